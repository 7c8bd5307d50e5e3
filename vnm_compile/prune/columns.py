"""The columns that blocks of scores keep: which 4 of M, shared by V rows of which each keeps its N largest in them.

Up to M = 16 every choice is tried (C(16, 4) = 1820); beyond, and where more or fewer than 4 are kept, a set grows
column by column and then exchanges columns, which can only improve on it. On CPUs both are C++ for all but small
weights, 20 to 200 times faster than the same in torch, which GPUs and machines without a compiler take.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache, partial
from itertools import combinations

import torch
from torch import Tensor, nn

from vnm_compile.native import columns as native
from vnm_compile.native.columns import Way
from vnm_compile.spec import KEPT_COLUMNS

EXACT_UP_TO = 16
CHUNK_ELEMENTS = 1 << 22  # scores that torch works on at a time: bounds the memory to some 100 MB
_IN_CACHE = 1 << 17  # and where every choice is tried on a CPU: twice as fast as `CHUNK_ELEMENTS` for 1024 x 4096
_NATIVE_FROM = 1 << 14  # scores; by size alone, so that a run that is taken up again chooses alike
_MOST_SWEEPS = 8


def choose_columns(blocks: Tensor, n: int, width: int = KEPT_COLUMNS) -> Tensor:
    """Return the columns that each block keeps: scores `[B, G, V, M]` to int64 `[B, G, width]`, increasing."""
    b, g, v, m = blocks.shape
    if not blocks.numel():
        return torch.zeros(b, g, width, dtype=torch.int64, device=blocks.device)
    return columns_of(blocks.reshape(b * g, v, m), n, width, way(n, width, m)).view(b, g, width)


def way(n: int, width: int, m: int) -> Way:
    """How the columns of blocks are found that keep `width` of m columns, and n of these in each row."""
    if width == m:
        return "all"
    if n == width:
        return "sums"
    return "try" if width == KEPT_COLUMNS and n in (1, 2) and m <= EXACT_UP_TO else "grow"


def columns_of(blocks: Tensor, n: int, width: int, way: Way) -> Tensor:
    """As `choose_columns`, for blocks `[X, V, M]` in a given way.

    "grow": a set grows column by column, then single ones are exchanged while that improves it. Scores are not
    negative; of the columns in the set every row keeps its n largest.
    """
    if runs_native([blocks]):
        return native.columns_of(blocks, n, width, way)
    if way == "all":
        return torch.arange(width, device=blocks.device).expand(len(blocks), width)
    if way == "sums":
        return blocks.sum(1).topk(width).indices.sort(1).values
    search = partial(_try_all, n=n) if way == "try" else partial(_grow, n=n, width=width)
    elements = _IN_CACHE if way == "try" and blocks.device.type == "cpu" else CHUNK_ELEMENTS
    chunk = max(1, elements // (blocks.shape[1] * blocks.shape[2]))
    return torch.cat([search(part) for part in blocks.split(chunk)])


def runs_native(scores: Sequence[Tensor]) -> bool:
    """Whether C++ searches all of these scores: plain tensors, since subclasses may have no memory of their own."""
    fits = all(
        type(each) in (Tensor, nn.Parameter)
        and each.device.type == "cpu"
        and each.dtype in (torch.float32, torch.float64)
        for each in scores
    )
    return fits and sum(each.numel() for each in scores) >= _NATIVE_FROM and _compiles()


def column_value(blocks: Tensor, columns: Tensor, n: int) -> Tensor:
    """The score that blocks `[..., V, M]` keep with `columns` `[..., c]`: the n largest of these, over all rows."""
    index = columns.unsqueeze(-2).expand(*blocks.shape[:-1], columns.shape[-1])
    return blocks.gather(-1, index).topk(n, dim=-1).values.sum((-1, -2))


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


def _try_all(blocks: Tensor, n: int) -> Tensor:
    """Scores `[X, V, M]` to int64 `[X, 4]`, for n = 1 or 2."""
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
