"""Every recipe against every other on the real MiniLM: `python -m benchmarks.distill_recipes [--steps 200] [--write]`.

All linears of the encoder get to 64:2:8 from the dense weights, drawn to the dense model as in `benchmarks.distill`:
the same steps, batches, learning rates and loss for all. Two runs start from a model that was pruned in one shot, by
magnitudes and with second-order information, and keep its masks. Products are those of masked dense weights, in bf16
where the CPU has units for it.

With `--write`, runs that were made before are kept, and what comes is kept as it comes; `--again` starts over.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.progress import Progress
from torch import nn

import vnm_compile as vnm
from benchmarks.distill import RESULTS
from benchmarks.minilm import INCLUDE, RATE, Judge, draw_to, load, multiplies_bf16, optimizer_of, train_without_dropout
from benchmarks.minilm_texts import Texts, texts
from benchmarks.report import keep, save
from vnm_compile import train
from vnm_compile.machine import machine

SPEC = "64:2:8"
FIXED = {"fixed": 0.3}  # share of the steps that is left for training under the final masks


@dataclass(frozen=True)
class Way:
    """How a model gets into the pattern: pruned at first by a method, or not, and then trained by a recipe, or not."""

    method: str | None
    recipe: train.Recipe | None


WAYS = {
    "one shot, magnitude": Way("magnitude", None),
    "one shot, second order": Way("second_order", None),
    "fixed mask, from magnitude": Way("magnitude", train.FixedMask()),
    "fixed mask, from second order": Way("second_order", train.FixedMask()),
    "SR-STE": Way(None, train.SRSTE(**FIXED)),
    "SR-STE, decoupled": Way(None, train.SRSTE(decay=0.1, decoupled=True, **FIXED)),
    "mask decay, linear, scaled": Way(None, train.MaskDecay(decay="linear", **FIXED)),
    "mask decay, exponential, scaled": Way(None, train.MaskDecay(**FIXED)),
    "mask decay, exponential, straight through": Way(None, train.MaskDecay(grad="ste", **FIXED)),
    "structure decay, stepwise": Way(None, train.StructureDecay(**FIXED)),
    "structure decay, geometric": Way(None, train.StructureDecay(kind="geometric", **FIXED)),
}


@dataclass(frozen=True)
class Run:
    """What came of a way; the figures of general English, then those of documentation."""

    name: str
    steps: int
    seconds: float
    cosine: float
    pairs: float
    docs_cosine: float
    docs_pairs: float
    mask_share: float
    curve: list[float] = field(repr=False)


def run(
    name: str,
    dense: nn.Module,
    data: Texts,
    judge: Judge,
    steps: int,
    moved: Callable[[float], None] = lambda loss: None,
) -> Run:
    """Go one way and judge where it led; the training is seeded alike for all."""
    begin, way = time.perf_counter(), WAYS[name]
    torch.manual_seed(0)
    model, share = copy.deepcopy(dense), 0.0
    curve: list[float] = []
    if way.method is not None:
        vnm.sparsify(model, SPEC, way.method, calibration=data.calibration, include=INCLUDE, progress=False)
    if way.recipe is not None:
        train_without_dropout(model)
        optimizer = optimizer_of(model, RATE)
        spec = None if way.method is not None else SPEC
        training = train.begin(model, spec, way.recipe, steps, optimizer=optimizer, include=INCLUDE)
        curve = draw_to(dense, model, optimizer, data, 0, steps, moved, autocast=multiplies_bf16())
        share = training.mask_share
        training.finalize()
    return Run(name, len(curve), time.perf_counter() - begin, *judge(model), share, curve)


def table(runs: list[Run]) -> str:
    """Markdown."""
    lines = [
        "| | minutes | general English: cosine | pairs | documentation: cosine | pairs | masks, % of the time |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in runs:
        figures = " | ".join(f"{f:.3f}" for f in (each.cosine, each.pairs, each.docs_cosine, each.docs_pairs))
        share = f"{100 * each.mask_share:.1f}" if each.curve else ""
        lines.append(f"| {each.name} | {each.seconds / 60:.1f} | {figures} | {share} |")
    return "\n".join(lines)


def plot(runs: list[Run], path: Path) -> None:
    """Losses along the way, means of 10 steps; beside them what they came to on either kind of text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5))
    colours: dict[str, str] = {}
    for each in runs:
        if each.curve:
            means = torch.tensor(each.curve)[: len(each.curve) // 10 * 10].view(-1, 10).mean(1)
            line = left.plot([10 * i + 5 for i in range(len(means))], means, label=each.name, linewidth=1.2)[0]
            colours[each.name] = line.get_color()
    left.set(yscale="log", xlabel="optimizer steps", ylabel="distillation loss", title=f"MiniLM on its way to {SPEC}")
    if colours:
        left.legend(fontsize=7)
    places = range(len(runs))
    for each, place in zip(reversed(runs), places, strict=True):
        colour = colours.get(each.name, "#999999")
        right.barh(place + 0.2, each.cosine, 0.38, color=colour)
        right.barh(place - 0.2, each.docs_cosine, 0.38, color=colour, alpha=0.55)
    right.set_yticks(places, [each.name for each in reversed(runs)], fontsize=7)
    right.set(xlabel="mean cosine to the dense embeddings: general English, documentation (pale)", xlim=(0, 1))
    right.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def known_runs(steps: int) -> list[Run]:
    """What was found before with as many steps."""
    path = RESULTS / "distill_recipes.json"
    found = [Run(**row) for row in json.loads(path.read_text())["rows"]] if path.exists() else []
    return [each for each in found if each.steps in (0, steps)]


def main() -> None:
    """Go every way that was not gone, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distill_recipes", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each run, of 2,048 tokens")
    parser.add_argument("--only", action="append", metavar="WAY", choices=list(WAYS), help="one (repeatable)")
    parser.add_argument("--again", action="store_true", help="forget what was found before")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results and docs/training.md")
    options = parser.parse_args()
    runs = known_runs(options.steps) if options.write and not options.again else []
    missing = [name for name in options.only or WAYS if name not in {each.name for each in runs}]
    dense, tokenizer = load()
    data = texts(tokenizer)
    judge = Judge(dense, data)
    with Progress() as progress:
        bar = progress.add_task("", total=options.steps * sum(WAYS[name].recipe is not None for name in missing))
        for name in missing:
            progress.update(bar, description=name)

            def moved(loss: float, name: str = name) -> None:
                progress.update(bar, advance=1, description=f"{name}: {loss:.3f}")

            runs.append(run(name, dense, data, judge, options.steps, moved))
            print(runs[-1], flush=True)
            if options.write:
                save("distill_recipes", [kept(each) for each in runs])
    runs.sort(key=lambda each: list(WAYS).index(each.name))
    print(table(runs))
    if options.write:
        where = "({cpu}; {threads} threads; torch {torch}; ".format(**machine())
        text = f"{table(runs)}\n\n{where}{options.steps} steps)"
        keep("distill_recipes", [kept(each) for each in runs], text, "training.md", "training minilm recipes")
        plot(runs, RESULTS / "distill_recipes.png")


def kept(each: Run) -> dict[str, object]:
    """A run as it is saved."""
    return {**asdict(each), "curve": [round(loss, 5) for loss in each.curve]}


if __name__ == "__main__":
    main()
