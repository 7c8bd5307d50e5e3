"""The kernels of a model, for any GPU: their source, machine code, what they move and what bounds them."""

from vnm_compile.inspection.inspect import inspect
from vnm_compile.inspection.report import Kernel, KernelReport

__all__ = ["Kernel", "KernelReport", "inspect"]
