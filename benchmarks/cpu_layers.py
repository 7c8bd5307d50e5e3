"""One linear layer at a time: shapes, dtypes, token counts and patterns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import nn

from benchmarks.contenders import OURS, contenders, random_weight
from benchmarks.timing import Result, compare
from vnm_compile.spec import Spec

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
SMALL_SHAPES = ((64, 64), (384, 384), (1536, 384), (384, 1536), (1024, 1024), (3072, 768))
DTYPES = (torch.float32, torch.bfloat16)
SPECS = ("64:2:8", "64:2:16", "64:2:5")
TOKENS = (1, 16, 128, 512)
SMALL_TOKENS = (1, 16, 128, 1024, 4096)

# What is asked for on 4096 x 4096, by dtype, pattern and tokens; 85 % of it on the other two shapes.
TARGETS = {
    (torch.float32, "64:2:8"): (4.0, 2.4, 1.6, 1.6),
    (torch.float32, "64:2:16"): (8.0, 4.5, 3.0, 3.0),
    (torch.bfloat16, "64:2:8"): (3.0, 2.0, 1.3, 1.3),
    (torch.bfloat16, "64:2:16"): (5.0, 3.5, 2.2, 2.2),
}


@dataclass(frozen=True)
class Case:
    """A layer `[tokens, in_features] @ [out_features, in_features].T + bias`; `cold` as in `timing.compare`."""

    out_features: int
    in_features: int
    dtype: torch.dtype
    spec: Spec
    tokens: int
    cold: bool
    policy: str

    @property
    def limit(self) -> float:
        """How much faster it could be: by the bytes of the weight up to 4 tokens, by its non-zeros beyond."""
        if self.tokens <= 4:
            dense = self.out_features * self.in_features * self.dtype.itemsize
            return dense / self.spec.nbytes(self.out_features, self.in_features, self.dtype)
        return self.spec.m / self.spec.n

    @property
    def target(self) -> float | None:
        """The ratio that is asked for, where one is."""
        if self.policy == "latency":
            return 0.97
        if str(self.spec) == "64:2:5":
            return 1.0
        targets = TARGETS.get((self.dtype, str(self.spec)))
        if targets is None or self.cold or self.tokens not in TOKENS:
            return None
        share = 1.0 if (self.out_features, self.in_features) == SHAPES[0] else 0.85
        return targets[TOKENS.index(self.tokens)] * share


def large(quick: bool) -> Iterator[Case]:
    """Layers of a 7B-parameter model, always sparse (policy "memory"); T = 1 with warm and with cold caches."""
    shapes, specs = (SHAPES[:1], SPECS[:1]) if quick else (SHAPES, SPECS)
    for (out, inp), dtype, spec in product(shapes, DTYPES, specs):
        yield Case(out, inp, dtype, Spec.parse(spec), 1, True, "memory")
        for tokens in TOKENS:
            yield Case(out, inp, dtype, Spec.parse(spec), tokens, False, "memory")


def small(quick: bool) -> Iterator[Case]:
    """Layers where sparse does not always win, under policy "latency": is anything slower than dense?"""
    shapes, tokens = (SMALL_SHAPES[1:2], (1, 128)) if quick else (SMALL_SHAPES, SMALL_TOKENS)
    for (out, inp), dtype, count in product(shapes, DTYPES, tokens):
        yield Case(out, inp, dtype, Spec(64, 2, 8), count, False, "latency")


def run(case: Case, seconds: float) -> Result:
    """Measure one case."""
    layer = nn.Linear(case.in_features, case.out_features, dtype=case.dtype).eval()
    layer.weight.data = random_weight(case.out_features, case.in_features, case.spec, case.dtype)
    x = torch.randn(case.tokens, case.in_features).to(case.dtype)
    calls = contenders(layer, (x,), case.policy)
    if case.policy == "latency":
        # What a call of any compiled function costs in Dynamo is not at issue here; eager has none of it.
        del calls["eager"]
    with torch.no_grad():
        return compare(calls, OURS, seconds, case.cold)
