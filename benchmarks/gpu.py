"""Sparse against dense and 2:4 on this machine's GPU: `python -m benchmarks.gpu [--sections ...] [--out DIR]`.

First every template is checked against float64, then each shape is timed, in turn and in one run: dense through cuBLAS
(and, with `--max-autotune`, as Inductor chooses), torch's own 2:4 (cuSPARSELt), and backend="vnm" for each pattern, the
copies of activations before it included. Times are medians of CUDA-graph replays that go through several sets of random
weights, larger than the L2 together. Needs torch, triton, numpy and sympy only; the plot also matplotlib. Without a
GPU, `--dry-run` generates and compiles every case's kernel for sm_90.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch

from benchmarks import gpu_cases, gpu_check, gpu_models
from benchmarks.gpu_cases import LARGE, LEAST_SMALL, TARGETS, TOKENS, Case
from benchmarks.gpu_check import errors, line

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ("correctness", "models", "layers", "small", "values")


@dataclass(frozen=True)
class Row:
    """What was measured of one case: microseconds a call, and the least that the device allows."""

    case: str
    spec: str
    tokens: int
    dense_us: float
    dense: str
    semi_structured_us: float | None
    sparse_us: float
    floor_us: float
    limit: float
    same_values_us: float | None = None  # dense, with values quantised to as many bits

    @property
    def ratio(self) -> float:
        """Dense time over ours."""
        return self.dense_us / self.sparse_us

    @property
    def over_semi_structured(self) -> float | None:
        """2:4 time over ours."""
        return self.semi_structured_us / self.sparse_us if self.semi_structured_us else None

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        over = self.over_semi_structured
        return (
            self.case,
            self.spec,
            str(self.tokens),
            f"{self.dense_us:.1f} ({self.dense})",
            f"{self.semi_structured_us:.1f}" if self.semi_structured_us else "-",
            f"{self.sparse_us:.1f}",
            f"{self.ratio:.2f}",
            _ratio(over),
            _ratio(self.same_values_us / self.sparse_us if self.same_values_us else None),
            f"{self.limit:.2f} ({self.ratio / self.limit:.0%})",
            f"{self.floor_us / self.sparse_us:.0%}",
        )


HEADINGS = (
    "case",
    "pattern",
    "T",
    "dense us",
    "2:4 us",
    "vnm us",
    "ratio",
    "over 2:4",
    "over intN",
    "limit",
    "of floor",
)


def table(headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Rows as aligned text."""
    rows = [headings, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(headings))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def geometric_means(rows: Iterable[Row]) -> list[tuple[int, int, float, float, float | None]]:
    """(M, T, mean over LARGE, target, worst ratio over 2:4) of every target that was measured, with the V that is best
    for an M over all T: weights are stored once."""
    names = [f"{o} x {k}" for o, k in LARGE]
    cells: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row.case in names:
            cells.setdefault((row.spec, row.tokens), []).append(row)
    means = {key: geometric_mean([row.ratio for row in its]) for key, its in cells.items() if len(its) == len(names)}
    found = []
    for m, targets in TARGETS.items():
        specs = {spec for spec, _ in means if spec.endswith(f":2:{m}")}
        if not specs:
            continue
        most = max(len([key for key in means if key[0] == spec]) for spec in specs)
        timed = {spec: [mean for key, mean in means.items() if key[0] == spec] for spec in specs}
        best = max((spec for spec in specs if len(timed[spec]) == most), key=lambda spec: geometric_mean(timed[spec]))
        for tokens, target in zip(TOKENS, targets, strict=True):
            if (best, tokens) in means:
                over = [row.over_semi_structured for row in cells[best, tokens] if row.over_semi_structured]
                found.append((m, tokens, means[best, tokens], target, min(over) if over else None))
    return found


def summary(rows: list[Row]) -> str:
    """The table of targets."""
    cells = [
        (str(m), str(t), f"{mean:.2f}", f"{target:.1f}", "yes" if mean >= target else "NO", _ratio(over))
        for m, t, mean, target, over in geometric_means(rows)
    ]
    small = [row.ratio for row in rows if row.tokens == 1 and row.case not in [f"{o} x {k}" for o, k in LARGE]]
    if small:
        met = "yes" if min(small) >= LEAST_SMALL else "NO"
        cells.append(("small", "1", f"{min(small):.2f}", f"{LEAST_SMALL:.1f}", met, "-"))
    return table(("M", "T", "ratio", "asked", "met", "least over 2:4"), cells)


def measure(
    cases: list[Case], device: torch.device, bandwidth: float, flops: float, tuned: bool = False
) -> tuple[list[Row], list[tuple[str, ...]]]:
    """Time the cases of one shape and number of tokens in turn with dense and 2:4; and what was wrong in their results.

    A contender that fails is left out.
    """
    from benchmarks.gpu_contenders import SEMI_STRUCTURED, dense, linears, ours, quantised, semi_structured
    from benchmarks.gpu_timing import seconds_of_each, sets_needed

    torch._dynamo.reset()
    first, wrong = cases[0], []
    few = sets_needed(2 * first.out_features * first.in_features, device)
    x = torch.randn(first.tokens, first.in_features, device=device).to(first.dtype)
    with torch.no_grad():
        calls: dict[str, list[Callable[[], Any]]] = dense(first, x, device, few, tuned)
        names = list(calls)
        other = semi_structured(first, x, device, few)
        if isinstance(other, str):
            print(f"2:4 has no kernel for {first.name}, T = {first.tokens}: {other}", flush=True)
        else:
            calls[SEMI_STRUCTURED] = other
        bits = {case.quantization.bits for case in cases if case.quantization}
        calls |= {name: its for each in bits for name, its in quantised(first, x, device, few, each).items()}
        for case in cases:
            layers = linears(case, device, sets_needed(case.layout.nbytes(case.dtype), device))
            calls[case.stored] = ours(layers, x)
            try:
                found = errors(layers[0], calls[case.stored][0](), x)
            except Exception as error:
                print(f"{case.spec} failed: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
                del calls[case.stored]
                continue
            if not found[-1]:
                wrong.append(line(case, *found))
        taken = {name: 1e6 * median(each) for name, each in seconds_of_each(calls).items()}
    best = min((name for name in names if name in taken), key=taken.__getitem__)
    rows = []
    for case in cases:
        if case.stored in taken:
            floors = [1e6 * case.floor(bandwidth, flops, sparse) for sparse in (True, False)]
            figures = taken[best], best, taken.get(SEMI_STRUCTURED), taken[case.stored], floors[0]
            like = f"int{case.quantization.bits}" if case.quantization else "-"
            same = min((each for name, each in taken.items() if name.startswith(like)), default=None)
            rows.append(Row(case.name, case.stored, case.tokens, *figures, floors[1] / floors[0], same))
    return rows, wrong


def dry_run(target: str) -> Iterator[tuple[str, ...]]:
    """Generate and compile every case's kernel for a GPU that is not there; its resources and its floor there."""
    from vnm_compile.codegen.generate import generate
    from vnm_compile.codegen.virtual_device import virtual_device
    from vnm_compile.hardware import find_target
    from vnm_compile.inspection.machine_code import compile_kernel

    card = find_target(target)
    for case in (case for cases in (*gpu_cases.layers(), *gpu_cases.small(), *gpu_cases.values()) for case in cases):
        kinds = zip(case.layout.shapes, case.layout.dtypes(case.dtype), strict=True)
        arrays = [torch.empty(shape, dtype=kind, device="meta") for shape, kind in kinds]
        x = torch.empty(case.tokens, case.in_features, dtype=case.dtype, device="meta")
        generated = generate(_linear(case), [x, *arrays], card, static=range(1, 1 + len(arrays)))
        (kernel,) = (each for each in generated.kernels if each.schedule.template)
        with virtual_device(card):
            code = compile_kernel(kernel.source, kernel.name, card)
        floor = case.floor(card.bandwidth, card.half_flops, sparse=True)
        tile = " ".join(f"{key[6:]}{code.config[key]}" for key in ("BLOCK_O", "BLOCK_T", "BLOCK_G"))
        tile += f" w{code.config['num_warps']} s{code.config['num_stages']} k{code.config['SPLITS']}"
        figures = (str(code.registers), str(code.spills), str(code.shared_bytes), f"{1e6 * floor:.1f}")
        yield case.name, case.stored, str(case.tokens), tile, *figures


def _linear(case: Case) -> Callable[..., Any]:
    from vnm_compile.ops import linear

    def graph(x: Any, values: Any, metadata: Any, columns: Any) -> Any:
        return linear(x, (values, metadata, columns), case.layout)

    def quantised(x: Any, values: Any, metadata: Any, columns: Any, scales: Any) -> Any:
        return linear(x, (values, metadata, columns, scales), case.layout)

    return quantised if case.quantization else graph


def plot(rows: list[Row], path: Path) -> None:
    """Ratio over tokens, one panel a shape, one line a pattern, with the limit dotted."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row.case for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 4), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for i, spec in enumerate(dict.fromkeys(row.spec for row in rows)):
            its = [row for row in rows if row.case == name and row.spec == spec]
            tokens = [row.tokens for row in its]
            axis.plot(tokens, [row.ratio for row in its], "o-", color=f"C{i}", label=spec)
            axis.plot(tokens, [row.limit for row in its], ":", color=f"C{i}")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(xscale="log", yscale="log", title=name, xlabel="tokens")
    axes[0][0].set_ylabel("speed-up over dense (dotted: limit)")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


class Results:
    """What was measured so far, kept after each step: a machine may be gone in the next."""

    def __init__(self, out: Path, machine: dict[str, Any]) -> None:
        self.path, self.machine = out / "gpu.json", machine
        self.checked: list[tuple[str, ...]] = []
        self.models: list[tuple[str, ...]] = []
        self.rows: list[Row] = []
        out.mkdir(parents=True, exist_ok=True)

    @property
    def wrong(self) -> bool:
        """Whether a result was."""
        return any(each[-1] for each in self.checked)

    def keep(self) -> None:
        """Write the file."""
        rows = [asdict(row) for row in self.rows]
        saved = {"machine": self.machine, "correctness": self.checked, "models": self.models, "rows": rows}
        self.path.write_text(json.dumps(saved, indent=1) + "\n")

    def print(self) -> None:
        """The tables."""
        if self.checked:
            print(table(gpu_check.HEADINGS, [each for each in self.checked if each[-1]]))
            print(f"{len(self.checked)} checked, {sum(bool(each[-1]) for each in self.checked)} of them wrong")
        if self.models:
            print(table(gpu_models.HEADINGS, self.models))
        if self.rows:
            print(table(HEADINGS, (row.cells for row in self.rows)))
            print(summary(self.rows))


def run(sections: list[str], out: Path, budget: float, tuned: bool = False, processes: int = 1) -> int:
    """Check and measure the sections within `budget` seconds, write and print what is found; 1 if a result is wrong."""
    from benchmarks.gpu_timing import ceilings

    begin, device = time.monotonic(), torch.device("cuda", 0)
    checked, failed = gpu_check.side_by_side(sections, processes)
    print(
        *failed, f"{len(checked)} cases compiled and checked in {time.monotonic() - begin:.0f} s", sep="\n", flush=True
    )
    torch._dynamo.config.recompile_limit = 64
    bandwidth, flops = ceilings(device)
    name = torch.cuda.get_device_name(device)
    print(f"{name}: {bandwidth / 1e12:.2f} TB/s copy, {flops / 1e12:.0f} Tflop/s bf16", flush=True)
    results = Results(out, {"device": name, "torch": torch.__version__, "bandwidth": bandwidth, "flops": flops})
    results.checked += checked
    results.keep()

    def steps(section: str) -> Iterator[None]:
        if section == "models":
            for each in gpu_models.run(device):
                results.models.append(each)
                print(*each, sep="  ", flush=True)
                yield
        elif section != "correctness":  # which was checked before
            for cases in getattr(gpu_cases, section)():
                rows, wrong = measure(cases, device, bandwidth, flops, tuned)
                results.rows += rows
                results.checked += wrong
                for row in rows:
                    print(*row.cells, sep="  ", flush=True)
                yield

    for _ in (step for section in sections for step in steps(section)):
        results.keep()
        if time.monotonic() - begin > budget:
            print(f"stopped after {budget:.0f} s: not everything was measured")
            break
    if results.rows:
        plot(results.rows, out / "gpu_layers.png")
    results.print()
    return int(results.wrong or bool(failed))


def main(arguments: list[str] | None = None) -> int:
    """The command; the exit status is 1 where a kernel computes something wrong, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"some of {', '.join(SECTIONS)}")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for JSON and plot")
    parser.add_argument("--max-autotune", action="store_true", help="also time Inductor's own choice of dense kernels")
    parser.add_argument("--seconds", type=float, default=480, help="stop measuring after so long")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that check")
    parser.add_argument("--dry-run", action="store_true", help="compile the kernels for --target, run nothing")
    parser.add_argument("--target", default="sm_90", help="of the dry run")
    parser.add_argument("--estimate", action="store_true", help="print what the static model expects of every card")
    parser.add_argument("--write", action="store_true", help="estimates into benchmarks/results and the docs")
    options = parser.parse_args(arguments)
    sections = options.sections.split(",")
    unknown = [name for name in sections if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if options.estimate:
        from benchmarks import gpu_estimate

        print(gpu_estimate.run(options.write))
        return 0
    if options.dry_run:
        lines = list(dry_run(options.target))
        print(table(("case", "pattern", "T", "tile", "registers", "spills", "shared", "floor us"), lines))
        return 0
    if not torch.cuda.is_available():
        print("no GPU here; --dry-run compiles the kernels for one")
        return 2
    return run(sections, options.out, options.seconds, options.max_autotune, options.processes)


if __name__ == "__main__":
    raise SystemExit(main())
