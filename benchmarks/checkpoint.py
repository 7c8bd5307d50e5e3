"""What a compressed model takes on disk, how long it takes to load, and how much memory meanwhile.

    python -m benchmarks.checkpoint [--spec 64:2:8] [--write]

A BERT of 12 blocks with random weights in the pattern is stored dense with zeros and compressed. Each way to load it
runs in a process of its own, from a warm page cache, several times by turns: transformers with the dense directory, the
compressed one, and compressing the dense one meanwhile; and `vnm.load`. Memory is what the process owns (RssAnon) at
most, over what it owned before, sampled from another thread; pages of mapped files belong to the page cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from transformers import BertConfig, BertModel

import vnm_compile as vnm
from benchmarks.memory import Peak, owned
from vnm_compile.layout import Layout
from vnm_compile.machine import machine

RESULTS = Path(__file__).parent / "results" / "checkpoint.json"
CONFIG = BertConfig(
    vocab_size=2000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=16
)
WAYS = ("dense", "compressed", "compressed on load", "vnm.load")


def measure(way: str, folder: Path) -> dict[str, float]:
    """Load once, in this process."""
    import vnm_compile.integrations.transformers as integration

    BertModel(BertConfig(vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    torch.ones(1000, 1000).bfloat16().float().sum()  # what torch sets up once
    before, peak = owned(), Peak()
    peak.start()
    start = time.perf_counter()
    if way == "vnm.load":
        with torch.device("meta"):
            empty = BertModel(CONFIG)
        # Buffers that are not saved are made by the constructor.
        empty.embeddings.position_ids = torch.arange(CONFIG.max_position_embeddings)[None]
        empty.embeddings.token_type_ids = torch.zeros_like(empty.embeddings.position_ids)
        model = vnm.load(folder / "compressed", empty, progress=False)
    elif way == "compressed on load":
        model = BertModel.from_pretrained(folder / "dense", quantization_config=integration.VnmConfig())
    else:
        model = BertModel.from_pretrained(folder / way)
    seconds = time.perf_counter() - start
    peak.done.set()
    peak.join()
    # What is mapped is read when it is first used: a reader that has not touched its weights has not loaded them.
    start = time.perf_counter()
    for parameter in model.parameters():
        for array in parameter.packed if isinstance(parameter, vnm.VNMTensor) else (parameter,):
            array.detach().view(torch.uint8).view(-1)[::4096].sum()
    return {"seconds": seconds + time.perf_counter() - start, "peak_bytes": peak.most - before}


def make(folder: Path, spec: str) -> dict[str, int]:
    """Write the model both ways; returns bytes."""
    torch.manual_seed(0)
    model = BertModel(CONFIG).eval()
    report = vnm.sparsify(model, spec, progress=False)
    model.save_pretrained(folder / "dense")
    vnm.compress_model(model)
    vnm.save(model, folder / "compressed", progress=False)
    path = folder / "compressed" / "model.safetensors"
    weights = {name: p for name, p in model.named_parameters() if isinstance(p, vnm.VNMTensor)}
    arrays = sum(Layout(p.spec, p.out_features, p.in_features).nbytes(p.dtype) for p in weights.values())
    rest = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name not in weights)
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    return {
        "layers": len(report.layers),
        "dense_bytes": (folder / "dense" / "model.safetensors").stat().st_size,
        "bytes": path.stat().st_size,
        "header_bytes": 8 + int.from_bytes(path.read_bytes()[:8], "little"),
        "bytes_by_formula": arrays + rest,
        "largest_dense_weight": largest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", default="64:2:8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(measure(given.way, given.folder)))
        return
    with tempfile.TemporaryDirectory() as made:
        sizes = make(Path(made), given.spec)
        taken: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(given.rounds):
            for way in WAYS:
                command = [sys.executable, "-m", "benchmarks.checkpoint", "--way", way, "--folder", made]
                shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                taken[way].append(json.loads(shown.splitlines()[-1]))
    ways = {way: {key: median(each[key] for each in runs) for key in runs[0]} for way, runs in taken.items()}
    stored, dense = sizes["bytes"] / 1e6, sizes["dense_bytes"] / 1e6
    print(f"on disk: {stored:.1f} MB of {dense:.1f}; {sizes['header_bytes']} bytes of them are the header")
    assert sizes["bytes"] == sizes["header_bytes"] + sizes["bytes_by_formula"]
    for way, figures in ways.items():
        print(f"{way:20} {figures['seconds'] * 1e3:7.0f} ms {figures['peak_bytes'] / 1e6:8.1f} MB of memory at most")
    if given.write:
        result = {**machine(), "spec": given.spec, "rounds": given.rounds, **sizes, "ways": ways}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
