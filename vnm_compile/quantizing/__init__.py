"""Integers in the place of a pruned model's kept values: `vnm.quantize`."""

from vnm_compile.quantizing.quantize import quantize
from vnm_compile.quantizing.report import LayerQuantized, QuantizeReport

__all__ = ["LayerQuantized", "QuantizeReport", "quantize"]
