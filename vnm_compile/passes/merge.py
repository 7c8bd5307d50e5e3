"""Join sparse linears that read the same activation into one: q/k/v, and gate/up with what lies between them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from vnm_compile.activations import activation_of
from vnm_compile.passes.effects import Effects
from vnm_compile.passes.forms import example
from vnm_compile.passes.plan import Decision

_MULTIPLY = {operator.mul, torch.mul, "mul", "__mul__"}


@dataclass(frozen=True)
class Unit:
    """What becomes one op.

    Attributes:
        kind: "single", "siblings" (one op, its output cut into sections) or "gated" (`activation(gate) * up`).
        members: the decisions it is made of, in graph order; gate then up where gated.
        activation: of a gated unit, a name in `vnm_compile.activations`.
        result: the node whose value a gated unit computes.
    """

    kind: Literal["single", "siblings", "gated"]
    members: tuple[Decision, ...]
    activation: str | None = None
    result: fx.Node | None = None


def merge(decisions: Sequence[Decision], enabled: bool = True) -> list[Unit]:
    """Return the units that the sparse ones of `decisions` form, in graph order.

    Joined are linears over one activation with one pattern, dtype and kind of bias. A unit is computed in one place:
    for siblings that of the first, for a gated pair that of the product. So nothing on the way there may write to what
    they read or change a mode (gradients, autocast). Where gradients are on gated pairs stay single, as they have no
    backward, and so do weights that are stored compressed: their arrays are never joined, which would be to store them
    twice, but handed to the op one after the other.
    """
    sparse = [decision for decision in decisions if decision.sparse]
    if not enabled:
        return [Unit("single", (decision,)) for decision in sparse]
    joinable = [decision for decision in sparse if not (decision.compressed and decision.site.mode.grad)]
    if len(joinable) < 2:
        return [Unit("single", (decision,)) for decision in sparse]
    effects = Effects(joinable[0].site.node.graph)
    units: list[Unit] = []
    taken: set[int] = set()
    for join in _JOINS:
        units += join([d for d in joinable if id(d) not in taken], effects)
        taken |= {id(member) for unit in units for member in unit.members}
    units += [Unit("single", (d,)) for d in sparse if id(d) not in taken]
    order = {id(decision): i for i, decision in enumerate(decisions)}
    return sorted(units, key=lambda unit: min(order[id(member)] for member in unit.members))


def _gated_units(decisions: Sequence[Decision], effects: Effects) -> list[Unit]:
    """Pairs of linears whose only use is `activation(gate) * up`, where no gradients are recorded."""
    fit = [decision for decision in decisions if decision.site.bias is None and not decision.site.mode.grad]
    by_node = {decision.site.node: decision for decision in fit}
    units = []
    for gate in by_node.values():
        activated = _only_user(gate.site.node)
        activation = activation_of(activated)
        product = _only_user(activated) if activation else None
        if product is None or product.target not in _MULTIPLY or len(product.args) != 2 or product.kwargs:
            continue
        other = product.args[1] if product.args[0] is activated else product.args[0]
        up = by_node.get(other) if isinstance(other, fx.Node) else None
        if up is None or up is gate or _only_user(up.site.node) is not product:
            continue
        same = gate.compressed and gate.site.weight is up.site.weight  # a kernel reads no array twice
        if _alike(gate, up) and gate.shape == up.shape and not same and _may_move((gate, up), product, effects):
            units.append(Unit("gated", (gate, up), activation, product))
    return units


def _sibling_units(decisions: Sequence[Decision], effects: Effects) -> list[Unit]:
    groups: list[list[Decision]] = []
    for decision in decisions:
        group = next(
            (g for g in groups if _alike(g[0], decision) and _may_move((decision,), g[0].site.node, effects)), None
        )
        if group is None:
            groups.append([decision])
        elif all(decision.site.weight is not other.site.weight for other in group):
            group.append(decision)
    return [Unit("siblings", tuple(group)) for group in groups if len(group) > 1]


_JOINS: tuple[Callable[[Sequence[Decision], Effects], list[Unit]], ...] = (_gated_units, _sibling_units)
"""The ways to join linears; what one has taken is not offered to the next."""


def _may_move(members: Sequence[Decision], place: fx.Node, effects: Effects) -> bool:
    """Whether members may be computed at `place` instead, before or after their own."""
    for member in members:
        node, read = member.site.node, [member.site.x, member.site.bias]
        if not effects.together(node, place) or effects.writer_between(node, place, *filter(None, read)) is not None:
            return False
    return True


def _alike(one: Decision, other: Decision) -> bool:
    """Whether two linears can be one: same activation, pattern, dtype and kind of weight, and both or neither with a
    stored bias."""

    def traits(decision: Decision) -> tuple[Any, ...]:
        return decision.site.x, decision.dtype, decision.site.bias is None, decision.compressed

    assert one.layout is not None, "only sparse ones are asked about"
    assert other.layout is not None
    alike = traits(one) == traits(other) and one.layout.joins(other.layout)
    return alike and _has_plain_bias(one) and _has_plain_bias(other)


def _has_plain_bias(decision: Decision) -> bool:
    """Whether a linear has no bias, or a stored one with an element for each output: such can be joined end to end."""
    bias = decision.site.bias
    if bias is None:
        return True
    value = example(bias)
    return (
        bias.op == "placeholder"
        and value is not None
        and decision.shape is not None
        and (tuple(value.shape) == decision.shape[:1])
    )


def _only_user(node: fx.Node | None) -> fx.Node | None:
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None
