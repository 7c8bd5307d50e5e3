"""Write the planned units into a copy of the graph, with the packed weights as further inputs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from vnm_compile._torch import constant_source
from vnm_compile.activations import activation_of
from vnm_compile.layout import Layout
from vnm_compile.ops import weight_args
from vnm_compile.passes.forms import example, is_view, product_of
from vnm_compile.passes.higher_order import with_graph
from vnm_compile.passes.merge import Unit
from vnm_compile.passes.plan import Decision
from vnm_compile.spec import Spec


@dataclass(frozen=True)
class PackedInput:
    """Further inputs of a rewritten graph: the canonical arrays of one weight, or of several.

    Attributes:
        indices: positions of the weights among the graph's inputs. The arrays of dense ones are joined along the rows;
            those of weights that are stored compressed follow one another.
        transposed: for each, whether it is stored `[in_features, out_features]`.
        names: for each, the layer's name.
        layout: of the whole; joined weights are padded to whole blocks each.
        stored: of weights that are stored compressed, the layout of each; none of dense ones.
    """

    indices: tuple[int, ...]
    transposed: tuple[bool, ...]
    names: tuple[str, ...]
    layout: Layout
    stored: tuple[Layout, ...] = ()

    @property
    def spec(self) -> Spec:
        """The pattern of all."""
        return self.layout.spec

    @property
    def parts(self) -> int:
        """How many times it has the arrays of its layout."""
        return max(1, len(self.stored))


@dataclass(frozen=True)
class Rewritten:
    """A rewritten copy of a graph, and the inputs that were appended to it."""

    gm: fx.GraphModule
    packed: tuple[PackedInput, ...]


def rewrite(gm: fx.GraphModule, units: Sequence[Unit]) -> Rewritten:
    """Return a copy of `gm` in which every unit is one `vnm` op; `gm` is left as it is.

    The copy takes the inputs of `gm`, the dense weights among them (unused where compressed), then for each
    `PackedInput` the arrays of each part (`Layout.names`). It never bakes a weight in: Dynamo shares one compiled graph
    between modules with the same code, and caches key inputs by their metadata only.
    """
    graph, new = _copy(gm)
    packed = tuple(_packed_input(unit) for unit in units)
    arrays = _append_placeholders(graph, packed)
    writer = _Writer(graph, new)
    for unit, its_arrays in zip(units, arrays, strict=True):
        writer.write(unit, its_arrays)
    return Rewritten(with_graph(gm, graph), packed)


def own_copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of Dynamo's graph to keep.

    Dynamo's own refers weakly to the weights, which `torch.utils.swap_tensors`, and so `.to()` of a compressed model,
    refuses.
    """
    graph, _ = _copy(gm)
    for placeholder in graph.find_nodes(op="placeholder"):
        placeholder.meta.pop("grapharg", None)
    return with_graph(gm, graph)


def _copy(gm: fx.GraphModule) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of the graph with its sources; placeholders cannot be added to Dynamo's own graph."""
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, new)
    graph.output(result)
    for old, copied in new.items():
        if hasattr(old, "_dynamo_source"):
            copied._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
    return graph, new


def _packed_input(unit: Unit) -> PackedInput:
    sites = [member.site for member in unit.members]
    layouts = [_layout(member) for member in unit.members]
    alone = len(layouts) == 1
    return PackedInput(
        tuple(site.index for site in sites if site.index is not None),
        tuple(site.transposed for site in sites),
        tuple(member.name for member in unit.members),
        layouts[0] if alone else layouts[0].with_rows(sum(layout.rows for layout in layouts)),
        tuple(layouts) if unit.members[0].compressed else (),
    )


def _append_placeholders(graph: fx.Graph, packed: Sequence[PackedInput]) -> list[tuple[fx.Node, ...]]:
    last = graph.find_nodes(op="placeholder")[-1] if packed else None
    appended = []
    for i, group in enumerate(packed):
        nodes = []
        of_part = [""] if group.parts == 1 else [f"_{part}" for part in range(group.parts)]
        for name in (f"vnm_{i}{part}_{array}" for part in of_part for array in group.layout.names):
            with graph.inserting_after(last):
                last = graph.placeholder(name)
            last._dynamo_source = constant_source(name)  # type: ignore[attr-defined]
            # A static input: CUDA graphs may keep its address.
            last.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
            nodes.append(last)
        appended.append(tuple(nodes))
    return appended


class _Writer:
    """Writes units into the copy of a graph; `new` maps the nodes of the original to those that stand for them."""

    def __init__(self, graph: fx.Graph, new: dict[fx.Node, fx.Node]) -> None:
        self.graph = graph
        self.new = new

    def write(self, unit: Unit, arrays: tuple[fx.Node, ...]) -> None:
        {"single": self.single, "siblings": self.siblings, "gated": self.gated}[unit.kind](unit, arrays)

    def single(self, unit: Unit, arrays: tuple[fx.Node, ...]) -> None:
        (member,) = unit.members
        with self.graph.inserting_before(self.new[member.site.node]):
            y = self.linear(member, arrays, _layout(member))
            if member.site.bias is not None:
                y = self.call(torch.add, y, self.bias(member, y))
        self.replace(member.site.node, y)

    def siblings(self, unit: Unit, arrays: tuple[fx.Node, ...]) -> None:
        """One linear over all rows; each weight is padded to whole blocks, so its section starts at a multiple of V."""
        first = unit.members[0]
        layouts = [_layout(member) for member in unit.members]
        widths, strides = [layout.out_features for layout in layouts], [layout.rows for layout in layouts]
        with self.graph.inserting_before(self.new[first.site.node]):
            y = self.linear(first, arrays, layouts[0].with_rows(sum(strides)))
            if first.site.bias is not None:
                # Cast one by one: torch.cat has ideas of its own about dtypes under autocast.
                biases = [self.bias(member, y) for member in unit.members]
                padding = [stride - width for width, stride in zip(widths, strides, strict=True)]
                padded = [self.pad(bias, missing) for bias, missing in zip(biases, padding, strict=True)]
                y = self.call(torch.add, y, self.call(torch.cat, padded))
            sections = self.call(torch.ops.vnm.sections.default, y, widths, strides)
            results = [self.call(operator.getitem, sections, i) for i in range(len(widths))]
        for member, result in zip(unit.members, results, strict=True):
            self.replace(member.site.node, result)

    def gated(self, unit: Unit, arrays: tuple[fx.Node, ...]) -> None:
        gate = unit.members[0]
        assert unit.result is not None
        with self.graph.inserting_before(self.new[unit.result]):
            args = self.linear_args(gate, arrays, _layout(gate))
            y = self.call(torch.ops.vnm.gated_linear.default, *args, unit.activation)
        self.replace(unit.result, y)

    def linear(self, member: Decision, arrays: tuple[fx.Node, ...], layout: Layout) -> fx.Node:
        return self.call(torch.ops.vnm.linear.default, *self.linear_args(member, arrays, layout))

    def linear_args(self, member: Decision, arrays: tuple[fx.Node, ...], layout: Layout) -> tuple[Any, ...]:
        assert member.site.x is not None
        return self.new[member.site.x], *weight_args(arrays, layout)

    def bias(self, member: Decision, y: fx.Node) -> fx.Node:
        """The bias in the dtype of the product `y`: under autocast torch casts it too, where `+` would promote."""
        assert member.site.bias is not None
        bias, value, result = self.new[member.site.bias], example(member.site.bias), example(member.site.node)
        if result is not None and value is not None and result.dtype == value.dtype:
            return bias
        return self.graph.call_method("type_as", (bias, y))

    def pad(self, bias: fx.Node, missing: int) -> fx.Node:
        return self.call(torch.nn.functional.pad, bias, (0, missing)) if missing else bias

    def call(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        return self.graph.call_function(target, args)

    def replace(self, original: fx.Node, result: fx.Node) -> None:
        old = self.new[original]
        result.meta = {**old.meta, **result.meta}
        old.replace_all_uses_with(result)
        self.new[original] = result
        self.erase(old)

    def erase(self, node: fx.Node) -> None:
        """Erase a replaced node, and above it what only it used: transposes of the weight, the inside of a gated pair.

        Dead code elimination is not for torch IR: it would take in-place methods whose result nobody reads.
        """
        above = [each for each in node.all_input_nodes if each.op != "placeholder"]
        self.graph.erase_node(node)
        for each in above:
            if not each.users and (product_of(each) or activation_of(each) or is_view(each)):
                self.erase(each)


def _layout(member: Decision) -> Layout:
    assert member.layout is not None, "only sparse decisions form units"
    return member.layout
