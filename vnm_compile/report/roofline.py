"""A roofline plot: what a machine can do at best, and where layers and kernels stand."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from vnm_compile.errors import MissingPackage
from vnm_compile.explanation.layer import LayerReport
from vnm_compile.hardware import CPU_CORE, Core, Target, allows_tf32
from vnm_compile.inspection.kernel import Kernel


@dataclass(frozen=True)
class Roof:
    """A machine: bytes and floating-point operations a second at best, and its name.

    `sparse_flops` are those of sparse tensor cores, zeros counted; 0 where there are none.
    """

    bandwidth: float
    flops: float
    name: str
    sparse_flops: float = 0.0

    @classmethod
    def of(cls, target: Target | None, dtype: torch.dtype) -> Roof:
        """The roof of a GPU, or of the cores of this machine that torch uses."""
        if target is not None:
            sparse = target.sparse_flops if dtype.itemsize == 2 else 0.0
            return cls(target.bandwidth, target.peak_flops(dtype, allows_tf32()), target.card, sparse)
        core: Core = CPU_CORE
        threads = torch.get_num_threads()
        name = f"{threads} cores as the cost model takes them"
        return cls(threads * core.bandwidth, threads * core.peak_flops(dtype), name)

    def at(self, intensity: float, sparse_cores: bool = False) -> float:
        """Most operations a second at so many operations a byte."""
        return min(max(self.flops, self.sparse_flops) if sparse_cores else self.flops, self.bandwidth * intensity)


@dataclass(frozen=True)
class Point:
    """Something that moves bytes and computes: operations a byte, and operations a second where that was measured."""

    label: str
    intensity: float
    rate: float | None
    sparse_cores: bool = False


Series = tuple[str, str, Sequence[Point]]
"""A label, a colour, and points."""


def layer_points(layers: Iterable[LayerReport], itemsize: int, *, sparse: bool) -> list[Point]:
    """The layers whose times were measured; operations are those on the weights that are kept, or on all."""
    points = []
    for layer in layers:
        seconds = layer.sparse_seconds if sparse else layer.dense_seconds
        moved = layer.stored_bytes if sparse else layer.dense_bytes
        if layer.shape is None or not seconds or not moved or not layer.tokens:
            continue
        rows, columns = layer.shape
        flops = 2 * layer.tokens * rows * columns * (layer.density if sparse else 1.0)
        moved += layer.tokens * (rows + columns) * itemsize
        points.append(Point(layer.name, flops / moved, flops / seconds))
    return points


def kernel_points(kernels: Iterable[Kernel]) -> list[Point]:
    """The kernels that multiply; how long they take is not known without the machine."""
    points = []
    for kernel in kernels:
        flops, moved = kernel.at_tokens(kernel.flops), kernel.at_tokens(kernel.bytes_moved)
        if flops and moved:
            points.append(Point(kernel.name, flops / moved, None, kernel.schedule.sparse_cores))
    return points


def roofline(roof: Roof, series: Sequence[Series]) -> str:
    """Draw a roofline plot as SVG.

    Args:
        roof: the machine.
        series: what to draw. Points that were not measured are drawn on the roof, hollow.

    Raises:
        VNMError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError as missing:
        raise MissingPackage("a report needs matplotlib: pip install 'vnm-compile[cli]'.") from missing
    points = [point for _, _, each in series for point in each]
    ridge = roof.flops / roof.bandwidth
    least = min([point.intensity for point in points] + [ridge / 8]) / 2
    most = max([point.intensity for point in points] + [ridge * 4]) * 2
    with rc_context({"svg.hashsalt": "vnm", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7.5, 4.2), layout="constrained")
        axes = figure.add_subplot(xscale="log", yscale="log")
        axes.plot([least, ridge, most], [roof.at(x) for x in (least, ridge, most)], color="#444444")
        if any(point.sparse_cores for point in points):
            higher = [max(least, min(ridge, most)), min(most, roof.sparse_flops / roof.bandwidth), most]
            heights = [roof.at(x, sparse_cores=True) for x in higher]
            axes.plot(higher, heights, "--", color="#444444", label="sparse tensor cores")
        for label, colour, each in series:
            measured = [point for point in each if point.rate is not None]
            others = [point for point in each if point.rate is None]
            if measured:
                rates = [point.rate or 0.0 for point in measured]
                axes.scatter([p.intensity for p in measured], rates, s=28, color=colour, label=label, alpha=0.8)
            if others:
                at = [roof.at(point.intensity, point.sparse_cores) for point in others]
                axes.scatter([p.intensity for p in others], at, s=36, facecolors="none", edgecolors=colour, label=label)
        axes.set_xlabel("operations a byte")
        axes.set_ylabel("operations a second")
        axes.set_title(roof.name, fontsize=10, parse_math=False)
        axes.grid(True, which="major", alpha=0.25)
        if points:
            axes.legend(fontsize=8)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return re.sub(r"^.*?(?=<svg)", "", written.getvalue(), flags=re.DOTALL)
