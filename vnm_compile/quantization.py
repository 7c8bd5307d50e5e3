"""Quantised values: how many bits a kept value takes, and how many of them share a scale.

A kept value is `level * scale`: the level is an integer of 8 or 4 bits, the scale a float of the weight's dtype, one
for every `group` kept values of a row, or one a row. Zero is level 0, so the pattern is kept.

    values   int8  [R, G*N]            levels -127 to 127
             uint8 [R, ceil(G*N / 2)]  two levels of 4 bits a byte, -8 to 7 in two's complement, the first in the low
                                       half
    scales   [R, ceil(G*N / group)]    the weight's dtype

Activations may be rounded as well, each token's to 127 levels either way of its largest magnitude, where the layer is
computed: products are then those of integers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from vnm_compile.errors import BadOption

VALUE_KINDS = ("int8", "int4")
GROUPS = (32, 64, 128)
"""Kept values that may share a scale; beside these, all of a row."""

_TEXT = re.compile(r"int([48])/(row|[0-9]{1,3})(/a8)?")
_MOST_LEVEL, _LEAST_MAGNITUDE = 127, 1e-30  # of activations


@dataclass(frozen=True)
class Quantization:
    """How kept values are stored as integers, written `"int8/64"`: bits, and kept values a scale (or `"row"`); `"/a8"`
    behind it where activations are rounded too.

    Attributes:
        bits: 8 or 4.
        group: kept values that share a scale: 32, 64, 128, or None for all of a row.
        activations: 8 where a layer rounds its activations to integers of so many bits, token by token; None where it
            does not.

    Raises:
        VNMError: other bits or groups.
    """

    bits: int
    group: int | None = 64
    activations: int | None = None

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in (8, 4):
            raise BadOption(f"values of {self.bits!r} bits; there are int8 and int4.")
        if self.group is not None and (type(self.group) is not int or self.group not in GROUPS):
            raise BadOption(
                f'group={self.group!r}; kept values share a scale by {", ".join(map(str, GROUPS))} or "row".'
            )
        if self.activations is not None and (type(self.activations) is not int or self.activations != 8):
            raise BadOption(f"activations of {self.activations!r} bits; they are rounded to 8, or not at all (None).")

    @classmethod
    def of(cls, values: str, group: int | str = 64, activations: str | None = None) -> Quantization:
        """From what users write: `"int8"` or `"int4"`, and 32, 64, 128 or `"row"`; `"int8"` activations, or None.

        Raises:
            VNMError: they wrote something else.
        """
        if values not in VALUE_KINDS:
            raise BadOption(f"values={values!r}; there are {' and '.join(VALUE_KINDS)}.")
        if isinstance(group, str) and group != "row":
            raise BadOption(f'group={group!r}; kept values share a scale by {", ".join(map(str, GROUPS))} or "row".')
        if activations not in (None, "int8"):
            raise BadOption(f'activations={activations!r}; they are rounded to "int8", or not at all (None).')
        return cls(int(values[3:]), None if group == "row" else group, activations and 8)  # type: ignore[arg-type]

    @classmethod
    def parse(cls, text: str) -> Quantization:
        """Return what `text` ("int8/64", "int4/row") names.

        Raises:
            VNMError: it names nothing that there is.
        """
        found = _TEXT.fullmatch(text)
        if found is None:
            raise BadOption(f'{text!r} is no way to store values; write such as "int8/64" or "int4/row".')
        return cls(int(found[1]), None if found[2] == "row" else int(found[2]), 8 if found[3] else None)

    def __str__(self) -> str:
        return f"{self.kind}/{self.group or 'row'}{'/a8' if self.activations else ''}"

    @property
    def kind(self) -> str:
        """`"int8"` or `"int4"`."""
        return f"int{self.bits}"

    @property
    def lowest(self) -> int:
        """The lowest level."""
        return -127 if self.bits == 8 else -8

    @property
    def highest(self) -> int:
        """The highest level."""
        return 127 if self.bits == 8 else 7

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored values."""
        return torch.int8 if self.bits == 8 else torch.uint8

    def width(self, kept: int) -> int:
        """Elements that `kept` values of a row are stored in."""
        return kept if self.bits == 8 else -(-kept // 2)

    def scales(self, kept: int) -> int:
        """Scales of a row of `kept` values."""
        return -(-kept // self.group) if self.group else min(1, kept)


def store_levels(levels: Tensor, quantization: Quantization) -> Tensor:
    """Levels `[R, G*N]` int8 as they are stored."""
    if quantization.bits == 8:
        return levels
    padded = torch.nn.functional.pad(levels, (0, levels.shape[1] % 2)).view(torch.uint8)
    return (padded[:, 0::2] & 15) | (padded[:, 1::2] << 4)


def stored_levels(values: Tensor, quantization: Quantization, kept: int) -> Tensor:
    """Stored values as levels `[R, kept]`, int8."""
    if quantization.bits == 8:
        return values
    halves = torch.stack([values << 4, values & 0xF0], -1).flatten(1)[:, :kept]
    return halves.contiguous().view(torch.int8) >> 4


def spread_scales(scales: Tensor, quantization: Quantization, kept: int) -> Tensor:
    """Scales `[R, S]` for every kept value: `[R, kept]`."""
    if quantization.group is None:
        return scales.expand(-1, kept)
    return scales.repeat_interleave(quantization.group, 1)[:, :kept]


def dequantised(values: Tensor, scales: Tensor, quantization: Quantization, kept: int) -> Tensor:
    """The kept values `[R, kept]` that stored ones stand for, in the dtype of the scales.

    Of bf16 and fp16 scales the product is exact in float32; it is rounded once.
    """
    wide = torch.promote_types(scales.dtype, torch.float32)
    levels = stored_levels(values, quantization, kept).to(wide)
    return (levels * spread_scales(scales.to(wide), quantization, kept)).to(scales.dtype)


def rounded_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations `[..., K]` as integers, -127 to 127, in float32 or float64, and what one is worth, `[..., 1]`.

    A token with NaN or infinity among its activations has levels of 0 that are worth NaN or infinity, so that products
    are NaN; one that is next to nothing is 0.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if not x.shape[-1]:
        return wide, wide.new_zeros(*x.shape[:-1], 1)
    largest = wide.abs().amax(-1, keepdim=True)
    small = largest <= _LEAST_MAGNITUDE
    usable = largest.isfinite() & ~small
    # A division that is rounded once, as that of kernels: torch makes two roundings of a number over a tensor.
    inverse = torch.div(torch.full_like(largest, _MOST_LEVEL), largest.where(usable, torch.ones_like(largest)))
    return torch.where(usable, wide * inverse, 0).round(), torch.where(small, 0, largest / _MOST_LEVEL)
