"""What the static model expects of every card, without one: `python -m benchmarks.gpu --estimate [--write]`.

The table of targets of `benchmarks.gpu`, filled in with estimates: ours by the model that ranks configurations, with
the copy that orders activations before it where there is more than one token; dense by what cuBLAS reached on an H200,
as shares of that card's bandwidth and peak. Predictions, to be held against the first run on a card.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from statistics import geometric_mean
from typing import Any

import torch

from benchmarks.gpu_cases import LARGE, SPECS, TARGETS, TOKENS
from benchmarks.report import ROOT, keep
from vnm_compile.codegen.triton.configs import Config, Shape, configurations
from vnm_compile.codegen.triton.sparse_configs import SparseConfig, of_both_kinds
from vnm_compile.codegen.triton.vector_configs import vector_configurations
from vnm_compile.hardware import CARDS, Target
from vnm_compile.inspection.limits import estimated_seconds, least_seconds
from vnm_compile.layout import Layout
from vnm_compile.spec import Spec

DTYPE = torch.bfloat16
SHOWN = ("A100-SXM4-80GB", "RTX 3090", "RTX 4090", "H100", "H200", "B200", "RTX 5090", "MI300X", "RX 7900 XTX")
"""The cards that are shown: the one that stands for each architecture, and the H100."""

# Of cuBLAS on an H200 (benchmarks/results/gpu_tiles.json).
_LAUNCH_SECONDS = 3.8e-6
_OF_BANDWIDTH, _OF_PEAK = 0.84, 0.81
# Of the kernel that orders activations, timed there: 3.5 to 5 us for few tokens, and 0.69 of bandwidth.
_COPY_SECONDS, _COPY_OF_BANDWIDTH = 3.5e-6, 0.69


@dataclass(frozen=True)
class Estimate:
    """Of one pattern and number of tokens on a card: the geometric mean over `LARGE` of dense over sparse time, what
    bounds the sparse kernels (of each shape), and which kernels they are."""

    card: str
    spec: str
    tokens: int
    ratio: float
    bound: tuple[str, ...]
    kernels: tuple[str, ...]


def estimates(cards: Iterable[Target]) -> Iterator[Estimate]:
    """Of all patterns and numbers of tokens."""
    for card in cards:
        for spec in SPECS:
            for tokens in TOKENS:
                layers = [_layer(card, Spec.parse(spec), tokens, *sizes) for sizes in LARGE]
                ratio = geometric_mean(dense / ours for dense, ours, *_ in layers)
                bounds, kernels = (tuple(layer[i] for layer in layers) for i in (2, 3))
                yield Estimate(card.card, spec, tokens, ratio, bounds, kernels)


def _layer(card: Target, spec: Spec, tokens: int, out_features: int, in_features: int) -> tuple[float, float, str, str]:
    """Seconds of dense and ours, what bounds ours, and its kernel."""
    layout = Layout(spec, out_features, in_features)
    shape = shape_of(layout, tokens)
    config = first_config(card, shape)
    copy = 0.0
    if not config.is_vector:
        copy = _COPY_SECONDS + 2 * tokens * in_features * DTYPE.itemsize / (_COPY_OF_BANDWIDTH * card.bandwidth)
    read, written = (tokens * features * DTYPE.itemsize for features in (in_features, out_features))
    stored = layout.nbytes(DTYPE) + read + written
    least = least_seconds(config, shape, card, stored, written, multiplies=not config.is_vector)
    dense = dense_seconds(card, tokens, out_features, in_features)
    return dense, estimated_seconds(config, shape, card) + copy, max(least, key=least.__getitem__), _kernel(config)


def shape_of(layout: Layout, tokens: int) -> Shape:
    """What the choice of a configuration depends on, in bf16."""
    return Shape(tokens, layout.rows, layout.groups, layout.spec, DTYPE, False, layout.quantization)


def first_config(card: Target, shape: Shape) -> Config:
    """The one that is tried first."""
    if shape.tokens == 1 and card.backend == "cuda":
        return vector_configurations(shape)[0]
    ranked = configurations(shape, card)
    return (of_both_kinds(ranked, shape, card, most=1) if card.sparse_flops else ranked)[0]


def _kernel(config: Config) -> str:
    if isinstance(config, SparseConfig):
        return "sparse cores"
    return "vector" if config.is_vector else "dense cores"


def dense_seconds(card: Target, tokens: int, out_features: int, in_features: int) -> float:
    """What a dense layer in bf16 takes: launch, and the longer of memory and arithmetic."""
    moved = DTYPE.itemsize * (out_features * in_features + tokens * (in_features + out_features))
    flops = 2.0 * tokens * out_features * in_features
    return _LAUNCH_SECONDS + max(moved / (_OF_BANDWIDTH * card.bandwidth), flops / (_OF_PEAK * card.half_flops))


def held_against_h200() -> dict[tuple[str, int], tuple[float, float]]:
    """(measured, estimated) ratio of dense to sparse time on an H200, by pattern and tokens.

    Of the kernels alone, the geometric mean over `LARGE`; measured is the best configuration, estimated the one that
    the model would take.
    """
    rows = json.loads((ROOT / "benchmarks" / "results" / "gpu_tiles.json").read_text())["rows"]
    best: dict[tuple[str, int, int, int], float] = {}
    for row in rows:
        case = (row["spec"], row["tokens"], row["out"], row["in"])
        best[case] = max(best.get(case, 0.0), row["dense_us"] / row["us"])
    card = card_called("H200")
    found = {}
    for spec, tokens in dict.fromkeys(case[:2] for case in best):
        if all((spec, tokens, *sizes) in best for sizes in LARGE):
            estimated = [kernel_ratio(card, Layout(Spec.parse(spec), *sizes), tokens) for sizes in LARGE]
            found[spec, tokens] = (
                geometric_mean(best[spec, tokens, *sizes] for sizes in LARGE),
                geometric_mean(estimated),
            )
    return found


def kernel_ratio(card: Target, layout: Layout, tokens: int) -> float:
    """Dense over sparse time of the kernel alone, without copies."""
    shape = shape_of(layout, tokens)
    ours = estimated_seconds(first_config(card, shape), shape, card)
    return dense_seconds(card, tokens, layout.out_features, layout.in_features) / ours


def card_called(name: str) -> Target:
    """The card of this name.

    Raises:
        StopIteration: there is none.
    """
    return next(card for card in CARDS if card.card == name)


def table(found: list[Estimate]) -> str:
    """Markdown: a row a card and M, with the V that is best over all numbers of tokens."""
    lines = [
        "| card | M | V | " + " | ".join(f"T = {tokens}" for tokens in TOKENS) + " |",
        "| --- " * (len(TOKENS) + 3) + "|",
    ]
    for m, targets in TARGETS.items():
        lines.append(f"| *asked of H100 and H200* | {m} | | " + " | ".join(map(str, targets)) + " |")
    for card in dict.fromkeys(each.card for each in found):
        for m in TARGETS:
            those = [each for each in found if each.card == card and each.spec.endswith(f":2:{m}")]
            spec, its = max(_by_spec(those).items(), key=lambda each: geometric_mean(one.ratio for one in each[1]))
            cells = [f"{each.ratio:.2f} {'/'.join(dict.fromkeys(each.bound))}" for each in its]
            lines.append(f"| {card} | {m} | {Spec.parse(spec).v} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _by_spec(found: Iterable[Estimate]) -> dict[str, list[Estimate]]:
    by_spec: dict[str, list[Estimate]] = {}
    for each in found:
        by_spec.setdefault(each.spec, []).append(each)
    return by_spec


def run(write: bool) -> str:
    """The table; written into benchmarks/results and docs/performance.md if wanted."""
    found = list(estimates(card_called(name) for name in SHOWN))
    off = [estimated / measured for measured, estimated in held_against_h200().values()]
    told = (
        f"{table(found)}\n\nEstimated, not measured; but for the H200's kernels alone, without copies, of which "
        f"{len(off)} such ratios were timed: the estimates are {min(off):.2f} to {max(off):.2f} times those."
    )
    if write:
        rows: list[dict[str, Any]] = [asdict(each) for each in found]
        keep("gpu_estimate", rows, told, "performance.md", "gpu estimate")
    return told
