"""The one primitive of every method: the V:N:M mask that keeps the largest sum of scores.

A block of V rows and M columns keeps 4 columns, and inside them every row its N largest scores. For given columns the
rows are independent; the columns are what has to be searched for (`vnm_compile.prune.columns`).

Source: VENOM, arXiv 2310.02065, section 5 (the objective).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vnm_compile.errors import BadScores
from vnm_compile.native import columns as native
from vnm_compile.prune.columns import CHUNK_ELEMENTS, choose_columns, runs_native, way
from vnm_compile.spec import KEPT_COLUMNS, Spec


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
    scores = [_in_single(each) for each in scores]
    if runs_native(scores):
        return [native.project(each, v, width, n, m, way(n, width, m)) for each in scores]
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


def _in_single(scores: Tensor) -> Tensor:
    """A matrix of scores, in fp32 where it was in half precision: sums need the digits."""
    if scores.dim() != 2:
        raise BadScores(f"scores have shape {list(scores.shape)}; expected a matrix [out_features, in_features].")
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores


def _parts(blocks: list[Tensor]) -> list[list[Tensor]]:
    """Neighbours together as long as they are small."""
    parts: list[list[Tensor]] = []
    room = 0
    for each in blocks:
        if each.numel() > room:
            parts.append([])
            room = CHUNK_ELEMENTS
        parts[-1].append(each)
        room -= each.numel()
    return parts


def _blocks(scores: Tensor, v: int, m: int) -> Tensor:
    """Scores `[O, K]` as `[B, G, V, M]`."""
    if scores.isnan().any():
        raise BadScores(native.NAN)
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
