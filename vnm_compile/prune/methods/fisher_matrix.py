"""The empirical Fisher matrix of a loss, in diagonal blocks along the rows of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from vnm_compile.errors import BadLoss, VNMError, at_layer
from vnm_compile.layers import Layer
from vnm_compile.prune.calibration import run_model
from vnm_compile.prune.calibration.padding import Padding
from vnm_compile.spec import Spec

Loss = Callable[[nn.Module, Any], Tensor]
_GATHERED = 8  # gradients that enter the sum at a time: one matrix product instead of many outer ones


@dataclass(frozen=True)
class Part:
    """Some rows of a layer, as many as the memory allows.

    Attributes:
        layer, spec: the layer, and the pattern it gets.
        start, stop: rows of the weight `[out_features, in_features]`.
        size: weights along a row that one Fisher block couples, a multiple of M.
    """

    layer: Layer
    spec: Spec
    start: int
    stop: int
    size: int

    @property
    def blocks(self) -> int:
        """Fisher blocks a row; the last one may reach beyond the weight."""
        return -(-self.layer.weight.shape[1] // self.size)

    @property
    def nbytes(self) -> int:
        """Bytes that its Fisher blocks take."""
        return (self.stop - self.start) * self.blocks * self.size**2 * 4

    def cut(self, matrix: Tensor) -> Tensor:
        """These rows of a matrix of the weight's shape, in blocks: `[rows, blocks, size]` float32, zero-padded."""
        rows = matrix[self.start : self.stop].float()
        padded = nn.functional.pad(rows, (0, self.blocks * self.size - rows.shape[1]))
        return padded.view(len(rows), self.blocks, self.size)


def parts_in_memory(selected: Sequence[tuple[Layer, Spec]], block_size: int, memory: int) -> Iterator[list[Part]]:
    """Cut layers into lists of parts whose Fisher blocks take at most `memory` bytes a list, but at least V rows."""
    batch: list[Part] = []
    for layer, spec in selected:
        size = max(1, block_size // spec.m) * spec.m
        rows = layer.weight.shape[0]
        most = max(1, memory // max(1, spec.v * Part(layer, spec, 0, 1, size).nbytes)) * spec.v
        for start in range(0, rows, most):
            part = Part(layer, spec, start, min(start + most, rows), size)
            if batch and sum(each.nbytes for each in batch) + part.nbytes > memory:
                yield batch
                batch = []
            batch.append(part)
    yield batch


def fisher_blocks(
    model: nn.Module, parts: Sequence[Part], batches: Sequence[Any], loss: Loss | None, num_grads: int
) -> list[Tensor]:
    """Return the mean of `g gᵀ` over gradients g of the loss, one a batch: `[rows, blocks, size, size]` a part.

    Without a loss the gradients are those of the outputs times standard normal noise, the mean of whose squares is
    the Gauss-Newton matrix of the squared distance to the present outputs, padding excepted; batches are then used
    again with new noise.

    Raises:
        VNMError: a loss that is no finite scalar, or does not depend on a layer.
    """
    sums = [torch.zeros(_shape(part), dtype=torch.float32, device=part.layer.weight.device) for part in parts]
    count = num_grads if loss is None else min(num_grads, len(batches))
    gathered: list[list[Tensor]] = []
    with _gradients_of(model, parts) as weights:
        for i, batch in enumerate(islice(cycle(batches), count)):
            value = _noise_loss(model, batch) if loss is None else loss(model, batch)
            gathered.append(_gradients(value, weights, parts))
            if len(gathered) == _GATHERED or i == count - 1:
                for total, *gradients in zip(sums, *gathered, strict=True):
                    stacked = torch.stack(gradients, -1).flatten(0, 1)  # [rows * blocks, size, gathered]
                    total.view(-1, *total.shape[2:]).baddbmm_(stacked, stacked.mT)
                gathered.clear()
    return [total.div_(count) for total in sums]


def _shape(part: Part) -> tuple[int, int, int, int]:
    return part.stop - part.start, part.blocks, part.size, part.size


def _noise_loss(model: nn.Module, batch: Any) -> Tensor:
    output = run_model(model, batch)
    while not isinstance(output, Tensor):
        if output is None or not len(output):
            raise BadLoss("the model returns no tensor; give a loss: method=vnm.prune.Fisher(loss=...).")
        output = next(iter(output.values())) if hasattr(output, "values") else output[0]
    if not output.is_floating_point():
        raise BadLoss(f"the model returns {output.dtype}; give a loss: method=vnm.prune.Fisher(loss=...).")
    return (output * Padding(model, batch).clear(torch.randn_like(output))).sum()


def _independent(part: Part) -> VNMError:
    return at_layer(part.layer.name, "the loss does not depend on it; exclude it, or give another loss.", BadLoss)


def _gradients(value: Tensor, weights: Sequence[Tensor], parts: Sequence[Part]) -> list[Tensor]:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.isfinite().all():
        raise BadLoss(f"the loss is {value!r}; it must be a tensor of one finite number.")
    if not value.requires_grad:
        raise _independent(parts[0])
    gradients = torch.autograd.grad(value.sum(), list(weights), allow_unused=True)
    found = []
    for gradient, part in zip(gradients, parts, strict=True):
        if gradient is None:
            raise _independent(part)
        found.append(part.cut(gradient.t() if part.layer.transposed else gradient))
    return found


@contextmanager
def _gradients_of(model: nn.Module, parts: Sequence[Part]) -> Iterator[list[Tensor]]:
    """Let the weights of these parts, and nothing else, require gradients; the user's settings come back."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    weights: list[Tensor] = [part.layer.module.weight for part in parts]  # type: ignore[misc]
    try:
        for parameter in before:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield weights
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)
