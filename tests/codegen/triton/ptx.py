"""Execute the few PTX instructions that our kernels hold in inline assembly, on arrays.

Semantics are those of the PTX ISA: `prmt` in its default mode, and 32-bit logic.
"""

from __future__ import annotations

import numpy as np

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


_INSTRUCTIONS = {
    "prmt.b32": _prmt,
    "xor.b32": np.bitwise_xor,
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "shr.u32": np.right_shift,
    "shl.b32": np.left_shift,
}
