"""What a user is told: which layers became sparse and why, and what that is worth."""

from vnm_compile.explanation.explain import explain
from vnm_compile.explanation.explanation import Explanation
from vnm_compile.explanation.layer import LayerReport

__all__ = ["Explanation", "LayerReport", "explain"]
