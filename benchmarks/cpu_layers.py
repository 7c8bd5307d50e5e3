"""One linear layer at a time: shapes, dtypes, token counts and patterns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from benchmarks.contenders import OURS, contenders, fill_with_pattern, forget_compiled
from vnm_compile.comparison import Result, compare
from vnm_compile.layout import Layout
from vnm_compile.spec import Spec

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
SMALL_SHAPES = ((64, 64), (384, 384), (1536, 384), (384, 1536), (1024, 1024), (3072, 768))
DTYPES = (torch.float32, torch.bfloat16)
SPECS = ("64:2:8", "64:2:16", "64:2:5")
TOKENS = (1, 16, 128, 512)
MOST_FEW_TOKENS = 16  # of those
SMALL_TOKENS = (1, 16, 128, 1024, 4096)

# What is asked for on 4096 x 4096, by dtype, pattern and tokens; 85 % of it on the other two shapes.
TARGETS = {
    (torch.float32, "64:2:8"): (4.0, 2.4, 1.6, 1.6),
    (torch.float32, "64:2:16"): (8.0, 4.5, 3.0, 3.0),
    (torch.bfloat16, "64:2:8"): (3.0, 2.0, 1.3, 1.3),
    (torch.bfloat16, "64:2:16"): (5.0, 3.5, 2.2, 2.2),
}


MODEL_BYTES, MOST_LAYERS = 1 << 30, 16  # of dense weights in a call where a layer is timed as one of a model


@dataclass(frozen=True)
class Case:
    """Layers `[tokens, in_features] @ [out_features, in_features].T + bias`, each on an input of its own.

    With few tokens and one layer a call, what is timed is mostly the call: where dense weights have just swept the
    caches, Python and the compiled function fetch their own data from memory, which takes as long as the sparse
    layer. In a model that is paid once for all layers; so few tokens are timed with several layers a call, too.
    """

    out_features: int
    in_features: int
    dtype: torch.dtype
    spec: Spec
    tokens: int
    layers: int
    policy: str

    @property
    def limit(self) -> float:
        """How much faster it could be: by the bytes of the weight up to 4 tokens, by its non-zeros beyond."""
        if self.tokens <= 4:
            dense = self.out_features * self.in_features * self.dtype.itemsize
            return dense / Layout(self.spec, self.out_features, self.in_features).nbytes(self.dtype)
        return self.spec.m / self.spec.n

    @property
    def target(self) -> float | None:
        """The ratio that is asked for, where one is."""
        if self.policy == "latency":
            return 0.97
        if str(self.spec) == "64:2:5":
            return 1.0
        targets = TARGETS.get((self.dtype, str(self.spec)))
        few_alone = self.layers == 1 and self.tokens <= MOST_FEW_TOKENS  # asked of the layer, not of the call
        if targets is None or self.tokens not in TOKENS or few_alone:
            return None
        share = 1.0 if (self.out_features, self.in_features) == SHAPES[0] else 0.85
        return targets[TOKENS.index(self.tokens)] * share


def large(quick: bool) -> Iterator[Case]:
    """Layers of a 7B-parameter model, always sparse (policy "memory")."""
    shapes, specs = (SHAPES[:1], SPECS[:1]) if quick else (SHAPES, SPECS)
    for (out, inp), dtype, spec, tokens in product(shapes, DTYPES, specs, TOKENS):
        as_model = min(MOST_LAYERS, MODEL_BYTES // (out * inp * dtype.itemsize))
        for layers in (1, as_model) if tokens <= MOST_FEW_TOKENS else (1,):
            yield Case(out, inp, dtype, Spec.parse(spec), tokens, layers, "memory")


def small(quick: bool) -> Iterator[Case]:
    """Layers where sparse does not always win, under policy "latency": is anything slower than dense?"""
    shapes, tokens = (SMALL_SHAPES[1:2], (1, 128)) if quick else (SMALL_SHAPES, SMALL_TOKENS)
    for (out, inp), dtype, count in product(shapes, DTYPES, tokens):
        yield Case(out, inp, dtype, Spec(64, 2, 8), count, 1, "latency")


class Layers(nn.ModuleList):
    """Linears alike, each with an input of its own."""

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """What each layer makes of its input [T, in_features]."""
        return [layer(x) for layer, x in zip(self, inputs, strict=True)]


def run(case: Case, seconds: float) -> Result:
    """Measure one case; seconds are those of a layer."""
    forget_compiled()
    size = case.in_features, case.out_features
    model = Layers(nn.Linear(*size, dtype=case.dtype) for _ in range(case.layers)).eval()
    fill_with_pattern(model, case.spec)
    inputs = tuple(torch.randn(case.tokens, case.in_features).to(case.dtype) for _ in model)
    calls = contenders(model, inputs, case.policy)
    if case.policy == "latency":
        # What a call of any compiled function costs in Dynamo is not at issue here; eager has none of it.
        del calls["eager"]
    with torch.no_grad():
        return compare(calls, OURS, seconds, case.layers)
