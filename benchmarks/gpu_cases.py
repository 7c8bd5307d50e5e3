"""What the GPU benchmark measures: shapes, token counts and patterns, and the speed-ups that are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vnm_compile.cost import CostModel
from vnm_compile.layout import Layout
from vnm_compile.spec import Spec

TOKENS = (1, 16, 64, 2048, 8192)
# Llama-3-8B: gate and up, down, q and o, k and v; out_features x in_features.
LARGE, SMALL = ((14336, 4096), (4096, 14336)), ((4096, 4096), (1024, 4096))
SPECS = ("64:2:8", "128:2:8", "64:2:16", "128:2:16", "128:2:32")

# Speed-up over dense, bf16, geometric mean over LARGE, the better of V = 64 and 128; by M, then in the order of TOKENS.
TARGETS = {
    8: (2.6, 2.5, 2.0, 1.4, 1.4),
    16: (4.5, 4.2, 3.2, 2.6, 2.6),
    32: (7.0, 6.5, 5.0, 4.5, 4.5),
}
LEAST_SMALL = 1.5  # of SMALL at one token


@dataclass(frozen=True)
class Case:
    """One linear without bias, `[tokens, in_features]` to `[tokens, out_features]`."""

    out_features: int
    in_features: int
    tokens: int
    spec: Spec
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        """`14336 x 4096`."""
        return f"{self.out_features} x {self.in_features}"

    @property
    def layout(self) -> Layout:
        """Storage of the weight."""
        return Layout(self.spec, self.out_features, self.in_features)

    def floor(self, bandwidth: float, flops: float, sparse: bool) -> float:
        """The least seconds a call can take on a device that moves `bandwidth` bytes/s and does `flops` flop/s."""
        model = CostModel(self.out_features, self.in_features, self.layout, self.dtype, balance=flops / bandwidth)
        return model.time_at(self.tokens, sparse) / bandwidth


def layers(specs: tuple[str, ...] = SPECS) -> Iterator[Case]:
    """The cases that the targets are about."""
    for spec in specs:
        for out_features, in_features in LARGE:
            for tokens in TOKENS:
                yield Case(out_features, in_features, tokens, Spec.parse(spec))


def small() -> Iterator[Case]:
    """Small layers, where launches weigh."""
    for spec in ("64:2:8", "64:2:16"):
        for out_features, in_features in SMALL:
            for tokens in TOKENS[:3]:
                yield Case(out_features, in_features, tokens, Spec.parse(spec))


def correctness() -> Iterator[Case]:
    """Every dtype, value count and regime, with tails in every direction."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for spec, out_features, in_features in (
            ("64:2:8", 1024, 1024),
            ("128:2:16", 640, 2048),
            ("64:2:5", 200, 1003),
            ("32:1:8", 96, 520),
            ("16:2:4", 272, 644),
        ):
            for tokens in (1, 17, 300):
                yield Case(out_features, in_features, tokens, Spec.parse(spec), dtype)
