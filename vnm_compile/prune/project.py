"""The one primitive of every method: the V:N:M mask that keeps the largest sum of scores.

A block of V rows and M columns keeps 4 columns, and inside them every row its N largest scores. For given columns the
rows are independent; the columns are what has to be searched for. Up to M = 16 every choice is tried (C(16, 4) = 1820);
beyond, greedy growth followed by swaps, which can only improve on greedy.

Source: VENOM, arXiv 2310.02065, section 5 (the objective); the searches are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from vnm_compile.errors import BadScores
from vnm_compile.spec import KEPT_COLUMNS, Spec

EXACT_UP_TO = 16
_CHUNK_ELEMENTS = 1 << 22  # scores that are worked on at a time: bounds the memory to some 100 MB
_IN_CACHE = 1 << 17  # and where every choice is tried on a CPU: twice as fast as `_CHUNK_ELEMENTS` for 1024 x 4096
_MOST_SWEEPS = 8


def project(scores: Tensor, spec: Spec | str) -> Tensor:
    """Return the mask that keeps the largest sum of `scores` under `spec`.

    Args:
        scores: `[O, K]`, non-negative floating point; |w| for VENOM's magnitude criterion.
        spec: the pattern.

    Returns:
        bool `[O, K]`; exactly N a row and group are set (fewer in a tail group of fewer columns).

    Raises:
        VNMError: the scores are not a matrix, or hold a NaN.
    """
    spec = Spec.parse(spec)
    return project_columns(scores, spec.v, KEPT_COLUMNS, spec.n, spec.m)


def project_columns(scores: Tensor, v: int, width: int, n: int, m: int) -> Tensor:
    """As `project`, for a pattern that keeps any number `width` of a block's columns, and in each row `n` of those.

    For `n` = `width` (whole columns) and `width` = `m` (rows alone) the mask is the best one.
    """
    return project_together([scores], v, width, n, m)[0]


def project_together(scores: Sequence[Tensor], v: int, width: int, n: int, m: int) -> list[Tensor]:
    """As `project_columns`, for several matrices of one dtype and device, whose small ones are worked on at once."""
    blocks = [_blocks(each, v, m) for each in scores]
    chosen: list[Tensor] = []
    for part in _parts(blocks):
        flat = [each.flatten(0, 1) for each in part]
        columns = choose_columns((flat[0] if len(flat) == 1 else torch.cat(flat)).unsqueeze(1), n, width)
        chosen += columns.squeeze(1).split([len(each) for each in flat])
    return [
        _mask(in_blocks, columns.view(*in_blocks.shape[:2], width), n)[: each.shape[0], : each.shape[1]].contiguous()
        for each, in_blocks, columns in zip(scores, blocks, chosen, strict=True)
    ]


def _parts(blocks: list[Tensor]) -> list[list[Tensor]]:
    """Neighbours together as long as they are small."""
    parts: list[list[Tensor]] = []
    room = 0
    for each in blocks:
        if each.numel() > room:
            parts.append([])
            room = _CHUNK_ELEMENTS
        parts[-1].append(each)
        room -= each.numel()
    return parts


def _blocks(scores: Tensor, v: int, m: int) -> Tensor:
    """Scores `[O, K]` as `[B, G, V, M]`."""
    if scores.dim() != 2:
        raise BadScores(f"scores have shape {list(scores.shape)}; expected a matrix [out_features, in_features].")
    if scores.isnan().any():
        raise BadScores("the scores hold NaN, so there is no largest sum; look for NaN in the weight or activations.")
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores  # sums need the digits
    out_features, in_features = scores.shape
    rows, groups = -(-out_features // v) * v, -(-in_features // m)
    # Padding scores less than anything real, so it is kept only where nothing real is left.
    padded = torch.nn.functional.pad(
        scores, (0, groups * m - in_features, 0, rows - out_features), value=-torch.finfo(scores.dtype).tiny
    )
    return padded.view(rows // v, v, groups, m).transpose(1, 2)


def _mask(blocks: Tensor, columns: Tensor, n: int) -> Tensor:
    """The mask, of padded size, that keeps of `columns` `[B, G, width]` in each row the n largest."""
    b, g, v, m = blocks.shape
    index = columns.unsqueeze(2).expand(-1, -1, v, -1)
    chosen = blocks.gather(3, index).topk(n, dim=3).indices
    mask = torch.zeros_like(blocks, dtype=torch.bool).scatter_(3, index.gather(3, chosen), True)
    return mask.transpose(1, 2).reshape(b * v, g * m)


def choose_columns(blocks: Tensor, n: int, width: int = KEPT_COLUMNS) -> Tensor:
    """Return the columns that each block keeps: scores `[B, G, V, M]` to int64 `[B, G, width]`, increasing."""
    b, g, v, m = blocks.shape
    if m == width:
        return torch.arange(width, device=blocks.device).expand(b, g, width)
    flat = blocks.reshape(b * g, v, m)
    if n == width:
        return flat.sum(1).topk(width).indices.sort(1).values.view(b, g, width)
    exact = width == KEPT_COLUMNS and n in (1, 2) and m <= EXACT_UP_TO
    search = partial(_exact, n=n) if exact else partial(grow_columns, n=n, width=width)
    chunk = max(1, (_IN_CACHE if exact and blocks.device.type == "cpu" else _CHUNK_ELEMENTS) // (v * m))
    columns = [search(part) for part in flat.split(chunk)] if flat.numel() else [flat.new_zeros(0, width)]
    return torch.cat(columns).long().view(b, g, width)


def column_value(blocks: Tensor, columns: Tensor, n: int) -> Tensor:
    """The score that blocks `[..., V, M]` keep with `columns` `[..., c]`: the n largest of these, over all rows."""
    index = columns.unsqueeze(-2).expand(*blocks.shape[:-1], columns.shape[-1])
    return blocks.gather(-1, index).topk(n, dim=-1).values.sum((-1, -2))


def _exact(blocks: Tensor, n: int) -> Tensor:
    """Try every choice of 4 columns: scores `[X, V, M]` to `[X, 4]`."""
    by_column = blocks.permute(2, 1, 0).contiguous()  # [M, V, X]
    m = by_column.shape[0]
    larger, both = {}, {}
    for i, j in combinations(range(m), 2):
        larger[i, j] = torch.maximum(by_column[i], by_column[j])
        both[i, j] = by_column[i] + by_column[j]
    best = torch.full((blocks.shape[0],), -torch.inf, dtype=blocks.dtype, device=blocks.device)
    winner = torch.zeros(blocks.shape[0], dtype=torch.int64, device=blocks.device)
    choices = list(combinations(range(m), KEPT_COLUMNS))
    for index, (i, j, k, q) in enumerate(choices):
        # The two largest of four: both of the first pair, both of the second, or the larger of each.
        value = torch.add(larger[i, j], larger[k, q])
        if n == 1:
            value = torch.maximum(larger[i, j], larger[k, q])
        else:
            value = torch.maximum(torch.maximum(value, both[i, j]), both[k, q])
        kept = value.sum(0)
        winner = torch.where(kept > best, index, winner)
        best = torch.maximum(best, kept)
    return torch.tensor(choices, device=blocks.device)[winner]


def grow_columns(blocks: Tensor, n: int, width: int = KEPT_COLUMNS) -> Tensor:
    """Grow a set column by column, then exchange single columns while that improves it: `[X, V, M]` to `[X, width]`.

    Scores are not negative; of the columns in the set every row keeps its n largest.
    """
    columns = blocks.new_zeros(blocks.shape[0], 0, dtype=torch.int64)
    for _ in range(width):
        columns = torch.cat([columns, value_with_each(blocks, columns, n).argmax(1, keepdim=True)], 1)
    best = column_value(blocks, columns, n)
    for _ in range(_MOST_SWEEPS):
        improved = False
        for position in range(width):
            others = torch.cat([columns[:, :position], columns[:, position + 1 :]], 1)
            values, candidate = value_with_each(blocks, others, n).max(1)
            better = values > best * (1 + 1e-6)
            columns[:, position] = torch.where(better, candidate, columns[:, position])
            best = torch.where(better, values, best)
            improved |= bool(better.any())
        if not improved:
            break
    return columns.sort(1).values


def value_with_each(blocks: Tensor, columns: Tensor, n: int) -> Tensor:
    """The score kept with `columns` `[X, c]` and one more, for every one more: `[X, M]`; -inf for those in the set."""
    index = columns.unsqueeze(1).expand(*blocks.shape[:2], columns.shape[1])
    largest = blocks.gather(2, index).sort(dim=2, descending=True).values[..., :n]
    padded = torch.nn.functional.pad(largest, (0, n - largest.shape[2]))
    # The new column takes the place of the smallest of the n kept ones, where it is larger.
    gain = (blocks - padded[..., -1:]).clamp_min(0).sum(1)
    total = padded.sum((1, 2)).unsqueeze(1) + gain
    return total.scatter(1, columns, -torch.inf) if columns.shape[1] else total
