"""Sparse against dense on this machine's CPU: `python -m benchmarks.cpu [--quick] [--sections layers,small,models]`.

Every row times five ways of computing the same thing in turn: eager, torch.compile, with freezing, with freezing and
max-autotune, and backend="vnm". The ratio is that of the medians, the fastest of the dense ones over ours; quartiles
are of the ratio round by round. Results go to benchmarks/results (JSON, PNG) and into docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import cpu_layers, cpu_models
from benchmarks.contenders import OURS
from benchmarks.report import Row, markdown, plot, replace_between, show
from vnm_compile.comparison import Result
from vnm_compile.machine import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SECTIONS = {
    "layers": "One linear with bias, policy memory",
    "small": "One linear with bias, policy latency: never slower than dense",
    "models": "Whole models, policy latency",
}


def _row(
    section: str, result: Result, what: tuple[str, str, str, str], limit: float | None, target: float | None
) -> Row:
    dense, sparse = result.seconds[result.baseline], result.seconds[OURS]
    name, dtype, spec, tokens = what
    figures = (result.baseline, dense, sparse, result.ratio, result.low, result.high)
    return Row(section, name, dtype, spec, tokens, *figures, limit, target)


def _layers(section: str, quick: bool, seconds: float) -> Iterator[Row]:
    for case in (cpu_layers.large if section == "layers" else cpu_layers.small)(quick):
        result = cpu_layers.run(case, seconds)
        name = f"{case.out_features} x {case.in_features}"
        tokens = f"{case.tokens}{f' ({case.layers} layers)' if case.layers > 1 else ''}"
        what = (name, str(case.dtype).removeprefix("torch."), str(case.spec), tokens)
        yield _row(section, result, what, case.limit, case.target)


def _models(quick: bool, seconds: float) -> Iterator[Row]:
    for name in list(cpu_models.MODELS)[: 1 if quick else None]:
        result = cpu_models.run(name, 4 * seconds)
        yield _row("models", result, (name, "", str(cpu_models.SPEC), ""), None, cpu_models.MODELS[name][0])


def _measure(section: str, quick: bool, seconds: float) -> list[Row]:
    rows = []
    for row in _models(quick, seconds) if section == "models" else _layers(section, quick, seconds):
        print(section, *row.cells, sep="  ", flush=True)
        rows.append(row)
    show(rows, SECTIONS[section])
    return rows


def _save(section: str, rows: list[Row]) -> None:
    path = RESULTS / "cpu.json"
    RESULTS.mkdir(exist_ok=True)
    saved = json.loads(path.read_text()) if path.exists() else {}
    saved[section] = {"machine": machine(), "rows": [row._asdict() for row in rows]}
    path.write_text(json.dumps(saved, indent=1) + "\n")
    plot(rows, RESULTS / f"cpu_{section}.png", SECTIONS[section])
    replace_between(ROOT / "docs" / "performance.md", f"cpu {section}", markdown(rows))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a few cases; writes no files")
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"some of {', '.join(SECTIONS)}")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing a case")
    options = parser.parse_args()
    logging.getLogger("torch").setLevel(logging.ERROR)
    torch._dynamo.config.recompile_limit = 64
    for section in options.sections.split(","):
        rows = _measure(section, options.quick, options.seconds)
        if not options.quick:
            _save(section, rows)


if __name__ == "__main__":
    main()
