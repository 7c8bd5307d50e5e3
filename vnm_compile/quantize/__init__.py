"""Integers in the place of a pruned model's kept values: `vnm.quantize`."""

from vnm_compile.quantize.quantize import quantize
from vnm_compile.quantize.report import LayerQuantized, QuantizeReport

__all__ = ["LayerQuantized", "QuantizeReport", "quantize"]
