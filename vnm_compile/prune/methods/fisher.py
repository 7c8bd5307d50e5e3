"""VENOM's pruning: second order in the loss, in steps, with retraining between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vnm_compile.errors import BadOption
from vnm_compile.layers import Layer
from vnm_compile.prune.calibration import calibrating, plain_numerics
from vnm_compile.prune.masks import hold_masks
from vnm_compile.prune.methods.fisher_matrix import Loss, fisher_blocks, parts_in_memory
from vnm_compile.prune.methods.fisher_solver import prune_rows
from vnm_compile.prune.methods.method import Job, Method
from vnm_compile.prune.pruned import Pruned
from vnm_compile.spec import KEPT_COLUMNS, Spec


@dataclass(frozen=True)
class Fisher(Method):
    """Prune what changes a loss least, as `vnm.sparsify(model, spec, method=Fisher(...))`.

    Every step estimates the loss's curvature anew by the empirical Fisher matrix, in blocks of `block_size` weights of
    a row; keeps, of each V x M block, the 4 columns and in every row the N weights whose complement costs the loss
    least when removed jointly; moves the kept weights of a block to make up for it; and calls `retrain`. All layers
    of a step are pruned by the curvature of the model as the step found it.

    Memory: `memory` bytes for the Fisher at a time (`4 * block_size` bytes a weight in all: what does not fit takes
    another pass over the gradients), about 300 MB beside it, and what the pruned weights take packed; with `retrain` or
    several steps also a copy of these weights, and with `retrain` one of the model, to return to on an error.

    Source: VENOM, arXiv 2310.02065, section 5, after oBERT, arXiv 2203.07259. Unlike theirs, groups of one block are
    pruned in turn, each knowing the ones before, and the damping is relative.

    Attributes:
        loss: `loss(model, batch)`, a scalar to be differentiated; None takes the squared distance of the model's
            first output to what it is now.
        num_grads: gradients that are averaged, one a batch of calibration data: small batches make a better estimate.
            With a `loss` no more than there are batches.
        block_size: weights of a row that are coupled, rounded down to a multiple of M (but M at least).
        damping: added to the diagonal of the Fisher of every V rows, as a share of its mean.
        steps: steps from dense to the pattern; step by step fewer of M weights are kept, as in VENOM's recipe from
            half of the final sparsity on (5, 4, 3, 2 of 8 in 4 steps).
        retrain: called as `retrain(model, step)` after each step, counted from 1. Pruned weights stay zero in it:
            their gradients are masked, and the mask is put on the weights again at its end.
        memory: bytes of Fisher blocks that are held at a time, though never less than V rows of a layer.
    """

    loss: Loss | None = None
    num_grads: int = 1024
    block_size: int = 32
    damping: float = 0.01
    steps: int = 1
    retrain: Callable[[nn.Module, int], Any] | None = None
    memory: int = 4 << 30

    name: ClassVar[str] = "fisher"
    summary: ClassVar[str] = "change the loss least, in steps with retraining; needs calibration data"

    def __post_init__(self) -> None:
        for name in ("num_grads", "block_size", "steps", "memory", "damping"):
            if not getattr(self, name) > 0:
                raise BadOption(f"Fisher({name}={getattr(self, name)!r}): it must be larger than 0.")

    @property
    def in_one_step(self) -> bool:
        """Whether the model can keep its weights until all is done."""
        return self.steps == 1 and self.retrain is None

    def prune(self, job: Job) -> list[Pruned]:
        """Prune all layers together, step by step."""
        if self.in_one_step:
            return [
                Pruned.of(layer, spec, weight, layer.weight.detach()) for layer, spec, weight in _step(job, self, 1)
            ]
        dense = [layer.weight.detach().clone() for layer, _ in job.selected]
        state = {} if self.retrain is None else {k: v.clone() for k, v in job.model.state_dict().items()}
        job.undo.callback(_restore, job, dense, state)
        for step in range(1, self.steps + 1):
            self._prune_in_model(job, step)
        return _taken_out(job, dense)

    def _prune_in_model(self, job: Job, step: int) -> None:
        # All layers of a step see the same curvature: the model keeps its weights until the last is done.
        found = list(_step(job, self, step))
        with torch.no_grad():
            for layer, _, weight in found:
                layer.weight.copy_(weight)
        del found
        if self.retrain is not None:
            with hold_masks([layer for layer, _ in job.selected]):
                self.retrain(job.model, step)


def relaxed(spec: Spec, step: int, steps: int) -> tuple[int, int]:
    """How many columns a block keeps and how many weights a row and group, after step 1 ... `steps`.

    Sparsity rises linearly from half of the pattern's; columns stay in the pattern's ratio to weights, 4 to N.

    >>> [relaxed(Spec(64, 2, 8), step, 4) for step in (1, 2, 3, 4)]
    [(8, 5), (8, 4), (6, 3), (4, 2)]
    """
    if step == steps:
        return KEPT_COLUMNS, spec.n
    share = 0.5 + 0.5 * (step - 1) / (steps - 1)
    kept = max(spec.n, round(spec.m * (1 - share * (1 - spec.density))))
    return min(spec.m, kept * KEPT_COLUMNS // spec.n), kept


def _restore(job: Job, dense: Sequence[Tensor], state: Mapping[str, Tensor]) -> None:
    """Undo what steps and retraining did."""
    with torch.no_grad():
        if state:
            job.model.load_state_dict(state)
        for (layer, _), weight in zip(job.selected, dense, strict=True):
            layer.weight.copy_(weight)


def _taken_out(job: Job, dense: Sequence[Tensor]) -> list[Pruned]:
    """The pruned weights that the layers hold, which get their dense ones back."""
    pruned = []
    with torch.no_grad():
        for (layer, spec), before in zip(job.selected, dense, strict=True):
            pruned.append(Pruned.of(layer, spec, layer.weight.detach(), before))
            layer.weight.copy_(before)
    return pruned


def _step(job: Job, options: Fisher, step: int) -> Iterator[tuple[Layer, Spec, Tensor]]:
    """The weights after one step, layer by layer; the model keeps its own."""
    selected, bar = job.selected, job.bar
    task = bar.add_task(f"step {step} of {options.steps}: gradients and pruning", total=len(selected))
    total, done = sum(layer.weight.numel() for layer, _ in selected), 0
    pruned = None
    for parts in parts_in_memory(selected, options.block_size, options.memory):
        with calibrating(job.model):
            blocks = fisher_blocks(job.model, parts, job.batches, options.loss, options.num_grads)
        for part in parts:
            weight = part.layer.weight.detach()
            pruned = torch.empty_like(weight) if pruned is None else pruned
            with plain_numerics(), torch.no_grad():
                fisher = blocks.pop(0)
                _damp(fisher, part.spec.v, options.damping)
                columns, kept = relaxed(part.spec, step, options.steps)
                free = part.cut(weight) != 0 if step > 1 else part.cut(torch.ones_like(weight)) != 0
                new = prune_rows(part.cut(weight), fisher, free, part.spec, columns, kept)
                pruned[part.start : part.stop] = new.flatten(1)[:, : weight.shape[1]].to(weight.dtype)
            done += new.numel()
            bar.update(task, completed=len(selected) * min(1.0, done / total))
            if part.stop == weight.shape[0]:
                yield part.layer, part.spec, pruned
                pruned = None


def _damp(fisher: Tensor, v: int, damping: float) -> None:
    """Add a share of the mean diagonal of every V rows, which prune together: so the result is that of any memory."""
    diagonal = fisher.diagonal(dim1=-2, dim2=-1)
    for rows in diagonal.split(v):
        mean = rows.mean()
        # Without any gradient all weights are alike, and the choice is by magnitude.
        rows.add_(torch.where(mean > 0, damping * mean, 1.0))
