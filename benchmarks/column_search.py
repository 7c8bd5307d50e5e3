"""How long the search for a mask takes: `python -m benchmarks.column_search [--write]`.

The mask of a random 2048 x 2048 matrix of scores in fp32, by the C++ that CPUs take and by the same search in torch;
they take turns, a row has medians. The last rows are patterns in which every choice is not tried: blocks of 64 columns
that keep 32, as the geometric structure decay has them, and 3 of 4 kept columns, as the stepwise one has them.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import torch
from rich.progress import track

from benchmarks.report import keep
from vnm_compile.machine import machine
from vnm_compile.prune import columns
from vnm_compile.prune.project import project_columns

SIZE, ROUNDS = 2048, 3
# V, columns that are kept, N, M
CASES = [
    (64, 4, 2, 8),
    (64, 4, 2, 16),
    (16, 4, 2, 16),
    (128, 4, 2, 10),
    (64, 4, 2, 32),
    (64, 32, 16, 64),
    (64, 4, 3, 8),
]


def measure() -> list[dict[str, Any]]:
    """Median seconds of either search."""
    scores, rows = torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(0)), []
    smallest = columns._NATIVE_FROM
    for v, width, n, m in track(CASES, description="searching"):
        taken: dict[str, list[float]] = {"native": [], "torch": []}
        for turn in range(ROUNDS + 1):
            for name, least in (("native", smallest), ("torch", 1 << 60)):
                columns._NATIVE_FROM = least
                start = time.perf_counter()
                project_columns(scores, v, width, n, m)
                if turn:  # the first one warms up
                    taken[name].append(time.perf_counter() - start)
        columns._NATIVE_FROM = smallest
        pattern = f"{v}:{n}:{m}" if width == 4 else f"{v}:{n}:{m}, {width} columns"
        rows.append({"pattern": pattern, **{name: median(each) for name, each in taken.items()}})
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = ["| pattern | torch, s | C++, s | torch / C++ |", "| --- | --- | --- | --- |"]
    for row in rows:
        ratio = row["torch"] / row["native"]
        lines.append(f"| {row['pattern']} | {row['torch']:.2f} | {row['native']:.3f} | {ratio:.0f} |")
    return "\n".join([*lines, "", "({cpu}; {threads} threads; torch {torch})".format(**machine())])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.column_search", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--write", action="store_true", help="into benchmarks/results and docs/pruning.md")
    options = parser.parse_args()
    rows = measure()
    print(markdown(rows))
    if options.write:
        keep("column_search", rows, markdown(rows), "pruning.md", "column search")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
