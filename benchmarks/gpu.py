"""Sparse against dense and 2:4 on this machine's GPU: `python -m benchmarks.gpu [--sections ...] [--out DIR]`.

First every template is checked against float64, then each case times, in turn and in one run: dense through cuBLAS and
through torch.compile, torch's own 2:4 (cuSPARSELt), and backend="vnm". Times are medians of CUDA-graph replays that go
through several sets of random weights, larger than the L2 together. Needs torch, triton, numpy and sympy only; the plot
also matplotlib. Without a GPU, `--dry-run` generates and compiles every case's kernel for sm_90.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from math import exp, log
from pathlib import Path
from statistics import median
from typing import Any

import torch

import vnm_compile  # noqa: F401  (registers the ops)
from benchmarks import gpu_cases, gpu_models
from benchmarks.gpu_cases import LARGE, LEAST_SMALL, TARGETS, TOKENS, Case
from vnm_compile.backend import vnm  # the package need not be installed

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ("correctness", "models", "layers", "small")


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
            f"{self.limit:.2f} ({self.ratio / self.limit:.0%})",
            f"{self.floor_us / self.sparse_us:.0%}",
        )


HEADINGS = ("case", "pattern", "T", "dense us", "2:4 us", "vnm us", "ratio", "over 2:4", "limit", "of floor")


def table(headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Rows as aligned text."""
    rows = [headings, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(headings))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def geometric_means(rows: Iterable[Row]) -> list[tuple[int, int, float, float, float | None]]:
    """(M, T, mean over LARGE of the better V, target, worst ratio over 2:4) of every target that was measured."""
    names = [f"{o} x {k}" for o, k in LARGE]
    found = []
    rows = list(rows)
    for m, targets in TARGETS.items():
        for tokens, target in zip(TOKENS, targets, strict=True):
            of_v: dict[str, list[Row]] = {}
            for row in rows:
                if row.case in names and row.tokens == tokens and row.spec.endswith(f":2:{m}"):
                    of_v.setdefault(row.spec, []).append(row)
            means = {
                spec: exp(sum(log(row.ratio) for row in its) / len(its))
                for spec, its in of_v.items()
                if len(its) == len(names)
            }
            if means:
                best = max(means, key=means.__getitem__)
                over = [row.over_semi_structured for row in of_v[best] if row.over_semi_structured]
                found.append((m, tokens, means[best], target, min(over) if over else None))
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


def check(device: torch.device) -> Iterator[tuple[str, ...]]:
    """One line a case: the error against float64, beside that of the dense kernel of the same dtype."""
    from benchmarks.gpu_contenders import linears

    for case in gpu_cases.correctness():
        torch._dynamo.reset()
        (layer,) = linears(case, device, 1)
        x = torch.randn(case.tokens, case.in_features, device=device).to(case.dtype)
        compiled = torch.compile(layer, backend=vnm, options={"vnm.policy": "memory"})
        with torch.no_grad():
            exact = x.double() @ layer.weight.double().T
            ours, dense = ((y.double() - exact).norm() / exact.norm() for y in (compiled(x), layer(x)))
            # What rounding the exact result makes is asked of nobody; a dense kernel may be exact by luck.
            least = (exact.to(case.dtype).double() - exact).norm() / exact.norm()
        fine = bool(ours <= 1.1 * max(dense, least))
        yield (
            case.name,
            str(case.spec),
            str(case.tokens),
            str(case.dtype).removeprefix("torch."),
            f"{float(ours):.2e}",
            f"{float(dense):.2e}",
            "" if fine else "WRONG",
        )


def measure(case: Case, device: torch.device, bandwidth: float, flops: float) -> Row:
    """Time a case."""
    from benchmarks.gpu_contenders import OURS, SEMI_STRUCTURED, contenders, linears, semi_structured
    from benchmarks.gpu_timing import seconds_of_each, sets_needed

    sets = sets_needed(case.layout.nbytes(case.dtype), device)
    x = torch.randn(case.tokens, case.in_features, device=device).to(case.dtype)
    with torch.no_grad():
        calls = contenders(case, linears(case, device, sets), x)
        other = semi_structured(case, x, device, sets)
        if isinstance(other, str):
            print(f"2:4 has no kernel for {case.name}, T = {case.tokens}: {other}", flush=True)
        else:
            calls[SEMI_STRUCTURED] = other
        taken = {name: 1e6 * median(each) for name, each in seconds_of_each(calls).items()}  # type: ignore[arg-type]
    ours, other_us = taken.pop(OURS), taken.pop(SEMI_STRUCTURED, None)
    dense = min(taken, key=taken.__getitem__)
    floors = [1e6 * case.floor(bandwidth, flops, sparse) for sparse in (True, False)]
    return Row(
        case.name, str(case.spec), case.tokens, taken[dense], dense, other_us, ours, floors[0], floors[1] / floors[0]
    )


def dry_run(target: str) -> Iterator[tuple[str, ...]]:
    """Generate and compile every case's kernel for a GPU that is not there; its resources and its floor there."""
    from vnm_compile.codegen.generate import generate
    from vnm_compile.codegen.virtual_device import virtual_device
    from vnm_compile.hardware import find_target
    from vnm_compile.inspection.machine_code import compile_kernel

    card = find_target(target)
    for case in (*gpu_cases.layers(), *gpu_cases.small()):
        kinds = zip(case.layout.shapes, case.layout.dtypes(case.dtype), strict=True)
        arrays = [torch.empty(shape, dtype=kind, device="meta") for shape, kind in kinds]
        x = torch.empty(case.tokens, case.in_features, dtype=case.dtype, device="meta")
        generated = generate(_linear(case), [x, *arrays], card, static=(1, 2, 3))
        (kernel,) = (each for each in generated.kernels if each.schedule.template)
        with virtual_device(card):
            code = compile_kernel(kernel.source, kernel.name, card)
        floor = case.floor(card.bandwidth, card.half_flops, sparse=True)
        tile = " ".join(f"{key[6:]}{code.config[key]}" for key in ("BLOCK_O", "BLOCK_T", "BLOCK_G"))
        tile += f" w{code.config['num_warps']} s{code.config['num_stages']} k{code.config['SPLITS']}"
        figures = (str(code.registers), str(code.spills), str(code.shared_bytes), f"{1e6 * floor:.1f}")
        yield case.name, str(case.spec), str(case.tokens), tile, *figures


def _linear(case: Case) -> Callable[..., Any]:
    from vnm_compile.ops import linear

    def graph(x: Any, values: Any, metadata: Any, columns: Any) -> Any:
        return linear(x, (values, metadata, columns), case.layout)

    return graph


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


def run(sections: list[str], out: Path, budget: float) -> int:
    """Measure the sections within `budget` seconds, write and print what was measured; 1 if a result is wrong."""
    from benchmarks.gpu_timing import ceilings

    begin, device, wrong = time.monotonic(), torch.device("cuda", 0), False
    torch._dynamo.config.recompile_limit = 64
    bandwidth, flops = ceilings(device)
    print(f"{torch.cuda.get_device_name(device)}: {bandwidth / 1e12:.2f} TB/s copy, {flops / 1e12:.0f} Tflop/s bf16")
    checked: list[tuple[str, ...]] = []
    if "correctness" in sections:
        for line in check(device):
            checked.append(line)
            wrong |= bool(line[-1])
    models: list[tuple[str, ...]] = []
    if "models" in sections:
        for line in gpu_models.run(device):
            models.append(line)
            wrong |= bool(line[-1])
    rows: list[Row] = []
    cases = [case for name in ("layers", "small") if name in sections for case in getattr(gpu_cases, name)()]
    for case in cases:
        if time.monotonic() - begin > budget:
            print(f"stopped after {budget:.0f} s; {len(cases) - len(rows)} cases were not measured")
            break
        rows.append(measure(case, device, bandwidth, flops))
        print(*rows[-1].cells, sep="  ", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    machine = {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "bandwidth": bandwidth,
        "flops": flops,
    }
    saved = {"machine": machine, "correctness": checked, "models": models, "rows": [asdict(row) for row in rows]}
    (out / "gpu.json").write_text(json.dumps(saved, indent=1) + "\n")
    if rows:
        plot(rows, out / "gpu_layers.png")
    if checked:
        print(table(("case", "pattern", "T", "dtype", "error", "dense error", ""), checked))
    if models:
        print(table(gpu_models.HEADINGS, models))
    if rows:
        print(table(HEADINGS, (row.cells for row in rows)))
        print(summary(rows))
    return int(wrong)


def main(arguments: list[str] | None = None) -> int:
    """The command; the exit status is 1 where a kernel computes something wrong, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"some of {', '.join(SECTIONS)}")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for JSON and plot")
    parser.add_argument("--seconds", type=float, default=480, help="stop measuring after so long")
    parser.add_argument("--dry-run", action="store_true", help="compile the kernels for --target, run nothing")
    parser.add_argument("--target", default="sm_90", help="of the dry run")
    options = parser.parse_args(arguments)
    sections = options.sections.split(",")
    unknown = [name for name in sections if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if options.dry_run:
        lines = list(dry_run(options.target))
        print(table(("case", "pattern", "T", "tile", "registers", "spills", "shared", "floor us"), lines))
        return 0
    if not torch.cuda.is_available():
        print("no GPU here; --dry-run compiles the kernels for one")
        return 2
    return run(sections, options.out, options.seconds)


if __name__ == "__main__":
    raise SystemExit(main())
