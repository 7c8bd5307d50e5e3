"""The real MiniLM, pruned and drawn back to its dense self: `python -m benchmarks.distill [--specs 64:2:8] [--write]`.

All linears of the encoder are pruned with second-order information and then trained on what they keep
(`vnm.train.compress_for_training`), compiled, towards the hidden states and the embeddings of the dense model. Two
kinds of text are calibrated and trained on by turns: general English, the glosses of WordNet (Debian's package
wordnet-base), and documentation, that of Python and the docstrings of its library. Of both, other texts are held out to
judge by (`--docs none` trains on glosses only). Two figures each: the mean cosine similarity of embeddings to the dense
ones, and how well the similarities of all pairs of texts agree with the dense model's (Pearson's correlation).

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
from statistics import mean, stdev

import torch
from rich.progress import Progress
from torch import nn

import vnm_compile as vnm
from benchmarks.minilm import INCLUDE, RATE, Judge, draw_to, load, optimizer_of, train_without_dropout
from benchmarks.minilm_texts import Texts, texts
from benchmarks.report import ROOT, keep, save
from vnm_compile import train
from vnm_compile.machine import machine

RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Row:
    """What a model came to after some steps; the figures of general English, then those of documentation."""

    spec: str
    seed: int
    steps: int
    seconds: float
    cosine: float
    pairs: float
    docs_cosine: float
    docs_pairs: float
    curve: list[float] = field(repr=False)

    @property
    def figures(self) -> tuple[float, ...]:
        """Of general English and of documentation."""
        return self.cosine, self.pairs, self.docs_cosine, self.docs_pairs


def prune(dense: nn.Module, data: Texts, judge: Judge, spec: str) -> tuple[nn.Module, Row]:
    """The model that training starts from."""
    begin = time.perf_counter()
    model = copy.deepcopy(dense)
    vnm.sparsify(model, spec, method="second_order", calibration=data.calibration, include=INCLUDE, progress=False)
    seconds = time.perf_counter() - begin
    return model, Row(spec, 0, 0, seconds, *judge(model), curve=[])


def distil(
    start: nn.Module, dense: nn.Module, data: Texts, seed: int, steps: int, moved: Callable[[float], None], rate: float
) -> tuple[nn.Module, list[float]]:
    """Train a copy of a pruned model on what its weights keep; the model, pruned as before, and its losses."""
    torch.manual_seed(seed)
    model = copy.deepcopy(start)
    train.compress_for_training(model, include=INCLUDE)
    train_without_dropout(model)
    compiled = torch.compile(model, backend="vnm")
    curve = draw_to(dense, compiled, optimizer_of(model, rate), data, seed, steps, moved)
    vnm.finalize(model)
    return model, curve


def run(
    pruned: tuple[nn.Module, Row],
    dense: nn.Module,
    data: Texts,
    judge: Judge,
    seed: int,
    steps: int,
    moved: Callable[[float], None] = lambda loss: None,
    rate: float = RATE,
) -> Row:
    """Train and judge; the seconds are those of pruning and training."""
    begin = time.perf_counter()
    model, curve = distil(pruned[0], dense, data, seed, steps, moved, rate)
    seconds = pruned[1].seconds + time.perf_counter() - begin
    return Row(pruned[1].spec, seed, steps, seconds, *judge(model), curve=curve)


def table(rows: list[Row]) -> str:
    """Markdown: a line a pattern and number of steps, means and spreads over seeds."""
    lines = [
        "| pattern | | seeds | minutes | general English: cosine | pairs | documentation: cosine | pairs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.spec, row.steps), []).append(row)
    for (spec, steps), group in groups.items():
        what = f"distilled, {steps} steps" if steps else "one shot"
        minutes = f"{mean(row.seconds for row in group) / 60:.1f}"
        figures = [_spread(list(each)) for each in zip(*(row.figures for row in group), strict=True)]
        lines.append(f"| {spec} | {what} | {len(group) if steps else ''} | {minutes} | {' | '.join(figures)} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def plot(rows: list[Row], path: Path) -> None:
    """Losses along the way, means of 25 steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for row in rows:
        if row.curve:
            span = 25 * len(row.curve) // row.steps or 1  # a curve that was saved has every fifth step
            means = torch.tensor(row.curve)[: len(row.curve) // span * span].view(-1, span).mean(1)
            places = [(i + 0.5) * row.steps / len(means) for i in range(len(means))]
            axes.plot(places, means, label=f"{row.spec}, {row.steps} steps, seed {row.seed}", linewidth=1)
    axes.set(yscale="log", xlabel="optimizer steps", ylabel="distillation loss", title="MiniLM towards its dense self")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def known_rows() -> list[Row]:
    """What was found before."""
    path = RESULTS / "distill.json"
    return [Row(**row) for row in json.loads(path.read_text())["rows"]] if path.exists() else []


def kept(row: Row) -> dict[str, object]:
    """A row as it is saved: every fifth loss."""
    curve = row.curve if len(row.curve) < row.steps else row.curve[::5]
    return {**asdict(row), "curve": [round(loss, 5) for loss in curve]}


def main() -> None:
    """Train and judge every pattern, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distill", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--specs", default="64:2:8", help="patterns (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps, of 2,048 tokens")
    parser.add_argument("--rate", type=float, default=RATE, help="the highest learning rate (default: %(default)s)")
    parser.add_argument("--docs", choices=("python", "none"), default="python", help="documentation to train on")
    parser.add_argument("--again", action="store_true", help="forget what was found before")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results and docs/training.md")
    options = parser.parse_args()
    rows = known_rows() if options.write and not options.again else []
    specs = options.specs.split(",")
    wanted = [(spec, seed) for spec in specs for seed in range(options.seeds)]
    wanted = [each for each in wanted if (*each, options.steps) not in {(r.spec, r.seed, r.steps) for r in rows}]
    dense, tokenizer = load()
    data = texts(tokenizer, options.docs != "none")
    judge, pruned = Judge(dense, data), {}

    def found(row: Row) -> None:
        rows.append(row)
        print(row, flush=True)
        if options.write:
            save("distill", [kept(each) for each in rows])

    with Progress() as progress:
        bar = progress.add_task("training", total=len(wanted) * options.steps)
        for spec, seed in wanted:

            def moved(loss: float, name: str = f"{spec}, seed {seed}") -> None:
                progress.update(bar, advance=1, description=f"{name}: {loss:.3f}")

            if spec not in pruned:
                progress.update(bar, description=f"{spec}: pruning")
                pruned = {spec: prune(dense, data, judge, spec)}
                if (spec, 0) not in {(row.spec, row.steps) for row in rows}:
                    found(pruned[spec][1])
            found(run(pruned[spec], dense, data, judge, seed, options.steps, moved, options.rate))
    rows.sort(key=lambda row: (row.spec != "64:2:8", row.spec, row.steps, row.seed))
    print(table(rows))
    if options.write:
        about = machine()
        where = f"({about['cpu']}; {about['threads']} threads; torch {about['torch']})"
        keep("distill", [kept(row) for row in rows], f"{table(rows)}\n\n{where}", "training.md", "training minilm")
        plot(rows, RESULTS / "distill.png")


if __name__ == "__main__":
    main()
