"""The machine: registers of all threads of some blocks, and the order in which instructions are carried out.

Threads run in lockstep where they are at the same instruction, those at the smallest place first elsewhere, so that
they meet again as soon as they can. Registers are arrays over threads, replaced when they are written, never changed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import numpy as np

from tests.ptx import instructions
from tests.ptx.asynchronous import Copies, Products
from tests.ptx.errors import NotModelled, PTXError
from tests.ptx.memory import GlobalMemory, SharedMemory
from tests.ptx.parse import Address, Immediate, Instruction, Name, Operand, Program, Register, Special, Vector

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
WARP = 32


def kind_size(kind: str) -> int:
    """Bytes of `u32`, `b16`, `bf16x2`."""
    return {"bf16x2": 4, "f16x2": 4, "f32x2": 8}.get(kind) or int(kind.lstrip("abcdefghijklmnopqrstuvwxyz")) // 8


def kind_dtype(kind: str) -> type:
    """NumPy's type of a PTX type; that of its bits where NumPy has none."""
    if kind in FLOATS:
        return FLOATS[kind]
    return (SIGNED if kind.startswith("s") else UNSIGNED)[kind_size(kind)]


class Watcher(Protocol):
    """Looks on before an instruction is carried out."""

    def compare(self, machine: Machine, original: Instruction, reached: np.ndarray) -> None:
        """The machine's active threads are those that have reached it and whose predicate is true."""


class Machine:
    """Some blocks of a kernel's grid.

    Attributes:
        memory: what all blocks share.
        shared: the memory of each.
        threads: how many there are.
        mask: those that carry out the current instruction; None for all.
        undefined: those that have read, in it, what they had not written: what they compute of it is nothing that may
            be stored, multiplied by tensor cores, or decide anything; None for none.
        taken: places of the instructions that have been reached.
        hazards: faults that are noted and not raised, and the registers that they are of.
        branches: sums up who has taken which.
        watch: who looks on, by place.
        meetings: barriers as they were passed: place, and how often shared memory was accessed before.
    """

    def __init__(
        self, program: Program, memory: GlobalMemory, parameters: Sequence[int], blocks: np.ndarray,
        grid: Sequence[int], shared_bytes: int, late: bool, steps: int,
    ) -> None:  # fmt: skip
        """`blocks` are coordinates `[blocks, 3]`; `late` makes asynchronous work wait for whoever waits for it."""
        self.program, self.memory = program, memory
        self.threads = len(blocks) * program.threads
        if program.threads % WARP:
            raise NotModelled("blocks of parts of warps")
        self.shared = SharedMemory(len(blocks), shared_bytes, program.threads)
        self.copies, self.products = Copies(self.shared, self.threads, late), Products(self, late)
        self.mask: np.ndarray | None = None
        self.undefined: np.ndarray | None = None
        self._unwritten = ""
        self.steps = steps
        self.taken: set[int] = set()
        self.hazards: set[tuple[str, str]] = set()
        self.watch: Mapping[int, Sequence[Watcher]] = {}
        self.branches = 0
        self.meetings: list[tuple[int, int]] = []
        self._parameters = dict(zip(program.parameters, parameters, strict=True))
        self._registers: dict[str, np.ndarray] = {}
        self._partial: dict[str, np.ndarray] = {}  # who has written, where not all have
        self._upper: dict[str, np.ndarray] = {}  # who has written the upper half, where not all have written both
        self._special = self._specials(blocks, grid)
        self._handlers = [self.handler(each) for each in program.instructions]
        self._pc = np.zeros(self.threads, np.int64)
        self._waiting = np.zeros(self.threads, bool)

    def _specials(self, blocks: np.ndarray, grid: Sequence[int]) -> dict[str, np.ndarray]:
        thread = np.tile(np.arange(self.program.threads, dtype=np.uint32), len(blocks))
        special = {"%tid.x": thread, "%laneid": thread % WARP, "%ntid.x": np.full_like(thread, self.program.threads)}
        for axis, name in enumerate("xyz"):
            special[f"%ctaid.{name}"] = np.repeat(blocks[:, axis].astype(np.uint32), self.program.threads)
            special[f"%nctaid.{name}"] = np.full_like(thread, grid[axis])
        return special

    def handler(self, instruction: Instruction) -> Callable[[Machine], None]:
        """What carries an instruction out. Raises NotModelled where nothing does."""
        opcode = instruction.opcode
        if opcode in ("ret", "exit", "bra", "bra.uni", "nop", "bar.sync"):
            return lambda machine: None
        function, modifiers = instructions.find(opcode)
        return partial(_carry_out, function, instruction, modifiers)

    # What instructions do with operands.

    def active(self) -> np.ndarray:
        """Numbers of the threads that carry out the instruction."""
        return np.arange(self.threads) if self.mask is None else np.flatnonzero(self.mask)

    def read(self, operand: Operand, kind: str) -> np.ndarray:
        """Values of an operand, in NumPy's type for `kind`: one for each thread, or, of a constant, one."""
        if isinstance(operand, Register):
            value = self._register(operand.name)
        elif isinstance(operand, Immediate):
            if kind == "pred":
                return np.bool_(operand.bits != 0)
            size = kind_size(kind)
            return UNSIGNED[size](operand.bits & ((1 << 8 * size) - 1)).view(kind_dtype(kind))
        elif isinstance(operand, Special):
            value = self._special[operand.name]
        elif isinstance(operand, Name) and operand.name == "global_smem":
            value = np.zeros(self.threads, np.uint32)
        else:
            raise NotModelled(f"a value of {operand}")
        if kind == "pred":
            return value
        size = kind_size(kind)
        if value.itemsize < size:
            raise PTXError(f"{operand} is narrower than {kind}")
        return value.astype(UNSIGNED[size], copy=False).view(kind_dtype(kind))

    def read_all(self, operand: Operand, kind: str) -> np.ndarray:
        """As `read`, one value for each thread."""
        return np.ascontiguousarray(np.broadcast_to(self.read(operand, kind), self.threads))

    def read_upper(self, operand: Operand, kind: str) -> np.ndarray:
        """As `read_all`, for whom only the upper half counts: the lower one may never have been written."""
        before = self.undefined
        value = self.read_all(operand, kind)
        if isinstance(operand, Register) and operand.name in self._upper:
            lost = ~self._upper[operand.name]
            self.undefined = lost if before is None else before | lost
        return value

    def write_halves(
        self, operand: Operand, value: np.ndarray, lower: np.ndarray | None, upper: np.ndarray | None
    ) -> None:
        """Write to a register what was put together of two halves; in which threads each was not written before."""
        self.undefined = lower if upper is None else upper if lower is None else lower | upper
        self.write(operand, value)
        if self.undefined is not None and isinstance(operand, Register):
            written = np.ones(self.threads, bool) if upper is None else ~upper
            self._upper[operand.name] = written if self.mask is None else written & self.mask

    def _register(self, name: str) -> np.ndarray:
        value = self._registers.get(name)
        if value is None:
            value = np.zeros(
                self.threads, bool if self.program.width(name) == 1 else UNSIGNED[self.program.width(name) // 8]
            )
            written: np.ndarray | None = np.zeros(self.threads, bool)
        else:
            written = self._partial.get(name)
        if written is not None and not (written if self.mask is None else written | ~self.mask).all():
            self.undefined = ~written if self.undefined is None else self.undefined | ~written
            self._unwritten = name
        self.products.check_read(name)
        return value

    def need_defined(self) -> None:
        """What the instruction has read so far has been written before, in all threads that carry it out."""
        if self.undefined is not None and (self.undefined if self.mask is None else self.undefined & self.mask).any():
            raise PTXError(f"{self._unwritten} is used before it is written")

    def peek(self, name: str) -> np.ndarray | None:
        """What a register holds, whoever has written it."""
        return self._registers.get(name)

    def write(self, operand: Operand, value: np.ndarray) -> None:
        """Write to a register, in the threads that carry out the instruction. Signed values are extended."""
        if isinstance(operand, Name) and operand.name == "_":
            return
        if not isinstance(operand, Register):
            raise NotModelled(f"a result in {operand}")
        self.products.check_write(operand.name)
        self.place(operand.name, value)

    def place(self, name: str, value: np.ndarray) -> None:
        """Write to a register without asking whether it is in use."""
        width = self.program.width(name)
        value = np.asarray(value)
        if width == 1:
            assert value.dtype == bool
        else:
            size = width // 8
            if value.dtype.kind == "f":
                value = value.view(UNSIGNED[value.itemsize])
            value = value.astype((SIGNED if value.dtype.kind == "i" else UNSIGNED)[size], copy=False)
            value = value.view(UNSIGNED[size])
        if value.ndim == 0:
            value = np.full(self.threads, value)
        old, written = self._registers.get(name), self._partial.pop(name, None)
        self._upper.pop(name, None)
        if self.mask is None:
            self._registers[name], written = value, None
        elif old is None:
            self._registers[name], written = value, self.mask
        else:
            self._registers[name] = np.where(self.mask, value, old)
            written = None if written is None else written | self.mask
        if self.undefined is not None:
            lost = self.undefined if self.mask is None else self.undefined & self.mask
            written = ~lost if written is None else written & ~lost
        if written is not None and not written.all():
            self._partial[name] = written

    def addresses(self, operand: Operand, kind: str) -> np.ndarray:
        """Addresses of the active threads."""
        if not isinstance(operand, Address):
            raise NotModelled(f"an address {operand}")
        base = np.broadcast_to(self.read(operand.base, kind), self.threads)[self.active()]
        self.need_defined()
        return base.astype(np.int64) + operand.offset

    def parameter(self, operand: Operand) -> int:
        """Value of a kernel's parameter."""
        if not (isinstance(operand, Address) and isinstance(operand.base, Name) and not operand.offset):
            raise NotModelled(f"a parameter {operand}")
        return self._parameters[operand.base.name]

    def results(self, each: Instruction) -> dict[str, bytes] | str:
        """What an instruction that only writes registers would write, or how it fails; nothing is changed."""
        registers, written, upper = dict(self._registers), dict(self._partial), dict(self._upper)
        undefined, active = self.undefined, self.active()
        self.shared.quiet = True
        try:
            self.handler(each)(self)
            changed = [name for name, value in self._registers.items() if value is not registers.get(name)]
            return {name: self._registers[name][active].tobytes() for name in changed}
        except (PTXError, NotModelled) as error:
            return str(error)
        finally:
            self._registers, self._partial, self._upper, self.undefined = registers, written, upper, undefined
            self.shared.quiet = False

    # The order of things.

    def run(self) -> None:
        """Carry out the program until all threads have left it. Raises PTXError for faults."""
        end = len(self.program.instructions)
        while (live := self._pc < end).any():
            ready = live & ~self._waiting
            if not ready.any():
                raise PTXError("deadlock: a barrier that not all threads of a block reach")
            here = int(self._pc[ready].min())
            at = ready & (self._pc == here)
            self.steps -= 1
            if self.steps < 0:
                raise PTXError("runs on and on")
            try:
                self._step(here, at)
            except (PTXError, NotModelled) as error:
                raise type(error)(f"{error} (instruction {here}: {self.program.instructions[here].text})") from None

    def _step(self, here: int, at: np.ndarray) -> None:
        each = self.program.instructions[here]
        self.undefined = None
        self.mask = None if at.all() else at
        if each.predicate is not None:
            chosen = self._register(each.predicate) ^ each.negated
            self.need_defined()
            chosen = chosen if self.mask is None else chosen & self.mask
            self.mask = None if chosen.all() else chosen
        chosen = at if self.mask is None else self.mask
        follow = np.where(at, here + 1, self._pc)
        self.taken.add(here)
        self.shared.place = here
        for watched in self.watch.get(here, ()):
            watched.compare(self, each, at)
        if chosen.any():
            if ".sync" in each.opcode:
                self._meet(here, each, chosen)
            if each.opcode.startswith("bra"):
                (target,) = each.operands
                assert isinstance(target, Name)
                follow = np.where(chosen, self.program.labels[target.name], follow)
                self.branches = zlib.crc32(chosen, self.branches)
            elif each.opcode in ("ret", "exit"):
                follow = np.where(chosen, len(self.program.instructions), follow)
            self._handlers[here](self)
        self._pc = follow

    def _meet(self, here: int, each: Instruction, chosen: np.ndarray) -> None:
        """Instructions that a warp's threads carry out together, and the barrier of a block."""
        if each.opcode.startswith("bar."):
            self.meetings.append((here, self.shared.accesses))
        warps = chosen.reshape(-1, WARP)
        if (warps.any(1) & ~warps.all(1)).any():
            raise PTXError("a warp's threads are not together")
        if each.opcode != "bar.sync":
            return
        if each.operands != (Immediate(0),):
            raise NotModelled("barriers but the first")
        self._waiting |= chosen
        left = (self._pc >= len(self.program.instructions)).reshape(-1, self.program.threads).any(1)
        together = self._waiting.reshape(-1, self.program.threads)
        if (left & together.any(1)).any():
            raise PTXError("a barrier after threads of the block have left")
        met = np.repeat(together.all(1), self.program.threads)
        self.shared.barrier(np.flatnonzero(met))
        self._waiting &= ~met


def _carry_out(
    function: Callable[..., None], instruction: Instruction, modifiers: dict[str, str], machine: Machine
) -> None:
    function(machine, *instruction.operands, **modifiers)


def vector(operand: Operand) -> tuple[Operand, ...]:
    """The registers of `{a, b}`, or the one of `a`."""
    return operand.items if isinstance(operand, Vector) else (operand,)
