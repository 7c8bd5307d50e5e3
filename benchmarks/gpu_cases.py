"""What the GPU benchmark measures: shapes, token counts and patterns, and the speed-ups that are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vnm_compile.cost import CostModel
from vnm_compile.layout import Layout
from vnm_compile.quantization import Quantization
from vnm_compile.spec import Spec

TOKENS = (1, 16, 64, 2048, 8192)
# Llama-3-8B: gate and up, down, q and o, k and v; out_features x in_features.
LARGE, SMALL = ((14336, 4096), (4096, 14336)), ((4096, 4096), (1024, 4096))
SPECS = ("64:2:8", "128:2:8", "64:2:16", "128:2:16", "128:2:32")

# Speed-up over dense, bf16, geometric mean over LARGE, one V for each M; by M, then in the order of TOKENS.
TARGETS = {
    8: (2.6, 2.5, 2.4, 1.6, 1.6),
    16: (4.5, 4.2, 3.8, 3.2, 3.2),
    32: (7.0, 6.5, 5.5, 5.5, 5.5),
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
    quantization: Quantization | None = None

    @property
    def name(self) -> str:
        """`14336 x 4096`."""
        return f"{self.out_features} x {self.in_features}"

    @property
    def layout(self) -> Layout:
        """Storage of the weight."""
        return Layout(self.spec, self.out_features, self.in_features, self.quantization)

    @property
    def stored(self) -> str:
        """`64:2:8`, with quantised values `64:2:8 int4/64`."""
        return f"{self.spec} {self.quantization}" if self.quantization else str(self.spec)

    def floor(self, bandwidth: float, flops: float, sparse: bool) -> float:
        """The least seconds a call can take on a device that moves `bandwidth` bytes/s and does `flops` flop/s."""
        model = CostModel(self.out_features, self.in_features, self.layout, self.dtype, balance=flops / bandwidth)
        return model.time_at(self.tokens, sparse) / bandwidth


def relative_error(output: Tensor, exact: Tensor) -> float:
    """How far off a result is, of the norm of the exact one (float64)."""
    return float((output.double() - exact).norm() / exact.norm())


def layers(specs: tuple[str, ...] = SPECS) -> Iterator[list[Case]]:
    """The cases that the targets are about; those of one shape and number of tokens are timed together."""
    for tokens in TOKENS:
        for out_features, in_features in LARGE:
            yield [Case(out_features, in_features, tokens, Spec.parse(spec)) for spec in specs]


def small() -> Iterator[list[Case]]:
    """Small layers, where launches weigh."""
    for tokens in TOKENS[:3]:
        for out_features, in_features in SMALL:
            yield [Case(out_features, in_features, tokens, Spec.parse(spec)) for spec in ("64:2:8", "64:2:16")]


def values() -> Iterator[list[Case]]:
    """Quantised values beside those in bf16."""
    kinds = (None, Quantization(8, 64), Quantization(4, 64))
    for tokens in TOKENS[:4]:
        for out_features, in_features in LARGE:
            yield [
                Case(out_features, in_features, tokens, Spec.parse(spec), quantization=kind)
                for spec in ("64:2:8", "128:2:16")
                for kind in kinds
            ]


def correctness() -> Iterator[Case]:
    """Every dtype, value count and regime, with tails in every direction."""
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    shapes = (("64:2:8", 1024, 1024), ("128:2:16", 640, 2048), ("64:2:5", 200, 1003), ("32:1:8", 96, 520))
    for i, (spec, out_features, in_features) in enumerate((*shapes, ("16:2:4", 272, 644))):
        for j, tokens in enumerate((1, 17, 300)):
            # All of 16 bits, and fp32 for one number of tokens of each pattern: it has one template.
            for dtype in kinds[:2] if i % 3 != j else kinds:
                yield Case(out_features, in_features, tokens, Spec.parse(spec), dtype)
    for bits in (8, 4):
        for tokens in (1, 17, 300):
            yield Case(640, 2048, tokens, Spec(128, 2, 16), kinds[0], Quantization(bits, 64))
