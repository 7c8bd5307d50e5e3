"""Methods that prune a layer by itself: block by block, in the order in which the model runs them."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vnm_compile.layers import Layer
from vnm_compile.prune.calibration import execution_order, plain_numerics, second_moments
from vnm_compile.prune.methods.method import Job, Method
from vnm_compile.prune.pruned import Pruned, running_pruned
from vnm_compile.spec import Spec

Block = Sequence[tuple[Layer, Spec]]


class LayerMethod(Method):
    """A method that needs no more than a layer's weight and the second moment of its inputs."""

    resumable: ClassVar[bool] = True

    @abstractmethod
    def prune_layer(self, layer: Layer, spec: Spec, moment: Tensor | None) -> Pruned:
        """Return what one layer becomes.

        Args:
            layer: it holds its dense weight `[O, K]`, and keeps it.
            moment: `[K, K]` float32, the mean of `x xᵀ` over its inputs; None for a method that needs no calibration.
        """

    @property
    def on_pruned_inputs(self) -> bool:
        """Whether a block's inputs are those that the blocks pruned before it produce, not those of the dense model."""
        return False

    def prune(self, job: Job) -> list[Pruned]:
        """Prune block by block, a pass over the data and one block's second moments at a time."""
        task = job.bar.add_task(f"pruning by {self.name}", total=len(job.selected))
        done: list[Pruned] = []
        for block in list(blocks_in_order(job.model, job.selected, job.batches)):
            for each in self._prune_block(job, block, list(done)):
                done.append(each)
                job.bar.advance(task)
        return done

    def _prune_block(self, job: Job, block: Block, before: Sequence[Pruned]) -> Iterator[Pruned]:
        stored = [job.finished.load(*pair) if job.finished else None for pair in block]
        open_layers = [layer for (layer, _), found in zip(block, stored, strict=True) if found is None]
        moments: list[Tensor | None] = [None] * len(open_layers)
        if self.needs_calibration and open_layers:
            with running_pruned(before if self.on_pruned_inputs else []):
                moments = list(second_moments(job.model, open_layers, job.batches))
        for (layer, spec), found in zip(block, stored, strict=True):
            if found is not None:
                yield Pruned.of(layer, spec, found[0], layer.weight.detach(), found[1])
                continue
            with torch.no_grad(), plain_numerics():
                each = self.prune_layer(layer, spec, moments.pop(0))
            if job.finished:
                job.finished.save(layer, spec, each.weight(), each.output_error)
            yield each


def blocks_in_order(model: nn.Module, selected: Block, batches: Sequence[Any]) -> Iterator[Block]:
    """The layers in the order in which they run on the first batch, those of one repeated block (`layers.3`) together;
    without batches in their own order."""
    order: Sequence[int] = range(len(selected))
    if batches:
        order = execution_order(model, [layer for layer, _ in selected], batches[0])
    block: list[tuple[Layer, Spec]] = []
    for i in order:
        if block and _block_name(block[0][0].name) != _block_name(selected[i][0].name):
            yield block
            block = []
        block.append(selected[i])
    yield block


def _block_name(name: str) -> str:
    """A layer's name up to its first number: `encoder.layer.3`; the whole name where there is none."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return found.group() if found else name
