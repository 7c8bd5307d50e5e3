"""Scales of kept values: those that round best, out of a few for each group."""

from __future__ import annotations

import torch
from torch import Tensor

from vnm_compile.quantization import Quantization

# Of the scale at which a group's largest value is the highest level. Smaller ones cut it off, and round others less.
_FACTORS = {8: (1.0, 0.97, 0.94, 0.9), 4: tuple(i / 100 for i in range(109, 54, -3))}


def choose_scales(
    kept: Tensor, quantization: Quantization, dtype: torch.dtype, weights: Tensor | None = None
) -> Tensor:
    """Return the scales `[R, S]` in `dtype` at which rounding to the nearest level changes the least.

    Tried are the scales at which the largest magnitude of a group becomes the highest level and, with its sign, the
    lowest, of which there is one more in 4 bits; each times some factors.

    Args:
        kept: `[R, G*N]` values.
        weights: of the squared differences, `[R, G*N]`; equal ones if None.
    """
    groups = grouped(kept, quantization)
    weighed = torch.ones_like(groups) if weights is None else grouped(weights, quantization)
    largest = groups.abs().amax(-1)
    signed = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best, least = largest.to(dtype), torch.full_like(largest, torch.inf)
    for base in (largest / quantization.highest, signed / quantization.lowest):
        for factor in _FACTORS[quantization.bits]:
            scales = (base * factor).to(dtype)
            difference = groups - nearest(groups, scales, quantization) * scales.to(groups.dtype).unsqueeze(-1)
            error = (weighed * difference.square()).sum(-1)
            better = error < least
            best, least = torch.where(better, scales, best), torch.where(better, error, least)
    return best


def nearest(values: Tensor, scales: Tensor, quantization: Quantization) -> Tensor:
    """Levels of `values` `[..., group]` at `scales` `[...]`, as floats; 0 where the scale is 0."""
    divisor = scales.to(values.dtype).unsqueeze(-1)
    levels = (values / torch.where(divisor == 0, 1, divisor)).round()
    return torch.where(divisor == 0, 0, levels.clamp(quantization.lowest, quantization.highest))


def grouped(kept: Tensor, quantization: Quantization) -> Tensor:
    """`[R, G*N]` as `[R, S, group]`, padded with zeros."""
    count = kept.shape[1]
    size = quantization.group or max(1, count)
    scales = quantization.scales(count)
    return torch.nn.functional.pad(kept, (0, scales * size - count)).view(kept.shape[0], scales, size)
