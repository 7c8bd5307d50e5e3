"""Speed against quality over patterns and values: `python -m benchmarks.frontier [--method second_order] [--write]`.

Quality: the pretrained MiniLM, all linears of its encoder pruned in one shot, on a quarter of the calibration data of
`benchmarks.prune`, and values rounded to the nearest, which data would do better (benchmarks.quantize); the mean cosine
similarity of held-out passages' embeddings to the dense model's. Speed: a linear of 4096 x 4096 in bf16 over the dense
one, as this machine's CPU takes them (what policy "latency" measures), and as the static model expects of an H200. A
point is on the front if no other is both faster and closer to the dense model.

Rows that were found before are kept: the command goes on where it was interrupted, and `--again` starts over.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import geometric_mean

import torch
from rich.progress import Progress
from torch import nn

import vnm_compile as vnm
import vnm_compile.codegen.kernels
from benchmarks import gpu_estimate
from benchmarks.prune import Data, embed, load
from benchmarks.report import ROOT, keep, save
from vnm_compile.codegen.measure import measure
from vnm_compile.layout import Layout
from vnm_compile.machine import machine
from vnm_compile.problem import Problem, Timing
from vnm_compile.quantization import Quantization
from vnm_compile.spec import Spec

RESULTS = ROOT / "benchmarks" / "results" / "frontier.json"
VS, MS, VALUES = (16, 32, 64, 128), (4, 5, 6, 8, 10, 16), ("bf16", "int8", "int4")
TOKENS, GPU_TOKENS, SIZE, GROUP = (1, 16, 512), (1, 2048), 4096, 64
SPEEDUPS = (2.0, 4.0, 8.0)  # that a point is chosen for


@dataclass(frozen=True)
class Point:
    """One pattern with one kind of values: similarity, and times faster than dense by device and tokens."""

    spec: str
    values: str
    similarity: float
    cpu: dict[str, float]
    h200: dict[str, float]

    def speed(self, device: str) -> float:
        """The geometric mean over numbers of tokens."""
        return geometric_mean(getattr(self, device).values())


def qualities(data: Data, spec: str, method: str) -> dict[str, float]:
    """Similarity of the pruned model by kind of values; bf16 stands for what is not rounded to integers."""
    pruned = copy.deepcopy(data.dense)
    batches = data.calibration[: len(data.calibration) // 4]
    vnm.sparsify(pruned, spec, method, include="encoder", calibration=batches, progress=False)
    found = {"bf16": _similarity(pruned, data)}
    for values in VALUES[1:]:
        model = copy.deepcopy(pruned)
        vnm.quantize(model, values, GROUP, progress=False)
        found[values] = _similarity(model, data)
    return found


def _similarity(model: nn.Module, data: Data) -> float:
    return float(nn.functional.cosine_similarity(embed(model, data.held_out), data.expected).mean())


def cpu_speeds(spec: str) -> dict[str, dict[str, float]]:
    """By kind of values and tokens."""
    device = torch.device("cpu")
    layouts = {values: _layout(spec, values) for values in VALUES}
    pairs = [(values, tokens) for values in VALUES for tokens in TOKENS]
    problems = [Problem(tokens, layouts[values], torch.bfloat16, device) for values, tokens in pairs]
    found: dict[str, dict[str, float]] = {values: {} for values in VALUES}
    for (values, tokens), timing in zip(pairs, measure(problems), strict=True):
        assert isinstance(timing, Timing), timing
        found[values][str(tokens)] = timing.dense / timing.sparse
    return found


def h200_speeds(spec: str, values: str) -> dict[str, float]:
    """By tokens, estimated: the kernel alone."""
    card, layout = gpu_estimate.card_called("H200"), _layout(spec, values)
    return {str(tokens): gpu_estimate.kernel_ratio(card, layout, tokens) for tokens in GPU_TOKENS}


def _layout(spec: str, values: str) -> Layout:
    quantization = None if values == "bf16" else Quantization.of(values, GROUP)
    return Layout(Spec.parse(spec), SIZE, SIZE, quantization)


def points(method: str, specs: list[str], again: bool) -> Iterator[Point]:
    """Every point, those that were found before first."""
    known = [] if again or not RESULTS.exists() else json.loads(RESULTS.read_text())["rows"]
    # What the static model expects may have changed since.
    known = [replace(Point(**row), h200=h200_speeds(row["spec"], row["values"])) for row in known]
    yield from known
    missing = [spec for spec in specs if spec not in {each.spec for each in known}]
    if not missing:
        return
    with Progress() as progress:
        for spec in progress.track(missing, description="speeds"):
            cpu_speeds(spec)  # kept on disk; nothing else should run meanwhile
        data = load()
        for spec in progress.track(missing, description="pruning"):
            similar, cpu = qualities(data, spec, method), cpu_speeds(spec)
            for values in VALUES:
                yield Point(spec, values, similar[values], cpu[values], h200_speeds(spec, values))


def front(found: list[Point], device: str) -> list[Point]:
    """The points that no other one beats in both, the fastest first."""
    best: list[Point] = []
    for each in sorted(found, key=lambda point: (-point.speed(device), -point.similarity)):
        if not best or each.similarity > best[-1].similarity:
            best.append(each)
    return best


def choose(found: list[Point], device: str, speedup: float) -> Point | None:
    """The point closest to the dense model among those that are fast enough."""
    fast = [each for each in found if each.speed(device) >= speedup]
    return max(fast, key=lambda point: point.similarity, default=None)


def table(found: list[Point]) -> str:
    """Markdown: the points of either front, the fastest on the CPU first."""
    on = {device: {id(each) for each in front(found, device)} for device in ("cpu", "h200")}
    headings = ["pattern", "values", "similarity", *(f"CPU T = {t}" for t in TOKENS)]
    headings += [*(f"H200 T = {t} (estimated)" for t in GPU_TOKENS), "on the front of"]
    lines = ["| " + " | ".join(headings) + " |", "| --- " * len(headings) + "|"]
    for each in sorted(found, key=lambda point: -point.speed("cpu")):
        where = ", ".join(name for device, name in (("cpu", "CPU"), ("h200", "H200")) if id(each) in on[device])
        if where:
            speeds = [f"{value:.2f}" for value in (*each.cpu.values(), *each.h200.values())]
            cells = [each.spec, each.values, f"{each.similarity:.3f}", *speeds, where]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def choices(found: list[Point]) -> str:
    """What to take for a speed-up, over the numbers of tokens."""
    told = []
    for device, name in (("cpu", "this CPU"), ("h200", "an H200 (estimated)")):
        picked = [(speedup, choose(found, device, speedup)) for speedup in SPEEDUPS]
        each = [f"{speedup:g}x: {it.spec} {it.values} ({it.similarity:.3f})" for speedup, it in picked if it]
        each += [f"{speedup:g}x: none" for speedup, it in picked if not it]
        told.append(f"On {name}, the geometric mean over tokens: " + "; ".join(each) + ".")
    return "\n\n".join(told)


def plot(found: list[Point], path: Path) -> None:
    """Similarity over speed, a panel a device; a colour a kind of values, a mark a V; the front as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    colours = dict(zip(VALUES, ("#4477aa", "#ee6677", "#228833"), strict=True))
    marks = dict(zip(VS, "o^sD", strict=True))
    titles = {"cpu": "this CPU (measured)", "h200": "H200 (estimated)"}
    for axes, device in zip(panels, titles, strict=True):
        for each in found:
            v = Spec.parse(each.spec).v
            axes.scatter(each.speed(device), each.similarity, s=22, color=colours[each.values], marker=marks[v])
        best = front(found, device)
        axes.plot([each.speed(device) for each in best], [each.similarity for each in best], color="#999999", zorder=0)
        for each in best:
            axes.annotate(f"{each.spec} {each.values}", (each.speed(device), each.similarity), fontsize=6)
        axes.set(xscale="log", xlabel="times faster than dense bf16, mean over tokens", title=titles[device])
    for label, colour in colours.items():
        panels[0].scatter([], [], s=22, color=colour, label=label)
    for v, mark in marks.items():
        panels[0].scatter([], [], s=22, color="#666666", marker=mark, label=f"V = {v}")
    panels[0].set_ylabel("similarity to the dense MiniLM, one shot")
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Find the points, one pattern at a time, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frontier", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--method", default="second_order", help="of pruning (default: %(default)s)")
    parser.add_argument("--specs", default=",".join(f"{v}:2:{m}" for m in MS for v in VS), help="patterns")
    parser.add_argument("--again", action="store_true", help="forget what was found before")
    parser.add_argument("--write", action="store_true", help="the table into docs/performance.md")
    options = parser.parse_args()
    found: list[Point] = []
    for point in points(options.method, options.specs.split(","), options.again):
        found.append(point)
        save("frontier", [asdict(each) for each in found])
    where = "({cpu}; {threads} threads; torch {torch})".format(**machine())
    told = f"{table(found)}\n\n{choices(found)}\n\n{where}"
    print(told)
    plot(found, RESULTS.with_suffix(".png"))
    if options.write:
        keep("frontier", [asdict(each) for each in found], told, "performance.md", "frontier")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
