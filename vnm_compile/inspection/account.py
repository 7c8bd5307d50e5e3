"""Where the time of a launch goes: instructions of the hot loop, bytes through caches and memory, and which bounds it.

What is said of a kernel are limits, from its machine code and from `hardware`: no launch is faster, and real ones wait
besides. Beside them stands the estimate of the model that ranks configurations, which was fitted to times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vnm_compile.codegen.schedule import Schedule
from vnm_compile.codegen.triton.configs import Config, Shape
from vnm_compile.codegen.triton.sparse_configs import SparseConfig
from vnm_compile.hardware import Target
from vnm_compile.inspection.assembly import Instructions, hot_loop
from vnm_compile.inspection.limits import estimated_seconds, l2_bytes, least_seconds, products, tensor_seconds
from vnm_compile.inspection.machine_code import MachineCode
from vnm_compile.inspection.pipes import instruction_seconds, pipes_of, products_of, stall_cycles
from vnm_compile.quantization import Quantization
from vnm_compile.spec import Spec


@dataclass(frozen=True)
class Account:
    """What a launch of a sparse kernel asks of a GPU, and what it takes at least.

    A step is one round of the template's loop over groups; where no loop is left of it, its share of all of the kernel.

    Attributes:
        pipes: warp instructions of a step by the pipe that executes them: "tensor", "integer", "float", "memory"
            (global and shared), "special", "uniform", "control"; on AMD "tensor", "memory", "vector", "scalar".
        stall_cycles: cycles of a step that the compiler lets a warp wait, issuing included: what it takes a warp whose
            loads are all there. None on AMD, whose code has no such counts.
        tensor_cycles: of a multiprocessor's tensor cores for a step of a tile, all warps of it.
        steps: of a tile.
        tiles: of the launch, each by one block of threads.
        warps: of a block.
        dram_bytes: read and written, each once.
        l2_bytes: that all tiles read from L2, and what is written.
        seconds: the least time of a launch by what could bound it: "DRAM", "L2", "tensor", "issue" (slots for
            instructions; not on AMD) and the pipes' names.
        estimate: seconds by the model that ranks configurations.
    """

    pipes: Mapping[str, int]
    stall_cycles: int | None
    tensor_cycles: float
    steps: int
    tiles: int
    warps: int
    dram_bytes: int
    l2_bytes: int
    seconds: Mapping[str, float]
    estimate: float

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=self.seconds.__getitem__)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        named = ("stall_cycles", "tensor_cycles", "steps", "tiles", "warps", "dram_bytes", "l2_bytes", "estimate")
        plain = {name: getattr(self, name) for name in named}
        return {"bound": self.bound, "pipes": dict(self.pipes), "seconds": dict(self.seconds), **plain}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{_many(self.tiles, 'tile')} of {_many(self.steps, 'step')}, {_many(self.warps, 'warp')} each"
        yield f"instructions of a warp and step: {sum(self.pipes.values())} " + _told(self.pipes, "{}")
        waits = f"a warp waits {self.stall_cycles} cycles, " if self.stall_cycles is not None else ""
        yield f"in a step: {waits}tensor cores work {self.tensor_cycles:.0f}"
        yield f"MB: DRAM {self.dram_bytes / 1e6:.2f}, L2 {self.l2_bytes / 1e6:.2f}"
        slowest_first = sorted(self.seconds, key=self.seconds.__getitem__, reverse=True)
        least = {name: 1e6 * self.seconds[name] for name in slowest_first}
        yield f"at least, us: {_told(least, '{:.2f}')}; estimated {1e6 * self.estimate:.1f}"


def _many(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _told(of: Mapping[str, float], form: str) -> str:
    return "(" + ", ".join(f"{name} {form.format(value)}" for name, value in of.items()) + ")"


def account_of(schedule: Schedule, code: MachineCode, dram_bytes: int, target: Target) -> Account:
    """The account of a kernel of one of our templates.

    Args:
        schedule: what it computes.
        code: what the compiler made of it, with the constants that its template was filled in with.
        dram_bytes: that it reads and writes.
        target: what it was compiled for.
    """
    shape, config = _shape(schedule, code.config), _config(code.config)
    tiles, steps = config.tiles(shape), config.steps(shape)
    pipes, stalls, multiplies = _step(config, shape, code, target)
    written = sum(each.nbytes for each in schedule.writes)
    least = least_seconds(config, shape, target, dram_bytes, written, multiplies)
    least |= instruction_seconds(pipes, tiles * steps * config.warps, target)
    in_step = tensor_seconds(config, shape, target) * target.multiprocessors * target.clock
    return Account(
        pipes=pipes,
        stall_cycles=stalls,
        tensor_cycles=in_step if multiplies else 0.0,
        steps=steps,
        tiles=tiles,
        warps=config.warps,
        dram_bytes=dram_bytes,
        l2_bytes=l2_bytes(config, shape, written),
        seconds=least,
        estimate=estimated_seconds(config, shape, target),
    )


def _shape(schedule: Schedule, constants: Mapping[str, Any]) -> Shape:
    quantization = None
    if "LEVEL_BITS" in constants:
        quantization = Quantization(constants["LEVEL_BITS"], constants["SCALE_GROUP"] or None)
    assert schedule.tokens is not None, "a kernel of a template multiplies tokens"
    assert schedule.dtype is not None
    return Shape(
        tokens=schedule.tokens,
        rows=constants["R"],
        groups=constants["G"],
        spec=Spec(constants["V"], constants["N"], constants["M"]),
        dtype=schedule.dtype,
        gated="gated" in (schedule.template or ""),
        quantization=quantization,
    )


def _config(constants: Mapping[str, Any]) -> Config:
    block_o, block_t, block_g = (constants[f"BLOCK_{axis}"] for axis in "OTG")
    warps, stages, splits = constants["num_warps"], constants["num_stages"], constants["SPLITS"]
    if "WARPS_O" in constants:
        return SparseConfig(block_o, block_t, block_g, warps, stages, splits, constants["WARPS_O"])
    return Config(block_o, block_t, block_g, warps, stages, splits)


def _step(config: Config, shape: Shape, code: MachineCode, target: Target) -> tuple[dict[str, int], int | None, bool]:
    """Instructions by pipe and cycles that a warp waits, of a step, and whether tensor cores multiply."""
    counted, lines = code.loop, (code.encoded or "").splitlines()
    if counted.total:
        steps = _steps_in_loop(config, shape, counted)
        lines = list(hot_loop(lines))
    else:
        counted, steps = code.instructions, config.steps(shape)
    pipes = pipes_of(counted.names, target.backend == "cuda")
    stalls = round(stall_cycles(lines) / steps) if code.encoded is not None else None
    return {pipe: round(times / steps) for pipe, times in pipes.items()}, stalls, counted.tensor_core > 0


def _steps_in_loop(config: Config, shape: Shape, loop: Instructions) -> int:
    """How many steps of the template's loop the compiler made one of: by its products, where instructions tell them."""
    return max(1, round(products_of(loop.names) * config.warps / products(config, shape)))
