"""A training step on compressed weights beside the dense one: `python -m benchmarks.training_step [--write]`.

The real MiniLM, pruned to 64:2:8, 16 x 128 tokens on CPUs: forward, backward and a step of AdamW, each model compiled,
in fp32 and under autocast to bf16. The contestants take turns; a row has medians.
"""

from __future__ import annotations

import argparse
import copy
import time
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from torch import nn

import vnm_compile as vnm
from benchmarks.report import keep
from vnm_compile.codegen.measure import nbytes
from vnm_compile.machine import machine

BATCH, TOKENS = 16, 128


def contestants() -> dict[str, nn.Module]:
    """The pruned model: dense, with masks, and on its values; plain Inductor compiles the first two."""
    from benchmarks.cpu_models import minilm

    model, _ = minilm()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    masked, values = copy.deepcopy(model), copy.deepcopy(model)
    vnm.train.begin(masked, None, vnm.train.FixedMask(), steps=1000)
    vnm.train.compress_for_training(values)
    return {"dense": model, "fixed masks, dense products": masked, "on compressed weights": values}


def measure(rounds: int, autocast: bool) -> list[dict[str, Any]]:
    """Seconds a step and bytes of weights and optimizer state of each contestant."""
    mode = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    runs, taken, rows = {}, {}, []
    for name, model in contestants().items():
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # random numbers would take as long in each
        backend = "vnm" if name == "on compressed weights" else "inductor"
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        runs[name], taken[name] = (torch.compile(model, backend=backend), model, optimizer), []
    ids = torch.randint(1000, 20000, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for turn in range(rounds + 2):
        for name, (call, _, optimizer) in runs.items():
            start = time.perf_counter()
            optimizer.zero_grad()
            with mode:
                loss = call(input_ids=ids, attention_mask=mask).last_hidden_state.float().square().mean()
            loss.backward()
            optimizer.step()
            if turn > 1:  # the first compiles, the second warms up
                taken[name].append(time.perf_counter() - start)
    for name, (_, model, optimizer) in runs.items():
        held = [each for state in optimizer.state.values() for each in state.values()]
        rows.append(
            {
                "name": name,
                "dtype": "bf16 autocast" if autocast else "fp32",
                "seconds": median(taken[name]),
                "weights": nbytes([*model.parameters(), *model.buffers()]),
                "state": nbytes(held),
            }
        )
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    dense = {row["dtype"]: row["seconds"] for row in rows if row["name"] == "dense"}
    lines = [
        "| weights | products in | ms a step | dense / it | weights, MB | optimizer state, MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['name']} | {row['dtype']} | {row['seconds'] * 1e3:.0f} | {dense[row['dtype']] / row['seconds']:.2f} | "
        f"{row['weights'] / 1e6:.1f} | {row['state'] / 1e6:.1f} |"
        for row in rows
    ]
    return "\n".join([*lines, "", "({cpu}; {threads} threads; torch {torch})".format(**machine())])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--write", action="store_true", help="into benchmarks/results and docs/training.md")
    options = parser.parse_args()
    rows = measure(options.rounds, autocast=False)
    torch.compiler.reset()
    rows += measure(options.rounds, autocast=True)
    print(markdown(rows))
    if options.write:
        keep("training_step", rows, markdown(rows), "training.md", "training step")


if __name__ == "__main__":
    main()
