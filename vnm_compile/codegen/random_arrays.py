"""Random packed weights: what is measured and benchmarked on. Random numbers in each array would be no weight."""

from __future__ import annotations

import torch

from vnm_compile.format import Packed
from vnm_compile.layout import Layout
from vnm_compile.quantization import store_levels


def random_packed(layout: Layout, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Packed:
    """Random canonical arrays of a weight of `dtype`: random kept columns, indices and values."""
    spec = layout.spec
    generator = torch.Generator(device).manual_seed(seed)
    _, metadata, columns, *_ = layout.shapes
    drawn = torch.rand(*columns[:2], spec.m, generator=generator, device=device, dtype=torch.float32)
    kept = drawn.topk(4, -1).indices.sort(-1).values
    # The pairs of increasing 2-bit indices, two pairs a byte; with one value a group any index will do.
    pairs = torch.tensor([0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110], dtype=torch.uint8, device=device)
    if spec.n == 2:
        low, high = (pairs[torch.randint(6, metadata, generator=generator, device=device)] for _ in range(2))
        indices = low | high << 4
    else:
        indices = torch.randint(256, metadata, generator=generator, device=device, dtype=torch.uint8)
    structure = indices, kept.to(spec.column_dtype)
    kind, size = layout.quantization, (layout.rows, layout.kept)
    if kind is None:
        scaled = torch.randn(size, generator=generator, device=device, dtype=torch.float32) * layout.in_features**-0.5
        return Packed(scaled.to(dtype), *structure)
    levels = torch.randint(kind.lowest, kind.highest + 1, size, generator=generator, device=device, dtype=torch.int8)
    scales = torch.rand(layout.shapes[3], generator=generator, device=device, dtype=torch.float32) + 0.5
    scales = scales * layout.in_features**-0.5 / kind.highest
    return Packed(store_levels(levels, kind), *structure, scales.to(dtype))
