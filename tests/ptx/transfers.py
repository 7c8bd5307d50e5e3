"""Loads, stores, asynchronous copies, what threads of a warp exchange, and fences."""

from __future__ import annotations

import numpy as np

from tests.ptx.errors import NotModelled, PTXError
from tests.ptx.instructions import instruction
from tests.ptx.machine import UNSIGNED, Machine, kind_dtype, kind_size, vector
from tests.ptx.parse import Immediate, Operand, Register

_KIND = r"(?P<kind>[bus](?:8|16|32|64)|f32)"
_WIDE = r"(?:\.v(?P<count>[248]))?"
_CACHE = r"(?:\.L1::\w+)?(?:\.L2::\w+)*"


@instruction(rf"ld\.param\.{_KIND}")
def load_parameter(machine: Machine, result: Operand, source: Operand, kind: str) -> None:
    """A parameter of the kernel, the same for all threads."""
    bits = machine.parameter(source) & ((1 << 8 * kind_size(kind)) - 1)
    machine.write(result, UNSIGNED[kind_size(kind)](bits).view(kind_dtype(kind)))


@instruction(rf"ld\.(?P<space>global|shared|shared::cta)(?:\.nc)?{_CACHE}{_WIDE}\.{_KIND}")
def load(
    machine: Machine, result: Operand, source: Operand, *policy: Operand, space: str, count: str | None, kind: str
) -> None:
    """One or several values of each thread, from an address that all of them together divide."""
    size, threads = kind_size(kind) * int(count or 1), machine.active()
    if space == "global":
        found = machine.memory.load(machine.addresses(source, "u64"), size, threads)
    else:
        found = machine.shared.load(machine.addresses(source, "u32"), size, threads)
    data = np.zeros((machine.threads, size), np.uint8)
    data[threads] = found
    values = data.view(kind_dtype(kind))
    for i, each in enumerate(vector(result)):
        machine.write(each, values[:, i].copy())


@instruction(rf"st\.(?P<space>global|shared|shared::cta){_CACHE}{_WIDE}\.{_KIND}")
def store(
    machine: Machine, target: Operand, source: Operand, *policy: Operand, space: str, count: str | None, kind: str
) -> None:
    """One or several values of each thread."""
    threads = machine.active()
    values = np.stack([machine.read_all(each, kind)[threads] for each in vector(source)], 1)
    machine.need_defined()
    data = values.view(np.uint8)
    if space == "global":
        machine.memory.store(machine.addresses(target, "u64"), data, threads)
    else:
        machine.shared.store(machine.addresses(target, "u32"), data, threads)


@instruction(rf"cp\.async\.(?P<cache>ca|cg)\.shared(?:::cta)?\.global{_CACHE}")
def begin_copy(
    machine: Machine, target: Operand, source: Operand, size: Operand, read: Operand | None = None,
    *policy: Operand, cache: str,
) -> None:  # fmt: skip
    """`size` bytes to shared memory: the first `read` of them from global memory, the others zeros."""
    if not isinstance(size, Immediate) or size.bits not in ((16,) if cache == "cg" else (4, 8, 16)):
        raise PTXError(f"cp.async.{cache} of {size}")
    threads = machine.active()
    width = np.full(threads.size, size.bits)
    if read is not None:
        width = machine.read_all(read, "u32")[threads].astype(np.int64)
    machine.need_defined()
    if (width > size.bits).any():
        raise PTXError("cp.async reads more than it copies")
    if not np.isin(width, (0, size.bits)).all():
        raise NotModelled("cp.async of a part")
    data = np.zeros((threads.size, size.bits), np.uint8)
    whole = width > 0
    data[whole] = machine.memory.load(machine.addresses(source, "u64")[whole], size.bits, threads[whole])
    machine.copies.begin(machine.addresses(target, "u32"), data, threads)


@instruction(r"cp\.async\.commit_group")
def commit_copies(machine: Machine) -> None:
    """End a group of copies."""
    machine.copies.commit(machine.active())


@instruction(r"cp\.async\.wait_(?P<what>group|all)")
def wait_for_copies(machine: Machine, *pending: Operand, what: str) -> None:
    """Wait for all groups of copies but the last few."""
    number = -1 if what == "all" else int(machine.read(pending[0], "u32"))
    machine.copies.wait(machine.active(), number)


@instruction(r"shfl\.sync\.(?P<how>idx|bfly|up|down)\.b32")
def shuffle(
    machine: Machine, result: Operand, source: Operand, which: Operand, clamp: Operand, members: Operand, how: str
) -> None:
    """Each thread's value from another of its warp."""
    if int(machine.read(members, "s32").flat[0]) != -1:
        raise NotModelled("shfl of parts of a warp")
    limits = machine.read_all(clamp, "u32").astype(np.int64)
    lane, by = np.arange(machine.threads) % 32, machine.read_all(which, "u32").astype(np.int64) & 31
    segment, last = (limits >> 8) & 31, limits & 31
    if segment.any() or (last != (0 if how == "up" else 31)).any():
        raise NotModelled("shfl within parts of a warp")
    machine.need_defined()
    other = {"idx": by, "bfly": lane ^ by, "up": lane - by, "down": lane + by}[how]
    other = np.where((other < 0) | (other > 31), lane, other)
    place = np.arange(machine.threads) - lane + other
    value = machine.read_all(source, "b32")[place]
    if machine.undefined is not None:
        machine.undefined = machine.undefined[place]
    machine.write(result, value)


@instruction(r"bar\.warp\.sync")
def warp_barrier(machine: Machine, members: Operand) -> None:
    """The threads of a warp meet, and see what the others have written."""
    if int(machine.read(members, "s32").flat[0]) != -1:
        raise NotModelled("bar.warp.sync of parts of a warp")
    machine.shared.warp_barrier(machine.active())


@instruction(r"fence\.proxy\.async(?:\.shared::cta)?")
def proxy_fence(machine: Machine) -> None:
    """What threads have written to shared memory can be seen by asynchronous products."""
    machine.shared.fence(machine.active())


@instruction(r"createpolicy\.fractional\.L2::evict_(?:first|last|normal)\.b64")
def cache_policy(machine: Machine, result: Operand, fraction: Operand) -> None:
    """A hint to caches, which there are none of."""
    assert isinstance(result, Register)
    machine.write(result, np.zeros(machine.threads, np.uint64))
