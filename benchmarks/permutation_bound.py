"""How much a channel permutation could bring, at the very most: `python -m benchmarks.permutation_bound`.

An order of channels decides which rows share a block of V and which columns a group of M. Here magnitude pruning of the
pretrained MiniLM is given more than any order could give it, step by step, at the density of 64:2:8:

- columns free: the rows of a block keep half of the columns, whichever these are, and a row half of those. No groups:
  every order of columns, even one for each block, is a special case;
- rows and columns free: every layer moreover has its rows dealt out to blocks as suits it best;
- then without what V:N:M shares between rows: 2 of each 8 in every row, and any quarter of a row.

The choices are searched for by alternating between rows, exactly, and columns, by their sums. Error is the mean over
the layers of the relative output error on held-out text, as in `benchmarks.prune`. Takes a minute.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from statistics import mean

import torch
from rich.console import Console
from rich.table import Table
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks import prune
from vnm_compile.prune.held_out import held_out_errors
from vnm_compile.prune.project import project
from vnm_compile.spec import Spec

SPEC = Spec(64, 2, 8)
ROUNDS = 12


def largest(scores: Tensor, count: int, columns: Tensor | None = None) -> Tensor:
    """Mask `[rows, K]` of the `count` largest scores of each row, among `columns` if given."""
    allowed = scores
    if columns is not None:
        allowed = torch.full_like(scores, -1).index_copy(1, columns, scores[:, columns])
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, allowed.topk(count, 1).indices, True)


def free_columns(scores: Tensor) -> Tensor:
    """Half of the columns of a block `[V, K]`, such that a quarter of them in each row keeps much of `scores`."""
    in_features = scores.shape[1]
    wanted = largest(scores, in_features // 4)
    columns, best = scores.sum(0).topk(in_features // 2).indices, -1.0
    for _ in range(ROUNDS):
        kept = largest(scores, in_features // 4, columns)
        total = (scores * kept).sum().item()
        if total <= best:
            break
        best, found = total, columns
        columns = (scores * (kept | wanted)).sum(0).topk(in_features // 2).indices
    return found


def mask_with_free_columns(weight: Tensor) -> Tensor:
    """Blocks of adjacent rows, columns as they like."""
    blocks = weight.abs().split(SPEC.v)
    return torch.cat([largest(block, weight.shape[1] // 4, free_columns(block)) for block in blocks])


def mask_with_free_rows(weight: Tensor) -> Tensor:
    """Rows and columns as they like; `[O, K]`, O a multiple of V."""
    scores, kept = weight.abs(), weight.shape[1] // 4
    order = torch.arange(len(scores))
    best, mask = -1.0, torch.zeros_like(scores, dtype=torch.bool)
    for _ in range(ROUNDS):
        blocks = order.view(-1, SPEC.v)
        columns = [free_columns(scores[rows]) for rows in blocks]
        found = torch.zeros_like(mask)
        for rows, chosen in zip(blocks, columns, strict=True):
            found[rows] = largest(scores[rows], kept, chosen)
        total = (scores * found).sum().item()
        if total <= best:
            break
        best, mask = total, found
        # What each row would keep in each block; every block takes V rows.
        gains = torch.stack([scores[:, chosen].topk(kept, 1).values.sum(1) for chosen in columns], 1)
        rows, seats = linear_sum_assignment(gains.repeat_interleave(SPEC.v, 1).numpy(), maximize=True)
        order = torch.from_numpy(rows[seats.argsort()])
    return mask


def mask_in_each_row(weight: Tensor) -> Tensor:
    """2 of each 8 adjacent columns, in every row for itself."""
    groups = weight.abs().reshape(-1, SPEC.m)
    return largest(groups, SPEC.n).view_as(weight)


def mask_without_pattern(weight: Tensor) -> Tensor:
    """Any quarter of each row."""
    return largest(weight.abs(), weight.shape[1] // 4)


def vnm_mask(weight: Tensor) -> Tensor:
    """Magnitude pruning as `vnm.sparsify` does it."""
    return project(weight.abs(), SPEC)


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "64:2:8 in the model's order": vnm_mask,
    "columns free": mask_with_free_columns,
    "rows and columns free": mask_with_free_rows,
    "2 of 8 in each row": mask_in_each_row,
    "a quarter of each row": mask_without_pattern,
}


def main() -> None:
    """Print the table."""
    data = prune.load()
    model = copy.deepcopy(data.dense)
    layers = prune.encoder_layers(model)
    dense = [layer.weight.detach().clone() for layer in layers]
    table = Table("mask", "|w| kept", "output error", "of the first", title="MiniLM, a quarter kept by magnitude")
    first = None
    for name, choose in MASKS.items():
        masks = [choose(weight) for weight in dense]
        masked = [prune.Whole(layer, w * m) for layer, w, m in zip(layers, dense, masks, strict=True)]
        kept = mean(((w.abs() * m).sum() / w.abs().sum()).item() for w, m in zip(dense, masks, strict=True))
        error = mean(held_out_errors(model, masked, data.held_out))
        first = first or error
        table.add_row(name, f"{kept:.3f}", f"{error:.3f}", f"{error / first:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
