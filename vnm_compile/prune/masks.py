"""The masks of pruned layers, held while a model is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from vnm_compile.layers import Layer


@contextmanager
def hold_masks(layers: Sequence[Layer]) -> Iterator[None]:
    """Keep the zeros of these layers' weights zero while a model is trained."""
    weights: list[Tensor] = [layer.module.weight for layer in layers]  # type: ignore[misc]
    masks = [weight.detach() != 0 for weight in weights]
    hooks = [
        weight.register_hook(lambda gradient, mask=mask: gradient * mask)
        for weight, mask in zip(weights, masks, strict=True)
        if weight.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        for layer, mask in zip(layers, masks, strict=True):
            weight: Tensor = layer.module.weight  # type: ignore[assignment]
            weight.mul_(mask)
