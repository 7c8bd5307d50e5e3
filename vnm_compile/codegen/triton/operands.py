"""The arrays of a weight, or of several that are computed as one, as the templates are handed them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vnm_compile.codegen.inductor import apply, contiguous_copy, round_up, rows_in_place, with_these_strides
from vnm_compile.codegen.random_arrays import random_packed
from vnm_compile.codegen.triton.prepack import SCALES_LOAD, WIDEST_LOAD
from vnm_compile.layout import Layout
from vnm_compile.ops import parts_of

aten = torch.ops.aten

NAMES = {
    torch.float32: "tl.float32",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
    torch.int16: "tl.int16",
    torch.int32: "tl.int32",
}
"""Dtypes, as templates write them."""


class Operands:
    """Nodes of the arrays, with rows that can be read by whole loads.

    Attributes:
        first: those of the first weight; the rows of the others are as far apart.
        all: those of one weight after the other.
        rows: of each weight.
    """

    def __init__(self, arrays: Sequence[Any], layout: Layout, dtype: torch.dtype) -> None:
        self.layout, self.dtype = layout, dtype
        first, *others = (self._prepared(part) for part in parts_of(arrays, layout))
        self.first: tuple[Any, ...] = first
        self._parts = [first, *(_alike(each, first) for each in others)]
        self.all = [array for part in self._parts for array in part]
        self.rows = [int(part[0].get_size()[0]) for part in self._parts]

    @property
    def word(self) -> torch.dtype:
        """What values are read in: those of a group, or of quantised ones those of a quad of groups, or half of it."""
        kind, n = self.layout.quantization, self.layout.spec.n
        if kind is not None:
            return torch.int16 if kind.bits * n == 4 else torch.int32
        if self.dtype.itemsize == 4:
            return self.dtype
        return torch.int32 if n == 2 else torch.int16

    def constants(self) -> dict[str, Any]:
        """What templates are told of them."""
        values, metadata, *_ = self.first
        n, values_in_word = self.layout.spec.n, self.word.itemsize // values.get_dtype().itemsize
        return {
            "VALUES_STRIDE": _row_stride(values) // values_in_word,
            "VALUES_WIDTH": _readable(values) // values_in_word,
            "METADATA_STRIDE": _row_stride(metadata) // n,
            "METADATA_WIDTH": _readable(metadata) // n,
            "WORDS": None if self.word.is_floating_point else NAMES[self.word],
            **self._constants_of_quantised(),
            **self._constants_of_parts(),
        }

    def extents(self) -> list[Any]:
        """Elements of each array up to the last that a load may touch, counted through all weights. Inductor's own
        check of 32 bits stops at the last element that counts, and what a whole load brings of the padding behind it
        may lie beyond."""
        return [
            sum(array.get_size()[0] * array.get_stride()[0] for array in each)
            for each in zip(*self._parts, strict=True)
        ]

    def random(self, device: torch.device) -> list[Callable[[Any], torch.Tensor]]:
        """For each array what makes a valid random one to measure on: random columns would lie outside of the
        activations."""

        @functools.cache
        def arrays(part: int) -> Any:
            return random_packed(self.layout.with_rows(self.rows[part]), self.dtype, device, part)

        def like(part: int, position: int, buffer: Any) -> torch.Tensor:
            size, stride = ([int(s) for s in sizes] for sizes in (buffer.get_size(), buffer.get_stride()))
            made = torch.empty_strided(size, stride, dtype=buffer.get_dtype(), device=buffer.get_device()).zero_()
            array = arrays(part)[position]
            made[:, : array.shape[1]] = array
            return made

        places = [(part, i) for part in range(len(self._parts)) for i in range(len(self.first))]
        return [functools.partial(like, *place) for place in places]

    def _prepared(self, arrays: Sequence[Any]) -> tuple[Any, ...]:
        values, metadata = (rows_in_place(array, WIDEST_LOAD, padded=True) for array in arrays[:2])
        columns = rows_in_place(arrays[2], WIDEST_LOAD)
        # Metadata is read two bytes at a time where a quad of groups has as many; levels, and scales, by the word.
        metadata = _rows_apart(metadata, self.layout.spec.n)
        scales: list[Any] = []
        if self.layout.quantization is not None:
            values = _rows_apart(values, self.word.itemsize // values.get_dtype().itemsize)
            few = rows_in_place(arrays[3], SCALES_LOAD, padded=True)
            scales = [_rows_apart(few, SCALES_LOAD // self.dtype.itemsize)]
        return values, metadata, columns, *scales

    def _constants_of_quantised(self) -> dict[str, Any]:
        """What templates ask for of quantised values, and only then."""
        kind = self.layout.quantization
        if kind is None:
            return {}
        return {
            "LEVEL_BITS": kind.bits,
            "QUAD_WORDS": kind.bits * self.layout.spec.n * 4 // 8 // self.word.itemsize,
            "SCALE_GROUP": kind.group or 0,  # 0: all of a row
            "SCALES_STRIDE": _row_stride(self.first[3]),
            "SCALES_WIDTH": _aligned(self.first[3], SCALES_LOAD),
        }

    def _constants_of_parts(self) -> dict[str, int]:
        """Of each weight but the first: the row at which it begins, and the elements of its arrays that as many rows
        would take."""
        told = {"PARTS": len(self._parts)}
        for i, part in enumerate(self._parts[1:], 1):
            row = sum(self.rows[:i])
            told[f"ROW_{i}"] = row
            for name, array in zip(self.layout.names, part, strict=True):
                before = row // self.layout.spec.v if name == "columns" else row
                told[f"{name.upper()}_BEFORE_{i}"] = before * _row_stride(array)
        return told


def _alike(arrays: Sequence[Any], first: Sequence[Any]) -> tuple[Any, ...]:
    """Arrays with rows as far apart as those of other ones: themselves, or copies where they lie otherwise."""

    def alike(array: Any, other: Any) -> Any:
        wanted = _row_stride(other)
        if _row_stride(array) == wanted:
            return array
        return contiguous_copy(array) if int(array.get_size()[1]) == wanted else _widened(array, wanted)

    return tuple(map(alike, arrays, first))


def _row_stride(array: Any) -> int:
    return int(array.get_stride()[0])


def _rows_apart(array: Any, multiple: int) -> Any:
    """The array itself if its rows begin at multiples of `multiple` elements; else a copy with zeros after each row."""
    return array if _row_stride(array) % multiple == 0 else _widened(array, _aligned(array))


def _widened(array: Any, width: int) -> Any:
    """A copy with zeros behind each row."""
    missing = width - int(array.get_size()[1])
    return with_these_strides(apply(aten.constant_pad_nd.default, array, [0, missing], 0))


def _readable(array: Any) -> int:
    """Elements of a row that may be read: with the zeros of an aligned one, so that the last load is whole."""
    aligned = _aligned(array)
    return aligned if _row_stride(array) >= aligned else int(array.get_size()[1])


def _aligned(array: Any, load: int = WIDEST_LOAD) -> int:
    """Elements of a row, rounded up to whole loads."""
    return int(round_up(int(array.get_size()[1]), load // array.get_dtype().itemsize))
