"""The kernels of a model, for any GPU: their source, machine code, what they move and what bounds them."""

from vnm_compile.inspection.inspect import inspect
from vnm_compile.inspection.kernel import Kernel
from vnm_compile.inspection.kernel_report import KernelReport

__all__ = ["Kernel", "KernelReport", "inspect"]
