"""The forms in which torch code multiplies an activation by a weight: F.linear, addmm, matmul, and views of the weight.

The same product is written in many ways: as a function, an operator, a method or an aten op (exported programs), with
positional arguments or keywords, over `w.T`, `w.mT`, `w.t()`, `w.transpose(0, 1)`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from vnm_compile._torch import is_traceable_wrapper_subclass

_aten = torch.ops.aten
_FUNCTIONS: dict[Any, str] = {
    torch._C._nn.linear: "linear",
    F.linear: "linear",
    _aten.linear: "linear",
    _aten.linear.default: "linear",
    torch.addmm: "addmm",
    Tensor.addmm: "addmm",
    _aten.addmm: "addmm",
    _aten.addmm.default: "addmm",
    torch.matmul: "matmul",
    Tensor.matmul: "matmul",
    Tensor.__matmul__: "matmul",
    operator.matmul: "matmul",
    _aten.matmul: "matmul",
    _aten.matmul.default: "matmul",
    torch.mm: "mm",
    Tensor.mm: "mm",
    _aten.mm: "mm",
    _aten.mm.default: "mm",
}
_METHODS = {"matmul": "matmul", "__matmul__": "matmul", "mm": "mm", "addmm": "addmm"}
# Names of the arguments, in order. Where torch and aten differ ("input" and "self"), torch's.
_ARGUMENTS = {
    "linear": ("input", "weight", "bias"),
    "addmm": ("input", "mat1", "mat2"),
    "matmul": ("input", "other"),
    "mm": ("input", "mat2"),
}
_ROLES = {"linear": (0, 1, 2), "addmm": (1, 2, 0), "matmul": (0, 1, None), "mm": (0, 1, None)}
"""Which of the arguments are x, the matrix, and the bias."""


@dataclass(frozen=True)
class Product:
    """A node that multiplies `x` by a matrix from the right.

    Attributes:
        x: the activation.
        matrix: `[in_features, out_features]`, or for F.linear `[out_features, in_features]`.
        bias: what is added, or None.
        is_linear: it is F.linear.
        reason: why it cannot become another op, or None.
    """

    x: fx.Node
    matrix: fx.Node
    bias: fx.Node | None
    is_linear: bool
    reason: str | None = None


def product_of(node: fx.Node) -> Product | None:
    """The product that a node computes, or None where it is none."""
    form = _form(node)
    if form is None:
        return None
    names = _ARGUMENTS[form]
    given: dict[str, Any] = dict(zip(names, node.args, strict=False))
    extra = {"input" if key == "self" else key: value for key, value in node.kwargs.items()}
    given |= {key: value for key, value in extra.items() if key in names}
    x, matrix, bias = (given.get(names[i]) if i is not None else None for i in _ROLES[form])
    if not isinstance(x, fx.Node) or not isinstance(matrix, fx.Node) or len(node.args) > len(names):
        return None
    if bias is not None and not isinstance(bias, fx.Node):
        return None
    reason = None
    if extra.get("out") is not None:
        reason = "its result is written into a given tensor (out=); use what it returns instead"
    elif extra.get("alpha", 1) != 1 or extra.get("beta", 1) != 1:
        reason = "addmm scales with alpha or beta; multiply outside of it to have the weight compressed"
    elif set(extra) - {*names, "out", "alpha", "beta"}:
        reason = f"it is called with {', '.join(set(extra) - set(names))}"
    return Product(x, matrix, bias, form == "linear", reason)


def _form(node: fx.Node) -> str | None:
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    return _FUNCTIONS.get(node.target) if node.op == "call_function" else None


def is_view(node: fx.Node) -> bool:
    """Whether a node is a matrix as it was or transposed, in the same memory: `w.T`, `w.t()`, `w.detach()`, `w[:]`."""
    return _flips(node) is not None


def through_views(node: fx.Node) -> tuple[fx.Node, int]:
    """The node under a chain of such views, and how many of them transpose."""
    flips = 0
    while (flip := _flips(node)) is not None:
        node, flips = node.all_input_nodes[0], flips + flip
    return node, flips


def _flips(node: fx.Node) -> int | None:
    """1 if a node transposes the matrix it views, 0 if it leaves it as it is, None if it does something else.

    Example values tell, whatever the op is called: a view has the storage of its base.
    """
    if node.op not in ("call_function", "call_method") or len(node.all_input_nodes) != 1:
        return None
    view, base = example(node), example(node.all_input_nodes[0])
    if view is None or base is None or view.dim() != 2 or base.dim() != 2 or view.dtype != base.dtype:
        return None
    if _memory(view) != _memory(base) or view.is_neg() != base.is_neg():
        return None
    form, base_form = (tuple(view.shape), view.stride()), (tuple(base.shape), base.stride())
    if form == base_form and not _writes_by_name(node):
        return 0
    return 1 if form == (base_form[0][::-1], base_form[1][::-1]) else None


def _writes_by_name(node: fx.Node) -> bool:
    """In-place ops return what they were given, too."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "_")
    return name.rstrip("_") != name or name.startswith("i")


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """What is equal for two tensors that start at the same element of the same storage."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return tuple(part for name in names for part in _memory(getattr(tensor, name)))
    try:
        return tensor.untyped_storage()._cdata, tensor.storage_offset()
    except (NotImplementedError, RuntimeError):
        return (object(),)


def example(node: Any) -> Tensor | None:
    """The fake tensor that Dynamo computed for a node, or None."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None
