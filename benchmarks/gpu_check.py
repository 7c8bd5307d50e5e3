"""Whether kernels are right on this machine's GPU, in many processes side by side: `benchmarks.gpu` begins with it.

Each process compiles a share of the cases, holds their results against float64, and calls each again and again: there
are no atomics, so a result of other bits is a race. What Triton compiles is kept for the process that times kernels
afterwards, alone; what Inductor measures here, while others run beside it, is not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_cases, gpu_models
from benchmarks.gpu_cases import Case, relative_error
from vnm_compile.format import unpack
from vnm_compile.tensor import VNMTensor

ROOT = Path(__file__).resolve().parent.parent
HEADINGS = ("case", "pattern", "T", "dtype", "error", "dense error", "")
Line = tuple[str, ...]
_AGAIN = 20


def errors(layer: torch.nn.Linear, y: torch.Tensor, x: torch.Tensor) -> tuple[float, float, bool]:
    """Errors against float64 of `y` and of the dense layer, and whether ours is as good.

    What rounding the exact result makes is asked of nobody, as a dense kernel may be exact by luck; nor, in fp32, is an
    order of summation: a unit in the last place, grown with the root of the number of terms, as random errors do.
    """
    weight = layer.weight.detach()
    of_dense = torch.nn.functional.linear(x, weight.to_dense() if isinstance(weight, VNMTensor) else weight)
    exact = x.double() @ in_double(weight).T
    ours, dense, least = (relative_error(each, exact) for each in (y, of_dense, exact.to(x.dtype)))
    summed = 2**-24 * layer.in_features**0.5 if x.dtype == torch.float32 else 0.0
    return ours, dense, ours <= 1.1 * max(dense, least, summed)


def in_double(weight: torch.Tensor) -> torch.Tensor:
    """A weight as it is stored: quantised values are levels times scales, unrounded."""
    if not isinstance(weight, VNMTensor):
        return weight.double()
    packed, layout = weight.packed, weight.layout_of_arrays
    return unpack(
        packed if layout.quantization is None else packed.replaced(3, packed.scales.double()), layout
    ).double()


def line(case: Case, ours: float, dense: float, fine: bool, steady: bool = True) -> Line:
    """A line of the table of errors."""
    kind = str(case.dtype).removeprefix("torch.")
    said = " ".join([*([] if fine else ["WRONG"]), *([] if steady else ["MOVES"])])
    return case.name, case.stored, str(case.tokens), kind, f"{ours:.2e}", f"{dense:.2e}", said


def is_steady(call: Callable[[], torch.Tensor], first: torch.Tensor) -> bool:
    """Whether further calls give the same bits."""
    return all(torch.equal(call(), first) for _ in range(_AGAIN))


def check(cases: Iterable[Case], device: torch.device) -> Iterator[Line]:
    """One line a case: the error against float64, beside that of the dense kernel of the same dtype."""
    from benchmarks.gpu_contenders import linears, ours

    for case in cases:
        torch._dynamo.reset()
        (layer,) = linears(case, device, 1)
        x = torch.randn(case.tokens, case.in_features, device=device).to(case.dtype)
        with torch.no_grad():
            (call,) = ours([layer], x)
            y = call()
            yield line(case, *errors(layer, y, x), is_steady(call, y))


def tasks(sections: Iterable[str]) -> list[Callable[[torch.device], Iterator[Line]]]:
    """What the sections have to be checked by, the longest first."""

    def of_model(block: gpu_models.Block, tokens: int, way: str) -> Callable[[torch.device], Iterator[Line]]:
        return lambda device: iter([gpu_models.check(block, tokens, way, device)])

    def of_case(case: Case) -> Callable[[torch.device], Iterator[Line]]:
        return lambda device: check([case], device)

    found: list[Callable[[torch.device], Iterator[Line]]] = []
    if "models" in sections:
        found += [
            of_model(block, tokens, way)
            for block in gpu_models.BLOCKS
            for tokens in block.tokens
            for way in (gpu_models.WAYS if tokens == block.tokens[0] else ("default",))
        ]
    for section in sections:
        if section == "correctness":
            found += [of_case(case) for case in gpu_cases.correctness()]
        elif section != "models":
            found += [of_case(case) for cases in getattr(gpu_cases, section)() for case in cases]
    return found


def side_by_side(sections: list[str], processes: int) -> tuple[list[Line], list[str]]:
    """Lines of all processes, and what those said that failed. What Triton compiles is kept where this process, too,
    will look for it."""
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="vnm-triton-"))
    running = []
    for i in range(processes):
        command = [sys.executable, "-m", "benchmarks.gpu_check", ",".join(sections), f"{i}/{processes}"]
        own = {
            "TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp(prefix="vnm-inductor-"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | own, **pipes))
    lines, failed = [], []
    for process in running:
        said = process.communicate()[0].splitlines()
        lines += [tuple(json.loads(each)) for each in said if each.startswith("[")]
        failed += ["\n".join(said[-25:])] if process.returncode else []
    return lines, failed


def main() -> None:
    """A process's share: a line of JSON each; the exit status is 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.split("\n", 1)[0])
    parser.add_argument("sections")
    parser.add_argument("share", help="i/n: the i-th of n processes")
    options = parser.parse_args()
    i, n = map(int, options.share.split("/"))
    device = torch.device("cuda", 0)
    torch._dynamo.config.recompile_limit = 64
    failed = False
    for task in tasks(options.sections.split(","))[i::n]:
        try:
            for each in task(device):
                print(json.dumps(each), flush=True)
        except Exception:
            traceback.print_exc()
            failed = True
        torch.cuda.empty_cache()
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
