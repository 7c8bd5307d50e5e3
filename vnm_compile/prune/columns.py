"""The columns that blocks of scores keep: which 4 of M, shared by V rows of which each keeps its N largest in them.

Up to M = 16 every choice is tried (C(16, 4) = 1820); beyond, and where more or fewer than 4 are kept, a set grows
column by column and then exchanges columns, which can only improve on it. On CPUs both are C++ for all but small
weights, 20 to 200 times faster than the same in torch, which GPUs and machines without a compiler take.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
from itertools import combinations

import torch
from torch import Tensor

from vnm_compile.native import columns as native
from vnm_compile.spec import KEPT_COLUMNS

EXACT_UP_TO = 16
CHUNK_ELEMENTS = 1 << 22  # scores that torch works on at a time: bounds the memory to some 100 MB
_IN_CACHE = 1 << 17  # and where every choice is tried on a CPU: twice as fast as `CHUNK_ELEMENTS` for 1024 x 4096
_NATIVE_FROM = 1 << 16  # scores; by size alone, so that a run that is taken up again chooses alike
_MOST_SWEEPS = 8


def choose_columns(blocks: Tensor, n: int, width: int = KEPT_COLUMNS) -> Tensor:
    """Return the columns that each block keeps: scores `[B, G, V, M]` to int64 `[B, G, width]`, increasing."""
    b, g, v, m = blocks.shape
    if m == width:
        return torch.arange(width, device=blocks.device).expand(b, g, width)
    flat = blocks.reshape(b * g, v, m)
    if n == width:
        return flat.sum(1).topk(width).indices.sort(1).values.view(b, g, width)
    if not flat.numel():
        return torch.zeros(b, g, width, dtype=torch.int64, device=blocks.device)
    exact = width == KEPT_COLUMNS and n in (1, 2) and m <= EXACT_UP_TO
    return (best_columns(flat, n) if exact else grow_columns(flat, n, width)).view(b, g, width)


def column_value(blocks: Tensor, columns: Tensor, n: int) -> Tensor:
    """The score that blocks `[..., V, M]` keep with `columns` `[..., c]`: the n largest of these, over all rows."""
    index = columns.unsqueeze(-2).expand(*blocks.shape[:-1], columns.shape[-1])
    return blocks.gather(-1, index).topk(n, dim=-1).values.sum((-1, -2))


def best_columns(blocks: Tensor, n: int) -> Tensor:
    """Try every choice of 4 columns, for n = 1 or 2: scores `[X, V, M]` to int64 `[X, 4]`, increasing."""
    if _runs_native(blocks):
        return native.best_columns(blocks, n)
    return _in_chunks(partial(_try_all, n=n), blocks, _IN_CACHE if blocks.device.type == "cpu" else CHUNK_ELEMENTS)


def grow_columns(blocks: Tensor, n: int, width: int = KEPT_COLUMNS) -> Tensor:
    """Grow a set column by column, then exchange single ones while that improves it: `[X, V, M]` to int64 `[X, width]`.

    Scores are not negative; of the columns in the set every row keeps its n largest.
    """
    if _runs_native(blocks):
        return native.grow_columns(blocks, n, width)
    return _in_chunks(partial(_grow, n=n, width=width), blocks, CHUNK_ELEMENTS)


def _runs_native(blocks: Tensor) -> bool:
    floats = blocks.dtype in (torch.float32, torch.float64)
    return floats and blocks.device.type == "cpu" and blocks.numel() >= _NATIVE_FROM and _compiles()


@cache
def _compiles() -> bool:
    try:
        native.build()
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        warnings.warn(
            f"masks are searched for in torch, some 20 times slower than in C++, which did not compile: {reason}",
            stacklevel=2,
        )
        return False
    return True


def _in_chunks(search: Callable[[Tensor], Tensor], blocks: Tensor, elements: int) -> Tensor:
    chunk = max(1, elements // (blocks.shape[1] * blocks.shape[2]))
    return torch.cat([search(part) for part in blocks.split(chunk)])


def _try_all(blocks: Tensor, n: int) -> Tensor:
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


def _grow(blocks: Tensor, n: int, width: int) -> Tensor:
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
