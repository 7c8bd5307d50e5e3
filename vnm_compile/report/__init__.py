"""What a user is told: which layers became sparse and why, and what that is worth."""

from vnm_compile.report.cost import CostModel
from vnm_compile.report.explain import explain
from vnm_compile.report.explanation import Explanation, LayerReport

__all__ = ["CostModel", "Explanation", "LayerReport", "explain"]
