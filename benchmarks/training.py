"""Every recipe against every other at equal steps: `python -m benchmarks.training [--task text] [--write]`.

A small ViT on the handwritten digits that come with scikit-learn, or a small GPT on the documentation that comes with
Python, from random weights. Each run has the same steps, batches and learning rates; only how the linears of the
blocks get into the pattern differs.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.progress import Progress

import vnm_compile as vnm
from benchmarks.report import replace_between
from benchmarks.training_tasks import TASKS, Task
from vnm_compile import train
from vnm_compile.machine import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SPEC, RATE = "64:2:8", 1e-3
PRUNED_AT = 0.4  # share of the steps, where a run is pruned in one shot and goes on
MASKED = {"dense": 0.25, "fixed": 0.15}

Recipes = dict[str, train.Recipe | None]
RECIPES: Recipes = {
    "dense": None,
    "one shot, at the end": None,
    "one shot after 40 %, fixed mask": train.FixedMask(),
    "SR-STE": train.SRSTE(**MASKED),
    "SR-STE, decoupled": train.SRSTE(decay=0.1, decoupled=True, **MASKED),
    "mask decay, linear, scaled": train.MaskDecay(decay="linear", **MASKED),
    "mask decay, exponential, scaled": train.MaskDecay(**MASKED),
    "mask decay, exponential, straight through": train.MaskDecay(grad="ste", **MASKED),
    "structure decay, stepwise": train.StructureDecay(**MASKED),
    "structure decay, geometric": train.StructureDecay(kind="geometric", **MASKED),
}


@dataclass(frozen=True)
class Run:
    """What came of one run: accuracy and loss on held-out data, losses along the way, share of the time for masks."""

    accuracy: float
    loss: float
    curve: list[float]
    mask_share: float


def run(name: str, task: type[Task], seed: int, steps: int, moved: Callable[[], None] = lambda: None) -> Run:
    """Train one model."""
    torch.manual_seed(seed)
    work = task(seed)
    model, recipe = work.model(), RECIPES[name]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    training, begins = None, int(PRUNED_AT * steps) if isinstance(recipe, train.FixedMask) else 0
    curve = []
    for step in range(steps):
        if recipe is not None and step == begins:
            if begins:
                vnm.sparsify(model, SPEC, include="blocks", progress=False)
            training = train.begin(model, SPEC, recipe, steps - begins, optimizer=optimizer, include="blocks")
        loss = work.loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        curve.append(loss.item())
        moved()
    if training is not None:
        training.finalize()
    elif name != "dense":
        vnm.sparsify(model, SPEC, include="blocks", progress=False)
    loss_held, accuracy = work.judge(model.eval())
    return Run(accuracy, loss_held, curve, training.mask_share if training else 0.0)


def table(runs: dict[str, list[Run]]) -> str:
    """Means and spreads as Markdown."""
    lines = ["| recipe | accuracy, % | held-out loss | masks, % of the time |", "| --- | --- | --- | --- |"]
    for name, each in runs.items():
        accuracies, losses = [100 * r.accuracy for r in each], [r.loss for r in each]
        spread = [f" ± {stdev(v):.{d}f}" if len(v) > 1 else "" for v, d in ((accuracies, 2), (losses, 3))]
        share = f"{100 * mean(r.mask_share for r in each):.1f}" if each[0].mask_share else ""
        lines.append(f"| {name} | {mean(accuracies):.2f}{spread[0]} | {mean(losses):.3f}{spread[1]} | {share} |")
    return "\n".join(lines)


def plot(runs: dict[str, list[Run]], title: str, path: Path) -> None:
    """Training losses, averaged over seeds and 50 steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5))
    for name, each in runs.items():
        losses = torch.tensor([r.curve for r in each]).mean(0)
        smooth = losses[: len(losses) // 50 * 50].view(-1, 50).mean(1)
        axes.plot([50 * i + 25 for i in range(len(smooth))], smooth, label=name, linewidth=1.2)
    axes.set_yscale("log")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("training loss")
    axes.set_title(f"{title} on its way to {SPEC}", fontsize=10)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write(task: str, runs: dict[str, list[Run]], about: dict[str, Any]) -> None:
    """Results as JSON, the plot, and the table in the docs."""
    figures = {
        name: [vars(each) | {"curve": [round(loss, 5) for loss in each.curve[::25]]} for each in r]
        for name, r in runs.items()
    }
    (RESULTS / f"training_{task}.json").write_text(json.dumps({**about, "runs": figures}, indent=1) + "\n")
    plot(runs, TASKS[task].title, RESULTS / f"training_{task}.png")
    seeds = len(next(iter(runs.values())))
    where = "({cpu}; {threads} threads; torch {torch}; ".format(**about["machine"])
    text = f"{table(runs)}\n\n{where}{about['steps']} steps, {seeds} seeds: mean ± standard deviation)"
    replace_between(ROOT / "docs" / "training.md", f"training {task}", text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--task", choices=list(TASKS), default="digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of each run (default: %(default)s)")
    parser.add_argument("--only", action="append", metavar="RECIPE", choices=list(RECIPES), help="one (repeatable)")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results and docs/training.md")
    options = parser.parse_args()
    logging.getLogger("torch").setLevel(logging.ERROR)
    names, start = options.only or list(RECIPES), time.perf_counter()
    runs: dict[str, list[Run]] = {name: [] for name in names}
    with Progress() as progress:
        bar = progress.add_task("training", total=len(names) * options.seeds * options.steps)
        for seed in range(options.seeds):
            for name in names:
                progress.update(bar, description=f"{name}, seed {seed}")
                made = run(name, TASKS[options.task], seed, options.steps, lambda: progress.advance(bar))
                runs[name].append(made)
                progress.console.print(f"seed {seed}, {name}: accuracy {made.accuracy:.4f}, loss {made.loss:.4f}")
    print(table(runs))
    if options.write:
        about = {"machine": machine(), "steps": options.steps, "seconds": time.perf_counter() - start}
        write(options.task, runs, about)


if __name__ == "__main__":
    main()
