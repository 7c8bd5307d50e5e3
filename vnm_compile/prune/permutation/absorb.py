"""Find the channel orders of a model that are free, and change them without changing what the model computes.

The model is exported once on example inputs, and channel axes are followed through the graph (`rules`). An order that
is still free at the end is one that no output and no operation depends on: all weights that have the axis can be
permuted along it, the rows of those that produce the channels, the columns of those that consume them, and the biases
and norms between. Nothing is left to do at run time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from vnm_compile.errors import BadModel, BadPermutation
from vnm_compile.prune.permutation.orders import (
    ChannelAxis,
    Dim,
    Layout,
    new_axis,
    pin,
    pin_incomplete,
    positions,
    reordered,
    resolve,
)
from vnm_compile.prune.permutation.rules import Layouts, apply_rule


@dataclass
class ChannelOrder:
    """One order of channels, and every dimension of a weight that follows it.

    Attributes:
        size: number of channels.
        block: channels may only change places inside blocks of this many (a head's); `size` where they all may.
        places: name of the parameter, its dimension, and what that dimension is.
        reason: why the order must stay as it is; None where it is free.
    """

    size: int
    block: int
    places: list[tuple[str, int, Dim]] = field(default_factory=list)
    reason: str | None = None
    axis: ChannelAxis | None = field(default=None, repr=False)

    @property
    def weights(self) -> list[str]:
        """The dimensions that follow the order, as text: `layers.0.fc.weight[0]`."""
        return [f"{name}[{dim}]" for name, dim, _ in self.places]

    def positions(self, dim: Dim) -> Tensor:
        """Where in a dimension each channel stands: int64 `[size, copies]`."""
        assert self.axis is not None
        return positions(dim, self.axis)

    def index(self, dim: Dim, permutation: Tensor) -> Tensor:
        """What brings a dimension into a new order, as `index_select` takes it."""
        assert self.axis is not None
        index = reordered(dim, self.axis, permutation)
        assert index is not None
        return index


class ChannelOrders:
    """The channel orders of a model, those that are free and those that are not."""

    def __init__(self, model: nn.Module, orders: list[ChannelOrder]) -> None:
        self.orders = orders
        self._parameters = dict(model.named_parameters())

    @property
    def free(self) -> list[ChannelOrder]:
        """Those that may be changed."""
        return [order for order in self.orders if order.reason is None]

    def apply(self, order: ChannelOrder, permutation: Tensor) -> None:
        """Bring every weight that follows `order` into a new order, in place.

        Args:
            order: one of `free`.
            permutation: int64 `[order.size]`, the present number of the channel that each new place gets.

        Raises:
            VNMError: the order is not free, or the permutation is none, or moves a channel out of its block.
        """
        _check(order, permutation)
        with torch.no_grad():
            for name, dim, digits in order.places:
                parameter = self._parameters[name]
                index = order.index(digits, permutation).to(parameter.device)
                parameter.copy_(parameter.index_select(dim, index))

    def explain(self) -> str:
        """One line an order: its weights, and whether it is free or why not."""
        lines = []
        for order in self.orders:
            shown = ", ".join(order.weights[:4]) + (
                f" and {len(order.places) - 4} more" if len(order.places) > 4 else ""
            )
            blocks = "" if order.block == order.size else f" in blocks of {order.block}"
            lines.append(f"{order.size} channels of {shown}: " + (order.reason or f"free{blocks}"))
        return "\n".join(lines)


def _check(order: ChannelOrder, permutation: Tensor) -> None:
    if order.reason is not None:
        raise BadPermutation(f"the order of {order.weights[0]} is not free: {order.reason}.")
    numbers = torch.arange(order.size, device="cpu")
    if permutation.shape != numbers.shape or not torch.equal(permutation.sort().values, numbers):
        raise BadPermutation(f"not a permutation of the {order.size} channels of {order.weights[0]}.")
    if not torch.equal(permutation // order.block, numbers // order.block):
        raise BadPermutation(f"channels of {order.weights[0]} may only change places inside blocks of {order.block}.")


def find_channel_orders(model: nn.Module, batch: Any) -> ChannelOrders:
    """Follow the channels of every parameter through the model.

    Outputs of the model keep their order. Values it keeps from call to call and hands back (key-value caches) are not
    asked for, and what a call with other arguments may return besides (all hidden states) follows the new order.

    Args:
        model: it is traced, not run, and not changed.
        batch: example inputs: a tensor, a tuple or list of arguments, or a dict of them.

    Raises:
        VNMError: the model cannot be exported.
    """
    graph, names = _export(model, batch)
    parameters = dict(model.named_parameters())  # a shared one under its first name only
    first_name = {id(parameter): name for name, parameter in parameters.items()}
    layouts: Layouts = {}
    own: dict[str, Layout] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in names and node.users:
            parameter = model.get_parameter(names[node.name])
            name = first_name[id(parameter)]
            if name not in own:
                own[name] = tuple(new_axis(f"{name}[{d}]", size)[0:1] for d, size in enumerate(parameter.shape))
            layouts[node] = own[name]
            if type(parameter) is not nn.Parameter:
                pin(own[name], f"{name} is a {type(parameter).__name__}, which stores its values in a way of its own")
        elif node.op == "call_function":
            apply_rule(node, layouts)
        elif node.op == "output":
            for value in node.all_input_nodes:
                pin(layouts.get(value, ()), "it is the order of an output of the model")
    for layout in (*layouts.values(), *own.values()):
        pin_incomplete(layout, "heads are mixed, or share a weight")
    orders = _collect(own)
    _pin_widths_of_unreached(orders, {name: p for name, p in parameters.items() if name not in own})
    return ChannelOrders(model, orders)


def _collect(own: Mapping[str, Layout]) -> list[ChannelOrder]:
    """The axes that the parameters have after all that was found, each with its places."""
    orders: dict[ChannelAxis, ChannelOrder] = {}
    for name, layout in own.items():
        for d, dim in enumerate(layout):
            for axis in dict.fromkeys(digit.axis for digit in resolve(dim) if digit.axis is not None):
                order = orders.setdefault(axis, ChannelOrder(axis.size, axis.block, [], axis.reason, axis))
                order.places.append((name, d, dim))
    return list(orders.values())


def _pin_widths_of_unreached(orders: list[ChannelOrder], unreached: Mapping[str, nn.Parameter]) -> None:
    """A parameter that the example inputs did not reach may consume any order of its width with other inputs."""
    by_width = {size: name for name, parameter in unreached.items() for size in parameter.shape}
    for order in orders:
        if order.reason is None and order.size in by_width:
            order.reason = f"{by_width[order.size]}, which has as many, was not reached by the example inputs"


def _export(model: nn.Module, batch: Any) -> tuple[fx.Graph, dict[str, str]]:
    """The graph of the model in ATen operations, and the parameter that each placeholder stands for."""
    args, kwargs = (), {}
    if isinstance(batch, Mapping):
        kwargs = dict(batch)
    else:
        args = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    try:
        with _without_cache(model), _without_fastpath(), torch.no_grad():
            exported = torch.export.export(model, args, kwargs, strict=False).run_decompositions({})
    except Exception as error:
        raise BadModel(
            "the model cannot be exported, so its free channel orders are unknown: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}. Prune with permute=False."
        ) from error
    return exported.graph, dict(exported.graph_signature.inputs_to_parameters)


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Have a transformers model hand out no key-value cache: it would pin the order inside the heads."""
    configs = {id(c): c for c in (getattr(m, "config", None) for m in model.modules()) if hasattr(c, "use_cache")}
    before = [(config, config.use_cache) for config in configs.values()]  # type: ignore[union-attr]
    try:
        for config, _ in before:
            config.use_cache = False  # type: ignore[union-attr]
        yield
    finally:
        for config, value in before:
            config.use_cache = value  # type: ignore[union-attr]


@contextmanager
def _without_fastpath() -> Iterator[None]:
    """Have torch's encoder layers show what they compute."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
