"""Layers with quantised values on this machine's CPU: `python -m benchmarks.cpu_quantised [--quick] [--write]`.

Linears of a 7B model with a bias, several a call, all ways of keeping the weight taking turns: dense bf16 (compiled
with freezing and max-autotune), torch's own int8 and int4 kernels for dense weights, and 64:2:8 in bf16, int8 and int4,
the latter two also with activations rounded to int8. A cell is milliseconds a layer; below the table are the ratios
that are asked for. Only the dense and the bf16 columns keep what they were given; every other one is an approximation
of its own.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from benchmarks.contenders import forget_compiled
from benchmarks.report import keep
from vnm_compile.codegen.random_arrays import random_packed
from vnm_compile.comparison import compare
from vnm_compile.layout import Layout
from vnm_compile.machine import machine
from vnm_compile.ops import linear
from vnm_compile.quantization import Quantization
from vnm_compile.spec import Spec

SHAPES, TOKENS, SPEC = ((4096, 4096), (11008, 4096)), (1, 4, 16, 128, 512), Spec(64, 2, 8)
GROUP, MOST_LAYERS, MODEL_BYTES = 64, 16, 512 << 20
OURS: dict[str, Quantization | None] = {
    "vnm bf16": None,
    "vnm int8": Quantization(8, GROUP),
    "vnm int8, a8": Quantization(8, GROUP, 8),
    "vnm int4": Quantization(4, GROUP),
    "vnm int4, a8": Quantization(4, GROUP, 8),
}
ASKED = (
    ("int8 over our bf16", "vnm int8", "vnm bf16", (1.6, 1.5, 1.3, None, None)),
    ("int8, a8 over our bf16", "vnm int8, a8", "vnm bf16", (None, None, None, 1.5, 1.5)),
    ("int4 over torch's dense int4", "vnm int4", "torch int4", (3, 3, 5, 8, 8)),
    ("int8 over torch's dense int8", "vnm int8", "torch int8", (3.5, 4, 8, 12, 12)),
    ("int8, a8 over torch's dense int8", "vnm int8, a8", "torch int8", (None, None, None, 12, 12)),
)


@dataclass(frozen=True)
class Row:
    """Median seconds a layer of each way, for one size and number of tokens."""

    out_features: int
    in_features: int
    tokens: int
    layers: int
    seconds: dict[str, float]


class Layers(nn.Module):
    """Linears alike, each on an input of its own; `product` multiplies by what is given for a weight."""

    def __init__(self, weights: list[tuple[Tensor, ...]], biases: list[Tensor], product: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weights, self.biases, self.product = weights, biases, product

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """What each layer makes of its input [T, in_features]."""
        return [
            self.product(x, *weight) + bias for x, weight, bias in zip(inputs, self.weights, self.biases, strict=True)
        ]


def _dense(weights: list[Tensor], biases: list[Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    layers = nn.ModuleList()
    for weight, bias in zip(weights, biases, strict=True):
        layer = nn.Linear(*reversed(weight.shape), device="meta", dtype=weight.dtype)
        layer.weight, layer.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
        layers.append(layer)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, *inputs: Tensor) -> list[Tensor]:
            return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]

    compiled: Any = torch.compile(Model(), options={"freezing": True, "max_autotune": True})
    with torch._inductor.config.patch(freezing=True):
        compiled(*inputs)
    return partial(compiled, *inputs)


def _torch_int8(weights: list[Tensor], biases: list[Tensor]) -> Layers:
    """torch's weight-only int8: one scale a row."""
    stored = []
    for weight in weights:
        scales = weight.float().abs().amax(1) / 127
        stored.append(((weight.float() / scales[:, None]).round().to(torch.int8), scales.to(weight.dtype)))
    return Layers(stored, biases, torch.ops.aten._weight_int8pack_mm)


def _torch_int4(weights: list[Tensor], biases: list[Tensor]) -> Layers:
    """torch's weight-only int4, groups of 64: levels 0 to 15, a scale and a zero each."""
    stored = []
    for weight in weights:
        groups = weight.float().unflatten(1, (-1, GROUP))
        scales = (groups.amax(-1) - groups.amin(-1)) / 15
        zeros = groups.amin(-1) + 8 * scales
        levels = ((groups - groups.amin(-1, keepdim=True)) / scales[..., None]).round().clamp(0, 15).flatten(1)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels.to(torch.int32), 1)
        stored.append((packed, torch.stack([scales.T, zeros.T], -1).contiguous().to(weight.dtype)))
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return Layers(stored, biases, lambda x, packed, scales: multiply(x, packed, GROUP, scales))


def _sparse(quantization: Quantization | None, shape: tuple[int, int], biases: list[Tensor]) -> Layers:
    layout = Layout(SPEC, *shape, quantization)
    stored = [tuple(random_packed(layout, torch.bfloat16, torch.device("cpu"), i)) for i in range(len(biases))]
    return Layers(stored, biases, lambda x, *arrays: linear(x, arrays, layout))


def measure(shape: tuple[int, int], tokens: int, seconds: float) -> Row:
    """One row of the table."""
    forget_compiled()
    out_features, in_features = shape
    count = min(MOST_LAYERS, MODEL_BYTES // (2 * out_features * in_features)) if tokens <= 16 else 2
    inputs = tuple(torch.randn(tokens, in_features).bfloat16() for _ in range(count))
    weights = [(torch.randn(shape) * in_features**-0.5).bfloat16() for _ in range(count)]
    biases = [torch.randn(out_features).bfloat16() for _ in range(count)]
    calls: dict[str, Callable[[], Any]] = {"dense bf16": _dense(weights, biases, inputs)}
    for name, make in (("torch int8", _torch_int8), ("torch int4", _torch_int4)):
        calls[name] = partial(torch.compile(make(weights, biases)), *inputs)
    for name, quantization in OURS.items():
        calls[name] = partial(torch.compile(_sparse(quantization, shape, biases), backend="vnm"), *inputs)
    result = compare(calls, "vnm int8", seconds * len(calls), count)
    return Row(out_features, in_features, tokens, count, result.seconds)


def rows(quick: bool, seconds: float) -> Iterator[Row]:
    """All rows, the slowest last."""
    for shape in SHAPES[: 1 if quick else None]:
        for tokens in TOKENS[: 2 if quick else None]:
            yield measure(shape, tokens, seconds)


def table(found: list[Row]) -> str:
    """Markdown: milliseconds a layer, then ratios with what is asked for."""
    names = list(found[0].seconds)
    lines = [f"| O x K | T | {' | '.join(names)} |", "| --- | --- |" + " --- |" * len(names)]
    for row in found:
        cells = " | ".join(f"{row.seconds[name] * 1e3:.3f}" for name in names)
        lines.append(f"| {row.out_features} x {row.in_features} | {row.tokens} | {cells} |")
    lines += ["", "| ratio (asked) | O x K |" + "".join(f" T = {tokens} |" for tokens in TOKENS)]
    lines.append("| --- | --- |" + " --- |" * len(TOKENS))
    for shape in dict.fromkeys((row.out_features, row.in_features) for row in found):
        by_tokens = {row.tokens: row.seconds for row in found if (row.out_features, row.in_features) == shape}
        for title, ours, other, asked in ASKED:
            cells = []
            for tokens, goal in zip(TOKENS, asked, strict=True):
                if tokens not in by_tokens:
                    cells.append("")
                    continue
                ratio = by_tokens[tokens][other] / by_tokens[tokens][ours]
                missed = " !" if goal is not None and ratio < goal else ""
                cells.append(f"{ratio:.2f}{missed}" + (f" ({goal:g})" if goal is not None else ""))
            lines.append(f"| {title} | {shape[0]} x {shape[1]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_quantised", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="two rows")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing each way (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results and docs/performance.md")
    options = parser.parse_args()
    logging.getLogger("torch").setLevel(logging.ERROR)
    torch._dynamo.config.recompile_limit = 64
    found = []
    with Progress() as progress, torch.no_grad():
        bar = progress.add_task("timing", total=len(SHAPES) * len(TOKENS))
        for row in rows(options.quick, options.seconds):
            found.append(row)
            progress.console.print(row)
            progress.advance(bar)
    told = table(found) + "\n\n({cpu}; {threads} threads; torch {torch})".format(**machine())
    print(told)
    if options.write:
        keep("cpu_quantised", [asdict(row) for row in found], told, "performance.md", "cpu quantised")


if __name__ == "__main__":
    main()
