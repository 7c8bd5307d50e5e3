"""Bring a model's channels into the order that suits the pattern, before anything is pruned.

The importance of a weight is its square, times the mean square of its input where the method knows inputs: what the
output's mean square loses with it if inputs are uncorrelated. Its share that V:N:M keeps is what `permutation.search`
makes larger; of a change of order the model's outputs know nothing (`permutation.absorb`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vnm_compile.layers import Layer
from vnm_compile.prune.calibration import as_evaluated, input_energy, plain_numerics
from vnm_compile.prune.permutation.absorb import ChannelOrder, ChannelOrders, find_channel_orders
from vnm_compile.prune.permutation.search import HEAT, Use, retained, search
from vnm_compile.spec import Spec

if TYPE_CHECKING:
    from rich.progress import Progress

ROUNDS = 2  # orders that share a weight are searched in turn; the second round only goes uphill from the first


@dataclass
class _Scored:
    """A layer that will be pruned, and the mean square of each of its inputs (`[K]`, or None) in the present order."""

    layer: Layer
    spec: Spec
    energy: Tensor | None

    def importance(self) -> Tensor:
        """`[O, K]` float32."""
        squares = self.layer.weight.detach().float().square()
        return squares if self.energy is None else squares * self.energy

    def share(self) -> float:
        """What the best mask keeps of the importance."""
        return retained(self.importance(), self.spec)


@contextmanager
def permuted(
    model: nn.Module, selected: Sequence[tuple[Layer, Spec]], batches: Sequence[Any], weigh_inputs: bool, bar: Progress
) -> Iterator[dict[str, tuple[float, float]]]:
    """Reorder the free channels of `model` in place, for the sake of its selected layers; undone on an error.

    Memory: a copy of each parameter that has a free order, and some of the selected weights in float32.

    Args:
        model: every parameter along a free order may be moved, its embeddings and biases too.
        selected: the layers that will be pruned; only these count.
        batches: calibration data; the first batch is what the model is exported with.
        weigh_inputs: whether importance takes the inputs into account, as the method that prunes does.

    Yields:
        By layer, the share of its importance that the best mask keeps, before and after.

    Raises:
        VNMError: the model cannot be exported, or SciPy is missing.
    """
    with as_evaluated(model):
        orders = find_channel_orders(model, batches[0])
    moving = {name for order in orders.free for name, *_ in order.places}
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name in moving}
    try:
        scored = _scored(model, selected, batches, weigh_inputs)
        with plain_numerics():
            shares = _permute(model, orders, scored, bar)
        yield shares
    except BaseException:
        with torch.no_grad():
            for name, values in before.items():
                model.get_parameter(name).copy_(values)
        raise


def _scored(
    model: nn.Module, selected: Sequence[tuple[Layer, Spec]], batches: Sequence[Any], weigh_inputs: bool
) -> dict[str, _Scored]:
    """The selected layers by the names of their weights."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = [layer for layer, _ in selected]
    energies = input_energy(model, layers, batches) if weigh_inputs else [None] * len(layers)
    found = {}
    for (layer, spec), energy in zip(selected, energies, strict=True):
        found[names.get(id(layer.module.weight), layer.name)] = _Scored(layer, spec, energy)
    return found


def _permute(
    model: nn.Module, orders: ChannelOrders, layers: Mapping[str, _Scored], bar: Progress
) -> dict[str, tuple[float, float]]:
    before = {each.layer.name: each.share() for each in layers.values()}
    work = [order for order in orders.free if _matters(order, layers)]
    work.sort(key=lambda order: -len(order.places))  # the compromise of many layers first, then what suits each
    task = bar.add_task("permuting channels", total=ROUNDS * len(work))
    for number in range(ROUNDS):
        for order in work:
            _reorder(orders, order, layers, HEAT if number == 0 else 0.0)
            bar.advance(task)
    return {each.layer.name: (before[each.layer.name], each.share()) for each in layers.values()}


def _matters(order: ChannelOrder, layers: Mapping[str, _Scored]) -> bool:
    """Whether a layer follows the order, and none does by its rows and its columns both: one of them can be moved."""
    names = [name for name, *_ in order.places if name in layers]
    return 0 < len(names) == len(set(names))


def _reorder(orders: ChannelOrders, order: ChannelOrder, layers: Mapping[str, _Scored], heat: float) -> None:
    """Search for a better order and apply it."""
    uses, columns = [], []
    for name, parameter_dim, digits in order.places:
        if name not in layers:
            continue
        scored = layers[name]
        dim = 1 - parameter_dim if scored.layer.transposed else parameter_dim
        uses.append(Use(scored.importance(), scored.spec, dim, order.positions(digits)))
        if dim == 1:
            columns.append((scored, digits))
    found, before, after = search(uses, order.block, heat=heat)
    if after <= before:
        return
    for scored, digits in columns:
        if scored.energy is not None:
            scored.energy = scored.energy[order.index(digits, found).to(scored.energy.device)]
    orders.apply(order, found)
