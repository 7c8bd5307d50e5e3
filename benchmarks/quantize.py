"""What quantised values cost on top of pruning: `python -m benchmarks.quantize [--specs 64:2:8,16:2:8] [--write]`.

The real MiniLM, all linears of its encoder pruned with second-order information and then quantised, both on general
English (WordNet's glosses, Debian's package wordnet-base) and documentation, judged by other texts of both. The output
error of a layer is `||X W' - X W|| / ||X W||` against the dense weight, on the calibration data; the table has means
over the layers. Beside it the mean cosine similarity of embeddings to the dense model's.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

import vnm_compile as vnm
from benchmarks import minilm, minilm_texts
from benchmarks.report import keep
from vnm_compile.convert import compressed_layers
from vnm_compile.layers import Layer, linear_layers
from vnm_compile.machine import machine
from vnm_compile.prune.calibration import output_error, second_moments

WAYS: tuple[tuple[str, int | str, bool], ...] = (
    ("int8", 64, False),
    ("int8", 64, True),
    ("int4", 64, False),
    ("int4", 64, True),
    ("int4", 32, True),
)


@dataclass(frozen=True)
class Row:
    """One model: how its values are stored, what it takes, and how far it is from the dense one."""

    spec: str
    values: str
    calibrated: bool
    bytes: int
    error: float
    general: float
    docs: float


def figures(model: nn.Module, dense: nn.Module, moments: dict[str, Tensor], data: Any, expected: list[Tensor]) -> Any:
    """Mean output error over the layers, and similarities on general English and documentation."""
    before = {layer.name: layer.weight.detach() for layer in linear_layers(dense)}
    now = {layer.name: _dense(layer) for layer in linear_layers(model)}
    errors = [output_error(before[name], now[name], moment) for name, moment in moments.items()]
    return mean(errors), *(
        minilm.agreement(minilm.embed(model, found), each)[0]
        for found, each in zip((data.general, data.docs), expected, strict=True)
    )


def _dense(layer: Layer) -> Tensor:
    weight = layer.weight.detach()
    return weight.to_dense() if isinstance(weight, vnm.VNMTensor) else weight


def run(dense: nn.Module, data: Any, spec: str) -> Iterator[Row]:
    """Prune once, then quantise in every way."""
    layers = [layer for layer in linear_layers(dense) if layer.name.startswith("encoder")]
    moments = dict(zip((layer.name for layer in layers), second_moments(dense, layers, data.calibration), strict=True))
    expected = [minilm.embed(dense, found) for found in (data.general, data.docs)]
    pruned = copy.deepcopy(dense)
    vnm.sparsify(pruned, spec, method="second_order", calibration=data.calibration, include="encoder", progress=False)
    packed = copy.deepcopy(pruned)
    vnm.compress_model(packed)
    stored = sum(layer.stored.nbytes for layer in compressed_layers(packed))  # type: ignore[union-attr]
    yield Row(spec, "fp32", True, stored, *figures(pruned, dense, moments, data, expected))
    for values, group, calibrated in WAYS:
        model = copy.deepcopy(pruned)
        report = vnm.quantize(
            model, values, group, calibration=data.calibration if calibrated else None, progress=False
        )
        told = figures(model, dense, moments, data, expected)
        yield Row(spec, f"{values}/{group}", calibrated, report.totals["stored_bytes"], *told)


def table(rows: list[Row]) -> str:
    """Markdown; errors are also given over those of floats."""
    lines = [
        "| pattern | values | calibrated | MB | output error | over floats | general English | documentation |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    floats = {row.spec: row.error for row in rows if row.values == "fp32"}
    for row in rows:
        over = f"{row.error / floats[row.spec] - 1:+.1%}" if row.values != "fp32" else ""
        lines.append(
            f"| {row.spec} | {row.values} | {'yes' if row.calibrated else 'no'} | {row.bytes / 1e6:.2f} | "
            f"{row.error:.4f} | {over} | {row.general:.3f} | {row.docs:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--specs", default="64:2:8", help="patterns (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results and docs/quantization.md")
    options = parser.parse_args()
    dense, tokenizer = minilm.load()
    data, rows, specs = minilm_texts.texts(tokenizer), [], options.specs.split(",")
    with Progress() as progress:
        bar = progress.add_task("quantising", total=len(specs) * (1 + len(WAYS)))
        for spec in specs:
            for row in run(dense, data, spec):
                rows.append(row)
                progress.update(bar, advance=1, description=f"{row.spec} {row.values}")
    print(table(rows))
    if options.write:
        where = "({cpu}; {threads} threads; torch {torch})".format(**machine())
        keep(
            "quantize", [asdict(row) for row in rows], f"{table(rows)}\n\n{where}", "quantization.md", "quantize minilm"
        )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
