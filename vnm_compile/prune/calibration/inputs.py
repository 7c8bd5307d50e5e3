"""What calibration data says about the inputs of layers: their second moment, gathered while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vnm_compile.errors import BadCalibration, VNMError, at_layer
from vnm_compile.layers import Layer
from vnm_compile.prune.calibration.hooks import hooked
from vnm_compile.prune.calibration.padding import Padding
from vnm_compile.prune.calibration.running import calibrating, plain_numerics, run_model

Add = Callable[[Tensor | None, Tensor], Tensor]
"""`add(total, x)`: the total so far, or None, and inputs `[T, K]` float32 to the new total, which may be the old."""


def execution_order(model: nn.Module, layers: Sequence[Layer], batch: Any) -> list[int]:
    """Indices of `layers` in the order in which the model first calls them; those it does not call come last."""
    seen: list[int] = []
    modules = [layer.module for layer in layers]
    with hooked(modules, lambda i, *_: seen.append(i)), torch.no_grad(), calibrating(model):
        run_model(model, batch)
    called = list(dict.fromkeys(seen))
    return called + [i for i in range(len(layers)) if i not in seen]


def watch_inputs(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], see: Callable[[int, Tensor], None]
) -> list[bool]:
    """Run the batches through the model; `see(i, x)` gets the inputs `[T, K]` of `layers[i]` each time it is called.

    x is float32, and without the positions that a batch's masks say are padding (`padding.Padding`).

    Returns:
        Whether a token reached each layer.

    Raises:
        VNMError: the model does not take a batch.
    """
    reached = [False] * len(layers)
    padding: Padding

    def look(index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
        if not isinstance(given, Tensor):
            return
        x = padding.rows(given.detach(), layers[index].name)
        if len(x):
            reached[index] = True
            with plain_numerics():
                see(index, x.float())

    with hooked([layer.module for layer in layers], look), torch.no_grad(), calibrating(model):
        for batch in batches:
            padding = Padding(model, batch)
            run_model(model, batch)
    return reached


def second_moments(model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any]) -> list[Tensor]:
    """Return the mean of `x xᵀ` over all tokens that reach each layer: float32 `[K, K]` a layer.

    Raises:
        VNMError: a layer that no token reached, inputs that are not finite, or a batch that the model does not take.
    """

    def add(total: Tensor | None, x: Tensor) -> Tensor:
        return x.T @ x if total is None else total.addmm_(x.T, x)

    moments = []
    for layer, moment in zip(layers, _means(model, layers, batches, add), strict=True):
        if moment is None:
            raise unreached(model, layer)
        moments.append(moment)
    return moments


def input_energy(model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any]) -> list[Tensor | None]:
    """Return the mean square of each input of each layer over all tokens: float32 `[K]`; None where none reached it.

    Raises:
        VNMError: inputs that are not finite, or a batch that the model does not take.
    """

    def add(total: Tensor | None, x: Tensor) -> Tensor:
        squares = x.square().sum(0)
        return squares if total is None else total + squares

    return _means(model, layers, batches, add)


def _means(model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], add: Add) -> list[Tensor | None]:
    """A total over the tokens that reach each layer, over their number; None where none did."""
    totals: list[Tensor | None] = [None] * len(layers)
    counts = [0] * len(layers)

    def gather(index: int, x: Tensor) -> None:
        totals[index] = add(totals[index], x)
        counts[index] += x.shape[0]

    watch_inputs(model, layers, batches, gather)
    return [
        None if total is None else _finite(layer, total).div_(count)
        for layer, total, count in zip(layers, totals, counts, strict=True)
    ]


def _finite(layer: Layer, total: Tensor) -> Tensor:
    if not total.isfinite().all():
        raise at_layer(
            layer.name, "its calibration inputs hold NaN or infinity; repair the data or the model.", BadCalibration
        )
    return total


def unreached(model: nn.Module, layer: Layer) -> VNMError:
    """The error for a layer that saw no input, with the reason where it is known."""
    parent = next((m for m in model.modules() if layer.module in m.children()), None)
    if isinstance(parent, nn.MultiheadAttention):
        return at_layer(
            layer.name,
            "nn.MultiheadAttention multiplies by this weight without calling the layer, so its inputs cannot be seen; "
            f'exclude it (exclude="*.{layer.name.rpartition(".")[2]}"), or use method="magnitude" or "fisher".',
            BadCalibration,
        )
    return at_layer(
        layer.name,
        "no calibration data reached it: the model did not call this layer for any token of the batches; give batches "
        "that do, or exclude the layer.",
        BadCalibration,
    )


def output_error(weight: Tensor, pruned: Tensor, moment: Tensor) -> float:
    """Relative output error `||X W' - X W|| / ||X W||` for inputs with this second moment."""
    weight, change, moment = weight.detach().double(), (pruned - weight).detach().double(), moment.double()
    total = ((weight @ moment) * weight).sum()
    return float((((change @ moment) * change).sum().clamp_min(0) / total).sqrt()) if total > 0 else 0.0
