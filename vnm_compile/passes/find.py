"""Find the places of a Dynamo graph that multiply an activation by a stored weight matrix."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from vnm_compile._torch import HigherOrderOperator, is_traceable_wrapper_subclass
from vnm_compile.passes.effects import Effects
from vnm_compile.passes.forms import Product, example, is_view, product_of, through_views
from vnm_compile.passes.higher_order import Body, bodies, why_not_rewritten
from vnm_compile.passes.regions import RECORDING, Mode, modes
from vnm_compile.tensor import VNMTensor

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
    "tensordot": "multiplied by tensordot; write it as F.linear to have it compressed",
    "inner": "multiplied by inner; write it as F.linear to have it compressed",
    "bilinear": "a bilinear form; only linear layers are handled",
    "matmul": "not a 2-D weight that multiplies from the right; only x @ W.T is handled",
    "mm": "not a 2-D weight that multiplies from the right; only x @ W.T is handled",
    "mv": "it multiplies a vector from the left; write it as F.linear to have it compressed",
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
        mode: the mode of torch in which it runs.
        written: positions of the graph's inputs into which the graph writes.
    """

    name: str
    node: fx.Node
    x: fx.Node | None
    weight: fx.Node | None
    index: int | None
    bias: fx.Node | None = None
    transposed: bool = False
    reason: str | None = None
    mode: Mode = RECORDING
    written: tuple[int, ...] = ()


def find_linears(graph: fx.Graph, inputs: Sequence[Any]) -> list[Site]:
    """Return every multiplication by a stored weight, in graph order; those that must stay dense say why.

    Args:
        graph: as Dynamo hands it to a backend (torch IR, parameters as placeholders). It is not changed.
        inputs: the values of the placeholders.
    """
    return _Finder(graph, inputs, Effects(graph, inputs), modes(graph)).sites()


class _Finder:
    """Looks for the sites of one graph; those of the graphs that higher-order ops run are found by others like it."""

    def __init__(self, graph: fx.Graph, inputs: Sequence[Any], effects: Effects, mode: dict[fx.Node, Mode]) -> None:
        self.graph, self.inputs, self.effects, self.mode = graph, inputs, effects, mode
        self.position = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}

    def sites(self) -> list[Site]:
        found: list[Site] = []
        for node in self.graph.nodes:
            if node.op in ("call_function", "call_method"):
                site = self.linear(node)
                found += [site] if site is not None else self.unhandled(node)
                found += [each for body in bodies(node) for each in self.inside(node, body)]
        written = self.effects.written_inputs
        return [replace(site, written=written) for site in found]

    def linear(self, node: fx.Node) -> Site | None:
        """The site of `node` if it is F.linear, addmm or a matmul with a weight on the right."""
        product = product_of(node)
        if product is None:
            return None
        weight, flips = through_views(product.matrix)
        index = self.position.get(weight)
        if index is None:
            # A computed right-hand side is a linear only if the op says so: attention also multiplies.
            why = (
                "its weight is computed in the graph (sliced, cast or combined), so no stored tensor can be compressed"
            )
            return Site(module_name(node), node, product.x, None, None, reason=why) if product.is_linear else None
        value = self.inputs[index]
        if not isinstance(value, Tensor) or not (product.is_linear or _is_stored(value)):
            return None
        # F.linear multiplies by the transpose of its weight, the others by what they are given.
        transposed = flips % 2 == (1 if product.is_linear else 0)
        reason = self.why_unfit(node, weight, value, product)
        mode = self.mode[node]
        return Site(weight_name(weight), node, product.x, weight, index, product.bias, transposed, reason, mode)

    def why_unfit(self, node: fx.Node, weight: fx.Node, value: Tensor, product: Product) -> str | None:
        """Why a linear whose weight is an input must stay dense, or None: what the first rule that applies says."""
        case = _Case(node, weight, value, product, self.mode[node], self.effects)
        return next((reason for rule in _UNFIT if (reason := rule(case)) is not None), None)

    def unhandled(self, node: fx.Node) -> list[Site]:
        """The sites of an op that multiplies by stored weights in a way that is not rewritten."""
        name = op_name(node)
        reason = next((why for part, why in _UNHANDLED.items() if part in name), None)
        sites: list[Site] = []
        if reason is None:
            return sites
        for operand in node.all_input_nodes:
            weight = operand
            while weight not in self.position and len(weight.all_input_nodes) == 1:
                weight = weight.all_input_nodes[0]
            index = self.position.get(weight)
            if index is not None and _is_stored(self.inputs[index]) and self.inputs[index].dim() >= 2:
                sites.append(Site(weight_name(weight), node, None, weight, index, reason=reason))
        return sites

    def inside(self, node: fx.Node, body: Body) -> list[Site]:
        """The sites of a graph that a higher-order op runs, as sites of this graph: named by it, and dense."""
        operands = [self.position.get(each) if each is not None else None for each in body.operands]
        values = [self.inputs[i] if i is not None else None for i in operands]
        graph = body.module.graph
        mode = modes(graph, self.mode[node])
        found = _Finder(graph, values, Effects(graph), mode).sites()
        outer = list(self.position)
        sites = []
        for site in found:
            index = operands[site.index] if site.index is not None else None
            weight = outer[index] if index is not None else None
            name = weight_name(weight) if weight is not None else site.name
            reason = site.reason or why_not_rewritten(node)
            sites.append(replace(site, name=name, weight=weight, index=index, reason=reason))
        return sites


@dataclass(frozen=True)
class _Case:
    """A linear that a rule is asked about: its node, the placeholder of its weight, the weight, and where it runs."""

    node: fx.Node
    weight: fx.Node
    value: Tensor
    product: Product
    mode: Mode
    effects: Effects


def _no_matrix(case: _Case) -> str | None:
    dimensions = case.value.dim()
    return f"its weight has {dimensions} dimensions; only matrices are handled" if dimensions != 2 else None


def _stored_otherwise(case: _Case) -> str | None:
    if not is_traceable_wrapper_subclass(case.value) or isinstance(case.value, VNMTensor):
        return None
    return f"its weight is a {type(case.value).__name__}, which stores its values in a way of its own"


def _no_floats(case: _Case) -> str | None:
    if case.value.dtype.is_floating_point:
        return None
    return f"its weight is {case.value.dtype}; kernels exist for floating-point weights"


def _in_a_transform(case: _Case) -> str | None:
    if not case.mode.transforms:
        return None
    return "inside a transform of torch.func or forward-mode AD (vmap, grad, jvp), which the kernels do not follow"


def _written_to(case: _Case) -> str | None:
    writer = case.effects.writer_of(case.weight)
    if writer is None:
        return None
    return f"its weight is written to in the graph ({op_name(writer)}), after it would have been packed"


def _tied(case: _Case) -> str | None:
    other = next((user for user in case.weight.users if not _only_multiplies(user)), None)
    if other is None:
        return None
    return f"its weight is shared with {op_name(other)} (a tied weight); compressing it would store it twice"


def _called_with_more(case: _Case) -> str | None:
    return case.product.reason


def _unlike_eager(case: _Case) -> str | None:
    """Why our op followed by an addition would not be what this product is to eager."""
    product, mode = case.product, case.mode
    x, bias, y = example(product.x), example(product.bias), example(case.node)
    if x is None or y is None:
        return None
    operands = [each.dtype for each in (x, case.value, bias) if each is not None]
    if x.device.type not in mode.autocast:
        mixed = len(set(operands)) > 1
    else:  # autocast casts to its own dtype, but leaves float64 as it is
        mixed = len({dtype == torch.float64 for dtype in operands}) > 1
    if mixed:
        return f"it mixes {', '.join(sorted({str(dtype) for dtype in operands}))}, which eager refuses to multiply"
    if bias is not None and bias.dim() > 1 and x.dim() != 2:
        return f"its bias has {bias.dim()} dimensions; only a bias for each output is added as torch adds it"
    return None if _is_contiguous(y) else "its result is not contiguous in eager mode, and ours would be"


_UNFIT: tuple[Callable[[_Case], str | None], ...] = (
    _no_matrix,
    _stored_otherwise,
    _no_floats,
    _in_a_transform,
    _written_to,
    _tied,
    _called_with_more,
    _unlike_eager,
)
"""Why a product with a stored weight must stay dense; the first that applies is told."""


def _is_contiguous(tensor: Tensor) -> bool:
    """Whether a tensor is contiguous, by hints: to ask the tensor itself could add a guard where sizes are dynamic."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        length, step = hint(size), hint(stride)
        if length is None or step is None or length == 0:
            return True
        if length != 1 and step != expected:
            return False
        expected *= length
    return True


def hint(size: Any) -> int | None:
    """A size as a number; of a symbolic one the value it was traced with, without a guard; None where there is none."""
    return size if isinstance(size, int) else size.node.hint


def _only_multiplies(user: fx.Node) -> bool:
    """Whether a user of a weight is a linear, or a view that only linears use."""
    if product_of(user) is not None:
        return True
    if user.op == "call_function" and isinstance(user.target, HigherOrderOperator):
        return True  # what its graphs do with the weight is looked at on its own
    return is_view(user) and all(_only_multiplies(each) for each in user.users)


def _is_stored(value: Any) -> bool:
    return isinstance(value, torch.nn.Parameter) or bool(getattr(value, "_is_param", False))


def op_name(node: fx.Node) -> str:
    """What a node calls, for people."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def source_name(placeholder: fx.Node) -> str:
    """Qualified name of the tensor that a placeholder stands for: `layers.0.fc.weight`."""
    source = getattr(placeholder, "_dynamo_source", None)
    name = getattr(source, "name", "")
    name = name() if callable(name) else name  # a method in torch 2.11
    parts = re.findall(r"_(?:modules|parameters|buffers)\['([^']+)'\]", name)
    return ".".join(parts) or placeholder.name


def weight_name(placeholder: fx.Node) -> str:
    """Name of the layer whose weight a placeholder is."""
    return source_name(placeholder).removesuffix(".weight")


def module_name(node: fx.Node) -> str:
    """Qualified name of the module that a node was traced from."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return re.sub(r"^L\['\w+'\]\.?", "", path) or node.name
