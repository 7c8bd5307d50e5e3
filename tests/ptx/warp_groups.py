"""Products of four warps together (wgmma), asynchronous: A in registers, B in shared memory.

Each warp multiplies its 16 rows of A, held as in mma.sync, by all of B. Where B lies a descriptor says (PTX ISA, matrix
descriptor): in units of 16 bytes the start in bits 0 to 13, the leading offset in 16 to 29, the stride offset in 32
to 45; the swizzle in 62 and 63. In memory it is made of atoms of eight rows of 32, 64 or 128 bytes, whose chunks of 16
bytes are swizzled: bits of the address above 128 are added, without carry, to the number of the chunk.
"""

from __future__ import annotations

import numpy as np

from tests.ptx.asynchronous import Product
from tests.ptx.errors import NotModelled, PTXError
from tests.ptx.instructions import instruction
from tests.ptx.machine import Machine, vector
from tests.ptx.matrices import elements, fragment_c, matrix_a, numbers
from tests.ptx.parse import Immediate, Operand, Register, Vector

_CHUNKS = {1: 8, 2: 4, 3: 2}
"""16-byte chunks of a row of an atom, by the descriptor's swizzle."""


@instruction(r"wgmma\.fence\.sync\.aligned")
def fence(machine: Machine) -> None:
    """Registers that have been written may be used by the products that follow."""
    machine.products.fence()


@instruction(r"wgmma\.commit_group\.sync\.aligned")
def commit(machine: Machine) -> None:
    """End a group of products."""
    machine.products.commit()


@instruction(r"wgmma\.wait_group\.sync\.aligned")
def wait(machine: Machine, pending: Operand) -> None:
    """Wait for all groups of products but the last few."""
    machine.products.wait(int(machine.read(pending, "u32")))


@instruction(
    r"wgmma\.mma_async\.sync\.aligned\.m64n(?P<columns>\d+)k(?P<depth>8|16)\.f32\.(?P<kind>f16|bf16|tf32)\.(?P=kind)"
)
def multiply(
    machine: Machine, accumulators: Operand, a: Operand, descriptor: Operand, adds: Operand, *rest: Operand,
    columns: str, depth: str, kind: str,
) -> None:  # fmt: skip
    """`[64, K] @ [K, N]`, added to the accumulators where `adds` is true."""
    scale_a, scale_b, *turned = (each.bits if isinstance(each, Immediate) else None for each in rest)
    if not isinstance(a, Vector) or (scale_a, scale_b) != (1, 1) or turned not in ([], [0], [1]):
        raise NotModelled("wgmma with A in shared memory, or with signs")
    _check_groups(machine)
    names = tuple(each.name for each in vector(accumulators) if isinstance(each, Register))
    inputs = tuple(each.name for each in a.items if isinstance(each, Register))
    warps = np.unique(machine.active() // 32)
    left = numbers(matrix_a(elements(machine, a.items, kind)), kind)[warps]
    n, k = int(columns), int(depth)
    if left.shape[2] != k or len(names) != n // 2 or len(inputs) != 4:
        raise PTXError("wgmma with registers for another shape")
    word = machine.read_all(descriptor, "b64").reshape(-1, 32)
    if (word != word[:, :1]).any():
        raise PTXError("threads of a warp describe different matrices")
    bytes_each = 4 if kind == "tf32" else 2
    offsets = _offsets(word[warps, 0], n, k, bytes_each, turned == [1])
    places = machine.shared.places(offsets, bytes_each, 32 * warps)
    add = np.broadcast_to(machine.read(adds, "pred"), machine.threads)[32 * warps]

    def compute(chosen: np.ndarray) -> None:
        raw = machine.shared.peek(places[chosen], bytes_each).view(np.uint32 if bytes_each == 4 else np.uint16)
        product = left[chosen] @ numbers(raw[..., 0], kind)
        _accumulate(machine, names, warps[chosen], product, add[chosen])

    every_byte = (places[..., None] + np.arange(bytes_each)).reshape(len(warps), -1)
    group = machine.products.group(warps)
    machine.products.begin(Product(warps, group, names, inputs, every_byte, compute))


def _check_groups(machine: Machine) -> None:
    warps = np.unique(machine.active() // 32)
    if len(warps) % 4 or (warps.reshape(-1, 4) != warps[::4, None] + np.arange(4)).any() or (warps[::4] % 4).any():
        raise PTXError("the four warps of a group are not together")


def _offsets(descriptors: np.ndarray, n: int, k: int, size: int, turned: bool) -> np.ndarray:
    """Where B's elements begin in the block's shared memory: `[warps, K, N]`. `turned`: N is what lies contiguous."""

    def field(first: int) -> np.ndarray:
        return ((descriptors >> np.uint64(first)) & np.uint64(0x3FFF)).astype(np.int64)[:, None, None] * 16

    start, leading, stride = field(0), field(16), field(32)
    swizzles = np.unique(descriptors >> np.uint64(62))
    if len(swizzles) != 1 or int(swizzles[0]) not in _CHUNKS:
        raise NotModelled(f"wgmma with swizzles {swizzles}")
    if ((descriptors >> np.uint64(49)) & np.uint64(7)).any():
        raise NotModelled("wgmma with a base offset")
    chunks = _CHUNKS[int(swizzles[0])]
    row, column = np.arange(k)[:, None], np.arange(n)[None]
    if turned:
        width = 16 * chunks // size
        inner = size * (column % width) + 16 * chunks * (row % 8)
        address = start + inner + (column // width) * leading + (row // 8) * stride
    else:
        address = start + size * row + 16 * chunks * (column % 8) + (column // 8) * stride
    return address ^ (((address >> 7) & (chunks - 1)) << 4)


def _accumulate(
    machine: Machine, names: tuple[str, ...], warps: np.ndarray, product: np.ndarray, add: np.ndarray
) -> None:
    """Add to the registers of some warps, or replace what they hold."""
    held = fragment_c(product)
    lanes = (32 * warps[:, None] + np.arange(32)).ravel()
    adds = np.repeat(add, 32)
    mask = np.zeros(machine.threads, bool)
    mask[lanes] = True
    before, machine.mask = machine.mask, mask
    try:
        for r, name in enumerate(names):
            value = np.zeros(machine.threads, np.float64)
            value[lanes] = held[:, :, r].ravel()
            old = machine.peek(name)
            if adds.any():
                if old is None:
                    raise PTXError(f"{name} is added to before it is written")
                value[lanes] += np.where(adds, old[lanes].view(np.float32), 0)
            machine.place(name, value.astype(np.float32))
    finally:
        machine.mask = before
