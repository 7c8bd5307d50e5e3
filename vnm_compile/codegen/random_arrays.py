"""Random packed weights: what is measured and benchmarked on. Random numbers in each array would be no weight."""

from __future__ import annotations

import torch

from vnm_compile.format import Packed
from vnm_compile.layout import Layout


def random_packed(layout: Layout, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Packed:
    """Random canonical arrays of a weight of `dtype`: random kept columns, indices and values."""
    spec = layout.spec
    generator = torch.Generator(device).manual_seed(seed)
    values, metadata, columns = layout.shapes
    drawn = torch.rand(*columns[:2], spec.m, generator=generator, device=device, dtype=torch.float32)
    kept = drawn.topk(4, -1).indices.sort(-1).values
    # The pairs of increasing 2-bit indices, two pairs a byte; with one value a group any index will do.
    pairs = torch.tensor([0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110], dtype=torch.uint8, device=device)
    if spec.n == 2:
        low, high = (pairs[torch.randint(6, metadata, generator=generator, device=device)] for _ in range(2))
        indices = low | high << 4
    else:
        indices = torch.randint(256, metadata, generator=generator, device=device, dtype=torch.uint8)
    scaled = torch.randn(values, generator=generator, device=device, dtype=torch.float32) * layout.in_features**-0.5
    return Packed(scaled.to(dtype), indices, kept.to(spec.column_dtype))
