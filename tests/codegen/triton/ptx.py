"""Execute the few PTX instructions that our kernels hold in inline assembly, on arrays.

Semantics are those of the PTX ISA: `prmt` in its default mode, 32-bit logic, and floats, alone and two in a word.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.arithmetic import bf16_to_float, float_to_bf16

_MASK = np.int64(0xFFFFFFFF)


def execute(asm: str, constraints: str, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Results of an asm block over 32-bit registers: outputs `$0...` first, then inputs, as LLVM numbers them."""
    outputs = sum(constraint.strip().startswith("=") for constraint in constraints.split(","))
    registers = {f"${outputs + i}": value.astype(np.int64) & _MASK for i, value in enumerate(inputs)}
    for line in asm.strip().removeprefix("{").removesuffix("}").split(";"):
        instruction = line.strip()
        if not instruction or instruction.startswith(".reg"):
            continue
        name, operands = instruction.split(None, 1)
        target, *sources = (operand.strip() for operand in operands.split(","))
        registers[target] = _INSTRUCTIONS[name](*(_value(source, registers) for source in sources)) & _MASK
    shape = np.broadcast_shapes(*(value.shape for value in inputs))
    results = [np.broadcast_to(registers[f"${i}"], shape) for i in range(outputs)]
    return [result.astype(np.uint32).view(np.int32) for result in results]


def _value(operand: str, registers: dict[str, np.ndarray]) -> np.ndarray:
    return registers[operand] if operand in registers else np.asarray(int(operand, 0), np.int64)


def _prmt(a: np.ndarray, b: np.ndarray, selectors: np.ndarray) -> np.ndarray:
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, selectors.shape), np.int64)
    for i in range(4):
        selector = (selectors >> (4 * i)) & 15
        word = np.where(selector & 4, b, a)
        byte = (word >> (8 * (selector & 3))) & 255
        byte = np.where(selector & 8, np.where(byte & 128, 255, 0), byte)
        result = result | byte << (8 * i)
    return result


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Any function of three bits: those of its table that stand where a, b and c say."""
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.int64)
    for i in range(8):
        if int(table) >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result & _MASK


def _floats(words: np.ndarray) -> np.ndarray:
    return words.astype(np.uint32).view(np.float32)


def _words(floats: np.ndarray) -> np.ndarray:
    return floats.astype(np.float32).view(np.uint32).astype(np.int64)


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    x, y, z = (_floats(each).astype(np.float64) for each in (a, b, c))
    return _words((x * y + z).astype(np.float32))


def _add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _words(_floats(a) + _floats(b))


def _pack_bf16(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    upper, lower = (float_to_bf16(_floats(each)).astype(np.int64) for each in (high, low))
    return upper << 16 | lower


def _fma_of_two(
    widen: Callable[[np.ndarray], np.ndarray], narrow: Callable[[np.ndarray], np.ndarray]
) -> Callable[..., np.ndarray]:
    """Of two 16-bit floats in a word each. Products and sums of such are exact in double precision, near enough to
    each other as they are here."""

    def fma(*operands: np.ndarray) -> np.ndarray:
        halves = []
        for shift in (0, 16):
            x, y, z = (widen((each >> shift & 0xFFFF).astype(np.uint16)).astype(np.float64) for each in operands)
            halves.append(narrow(x * y + z).astype(np.int64))
        return halves[1] << 16 | halves[0]

    return fma


_INSTRUCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "mov.b32": np.asarray,
    "lop3.b32": _lop3,
    "add.rn.f32": _add,
    "fma.rn.f32": _fma,
    "fma.rn.bf16x2": _fma_of_two(bf16_to_float, lambda value: float_to_bf16(value.astype(np.float32))),
    "fma.rn.f16x2": _fma_of_two(
        lambda bits: bits.view(np.float16), lambda value: value.astype(np.float16).view(np.uint16)
    ),
    "cvt.rn.bf16x2.f32": _pack_bf16,
    "prmt.b32": _prmt,
    "xor.b32": np.bitwise_xor,
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "shr.u32": np.right_shift,
    "shl.b32": np.left_shift,
}
