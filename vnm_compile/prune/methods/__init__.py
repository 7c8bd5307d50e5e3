"""The methods of `vnm.sparsify`: each a dataclass that holds its options, and its solver."""

from vnm_compile.prune.methods.fisher import Fisher
from vnm_compile.prune.methods.layer_by_layer import LayerMethod
from vnm_compile.prune.methods.magnitude import Magnitude
from vnm_compile.prune.methods.method import Job, Method, undone_on_error
from vnm_compile.prune.methods.registry import METHODS, find_method
from vnm_compile.prune.methods.second_order import SecondOrder
from vnm_compile.prune.methods.wanda import Wanda

__all__ = [
    "METHODS",
    "Fisher",
    "Job",
    "LayerMethod",
    "Magnitude",
    "Method",
    "SecondOrder",
    "Wanda",
    "find_method",
    "undone_on_error",
]
