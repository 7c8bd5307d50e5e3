"""Every recipe against every other at equal steps: `python -m benchmarks.training [--seeds 3] [--write]`.

A small ViT on the handwritten digits that come with scikit-learn (1,797 images of 8 x 8), from random weights. Each run
has the same steps, batches and learning rates; only how the model gets into the pattern differs.
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
from torch import Tensor, nn
from torch.nn import functional as F

import vnm_compile as vnm
from benchmarks.blocks import EncoderBlock
from benchmarks.report import replace_between
from vnm_compile import train
from vnm_compile.machine import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SPEC, BATCH, RATE, HELD_OUT = "64:2:8", 64, 1e-3, 500
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


class ViT(nn.Module):
    """16 patches of 2 x 2 pixels, 3 blocks of 128 channels."""

    def __init__(self, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, 4 * width, 4, pre_norm=True) for _ in range(depth)))
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """images [batch, 8, 8] to logits [batch, 10]."""
        patches = images.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).flatten(1, 2)
        return self.head(self.blocks(self.embed(patches) + self.positions).mean(1))


@dataclass(frozen=True)
class Run:
    """What came of one run: accuracy and loss on held-out images, losses along the way, share of the time for masks."""

    accuracy: float
    loss: float
    curve: list[float]
    mask_share: float


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on, then those held out, another split for each seed."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32) / 16
    labels, order = (
        torch.tensor(found.target),
        torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)),
    )
    kept, held = order[HELD_OUT:], order[:HELD_OUT]
    return images[kept], labels[kept], images[held], labels[held]


def run(name: str, seed: int, steps: int, moved: Callable[[], None] = lambda: None) -> Run:
    """Train one model."""
    torch.manual_seed(seed)
    images, labels, held, expected = digits(seed)
    model, recipe = ViT(), RECIPES[name]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    training, begins = None, int(0.4 * steps) if isinstance(recipe, train.FixedMask) else 0
    curve = []
    for step in range(steps):
        if recipe is not None and step == begins:
            if begins:
                vnm.sparsify(model, SPEC, progress=False)
            training = train.begin(model, SPEC, recipe, steps - begins, optimizer=optimizer)
        chosen = torch.randint(len(images), (BATCH,))
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        curve.append(loss.item())
        moved()
    if training is not None:
        training.finalize()
    elif name != "dense":
        vnm.sparsify(model, SPEC, progress=False)
    model.eval()
    with torch.no_grad():
        logits = model(held)
    accuracy = (logits.argmax(1) == expected).float().mean().item()
    return Run(accuracy, F.cross_entropy(logits, expected).item(), curve, training.mask_share if training else 0.0)


def table(runs: dict[str, list[Run]]) -> str:
    """Means and spreads as Markdown."""
    lines = ["| recipe | accuracy, % | held-out loss | masks, % of the time |", "| --- | --- | --- | --- |"]
    for name, each in runs.items():
        accuracies, losses = [100 * r.accuracy for r in each], [r.loss for r in each]
        spread = [f" ± {stdev(v):.{d}f}" if len(v) > 1 else "" for v, d in ((accuracies, 2), (losses, 3))]
        share = f"{100 * mean(r.mask_share for r in each):.1f}" if each[0].mask_share else ""
        lines.append(f"| {name} | {mean(accuracies):.2f}{spread[0]} | {mean(losses):.3f}{spread[1]} | {share} |")
    return "\n".join(lines)


def plot(runs: dict[str, list[Run]], path: Path) -> None:
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
    axes.set_title(f"A small ViT on digits on its way to {SPEC}", fontsize=10)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps of each run")
    parser.add_argument("--only", action="append", metavar="RECIPE", help="one recipe (repeatable)")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results and docs/training.md")
    options = parser.parse_args()
    logging.getLogger("torch").setLevel(logging.ERROR)
    names, runs, start = options.only or list(RECIPES), {}, time.perf_counter()
    with Progress() as progress:
        bar = progress.add_task("training", total=len(names) * options.seeds * options.steps)
        for name in names:
            progress.update(bar, description=name)
            runs[name] = [
                run(name, seed, options.steps, lambda: progress.advance(bar)) for seed in range(options.seeds)
            ]
    print(table(runs))
    if options.write:
        figures: dict[str, Any] = {
            name: [vars(each) | {"curve": each.curve[::25]} for each in r] for name, r in runs.items()
        }
        about = {"machine": machine(), "steps": options.steps, "seconds": time.perf_counter() - start}
        (RESULTS / "training.json").write_text(json.dumps({**about, "runs": figures}, indent=1) + "\n")
        plot(runs, RESULTS / "training.png")
        replace_between(ROOT / "docs" / "training.md", "training digits", table(runs))


if __name__ == "__main__":
    main()
