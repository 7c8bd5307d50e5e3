"""Moves between registers, and conversions of types."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.ptx.arithmetic import bf16_to_float, float_to_bf16, flushed
from tests.ptx.instructions import instruction
from tests.ptx.machine import UNSIGNED, Machine, kind_dtype, kind_size, vector
from tests.ptx.parse import Operand, Vector


@instruction(r"mov\.(?P<kind>[bus](?:16|32|64)|f32|pred)")
def move(machine: Machine, result: Operand, source: Operand, kind: str) -> None:
    """A register to another; the parts of one to several, or several to the parts of one."""
    if isinstance(result, Vector):
        size = kind_size(kind) // len(result.items)
        parts = machine.read_all(source, kind).view(UNSIGNED[size]).reshape(machine.threads, -1)
        for i, each in enumerate(result.items):
            machine.write(each, parts[:, i].copy())
    elif isinstance(source, Vector):
        part = f"b{8 * kind_size(kind) // len(source.items)}"
        parts, lost = [], []
        for each in vector(source):
            machine.undefined = None
            parts.append(machine.read_all(each, part))
            lost.append(machine.undefined)
        whole = np.stack(parts, 1).view(UNSIGNED[kind_size(kind)])[:, 0]
        middle = len(lost) // 2
        machine.write_halves(result, whole, _any(lost[:middle]), _any(lost[middle:]))
    else:
        machine.write(result, machine.read(source, kind))


def _any(masks: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Threads that are in one of the masks."""
    given = [each for each in masks if each is not None]
    return np.logical_or.reduce(given) if given else None


@instruction(r"cvt\.(?P<to>[us](?:8|16|32|64))\.(?P<kind>[us](?:8|16|32|64))")
def convert_integer(machine: Machine, result: Operand, source: Operand, to: str, kind: str) -> None:
    """Integers are extended by their sign, or cut off."""
    value = machine.read(source, kind).astype(kind_dtype(to))
    machine.write(result, value)


@instruction(r"cvt(?P<flush>\.ftz)?\.f32\.(?P<kind>f16|bf16)")
def widen_float(machine: Machine, result: Operand, source: Operand, kind: str, flush: str | None) -> None:
    """Exact."""
    value = machine.read(source, kind)
    machine.write(result, flushed(bf16_to_float(value) if kind == "bf16" else value.astype(np.float32), flush))


@instruction(r"cvt(?P<flush>\.ftz)?\.sat\.f32\.f32")
def saturate(machine: Machine, result: Operand, source: Operand, flush: str | None) -> None:
    """To 0 and 1; NaN to 0."""
    machine.write(result, np.nan_to_num(np.clip(flushed(machine.read(source, "f32"), flush), 0, 1), nan=0))


@instruction(r"cvt\.rn\.f32\.(?P<kind>[us](?:8|16|32|64))")
def integer_to_float(machine: Machine, result: Operand, source: Operand, kind: str) -> None:
    """To the nearest."""
    machine.write(result, machine.read(source, kind).astype(np.float32))


@instruction(r"cvt\.rn\.(?P<to>f16|bf16)\.f32")
def narrow_float(machine: Machine, result: Operand, source: Operand, to: str) -> None:
    """To the nearest."""
    machine.write(result, _narrow(machine.read_all(source, "f32"), to))


@instruction(r"cvt\.rn\.(?P<to>f16|bf16)x2\.f32")
def narrow_two(machine: Machine, result: Operand, high: Operand, low: Operand, to: str) -> None:
    """Two fp32 to the halves of a word, the first to the upper."""
    upper, lower = (_narrow(machine.read_all(each, "f32"), to).astype(np.uint32) for each in (high, low))
    machine.write(result, upper << np.uint32(16) | lower)


@instruction(r"cvt\.rna\.tf32\.f32")
def to_tf32(machine: Machine, result: Operand, source: Operand) -> None:
    """To ten bits of fraction, the nearest, away from zero."""
    bits = machine.read_all(source, "b32")
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    machine.write(result, np.where(np.isfinite(bits.view(np.float32)), rounded, bits))


def _narrow(value: np.ndarray, to: str) -> np.ndarray:
    return float_to_bf16(value) if to == "bf16" else value.astype(np.float16).view(np.uint16)
