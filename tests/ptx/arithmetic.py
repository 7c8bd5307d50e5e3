"""Arithmetic, logic, comparisons and permutations of bytes.

Approximations (`ex2.approx` and the like) are computed exactly and rounded, sums of products in double precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.errors import NotModelled, PTXError
from tests.ptx.instructions import instruction
from tests.ptx.machine import Machine, kind_dtype, kind_size
from tests.ptx.parse import Immediate, Operand

_INTEGER = r"(?P<kind>[us](?:16|32|64))"
_BITS = r"(?P<kind>b(?:16|32|64)|pred)"
_FLOAT = r"(?P<kind>f32|f16|bf16)"
_ROUNDED = r"(?:\.rn)?(?P<flush>\.ftz)?\."

_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def flushed(value: np.ndarray, flush: str | None) -> np.ndarray:
    """Zeros, of the same sign, for fp32 numbers below the normal ones, where asked for."""
    return np.where(np.abs(value) < 2.0**-126, np.copysign(np.float32(0), value), value) if flush else value


def bf16_to_float(bits: np.ndarray) -> np.ndarray:
    """bf16 is the upper half of an fp32."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def float_to_bf16(value: np.ndarray) -> np.ndarray:
    """The nearest, to even."""
    bits = np.asarray(value, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)


def _floats(machine: Machine, operand: Operand, kind: str, flush: str | None) -> np.ndarray:
    value = machine.read(operand, kind)
    return flushed(bf16_to_float(value) if kind == "bf16" else value, flush)


def _put(machine: Machine, result: Operand, value: np.ndarray, kind: str, flush: str | None) -> None:
    value = flushed(value, flush)
    machine.write(result, float_to_bf16(value) if kind == "bf16" else np.asarray(value, kind_dtype(kind)))


@instruction(rf"(?P<name>add|sub|min|max)\.{_INTEGER}")
@instruction(rf"(?P<name>mul)\.lo\.{_INTEGER}")
@instruction(rf"(?P<name>and|or|xor)\.{_BITS}")
def binary(machine: Machine, result: Operand, a: Operand, b: Operand, name: str, kind: str) -> None:
    """Of integers and bits, cut off at their width."""
    machine.write(result, _BINARY[name](machine.read(a, kind), machine.read(b, kind)))


@instruction(rf"(?P<name>add|sub|mul){_ROUNDED}{_FLOAT}")
def float_binary(
    machine: Machine, result: Operand, a: Operand, b: Operand, name: str, kind: str, flush: str | None
) -> None:
    """Of floats."""
    x, y = _floats(machine, a, kind, flush), _floats(machine, b, kind, flush)
    _put(machine, result, _BINARY[name](x, y), kind, flush)


@instruction(rf"(?P<name>min|max)(?P<flush>\.ftz)?(?P<nan>\.NaN)?\.{_FLOAT}")
def float_extreme(
    machine: Machine, result: Operand, a: Operand, b: Operand, name: str, nan: str | None, kind: str, flush: str | None
) -> None:
    """The smaller or larger; of NaN and a number the number, or, with `.NaN`, NaN."""
    x, y = _floats(machine, a, kind, flush), _floats(machine, b, kind, flush)
    functions = {"min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum)}
    _put(machine, result, functions[name][bool(nan)](x, y), kind, flush)


@instruction(r"add\.rn\.f32\.(?P<kind>bf16|f16)")
def mixed_add(machine: Machine, result: Operand, a: Operand, b: Operand, kind: str) -> None:
    """A two-byte float added to an fp32."""
    machine.write(result, _floats(machine, a, kind, None).astype(np.float32) + machine.read(b, "f32"))


@instruction(rf"fma\.(?P<rounding>rn|rm|rp)(?P<flush>\.ftz)?\.{_FLOAT}")
def fma(
    machine: Machine, result: Operand, a: Operand, b: Operand, c: Operand, rounding: str, kind: str, flush: str | None
) -> None:
    """The product is exact; the sum is rounded to double before it is to `kind`."""
    x, y, z = (_floats(machine, each, kind, flush).astype(np.float64) for each in (a, b, c))
    total = x * y + z
    value = total.astype(np.float32 if kind == "bf16" else kind_dtype(kind))
    if rounding == "rm":
        value = np.where(value > total, np.nextafter(value, value.dtype.type(-np.inf)), value)
    elif rounding == "rp":
        value = np.where(value < total, np.nextafter(value, value.dtype.type(np.inf)), value)
    _put(machine, result, value, kind, flush)


@instruction(r"fma\.rn\.f32\.(?P<kind>bf16|f16)")
def mixed_fma(machine: Machine, result: Operand, a: Operand, b: Operand, c: Operand, kind: str) -> None:
    """The product of two-byte floats added to an fp32."""
    x, y = (_floats(machine, each, kind, None).astype(np.float64) for each in (a, b))
    machine.write(result, (x * y + machine.read(c, "f32")).astype(np.float32))


@instruction(r"(?P<name>add|mul|fma)(?:\.rn)?(?P<flush>\.ftz)?\.f32x2")
def of_two(machine: Machine, result: Operand, *operands: Operand, name: str, flush: str | None) -> None:
    """Two fp32 in 64 bits."""
    pairs = [machine.read_all(each, "b64").view(np.float32) for each in operands]
    x, y = (flushed(each, flush) for each in pairs[:2])
    if name == "fma":
        value = (x.astype(np.float64) * y + flushed(pairs[2], flush)).astype(np.float32)
    else:
        value = _BINARY[name](x, y)
    machine.write(result, flushed(value, flush).view(np.uint64))


@instruction(r"fma\.rn\.(?P<kind>f16|bf16)x2")
def fma_of_two(machine: Machine, result: Operand, *operands: Operand, kind: str) -> None:
    """Of two two-byte floats in a word each. Sums of such are exact in double precision if not far apart."""
    halves = [machine.read_all(each, "b32").view(np.uint16) for each in operands]
    x, y, z = ((bf16_to_float(each) if kind == "bf16" else each.view(np.float16)).astype(np.float64) for each in halves)
    total = x * y + z
    value = float_to_bf16(total.astype(np.float32)) if kind == "bf16" else total.astype(np.float16).view(np.uint16)
    machine.write(result, value.view(np.uint32))


@instruction(r"mul\.hi\.(?P<kind>[us](?:16|32))")
def multiply_high(machine: Machine, result: Operand, a: Operand, b: Operand, kind: str) -> None:
    """The upper half of a product."""
    wide = np.int64 if kind[0] == "s" else np.uint64
    product = machine.read(a, kind).astype(wide) * machine.read(b, kind).astype(wide)
    machine.write(result, (product >> wide(8 * kind_size(kind))).astype(kind_dtype(kind)))


@instruction(r"mul\.wide\.(?P<kind>[us](?:16|32))")
def multiply_wide(machine: Machine, result: Operand, a: Operand, b: Operand, kind: str) -> None:
    """The whole product."""
    machine.write(result, _wide_product(machine, a, b, kind))


@instruction(r"mad\.wide\.(?P<kind>[us](?:16|32))")
def multiply_wide_add(machine: Machine, result: Operand, a: Operand, b: Operand, c: Operand, kind: str) -> None:
    """The whole product, and something added to it."""
    machine.write(result, _wide_product(machine, a, b, kind) + machine.read(c, kind[0] + str(2 * int(kind[1:]))))


def _wide_product(machine: Machine, a: Operand, b: Operand, kind: str) -> np.ndarray:
    wide = kind_dtype(kind[0] + str(2 * int(kind[1:])))
    return machine.read(a, kind).astype(wide) * machine.read(b, kind).astype(wide)


@instruction(rf"mad\.lo\.{_INTEGER}")
def multiply_add(machine: Machine, result: Operand, a: Operand, b: Operand, c: Operand, kind: str) -> None:
    """The lower half of a product, and something added to it."""
    x, y, z = (machine.read(each, kind) for each in (a, b, c))
    machine.write(result, x * y + z)


@instruction(rf"(?P<name>div|rem)\.{_INTEGER}")
def divide(machine: Machine, result: Operand, a: Operand, b: Operand, name: str, kind: str) -> None:
    """Towards zero."""
    x, y = machine.read_all(a, kind), machine.read_all(b, kind)
    if (y[machine.active()] == 0).any():
        raise PTXError("division by zero")
    y = np.where(y == 0, y.dtype.type(1), y)
    rest = np.fmod(x, y)
    machine.write(result, rest if name == "rem" else (x - rest) // y)


@instruction(r"(?P<name>neg|abs|not)\.(?P<kind>[us](?:16|32|64)|b(?:16|32|64)|pred)")
def integer_unary(machine: Machine, result: Operand, a: Operand, name: str, kind: str) -> None:
    """Of integers and bits."""
    functions: dict[str, Callable[[Any], Any]] = {"neg": np.negative, "abs": np.abs, "not": np.invert}
    machine.write(result, functions[name](machine.read(a, kind)))


_UNARY: dict[str, Callable[[Any], Any]] = {
    "neg": np.negative,
    "abs": np.abs,
    "ex2.approx": np.exp2,
    "lg2.approx": np.log2,
    "rcp.approx": np.reciprocal,
    "rcp.rn": np.reciprocal,
    "sqrt.approx": np.sqrt,
    "sqrt.rn": np.sqrt,
    "rsqrt.approx": lambda x: 1 / np.sqrt(x),
    "tanh.approx": np.tanh,
}


@instruction(rf"(?P<name>{'|'.join(_UNARY).replace('.', '[.]')})(?P<flush>\.ftz)?\.{_FLOAT}")
def float_unary(machine: Machine, result: Operand, a: Operand, name: str, kind: str, flush: str | None) -> None:
    """Of floats, in double precision."""
    value = _UNARY[name](_floats(machine, a, kind, flush).astype(np.float64))
    _put(machine, result, value.astype(np.float32 if kind == "bf16" else kind_dtype(kind)), kind, flush)


@instruction(r"div\.(?:full|rn|approx)(?P<flush>\.ftz)?\.(?P<kind>f32)")
def float_divide(machine: Machine, result: Operand, a: Operand, b: Operand, kind: str, flush: str | None) -> None:
    """The quotient of fp32 numbers, rounded."""
    _put(machine, result, _floats(machine, a, kind, flush) / _floats(machine, b, kind, flush), kind, flush)


@instruction(r"(?P<name>shl|shr)\.(?P<kind>[usb](?:16|32|64))")
def shift(machine: Machine, result: Operand, a: Operand, by: Operand, name: str, kind: str) -> None:
    """By as many bits as there are or more: nothing is left but the sign."""
    bits = 8 * kind_size(kind)
    drops_half = name == "shr" and isinstance(by, Immediate) and 2 * by.bits >= bits
    value = machine.read_upper(a, kind) if drops_half else machine.read_all(a, kind)
    amount = machine.read(by, "u32").astype(np.int64)
    fewer = np.minimum(amount, bits - 1).astype(value.dtype)
    moved = np.left_shift(value, fewer) if name == "shl" else np.right_shift(value, fewer)
    keeps_sign = name == "shr" and kind[0] == "s"
    machine.write(result, moved if keeps_sign else np.where(amount >= bits, value.dtype.type(0), moved))


@instruction(r"bfe\.(?P<kind>[us](?:32|64))")
def extract_bits(machine: Machine, result: Operand, a: Operand, place: Operand, count: Operand, kind: str) -> None:
    """Some bits, all of which there are, the uppermost a sign."""
    value, width = machine.read_all(a, f"u{kind[1:]}").astype(np.uint64), 8 * kind_size(kind)
    first, number = (machine.read_all(each, "u32").astype(np.int64) & 255 for each in (place, count))
    active = machine.active()
    if (first + number > width)[active].any() or (number == 0)[active].any():
        raise NotModelled("bfe of bits that are not there")
    left = np.clip(64 - first - number, 0, 63).astype(np.uint64)
    aligned = value << left
    right = np.clip(64 - number, 0, 63).astype(np.uint64)
    field = aligned.view(np.int64) >> right.view(np.int64) if kind[0] == "s" else aligned >> right
    machine.write(result, field.astype(kind_dtype(kind)))


@instruction(r"prmt\.b32")
def permute_bytes(machine: Machine, result: Operand, a: Operand, b: Operand, selectors: Operand) -> None:
    """Each of four selectors names one of eight bytes, or, with its highest bit, repeats that byte's sign. An operand
    that constant selectors have no byte of may be anything, also a register that nobody writes."""
    named = {selectors.bits >> 4 * i & 4 for i in range(4)} if isinstance(selectors, Immediate) else {0, 4}
    words = [machine.read_all(each if at in named else Immediate(0), "u32") for each, at in ((a, 0), (b, 4))]
    both = np.stack([each.view(np.uint8).reshape(-1, 4) for each in words], 1).reshape(-1, 8)
    chosen = machine.read_all(selectors, "u32")[:, None] >> (4 * np.arange(4, dtype=np.uint32))
    taken = np.take_along_axis(both, (chosen & 7).astype(np.int64), 1)
    signs = np.where(taken & 0x80, np.uint8(0xFF), np.uint8(0))
    machine.write(result, np.where(chosen & 8, signs, taken).view(np.uint32)[:, 0])


@instruction(r"lop3\.b32")
def any_logic(machine: Machine, result: Operand, a: Operand, b: Operand, c: Operand, table: Operand) -> None:
    """Any function of three bits: the bits of its table that a, b and c stand for."""
    assert isinstance(table, Immediate)
    x, y, z = (machine.read_all(each, "b32") for each in (a, b, c))
    value = np.zeros_like(x)
    for i in range(8):
        if table.bits >> i & 1:
            value |= (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
    machine.write(result, value)


_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal, "ne": lambda a, b: ~((a == b) | np.isnan(a) | np.isnan(b)),
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "equ": lambda a, b: (a == b) | np.isnan(a) | np.isnan(b), "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)), "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}  # fmt: skip


@instruction(r"setp\.(?P<how>eq|ne|lt|le|gt|ge)\.(?P<kind>[usb](?:16|32|64))")
def compare(machine: Machine, result: Operand, a: Operand, b: Operand, how: str, kind: str) -> None:
    """Of integers."""
    function = np.not_equal if how == "ne" else _COMPARE[how]
    machine.write(result, np.asarray(function(machine.read(a, kind), machine.read(b, kind))))


@instruction(rf"setp\.(?P<how>{'|'.join(_COMPARE)})(?P<flush>\.ftz)?\.{_FLOAT}")
def float_compare(
    machine: Machine, result: Operand, a: Operand, b: Operand, how: str, kind: str, flush: str | None
) -> None:
    """Of floats: with NaN false, or, with `u`, true."""
    x, y = _floats(machine, a, kind, flush), _floats(machine, b, kind, flush)
    machine.write(result, np.asarray(_COMPARE[how](x, y)))


@instruction(r"selp\.(?P<kind>[usbf](?:16|32|64))")
def select(machine: Machine, result: Operand, a: Operand, b: Operand, which: Operand, kind: str) -> None:
    """The first where a predicate is true, else the second."""
    machine.write(result, np.where(machine.read(which, "pred"), machine.read(a, kind), machine.read(b, kind)))
