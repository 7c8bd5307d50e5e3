"""Kernels compiled to PTX, and their launches on tensors of the CPU."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from tests.ptx.errors import NotModelled
from tests.ptx.machine import Machine
from tests.ptx.memory import GlobalMemory
from tests.ptx.parse import Program, parse
from vnm_compile.codegen.virtual_device import virtual_device
from vnm_compile.hardware import find_target
from vnm_compile.inspection.machine_code import compile_kernel, loaded

_THREADS = 2048
"""How many threads run in lockstep: more take memory, fewer time."""
_STEPS = 1_000_000
_BLOCKS = {"x": "XBLOCK", "y": "YBLOCK", "z": "ZBLOCK"}


@dataclass(frozen=True)
class Kernel:
    """A kernel for a target.

    Attributes:
        name: as the wrapper calls it.
        template: whether the wrapper says how many blocks there are, as it does for templates.
        arguments: names and types of what it is launched with; what was compiled in, "constexpr", is not passed on.
        config: block sizes, warps, stages.
        program: its instructions.
        shared_bytes: shared memory of a block.
    """

    name: str
    template: bool
    arguments: tuple[tuple[str, str], ...]
    config: dict[str, Any]
    program: Program
    shared_bytes: int


@functools.lru_cache(maxsize=64)
def compiled(name: str, source: str, target: str) -> Kernel:
    """Compile a kernel of a file that Inductor wrote, with the first of its configurations."""
    with virtual_device(target):
        code = compile_kernel(source, name, find_target(target))
        with loaded(source) as module:
            kernel = getattr(module, name)
            meta, kind = kernel.triton_meta, str(kernel.heuristic_type)
            constants = {*meta["constants"], *kernel.configs[0].kwargs}
    arguments = tuple(
        (each, "constexpr" if each in constants else kind)
        for each, kind in meta["signature"].items()
        if each not in kernel.configs[0].kwargs
    )
    program = parse(code.intermediate)
    return Kernel(name, "TEMPLATE" in kind, arguments, dict(code.config), program, code.shared_bytes)


@dataclass
class Ran:
    """What a launch has done.

    Attributes:
        taken: places of the instructions that were reached.
        hazards: faults that are noted and not raised, and the registers that they are of.
        steps: instructions that the longest of its blocks took.
        meetings: barriers as they were passed, as the machine notes them.
        digest: tells apart what was stored, where memory was accessed, and which branches were taken.
        read_back: places of instructions that wrote to shared memory what was read there; noted where somebody watches.
        ordering: places of barriers of blocks that order what no other does; noted likewise.
    """

    taken: set[int]
    hazards: set[tuple[str, str]]
    steps: int
    meetings: list[tuple[int, int]]
    read_back: set[int]
    digest: list[int]
    ordering: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Launch:
    """A call of a kernel: its arguments, tensors and sizes, and the grid."""

    kernel: Kernel
    arguments: tuple[Any, ...]
    grid: tuple[int, int, int]

    @classmethod
    def of(cls, kernel: Kernel, given: Sequence[Any]) -> Launch:
        """From what a wrapper calls it with."""
        if kernel.template:
            *arguments, x, y, z = given
            return cls(kernel, tuple(arguments), (x, y, z))
        sizes = {name: value for (name, _), value in zip(kernel.arguments, given, strict=True)}
        grid = [-(-int(sizes.get(f"{axis}numel", 1)) // kernel.config.get(block, 1)) for axis, block in _BLOCKS.items()]
        return cls(kernel, tuple(given), (grid[0], grid[1], grid[2]))

    def tensors(self) -> list[torch.Tensor]:
        """The tensors among the arguments."""
        return [each for each in self.arguments if isinstance(each, torch.Tensor)]

    def with_program(self, program: Program) -> Launch:
        """The same launch of another program."""
        return replace(self, kernel=replace(self.kernel, program=program))

    def run(self, late: bool = True, steps: int = _STEPS, watch: Any = None) -> Ran:
        """Carry it out, on the tensors."""
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in self.tensors()}
        arrays = [as_bytes(storage) for storage in storages.values()]
        memory = GlobalMemory(arrays)
        place = {address: memory.address(i) for i, address in enumerate(storages)}
        ran = Ran(set(), set(), 0, [], set(), [])
        program = self.kernel.program
        coordinates = np.array(np.unravel_index(range(int(np.prod(self.grid))), self.grid[::-1])).T[:, ::-1]
        at_once = max(1, _THREADS // program.threads)
        for first in range(0, len(coordinates), at_once):
            memory.first_thread = first * program.threads
            blocks = coordinates[first : first + at_once]
            machine = Machine(
                program, memory, self._parameters(place), blocks, self.grid, self.kernel.shared_bytes, late, steps
            )
            machine.watch = watch or {}
            if watch is not None:
                machine.shared.watch(32 if any(each.opcode == "bar.warp.sync" for each in program.instructions) else 1)
            with np.errstate(all="ignore"):
                machine.run()
            ran.taken.update(machine.taken)
            ran.digest += [machine.branches, machine.shared.digest]
            ran.read_back.update(machine.shared.read_back)
            if machine.shared.ordering:
                ran.ordering.update(machine.shared.ordering.needed)
            ran.hazards.update(machine.hazards)
            ran.meetings = ran.meetings or machine.meetings
            ran.steps = max(ran.steps, steps - machine.steps)
        ran.digest.append(memory.digest)
        for i, array in enumerate(arrays):
            array[:] = memory.contents(i)
        return ran

    def _parameters(self, place: dict[int, int]) -> list[int]:
        """Values of the kernel's parameters: those that were not compiled in, and Triton's own, which are null."""
        values = []
        for (name, kind), value in zip(self.kernel.arguments, self.arguments, strict=True):
            if kind == "constexpr":
                continue
            if isinstance(value, torch.Tensor):
                values.append(place[value.untyped_storage().data_ptr()] + value.storage_offset() * value.itemsize)
            elif kind.startswith("i"):
                values.append(int(value))
            else:
                raise NotModelled(f"argument {name} of type {kind}")
        missing = len(self.kernel.program.parameters) - len(values)
        if missing not in (1, 2):  # scratch memory, and, since Triton 3.4, that of the profiler
            raise NotModelled(f"{missing} parameters that nobody has given")
        return values + [0] * missing


def as_bytes(storage: torch.UntypedStorage) -> np.ndarray:
    """The memory of a storage, shared with it."""
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()  # type: ignore[call-overload]
