"""Every promising configuration of the kernels on this machine's GPU: `python -m benchmarks.gpu_tiles [--out DIR]`.

The kernels alone, without what Inductor fuses into them and without the copies and sums around them: each configuration
is compiled (in parallel), checked against float64 and timed, those of one shape and number of tokens in turn. What the
static model (`codegen/triton/configs.py`) is fitted to and held against. `--dry-run` compiles for sm_90 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
import torch

from benchmarks.gpu_cases import LARGE, SMALL, TOKENS, relative_error
from vnm_compile.codegen.triton import templates
from vnm_compile.codegen.triton.configs import Config, Shape, configurations, splits
from vnm_compile.codegen.triton.vector_configs import vector_configurations
from vnm_compile.hardware import TARGETS
from vnm_compile.inspection.machine_code import loaded
from vnm_compile.layout import Layout
from vnm_compile.spec import Spec

ROOT = Path(__file__).resolve().parent.parent
SPECS = ("64:2:8", "128:2:8", "64:2:16", "128:2:16", "128:2:32")
DTYPE = torch.bfloat16
_FEWEST_TOKENS = 16  # of a row of the activations


@dataclass(frozen=True)
class Job:
    """A configuration for a weight of `out_features x in_features` and a number of tokens."""

    spec: str
    out_features: int
    in_features: int
    tokens: int
    config: Config

    @property
    def is_vector(self) -> bool:
        """Whether it is the kernel for one token, which reads activations as they lie."""
        return self.config.is_vector

    @property
    def layout(self) -> Layout:
        """Storage of the weight."""
        return Layout(Spec.parse(self.spec), self.out_features, self.in_features)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Programs."""
        tiles = -(-self.tokens // self.config.block_t) * -(-self.out_features // self.config.block_o)
        return tiles, self.config.splits, 1

    @cached_property
    def constants(self) -> dict[str, Any]:
        """What the lowering would fill in; values are of 16 bits, two a group, in rows of whole loads."""
        layout, config = self.layout, self.config
        words, bytes_ = layout.shapes[0][1] // 2, layout.shapes[1][1]
        if words % 4 or bytes_ % 16:
            raise ValueError(f"{self}: rows of the weight are no whole loads.")
        part = -(-layout.groups // (config.splits * config.block_g)) * config.block_g
        return {
            **{"V": layout.spec.v, "N": 2, "M": layout.spec.m, "O": self.out_features, "K": self.in_features},
            **{"G": layout.groups, "R": layout.rows, "BLOCK_O": config.block_o, "BLOCK_T": config.block_t},
            **{"BLOCK_G": config.block_g, "GROUP_T": 8, "SPLITS": config.splits, "SPLIT_G": part},
            **{"VALUES_STRIDE": words, "VALUES_WIDTH": words},
            **{"METADATA_STRIDE": bytes_ // 2, "METADATA_WIDTH": bytes_ // 2},
            **{"EVEN_G": layout.groups % config.block_g == 0, "TAIL": layout.tail != 0, "WORDS": "tl.int32"},
            "EMPTY_ROUND": False,
            "PARTS": 1,
            **{"DTYPE": "tl.bfloat16", "WIDE": False, "COLUMN_BITS": 8, "PERMUTE_BYTES": True, "ALLOW_TF32": False},
        }

    def source(self) -> str:
        """The template as a Triton kernel of its own, sizes and strides in place."""
        names = ("vector", "row_products") if self.is_vector else ("linear", "weight")
        return (
            jinja2.Environment(undefined=jinja2.StrictUndefined)
            .from_string(templates.source(*names))
            .render(
                **self.constants,
                def_kernel=self._head,
                size=lambda name, dim: (self.tokens, self.in_features)[dim],
                stride=lambda name, dim: ((self.in_features, 1) if self.is_vector else (1, self.padded))[dim],
                store_output=self._store,
            )
        )

    @property
    def padded(self) -> int:
        """Tokens of a row of K-major activations."""
        return max(_FEWEST_TOKENS, -(-self.tokens // 8) * 8)

    def _head(self, *names: str) -> str:
        lines = ["import triton", "import triton.language as tl", "", "@triton.jit"]
        lines.append(f"def kernel({', '.join(names)}, OUT):")
        for name, value in {**self.constants, "INDEX_DTYPE": "tl.int32"}.items():
            lines.append(f"    {name} : tl.constexpr = {value}")
        return "\n".join(lines)

    def _store(self, indices: tuple[str, ...], value: str, mask: str, val_shape: tuple[str, ...]) -> str:
        *part, tokens, out = indices
        at = f"{out} + {tokens} * {self.out_features}"
        at += f" + {part[0]} * {self.tokens * self.out_features}" if part else ""
        return f"tl.store(OUT + ({at}), ({value}).to(OUT.dtype.element_ty), {mask})"


def jobs(specs: tuple[str, ...] = SPECS) -> Iterator[Job]:
    """What is promising: the model's first twelve, and other numbers of parts."""
    target = TARGETS["sm_90"]
    for out_features, in_features in (*LARGE, *SMALL):
        for tokens in TOKENS if (out_features, in_features) in LARGE else TOKENS[:2]:
            for spec in specs:
                layout = Layout(Spec.parse(spec), out_features, in_features)
                shape = Shape(tokens, layout.rows, layout.groups, layout.spec, DTYPE)
                found = configurations(shape, target)[:12]
                if splits(shape, target) > 1:
                    for parts in (1, 2, 4, 8):
                        found += [Config(*astuple(each)[:5], parts) for each in found[:3]]  # type: ignore[misc]
                found += vector_configurations(shape) if tokens == 1 else []
                for config in dict.fromkeys(found):
                    yield Job(spec, out_features, in_features, tokens, config)


def compiled(job: Job) -> Any:
    """The kernel for sm_90; a second time, in any process, it comes from Triton's cache."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    with loaded(job.source()) as module:
        out = "*fp32" if job.config.splits > 1 else "*bf16"
        signature = {"X": "*bf16", "VALUES": "*bf16", "METADATA": "*u8", "COLUMNS": "*u8", "OUT": out}
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(signature))}
        options = {"num_warps": job.config.warps, "num_stages": job.config.stages}
        return triton_compile(
            ASTSource(module.kernel, signature, {}, aligned), target=GPUTarget("cuda", 90, 32), options=options
        )


def problem(job: Job) -> str | None:
    """Compile; what went wrong, if anything did."""
    try:
        compiled(job)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def compile_all(found: list[Job]) -> list[Job]:
    """Those that compile, each compiled in one of many processes."""
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        problems = list(pool.map(problem, found))
    for job, said in zip(found, problems, strict=True):
        if said:
            print(f"{job}: {said}", flush=True)
    return [job for job, said in zip(found, problems, strict=True) if not said]


def time_together(group: list[Job], device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each of the jobs of one shape and number of tokens, with the time of the dense product."""
    from benchmarks.gpu_timing import seconds_of_each, sets_needed
    from vnm_compile.codegen.random_arrays import random_packed
    from vnm_compile.format import unpack

    first = group[0]
    x = torch.randn(first.tokens, first.in_features, device=device).to(DTYPE)
    across = torch.full((first.in_features, first.padded), float("nan"), device=device, dtype=DTYPE)
    across[:, : first.tokens] = x.T
    weights = [torch.randn(first.out_features, first.in_features, device=device).to(DTYPE) for _ in range(3)]
    calls: dict[str, list[Callable[[], Any]]] = {"dense": [partial(torch.nn.functional.linear, x, w) for w in weights]}
    arrays, exact, kept = {}, {}, []
    rows = {}
    for job in group:
        if job.spec not in arrays:
            sets = sets_needed(job.layout.nbytes(DTYPE), device)
            arrays[job.spec] = [random_packed(job.layout, DTYPE, device, seed) for seed in range(sets)]
            exact[job.spec] = x.double() @ unpack(arrays[job.spec][0], job.layout).double().T
        parts = (job.config.splits,) if job.config.splits > 1 else ()
        out = torch.full((*parts, job.tokens, job.out_features), float("nan"), device=device)
        out = out if parts else out.to(DTYPE)
        kernel = compiled(job)
        run = kernel[job.grid]
        its = [partial(run, x if job.is_vector else across, *packed, out) for packed in arrays[job.spec]]
        its[0]()
        error = relative_error(out.double().sum(0) if parts else out, exact[job.spec])
        kept.append(out)  # graphs write to it
        calls[str(job)] = its
        rows[str(job)] = {
            **{"spec": job.spec, "out": job.out_features, "in": job.in_features, "tokens": job.tokens},
            **{"config": astuple(job.config), "error": error, "registers": kernel.n_regs, "spills": kernel.n_spills},
        }
    taken = {name: 1e6 * median(each) for name, each in seconds_of_each(calls).items()}
    for name, row in rows.items():
        if name in taken:
            yield {**row, "us": taken[name], "dense_us": taken["dense"]}


def run(found: list[Job], out: Path) -> int:
    """Compile, check and time; 1 if a result is wrong."""
    from benchmarks.gpu_timing import ceilings

    begin, device = time.monotonic(), torch.device("cuda", 0)
    found = compile_all(found)
    print(f"{len(found)} kernels compiled in {time.monotonic() - begin:.0f} s", flush=True)
    bandwidth, flops = ceilings(device)
    machine = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
    saved: dict[str, Any] = {**machine, "bandwidth": bandwidth, "flops": flops, "rows": []}
    groups: dict[tuple[int, int, int], list[Job]] = {}
    for job in found:
        groups.setdefault((job.out_features, job.in_features, job.tokens), []).append(job)
    out.mkdir(parents=True, exist_ok=True)
    for (out_features, in_features, tokens), group in groups.items():
        rows = list(time_together(group, device))
        saved["rows"] += rows
        (out / "gpu_tiles.json").write_text(json.dumps(saved) + "\n")
        for spec in dict.fromkeys(row["spec"] for row in rows):
            best = min((row for row in rows if row["spec"] == spec), key=lambda row: row["us"])
            ratio = best["dense_us"] / best["us"]
            print(
                f"{out_features} x {in_features} T={tokens} {spec}: {best['config']} {best['us']:.1f} us {ratio:.2f}x"
            )
    wrong = [row for row in saved["rows"] if not row["error"] < 2**-8]
    print(*(f"WRONG: {row}" for row in wrong), sep="\n")
    return int(bool(wrong))


def main(arguments: list[str] | None = None) -> int:
    """The command; the exit status is 1 where a kernel computes something wrong, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_tiles", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--specs", default=",".join(SPECS), help="patterns")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the JSON")
    parser.add_argument("--dry-run", action="store_true", help="compile the kernels, run nothing")
    options = parser.parse_args(arguments)
    found = list(jobs(tuple(options.specs.split(","))))
    if options.dry_run:
        print(f"{len(compile_all(found))} of {len(found)} kernels compile")
        return 0
    if not torch.cuda.is_available():
        print("no GPU here; --dry-run compiles the kernels for one")
        return 2
    return run(found, options.out)


if __name__ == "__main__":
    raise SystemExit(main())
