"""Seconds to the first answer, beside plain Inductor: `python -m benchmarks.compile_time [--rounds 3] [--models ...]`.

From `torch.compile(model)` to the end of the first call, each in a process of its own. *Cold*: nothing was compiled
before on this machine but Inductor's precompiled header, which all programs share. *Warm*: the same program has run.
The contestants take turns; a row has medians, and ours over Inductor's. Imports, making and pruning the model are
not in it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import keep
from vnm_compile.machine import machine

ROOT = Path(__file__).resolve().parent.parent
MODELS = {
    "MiniLM": "MiniLM-L6, 8 x 128 tokens, fp32",
    "Llama block": "Llama-7B block, decode after 256, bf16",
}
CONTENDERS = {"Inductor": {"backend": "inductor"}, "vnm": {"backend": "vnm"}}
ASKED = {"cold": 1.3, "warm": 1.0}


def first_answer(model: str, contender: str) -> float:
    """Seconds to the first answer, in this process."""
    import torch

    from benchmarks.cpu_models import MODELS as MAKE

    torch.manual_seed(0)
    module, args = MAKE[MODELS[model]][1]()
    with torch.no_grad():
        module(*args)  # libraries that the first product loads are no one's compile time
        start = time.perf_counter()
        torch.compile(module, **CONTENDERS[contender])(*args)
        return time.perf_counter() - start


def _in_a_process(model: str, contender: str, cache: str) -> float:
    command = [sys.executable, "-m", "benchmarks.compile_time", "--one", model, contender]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{model} with {contender}: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.splitlines()[-1])


def measure(model: str, rounds: int) -> list[dict[str, Any]]:
    """Cold and warm seconds of each contender: one row each way."""
    with tempfile.TemporaryDirectory() as cache:  # the header that is compiled once a machine, for all programs
        _in_a_process(model, "Inductor", cache)
    taken: dict[str, dict[str, list[float]]] = {way: {name: [] for name in CONTENDERS} for way in ASKED}
    for _ in range(rounds):
        for name in CONTENDERS:
            with tempfile.TemporaryDirectory() as cache:
                for way in ASKED:
                    taken[way][name].append(_in_a_process(model, name, cache))
    rows = []
    for way, asked in ASKED.items():
        dense, ours = (median(taken[way][name]) for name in CONTENDERS)
        rows.append(
            {"model": model, "start": way, "inductor": dense, "vnm": ours, "ratio": ours / dense, "asked": asked}
        )
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table; a ratio above what was asked for carries an exclamation mark."""
    lines = ["| model | start | Inductor s | vnm s | ratio | asked |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        missed = " !" if row["ratio"] > row["asked"] else ""
        lines.append(
            f"| {row['model']} | {row['start']} | {row['inductor']:.1f} | {row['vnm']:.1f} | "
            f"{row['ratio']:.2f}{missed} | {row['asked']:.1f} |"
        )
    return "\n".join([*lines, "", "({cpu}; {threads} threads; torch {torch})".format(**machine())])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_time", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind (default 3)")
    parser.add_argument("--models", default=",".join(MODELS), help=f"some of {', '.join(MODELS)}")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "CONTENDER"), help="one time, in this process")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results and docs/performance.md")
    options = parser.parse_args()
    if options.one:
        print(first_answer(*options.one))
        return
    rows = [row for model in options.models.split(",") for row in measure(model, options.rounds)]
    print(markdown(rows))
    if options.write:
        keep("compile_time", rows, markdown(rows), "performance.md", "compile time")


if __name__ == "__main__":
    main()
