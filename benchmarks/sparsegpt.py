"""SparseGPT for 2:4, to compare with: columns in order, groups of four pruned by saliency, errors passed on.

Source: arXiv 2301.00774, algorithm 1, with its defaults: blocks of 128 columns, damping of 1 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vnm_compile.layers import Layer
from vnm_compile.prune.calibration import second_moments

BLOCK, GROUP, KEPT, DAMPING = 128, 4, 2, 0.01


def prune_layer(weight: Tensor, moment: Tensor) -> Tensor:
    """Return a 2:4 weight `[O, K]` for inputs of second moment `[K, K]`."""
    w, h = weight.detach().float().clone(), moment.float().clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for start in range(0, w.shape[1], BLOCK):
        stop = min(start + BLOCK, w.shape[1])
        errors = torch.zeros(len(w), stop - start)
        mask = torch.ones(len(w), stop - start, dtype=torch.bool)
        for column in range(start, stop):
            if column % GROUP == 0:
                group = slice(column, column + GROUP)
                saliency = w[:, group].square() / inverse.diagonal()[group].square()
                dropped = saliency.topk(GROUP - KEPT, dim=1, largest=False).indices + column - start
                mask.scatter_(1, dropped, False)
            kept = w[:, column] * mask[:, column - start]
            error = (w[:, column] - kept) / inverse[column, column]
            w[:, column] = kept
            w[:, column + 1 : stop] -= error.unsqueeze(1) * inverse[column, column + 1 : stop]
            errors[:, column - start] = error
        w[:, stop:] -= errors @ inverse[start:stop, stop:]
    return w.to(weight.dtype)


def prune(model: nn.Module, blocks: Sequence[Sequence[Layer]], batches: Sequence[Any]) -> None:
    """Prune layers in place, block by block, each on what the blocks before it produce."""
    for layers in blocks:
        for layer, moment in zip(layers, second_moments(model, layers, batches), strict=True):
            with torch.no_grad():
                layer.weight.copy_(prune_layer(layer.weight, moment))
