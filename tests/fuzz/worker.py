"""One process of a campaign: reads the seeds it is to run, prints one JSON record a case."""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tests.fuzz.generate import generate
from tests.fuzz.program import Program
from tests.fuzz.run import Outcome, run
from tests.fuzz.shrink import shrink


def prepare() -> None:
    """Fast to compile, rather than fast: one thread, no optimisation, no cache of graphs."""
    import torch._inductor.config as config

    torch.set_num_threads(1)
    config.compile_threads = 1
    config.fx_graph_cache = False
    config.aot_inductor.debug_compile = True  # -O0
    torch._functorch.config.enable_autograd_cache = False
    torch._dynamo.config.recompile_limit = 32
    torch._dynamo.config.fake_tensor_cache_enabled = False  # no two graphs are alike
    logging.disable(logging.WARNING)


def case(seed: int, work: dict[str, Any]) -> dict[str, Any]:
    start = time.monotonic()
    program = generate(seed, work["kernels"], work["only"], work["without"], work["means"], work["storage"])
    outcome = run(program)
    record: dict[str, Any] = {
        "seed": seed,
        "status": outcome.status,
        "signature": outcome.signature,
        "graphs": outcome.graphs,
        "calls": outcome.calls,
        "units": outcome.units,
        "through": program.settings.through,
        "kinds": [step.kind for step in program.steps],
        "writes": [write for write in program.settings.writes if write != "none"],
        "seconds": time.monotonic() - start,
    }
    if outcome.status in ("wrong", "raises"):
        small = shrink(program, outcome, run, work["shrink"]) if work["shrink"] else program
        final = run(small) if small is not program else outcome
        record["signature"] = f"{outcome.signature} [{', '.join(sorted({step.kind for step in small.steps}))}]"
        if final.status in ("wrong", "raises"):
            record["report"] = report(seed, small, final)
        else:  # what ran before in this process, or time, has a part in it
            record["report"] = f"{report(seed, program, outcome)}\n  not seen again in a second run"
            small = program
        if work["out"]:
            path = Path(work["out"])
            path.mkdir(parents=True, exist_ok=True)
            (path / f"seed_{seed}.py").write_text(small.script(record["report"]))
    return record


def report(seed: int, program: Program, outcome: Outcome) -> str:
    lines = [f"seed {seed}: {outcome.status} at call {outcome.call}"]
    lines += [f"  {each}" for each in outcome.differences[:4]]
    if outcome.error:
        lines += [f"  {line[:300]}" for line in outcome.error.strip().splitlines()[-4:]]
    settings = asdict(program.settings)
    lines.append(f"  {settings}")
    lines += [f"  {line}" for step in program.steps for line in (f"# {step.kind}", *step.lines)]
    return "\n".join(lines)


def main() -> None:
    prepare()
    work = json.loads(sys.stdin.readline())
    for seed in work["seeds"]:
        print(json.dumps({"begin": seed}), flush=True)
        print(json.dumps(case(seed, work)), flush=True)


if __name__ == "__main__":
    main()
