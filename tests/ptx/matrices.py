"""Products of a warp (mma.sync, dense and sparse), and the loads and stores of its fragments.

A fragment is a matrix spread over the 32 threads of a warp (PTX ISA, matrix fragments). Thread l has g = l / 4 and
t = l % 4; a register holds e elements next to each other along K: two of 16 bits, one of 32.

    A [16, K]  register r, element i  ->  row g + 8 (r % 2), column e t + i + 4 e (r / 2)
    B [K, 8]   register r, element i  ->  row e t + i + 4 e r, column g
    C [16, 8]  register r             ->  row g + 8 (r / 2), column 2 t + r % 2
"""

from __future__ import annotations

import numpy as np

from tests.ptx.arithmetic import bf16_to_float
from tests.ptx.errors import NotModelled, PTXError
from tests.ptx.instructions import instruction
from tests.ptx.machine import Machine, vector
from tests.ptx.parse import Immediate, Operand

_LANE = np.arange(32)
_G, _T = _LANE // 4, _LANE % 4


def numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    """What tensor cores read in the bits of elements: of tf32 the upper 19 of 32."""
    if kind == "bf16":
        return bf16_to_float(bits).astype(np.float64)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


def elements(machine: Machine, registers: tuple[Operand, ...], kind: str) -> np.ndarray:
    """Elements of a fragment as its warps' threads hold them: `[warps, 32, registers, elements]`."""
    words = np.stack([machine.read_all(each, "b32") for each in registers], 1)
    machine.need_defined()
    return words.view(np.uint32 if kind == "tf32" else np.uint16).reshape(
        -1, 32, len(registers), words.itemsize // _size(kind)
    )


def _size(kind: str) -> int:
    return 4 if kind == "tf32" else 2


def matrix_a(held: np.ndarray) -> np.ndarray:
    """`[warps, 16, K]`."""
    warps, _, registers, each = held.shape
    matrix = np.zeros((warps, 16, 2 * registers * each), held.dtype)
    for r in range(registers):
        for i in range(each):
            matrix[:, _G + 8 * (r % 2), each * _T + i + 4 * each * (r // 2)] = held[:, :, r, i]
    return matrix


def matrix_b(held: np.ndarray) -> np.ndarray:
    """`[warps, K, 8]`."""
    warps, _, registers, each = held.shape
    matrix = np.zeros((warps, 4 * registers * each, 8), held.dtype)
    for r in range(registers):
        for i in range(each):
            matrix[:, each * _T + i + 4 * each * r, _G] = held[:, :, r, i]
    return matrix


def matrix_c(held: np.ndarray) -> np.ndarray:
    """`[warps, 32, registers]` to `[warps, 16, 2 registers]`: tiles of eight columns side by side."""
    matrix = np.zeros((held.shape[0], 16, 2 * held.shape[2]), held.dtype)
    for r in range(held.shape[2]):
        matrix[:, _G + 8 * (r // 2 % 2), 8 * (r // 4) + 2 * _T + r % 2] = held[:, :, r]
    return matrix


def fragment_c(matrix: np.ndarray) -> np.ndarray:
    """The reverse of `matrix_c`."""
    registers = range(matrix.shape[2] // 2)
    return np.stack([matrix[:, _G + 8 * (r // 2 % 2), 8 * (r // 4) + 2 * _T + r % 2] for r in registers], 2)


@instruction(r"mma\.sync\.aligned\.m16n8(?P<depth>k16|k8)\.row\.col\.f32\.(?P<kind>f16|bf16|tf32)\.(?P=kind)\.f32")
def multiply(machine: Machine, result: Operand, a: Operand, b: Operand, c: Operand, depth: str, kind: str) -> None:
    """`[16, K] @ [K, 8] + [16, 8]`, added up in double precision and rounded to fp32."""
    left = matrix_a(elements(machine, vector(a), kind))
    _add_product(machine, result, left, b, c, kind, int(depth[1:]))


@instruction(
    r"mma\.sp(?:::ordered_metadata)?\.sync\.aligned\.m16n8(?P<depth>k32|k16)\.row\.col\.f32\.(?P<kind>f16|bf16)\.(?P=kind)\.f32"
)
def multiply_sparse(
    machine: Machine, result: Operand, a: Operand, b: Operand, c: Operand, metadata: Operand, selector: Operand,
    depth: str, kind: str,
) -> None:  # fmt: skip
    """As `multiply`, A holding two of every four columns."""
    if depth != "k32" or not isinstance(selector, Immediate):
        raise NotModelled(f"mma.sp of {depth} by {selector}")
    stored = matrix_a(elements(machine, vector(a), kind))
    words = machine.read_all(metadata, "b32").reshape(-1, 32)
    _add_product(machine, result, expand(stored, words, selector.bits), b, c, kind, 32)


def expand(stored: np.ndarray, metadata: np.ndarray, selector: int) -> np.ndarray:
    """`[warps, 16, 16]` stored values to `[warps, 16, 32]`, by the words of the two threads of four that are selected.

    Of a word the lower half is of row g, the upper of row g + 8: four bits for two values.
    """
    full = np.zeros((stored.shape[0], 16, 32), stored.dtype)
    warps, g = np.arange(stored.shape[0])[:, None], np.arange(8)
    for half in range(2):
        words = metadata[:, 4 * g + 2 * selector + half]
        for upper in range(2):
            for quad in range(4):
                bits = (words >> np.uint32(16 * upper + 4 * quad)).astype(np.int64)
                first, second = bits & 3, bits >> 2 & 3
                if (first >= second).any():
                    raise PTXError("metadata of mma.sp is not in order")
                for i, place in enumerate((first, second)):
                    value = stored[:, g + 8 * upper, 8 * half + 2 * quad + i]
                    full[warps, g + 8 * upper, 16 * half + 4 * quad + place] = value
    return full


def _add_product(
    machine: Machine, result: Operand, a: np.ndarray, b: Operand, c: Operand, kind: str, depth: int
) -> None:
    right = matrix_b(elements(machine, vector(b), kind))
    if a.shape[2] != depth or right.shape[1] != depth:
        raise PTXError("mma with registers for another shape")
    words = np.stack([machine.read_all(each, "f32") for each in vector(c)], 1).reshape(-1, 32, 4)
    machine.need_defined()
    total = numbers(a, kind) @ numbers(right, kind) + matrix_c(words)
    held = fragment_c(total.astype(np.float32)).reshape(machine.threads, 4)
    for r, each in enumerate(vector(result)):
        machine.write(each, held[:, r].copy())


@instruction(r"ldmatrix\.sync\.aligned\.m8n8\.x(?P<count>[124])(?P<turned>\.trans)?\.shared(?:::cta)?\.b16")
def load_matrices(machine: Machine, result: Operand, source: Operand, count: str, turned: str | None) -> None:
    """Matrices of 8 x 8: the rows of the first at the addresses of threads 0 to 7, and so on."""
    threads = machine.active()
    addresses = machine.addresses(source, "u32").reshape(-1, 32)
    words = np.zeros((machine.threads, int(count)), np.uint32)
    for i, _ in enumerate(vector(result)):
        rows, owners = addresses[:, 8 * i : 8 * i + 8].ravel(), threads.reshape(-1, 32)[:, 8 * i : 8 * i + 8].ravel()
        matrix = machine.shared.load(rows, 16, owners, many=True).view(np.uint16).reshape(-1, 8, 8)
        if turned:
            matrix = matrix.transpose(0, 2, 1)
        pairs = np.stack([matrix[:, _G, 2 * _T], matrix[:, _G, 2 * _T + 1]], 2)
        words[threads, i] = np.ascontiguousarray(pairs).view(np.uint32).ravel()
    for i, each in enumerate(vector(result)):
        machine.write(each, words[:, i].copy())


@instruction(r"stmatrix\.sync\.aligned\.m8n8\.x(?P<count>[124])(?P<turned>\.trans)?\.shared(?:::cta)?\.b16")
def store_matrices(machine: Machine, target: Operand, source: Operand, count: str, turned: str | None) -> None:
    """The reverse of `load_matrices`."""
    threads = machine.active()
    addresses = machine.addresses(target, "u32").reshape(-1, 32)
    for i, each in enumerate(vector(source)):
        words = machine.read_all(each, "b32")[threads]
        machine.need_defined()
        pairs = words.view(np.uint16).reshape(-1, 32, 2)
        matrix = np.zeros((len(pairs), 8, 8), np.uint16)
        matrix[:, _G, 2 * _T], matrix[:, _G, 2 * _T + 1] = pairs[:, :, 0], pairs[:, :, 1]
        if turned:
            matrix = matrix.transpose(0, 2, 1)
        rows, owners = addresses[:, 8 * i : 8 * i + 8].ravel(), threads.reshape(-1, 32)[:, 8 * i : 8 * i + 8].ravel()
        data = np.ascontiguousarray(matrix).view(np.uint8).reshape(-1, 16)
        machine.shared.store(rows, data, owners)
