"""Text generation on this machine's CPU: `python -m benchmarks.generate [--models 160M,1B] [--write]`.

Llama-shaped models with random weights generate greedily after a prompt, one sequence, through transformers' `generate`
with a static cache: dense bf16 in eager mode and compiled (with freezing), torchao's int8 and int4 weights, llama.cpp's
Q8_0 and Q4_0, and ours at 64:2:8 in bf16, int8 and int4. All linears are quantised or sparse in each, the head too. The
whole model is compiled. Each contender is a process of its own, taking turns; memory is what the process owns while it
generates, at most.

torchao, and llama-cpp-python with gguf, are installed by hand; a contender without its package is left out and named.
torch's 2:4 kernels run on no CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.progress import Progress

from benchmarks import generate_llama
from benchmarks.generate_models import SHAPES, random_model
from benchmarks.memory import Peak
from benchmarks.report import ROOT, keep
from vnm_compile.machine import machine
from vnm_compile.quantization import Quantization

LLAMA = {"llama.cpp Q8_0": "Q8_0", "llama.cpp Q4_0": "Q4_0"}
OURS: dict[str, Quantization | None] = {
    "vnm bf16": None,
    "vnm int8": Quantization(8, 64),
    "vnm int4": Quantization(4, 64),
}


def _torchao_int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def _torchao_int4() -> Any:
    # The layout for CPUs, which torchao 0.18 keeps among its prototypes.
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=64)


TORCHAO = {"torchao int8": _torchao_int8, "torchao int4": _torchao_int4}
CONTENDERS = ("dense, eager", "dense, compiled", *TORCHAO, *LLAMA, *OURS)
PROMPT, TOKENS, REPEATS = 64, 64, 3


def _torch_model(shape: str, contender: str) -> Any:
    """A transformers model, compiled unless it is the eager one."""
    model = random_model(shape, OURS.get(contender), sparse=contender in OURS)
    if contender in TORCHAO:
        from torchao.quantization import quantize_

        quantize_(model, TORCHAO[contender]())
    if contender != "dense, eager":
        backend = "vnm" if contender in OURS else "inductor"
        freezing = {"freezing": True} if contender.startswith("dense") else {}
        model.compile(backend=backend, dynamic=False, options=freezing)
    return model


def _torch_moments(model: Any) -> Callable[[list[int], int], Iterator[float]]:
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.moments: list[float] = []

        def put(self, value: Any) -> None:
            self.moments.append(time.perf_counter())

        def end(self) -> None:
            pass

    def moments(prompt: list[int], tokens: int) -> Iterator[float]:
        clock = Clock()
        ids = torch.tensor([prompt])
        options = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False, "streamer": clock}
        model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation="static", **options)
        yield from clock.moments[1:]  # the first is the prompt itself

    return moments


def measure(shape: str, contender: str, files: Path, threads: int) -> dict[str, float]:
    """Seconds to the first token, tokens a second after it, and the most memory owned: medians of a few runs."""
    torch.set_num_threads(threads)
    if contender in LLAMA:
        path = files / f"{shape}-{LLAMA[contender]}.gguf"
        if not path.exists():
            generate_llama.write_model(path, shape, LLAMA[contender])
        model = generate_llama.load(path, threads)

        def moments(prompt: list[int], tokens: int) -> Iterator[float]:
            return generate_llama.generate(model, prompt, tokens)
    else:
        moments = _torch_moments(_torch_model(shape, contender))
    prompt = [int(i) for i in torch.randint(10, 30000, (PROMPT,), generator=torch.Generator().manual_seed(1))]
    with torch.no_grad():
        list(moments(prompt, TOKENS))  # compiles, for the cache that so many tokens need
        peak = Peak()
        peak.start()
        taken = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            times = list(moments(prompt, TOKENS))
            taken.append((times[0] - start, (len(times) - 1) / (times[-1] - times[0])))
        peak.done.set()
        peak.join()
    first, speed = (median(each) for each in zip(*taken, strict=True))
    return {"first": first, "tokens_per_second": speed, "memory": float(peak.most)}


def _in_a_process(shape: str, contender: str, files: Path) -> dict[str, float] | str:
    """What a process of its own measured, or why it did not."""
    command = [sys.executable, "-m", "benchmarks.generate", "--one", shape, contender, str(files)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it died"]
        return lines[-1][:200]
    return json.loads(done.stdout.splitlines()[-1])


def run(shapes: list[str], contenders: list[str], rounds: int) -> list[dict[str, Any]]:
    """Every contender in turn, `rounds` times; a row has the medians."""
    rows = []
    with tempfile.TemporaryDirectory() as files, Progress() as progress:
        bar = progress.add_task("generating", total=len(shapes) * len(contenders) * rounds)
        for shape in shapes:
            found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
            for _ in range(rounds):
                for name in contenders:
                    progress.update(bar, description=f"{shape} {name}")
                    got = _in_a_process(shape, name, Path(files))
                    if isinstance(got, str):
                        progress.console.print(f"{shape} {name}: left out: {got}")
                    else:
                        found[name].append(got)
                    progress.advance(bar)
            rows += [
                {"model": shape, "contender": name, **{key: median(each[key] for each in got) for key in got[0]}}
                for name, got in found.items()
                if got
            ]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; speeds also over the fastest dense one of the same model."""
    lines = [
        "| model | | tokens a second | over dense | first token, ms | memory, GB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        dense = [
            each["tokens_per_second"]
            for each in rows
            if each["model"] == row["model"] and each["contender"].startswith("dense")
        ]
        over = f"{row['tokens_per_second'] / max(dense):.2f}" if dense else ""
        lines.append(
            f"| {row['model']} | {row['contender']} | {row['tokens_per_second']:.1f} | {over} | "
            f"{row['first'] * 1e3:.0f} | {row['memory'] / 1e9:.2f} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens a second, a panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = pyplot.subplots(1, len(shapes), figsize=(4.5 * len(shapes), 3.2), squeeze=False)
    for shape, axes in zip(shapes, panels[0], strict=True):
        those = [row for row in rows if row["model"] == shape]
        colours = ["#4477aa" if row["contender"] in OURS else "#bbbbbb" for row in those]
        axes.barh([row["contender"] for row in those], [row["tokens_per_second"] for row in those], color=colours)
        axes.invert_yaxis()
        axes.set_title(shape, fontsize=10)
        axes.set_xlabel("tokens a second")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--models", default=",".join(SHAPES), help=f"some of {', '.join(SHAPES)}")
    parser.add_argument("--contenders", action="append", choices=CONTENDERS, help="one (repeatable; default: all)")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results and docs/performance.md")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        shape, contender, files = options.one
        print(json.dumps(measure(shape, contender, Path(files), torch.get_num_threads())))
        return
    rows = run(options.models.split(","), options.contenders or list(CONTENDERS), options.rounds)
    told = (
        f"{table(rows)}\n\n({PROMPT} tokens of prompt, {TOKENS} generated; "
        + "{cpu}; {threads} threads; torch {torch})".format(**machine())
    )
    print(told)
    if options.write:
        keep("generate", rows, told, "performance.md", "generate")
        plot(rows, ROOT / "benchmarks" / "results" / "generate.png")


if __name__ == "__main__":
    main()
