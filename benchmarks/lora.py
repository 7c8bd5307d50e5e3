"""Three-staged LoRA against other ways back from pruning: `python -m benchmarks.lora [--task text] [--write]`.

A small model is trained dense, then goes into the pattern in two ways with the same adapters, steps and batches: pruned
in one shot by magnitude and trained under that mask, and by three-staged LoRA (arXiv 2410.16135). Beside them the dense
model, trained on with the same adapters. What is closed of the gap between one shot and that model is the figure.

`--memory` measures a step of each kind on wider layers, each in a process of its own: memory over what the loaded model
takes, at most, and what is left of it after the step.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

import vnm_compile as vnm
from benchmarks.blocks import EncoderBlock
from benchmarks.memory import Peak, owned
from benchmarks.report import keep
from benchmarks.training_tasks import TASKS, Task
from vnm_compile import train
from vnm_compile.machine import machine

SPEC, RANK, DENSE_RATE, RATE = "64:2:8", 8, 1e-3, 2e-3
LINEARS = ["q", "k", "v", "o", "up", "down"]
WAYS = ("LoRA, dense", "one shot", "one shot, LoRA under its mask", "three-staged LoRA")
KINDS = ("LoRA, dense", "three-staged LoRA, dense phase", "three-staged LoRA, masks")


@dataclass(frozen=True)
class Row:
    """One way back, of one seed: loss and accuracy on what is held out, and how many parameters train."""

    way: str
    seed: int
    steps: int
    trained: int
    loss: float
    accuracy: float


def adapt(model: nn.Module, rank: int = RANK) -> Any:
    """The model with adapters on the linears of its blocks."""
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEARS))


def steps_of(
    work: Task, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, rate: float, moved: Callable[[], None]
) -> None:
    """Train on."""
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        loss = work.loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        moved()


def run(
    task: type[Task], seed: int, dense_steps: int, steps: int, moved: Callable[[], None] = lambda: None
) -> list[Row]:
    """Train one model dense, then take every way from it."""
    torch.manual_seed(seed)
    work = task(seed)
    dense = work.model()
    optimizer = torch.optim.AdamW(dense.parameters(), lr=DENSE_RATE, weight_decay=0.05)
    steps_of(work, dense, optimizer, dense_steps, DENSE_RATE, moved)
    rows = [Row("dense", seed, 0, 0, *work.judge(dense.eval()))]
    for way in WAYS:
        torch.manual_seed(seed)
        model, trained = copy.deepcopy(dense).train(), 0
        if way.startswith("one shot"):
            vnm.sparsify(model, SPEC, include="blocks", progress=False)
        if way != "one shot":
            adapted = adapt(model)
            trainable = [each for each in adapted.parameters() if each.requires_grad]
            trained = sum(each.numel() for each in trainable)
            optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.0)
            if way == "three-staged LoRA":
                train.begin(adapted, SPEC, train.ThreeStagedLoRA(), steps, optimizer=optimizer)
            elif way.startswith("one shot"):
                train.begin(adapted, None, train.FixedMask(), steps, optimizer=optimizer)
            steps_of(work, adapted, optimizer, steps, RATE, moved)
            if way != "LoRA, dense":
                vnm.finalize(adapted)
            model = adapted.merge_and_unload()
        rows.append(Row(way, seed, steps if trained else 0, trained, *work.judge(model.eval())))
        if way != "LoRA, dense":
            assert vnm.matches(model.blocks[0].up.weight, SPEC), way
    return rows


def closed(rows: list[Row], seed: int, way: str, goal: str = "LoRA, dense") -> float:
    """The share of the gap in loss between one shot and a dense model that a way closes."""
    loss = {row.way: row.loss for row in rows if row.seed == seed}
    return (loss["one shot"] - loss[way]) / (loss["one shot"] - loss[goal])


def table(rows: list[Row]) -> str:
    """Means and spreads as Markdown."""
    seeds = sorted({row.seed for row in rows})

    def spread(values: list[float], digits: int) -> str:
        return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")

    lines = [
        "| | trained parameters | held-out loss | accuracy, % | of the gap to dense | to dense, trained on |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for way in ("dense", *WAYS):
        mine = [row for row in rows if row.way == way]
        gaps = ["", ""]
        if "LoRA" in way and way != "LoRA, dense":
            gaps = [
                spread([100 * closed(rows, seed, way, goal) for seed in seeds], 0) + " %"
                for goal in ("dense", "LoRA, dense")
            ]
        figures = [spread([row.loss for row in mine], 3), spread([100 * row.accuracy for row in mine], 2), *gaps]
        lines.append(f"| {way} | {mine[0].trained or ''} | {' | '.join(figures)} |")
    return "\n".join(lines)


def memory(kind: str) -> dict[str, float]:
    """Memory of two steps, in this process: 4 blocks of 1024 channels, 4 x 64 tokens."""
    torch.manual_seed(0)
    model = adapt(nn.Sequential(*(EncoderBlock(1024, 4096, 16, pre_norm=True) for _ in range(4))))
    x = torch.randn(4, 64, 1024)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-4)
    before = owned()
    if kind != "LoRA, dense":
        recipe = train.ThreeStagedLoRA(dense=0.05 if "masks" in kind else 0.5, fixed=0.4)
        training = train.begin(model, SPEC, recipe, 20, optimizer=optimizer)
        if "masks" in kind:
            training.step()  # out of the dense phase
    peak = Peak()
    peak.start()
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    peak.done.set()
    peak.join()
    weights = sum(each.numel() * each.element_size() for each in model.parameters())
    masks = sum(each.numel() for each in model.buffers() if each.dtype == torch.bool and each.dim())
    return {"peak": peak.most - before, "weights": weights, "masks": masks}


def memory_table(found: dict[str, dict[str, float]]) -> str:
    """Megabytes as Markdown."""
    lines = ["| a step of | memory over the model's, MB | of that masks, MB | the model's weights, MB |"]
    lines.append("| --- | --- | --- | --- |")
    for kind, each in found.items():
        figures = " | ".join(f"{each[name] / 1e6:.0f}" for name in ("peak", "masks", "weights"))
        lines.append(f"| {kind} | {figures} |")
    return "\n".join(lines)


def measure_memory() -> dict[str, dict[str, float]]:
    """`memory` of each kind."""
    # What is freed goes back at once: glibc would keep it, and count it as owned.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found = {}
    for kind in KINDS:
        command = [sys.executable, "-m", "benchmarks.lora", "--memory-of", kind]
        told = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        found[kind] = json.loads(told.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lora", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--task", choices=list(TASKS), default="text")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dense-steps", type=int, default=800, help="of the dense model (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="of each way (default: %(default)s)")
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    parser.add_argument("--memory-of", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="into benchmarks/results and docs/training.md")
    options = parser.parse_args()
    logging.getLogger("torch").setLevel(logging.ERROR)
    about = machine()
    where = f"({about['cpu']}; {about['threads']} threads; torch {about['torch']}"
    if options.memory_of:
        print(json.dumps(memory(options.memory_of)))
    elif options.memory:
        found = measure_memory()
        print(memory_table(found))
        if options.write:
            rows = [{"kind": kind, **each} for kind, each in found.items()]
            keep("lora_memory", rows, f"{memory_table(found)}\n\n{where})", "training.md", "training lora memory")
    else:
        rows = []
        trained = len(WAYS) - 1
        with Progress() as progress:
            bar = progress.add_task(options.task, total=options.seeds * (options.dense_steps + trained * options.steps))
            for seed in range(options.seeds):
                made = run(TASKS[options.task], seed, options.dense_steps, options.steps, lambda: progress.advance(bar))
                progress.console.print("\n".join(map(str, made)))
                rows += made
        print(table(rows))
        if options.write:
            text = f"{table(rows)}\n\n{where}; {options.dense_steps} steps dense, then {options.steps}; rank {RANK})"
            keep("lora", [asdict(row) for row in rows], text, "training.md", "training lora")


if __name__ == "__main__":
    main()
