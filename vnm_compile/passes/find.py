"""Find the places of a Dynamo graph that multiply an activation by a stored weight matrix."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vnm_compile.tensor import VNMTensor

_LINEAR = {torch._C._nn.linear, F.linear}
_MATMUL = {torch.matmul, torch.mm, operator.matmul}
_MATMUL_METHODS = {"matmul", "mm", "__matmul__"}
_TRANSPOSING = {torch.t, torch.transpose, torch.swapaxes, torch.permute}
_TRANSPOSING_METHODS = {"t", "transpose", "swapaxes", "permute", "numpy_T"}
_TRANSPOSING_ATTRIBUTES = {"T", "mT"}
# Ops that multiply by a weight in a way that is not rewritten: part of their name, and why.
_UNHANDLED = {
    "_transformer_encoder_layer_fwd": (
        "inside torch's fused encoder layer; torch.backends.mha.set_fastpath_enabled(False) makes it visible"
    ),
    "_native_multi_head_attention": (
        "inside torch's fused attention; torch.backends.mha.set_fastpath_enabled(False) makes it visible"
    ),
    "multi_head_attention_forward": "inside F.multi_head_attention_forward, which computes on its own",
    "grouped_mm": "a batch of expert weights, multiplied together; only single matrices are handled",
    "bmm": "a batch of weights; only single matrices are handled",
    "einsum": "multiplied by einsum; write it as F.linear to have it compressed",
    "bilinear": "a bilinear form; only linear layers are handled",
    "matmul": "not a 2-D weight that multiplies from the right; only x @ W.T is handled",
    "mm": "not a 2-D weight that multiplies from the right; only x @ W.T is handled",
}


@dataclass(frozen=True)
class Site:
    """One multiplication by a stored weight.

    Attributes:
        name: the layer's qualified name, as far as the graph knows it.
        node: the node whose value is `x @ W.T (+ bias)`.
        x: the activation.
        weight: the placeholder of the weight; None where the weight is computed in the graph.
        index: position of the weight among the graph's inputs; None like `weight`.
        bias: what is added, or None.
        transposed: the weight is stored `[in_features, out_features]`.
        reason: why the site has to stay dense whatever the weight holds; None where it may be compressed.
    """

    name: str
    node: fx.Node
    x: fx.Node | None
    weight: fx.Node | None
    index: int | None
    bias: fx.Node | None = None
    transposed: bool = False
    reason: str | None = None


def find_linears(graph: fx.Graph, inputs: Sequence[Any]) -> list[Site]:
    """Return every multiplication by a stored weight, in graph order; those that must stay dense say why.

    Args:
        graph: as Dynamo hands it to a backend (torch IR, parameters as placeholders). It is not changed.
        inputs: the values of the placeholders.
    """
    position = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    sites = []
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        site = _linear_site(node, position, inputs)
        sites += [site] if site is not None else _unhandled_sites(node, position, inputs)
    return sites


def _linear_site(node: fx.Node, position: dict[fx.Node, int], inputs: Sequence[Any]) -> Site | None:
    """The site of `node` if it is F.linear, addmm or a matmul with a weight on the right."""
    parts = _operands(node)
    if parts is None:
        return None
    x, matrix, bias, is_linear = parts
    weight, flips = _through_transposes(matrix)
    index = position.get(weight)
    if index is None:
        # A computed right-hand side is a linear only if the op says so: attention also multiplies.
        reason = "its weight is computed in the graph (sliced, cast or combined), so no stored tensor can be compressed"
        return Site(_module_name(node), node, x, None, None, reason=reason) if is_linear else None
    value = inputs[index]
    if not isinstance(value, Tensor) or not (is_linear or _is_stored(value)):
        return None
    # F.linear multiplies by the transpose of its weight, the others by what they are given.
    transposed = flips % 2 == (1 if is_linear else 0)
    unfit = _why_unfit(node, weight, value, bias)
    return Site(_weight_name(weight), node, x, weight, index, bias, transposed, unfit)


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None, bool] | None:
    """(x, matrix, bias, is F.linear) of a node that multiplies x by a matrix from the right."""
    args, kwargs = node.args, node.kwargs
    if node.target in _LINEAR:
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs)
        parts = given.get("input"), given.get("weight"), given.get("bias"), True
    elif node.target is torch.addmm and len(args) == 3 and not kwargs:
        parts = args[1], args[2], args[0], False
    elif (node.target in _MATMUL or (node.op == "call_method" and node.target in _MATMUL_METHODS)) and len(args) == 2:
        parts = args[0], args[1], None, False
    else:
        return None
    fit = isinstance(parts[0], fx.Node) and isinstance(parts[1], fx.Node)
    return parts if fit else None  # type: ignore[return-value]


def is_linear(node: fx.Node) -> bool:
    """Whether a node is F.linear, addmm or a matmul."""
    return _operands(node) is not None


def is_transpose(node: fx.Node) -> bool:
    """Whether a node swaps the two dimensions of a matrix."""
    by_function = node.op == "call_function" and node.target in _TRANSPOSING
    by_method = node.op == "call_method" and node.target in _TRANSPOSING_METHODS
    by_attribute = node.target is getattr and node.args[1] in _TRANSPOSING_ATTRIBUTES
    return (by_function or by_method or by_attribute) and isinstance(node.args[0], fx.Node) and _swaps_two(node)


def _through_transposes(node: fx.Node) -> tuple[fx.Node, int]:
    """The node under a chain of 2-D transposes, and how many there are."""
    flips = 0
    while is_transpose(node):
        node, flips = node.args[0], flips + 1  # type: ignore[assignment]
    return node, flips


def _swaps_two(node: fx.Node) -> bool:
    """Whether a transposing node really swaps the two dimensions of a matrix."""
    value = _example(node.args[0])  # type: ignore[arg-type]
    if value is None or value.dim() != 2:
        return False
    dims = node.args[1:]
    dims = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], tuple | list) else dims
    if node.target is getattr or not dims:
        return True
    permuting = node.target is torch.permute or node.target == "permute"
    swapped = [d % 2 for d in dims if isinstance(d, int)]
    return swapped == [1, 0] if permuting else sorted(swapped) == [0, 1]


def _why_unfit(node: fx.Node, weight: fx.Node, value: Tensor, bias: fx.Node | None) -> str | None:
    """Why a linear whose weight is an input must stay dense, or None."""
    if value.dim() != 2:
        return f"its weight has {value.dim()} dimensions; only matrices are handled"
    if is_traceable_wrapper_subclass(value) and not isinstance(value, VNMTensor):
        return f"its weight is a {type(value).__name__}, which stores its values in a way of its own"
    if not value.dtype.is_floating_point:
        return f"its weight is {value.dtype}; kernels exist for floating-point weights"
    others = [user for user in weight.users if not _only_multiplies(user)]
    if others:
        return f"its weight is shared with {_op_name(others[0])} (a tied weight); compressing it would store it twice"
    added = _example(bias) if bias is not None else None
    if added is not None and added.dim() > 1 and node.target is torch.addmm:
        return "addmm adds a matrix, not a bias"
    return None


def _only_multiplies(user: fx.Node) -> bool:
    """Whether a user of a weight is a linear, or a transpose that only linears use."""
    if is_linear(user):
        return True
    return is_transpose(user) and all(_only_multiplies(each) for each in user.users)


def _unhandled_sites(node: fx.Node, position: dict[fx.Node, int], inputs: Sequence[Any]) -> list[Site]:
    """The sites of an op that multiplies by stored weights in a way that is not rewritten."""
    name = _op_name(node)
    reason = next((why for part, why in _UNHANDLED.items() if part in name), None)
    sites: list[Site] = []
    if reason is None:
        return sites
    for operand in node.all_input_nodes:
        weight = operand
        while weight not in position and len(weight.all_input_nodes) == 1:
            weight = weight.all_input_nodes[0]
        index = position.get(weight)
        if index is not None and _is_stored(inputs[index]) and inputs[index].dim() >= 2:
            sites.append(Site(_weight_name(weight), node, None, weight, index, reason=reason))
    return sites


def _is_stored(value: Any) -> bool:
    return isinstance(value, torch.nn.Parameter) or bool(getattr(value, "_is_param", False))


def _example(node: Any) -> Tensor | None:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _op_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def source_name(placeholder: fx.Node) -> str:
    """Qualified name of the tensor that a placeholder stands for: `layers.0.fc.weight`."""
    source = getattr(placeholder, "_dynamo_source", None)
    name = getattr(source, "name", "")
    name = name() if callable(name) else name  # a method in torch 2.11
    parts = re.findall(r"_(?:modules|parameters|buffers)\['([^']+)'\]", name)
    return ".".join(parts) or placeholder.name


def _weight_name(placeholder: fx.Node) -> str:
    return source_name(placeholder).removesuffix(".weight")


def _module_name(node: fx.Node) -> str:
    """Qualified name of the module that a node was traced from."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return re.sub(r"^L\['\w+'\]\.?", "", path) or node.name
