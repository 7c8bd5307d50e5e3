"""Optimal brain surgeon in V:N:M blocks: which weights cost the loss least, and how the others make up for them.

With a curvature matrix F over some weights w of a row, removing a set changes the loss by `(w' - w)ᵀ F (w' - w) / 2`,
the kept ones being free to move. Keeping the set S out of a group costs a constant minus `u_Sᵀ (C_SS)⁻¹ u_S`, where
C is F with everything outside the group minimised away (a Schur complement) and `u = C w`: the cost of removing all
others at once, from a matrix no larger than N x N.

Source: oBERT, arXiv 2203.07259, section 3; VENOM, arXiv 2310.02065, section 5. The form in kept weights is ours.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from vnm_compile.prune.columns import EXACT_UP_TO, choose_columns
from vnm_compile.spec import KEPT_COLUMNS, Spec

_CHUNK_ELEMENTS = 1 << 23  # of the Fisher that is worked on at a time: bounds the memory beyond it to some 300 MB


def prune_rows(weight: Tensor, fisher: Tensor, free: Tensor, spec: Spec, columns: int, kept: int) -> Tensor:
    """Prune rows of a weight to `kept` of every M, inside `columns` columns shared by V rows, and update what stays.

    Args:
        weight: `[rows, blocks, size]` float32, `rows` counted from a multiple of V.
        fisher: `[rows, blocks, size, size]`, positive definite; coupled are the weights of one block.
        free: bool, as `weight`: weights that may stay. The others are zero.
        spec: the pattern in the end.
        columns, kept: what this step leaves of a group; `4, spec.n` in the last step.

    Returns:
        The new weight, zero where it is pruned.
    """
    chunk = max(1, _CHUNK_ELEMENTS // (spec.v * fisher[0].numel())) * spec.v
    parts = zip(weight.split(chunk), fisher.split(chunk), free.split(chunk), strict=True)
    return torch.cat([_prune_chunk(*part, spec, columns, kept) for part in parts])


def _prune_chunk(w: Tensor, fisher: Tensor, free: Tensor, spec: Spec, columns: int, kept: int) -> Tensor:
    free = free.clone()
    inverse = _masked_inverse(fisher, free)
    for start in range(0, w.shape[2], spec.m):
        group = slice(start, start + spec.m)
        corner = inverse[..., group, group]
        curvature = torch.linalg.inv(corner)
        scores = w[..., group].square() / corner.diagonal(dim1=-2, dim2=-1)
        free[..., group] &= _choose(w[..., group], curvature, scores, spec, columns, kept)
        # The minimum over the free weights: F_SS w'_S = (F w)_S.
        inverse = _masked_inverse(fisher, free)
        w = (inverse @ ((fisher @ w.unsqueeze(-1)) * free.unsqueeze(-1))).squeeze(-1) * free
    return w


def _masked_inverse(fisher: Tensor, free: Tensor) -> Tensor:
    """The inverse over the free weights of each block, the identity elsewhere."""
    both = free.unsqueeze(-1) & free.unsqueeze(-2)
    masked = torch.where(both, fisher, torch.eye(fisher.shape[-1], dtype=fisher.dtype, device=fisher.device))
    return torch.cholesky_inverse(torch.linalg.cholesky(masked))


def _choose(w: Tensor, curvature: Tensor, scores: Tensor, spec: Spec, columns: int, kept: int) -> Tensor:
    """The mask `[rows, blocks, M]` of one group of every block."""
    m = spec.m
    if columns == KEPT_COLUMNS and kept == spec.n:
        choices = list(combinations(range(m), kept))
        gains = _gains((curvature @ w.unsqueeze(-1)).squeeze(-1), curvature, choices)
        candidates = None if m <= EXACT_UP_TO else _grown(scores, spec, columns, kept)
        chosen = best_choices(gains, choices, m, spec, candidates)
        table = torch.zeros(len(choices), m, dtype=torch.bool, device=w.device)
        for i, choice in enumerate(choices):
            table[i, list(choice)] = True
        return table[chosen]
    inside = _grown(scores, spec, columns, kept).repeat_interleave(spec.v, 0)[: len(w)]
    best = scores.gather(2, inside).topk(kept, dim=2).indices
    return torch.zeros_like(w, dtype=torch.bool).scatter_(2, inside.gather(2, best), True)


def _gains(u: Tensor, curvature: Tensor, choices: list[tuple[int, ...]]) -> Tensor:
    """`u_Sᵀ (C_SS)⁻¹ u_S` of every choice S of one or two weights: `[choices, rows, blocks]`."""
    index = torch.tensor(choices, device=u.device)
    first = index[:, 0]
    diagonal = curvature.diagonal(dim1=-2, dim2=-1)
    if index.shape[1] == 1:
        return (u[..., first].square() / diagonal[..., first]).movedim(-1, 0)
    second = index[:, 1]
    cross = curvature[..., first, second]
    determinant = (diagonal[..., first] * diagonal[..., second] - cross.square()).clamp_min(1e-30)
    ui, uj = u[..., first], u[..., second]
    above = ui.square() * diagonal[..., second] - 2 * ui * uj * cross + uj.square() * diagonal[..., first]
    return (above / determinant).movedim(-1, 0)


def best_choices(
    gains: Tensor, choices: list[tuple[int, ...]], m: int, spec: Spec, columns: Tensor | None = None
) -> Tensor:
    """For each row the choice of largest gain inside the 4 columns that its block takes.

    Args:
        gains: `[choices, rows, ...]`, of keeping each of `choices`, the sets of N of m columns.
        columns: int64 `[row blocks, ..., 4]`, the columns that blocks take; None tries all sets of 4.

    Returns:
        int64 `[rows, ...]`, a number of a choice each.
    """
    rows = gains.shape[1]
    number = {choice: i for i, choice in enumerate(choices)}
    if columns is not None:
        lookup = torch.full((m,) * spec.n, 0, device=gains.device)
        for choice, i in number.items():
            lookup[choice] = i
        slots = torch.tensor(list(combinations(range(KEPT_COLUMNS), spec.n)), device=gains.device)
        inside = lookup[tuple(columns[..., slot] for slot in slots.T)].movedim(-1, 0)  # [choices of 4, blocks, ...]
        inside = inside.repeat_interleave(spec.v, 1)[:, :rows]
        return inside.gather(0, gains.gather(0, inside).argmax(0, keepdim=True))[0]
    padding = -rows % spec.v
    best = gains.new_full(((rows + padding) // spec.v, *gains.shape[2:]), -torch.inf)
    winner = torch.zeros(gains.shape[1:], dtype=torch.int64, device=gains.device)
    for four in combinations(range(m), KEPT_COLUMNS):
        inside = torch.tensor([number[choice] for choice in combinations(four, spec.n)], device=gains.device)
        most, which = gains[inside].max(0)
        padded = torch.cat([most, most.new_zeros(padding, *most.shape[1:])])
        total = padded.view(-1, spec.v, *most.shape[1:]).sum(1)
        better = (total > best).repeat_interleave(spec.v, 0)[:rows]
        winner = torch.where(better, inside[which], winner)
        best = torch.maximum(best, total)
    return winner


def _grown(scores: Tensor, spec: Spec, columns: int, kept: int) -> Tensor:
    """The columns of every V x M block, by scores `[rows, blocks, M]` of single weights: `[row blocks, blocks, c]`."""
    rows, blocks, m = scores.shape
    padded = torch.cat([scores, scores.new_zeros(-rows % spec.v, blocks, m)])
    tiles = padded.view(-1, spec.v, blocks, m).transpose(1, 2)  # [row blocks, blocks, V, M]
    return choose_columns(tiles, kept, columns)
