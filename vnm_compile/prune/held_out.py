"""What pruning did to the outputs of layers, measured on data that it did not see."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vnm_compile.errors import BadCalibration
from vnm_compile.layers import Layer
from vnm_compile.prune.calibration import unreached, watch_inputs


class Changed(Protocol):
    """A layer, and the weights `[rows, K]` that rows of it will have; `prune.pruned.Pruned` is one."""

    layer: Layer

    def parts(self) -> Iterable[tuple[slice, Tensor]]:
        """Rows, and the weights in them."""
        ...


def held_out_errors(model: nn.Module, pruned: Sequence[Changed], batches: Sequence[Any]) -> list[float]:
    """Return `||X W' - X W|| / ||X W||` of each layer, X being its inputs in the dense model.

    Args:
        model: still dense: its layers hold W. Nothing of size K x K is held.
        pruned: what they will hold, W'.
        batches: model inputs.

    Raises:
        VNMError: there is no batch, the model does not take one, or no token reached a layer.
    """
    if not batches:
        raise BadCalibration("held_out= holds no data; give held_out=[batch, ...], or leave it out.")
    squares = torch.zeros(2, len(pruned), dtype=torch.float64, device="cpu")

    def compare(index: int, x: Tensor) -> None:
        dense = pruned[index].layer.weight.detach()
        for rows, after in pruned[index].parts():
            before = dense[rows].float()
            squares[0, index] += (x @ (after.float() - before).T).square().sum(dtype=torch.float64).cpu()
            squares[1, index] += (x @ before.T).square().sum(dtype=torch.float64).cpu()

    layers = [each.layer for each in pruned]
    for layer, reached in zip(layers, watch_inputs(model, layers, batches, compare), strict=True):
        if not reached:
            raise unreached(model, layer)
    change, total = squares
    return torch.where(total > 0, (change / total).sqrt(), 0.0).tolist()
