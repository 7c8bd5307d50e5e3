"""Rounding in which one value makes up for another: coordinate descent on the error of a layer's output.

The error of the output is `tr(E H Eᵀ)`, E being what rounding does to the weight and H the second moment of the layer's
inputs. One column after the other, for all rows at once, every kept value takes the level that is best given what all
others are: in the first pass those before it rounded and those after it as they were, later all of them rounded.

Source: QuantEase, arXiv 2309.01885, algorithm 2, on the kept places of a pattern; GPTQ (arXiv 2210.17323) rounds in the
same order, once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vnm_compile.quantization import Quantization

_COLUMNS = 64  # whose effect on the others is added up before it is applied
_MOST_PASSES = 12
_DAMPING = 0.01  # of the second moments, as a share of their mean diagonal


def descend(weight: Tensor, scales: Tensor, moment: Tensor, quantization: Quantization) -> Tensor:
    """Return the levels of a weight, `[O, K]` as floats; zeros stay zeros.

    Args:
        weight: `[O, K]`.
        scales: of every weight, `[O, K]`.
        moment: `[K, K]`, the mean of `x xᵀ` over the layer's inputs.
    """
    # Columns are worked on one by one: here they are rows.
    target = weight.t().float().contiguous()
    scales = torch.where(target == 0, 0, scales.t().float())
    damping = _DAMPING * moment.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    second = moment.float().clone()
    second.diagonal().add_(damping)
    rounded, slope = target.clone(), torch.zeros_like(target)  # slope: H times the error
    for _ in range(_MOST_PASSES):
        before = rounded.clone()
        for start in range(0, len(target), _COLUMNS):
            part = slice(start, start + _COLUMNS)
            moved = _round_columns(rounded[part], slope[part], scales[part], second[part, part], quantization)
            slope.addmm_(second[:, part], moved)
        if torch.equal(before, rounded):
            break
    levels = rounded / torch.where(scales == 0, 1, scales)
    return levels.round().t()


def _round_columns(
    rounded: Tensor, slope: Tensor, scales: Tensor, second: Tensor, quantization: Quantization
) -> Tensor:
    """Round some columns one after the other, in place; return by how much each has moved. All are `[columns, O]`."""
    slope, moved = slope.clone(), torch.zeros_like(rounded)
    for i in range(len(rounded)):
        scale = scales[i]
        wanted = rounded[i] - slope[i] / second[i, i]
        levels = (wanted / torch.where(scale == 0, 1, scale)).round_()
        new = levels.clamp_(quantization.lowest, quantization.highest).mul_(scale)
        moved[i] = new - rounded[i]
        rounded[i] = new
        slope[i:].addr_(second[i:, i], moved[i])
    return moved
