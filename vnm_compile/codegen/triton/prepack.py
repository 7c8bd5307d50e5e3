"""Packed arrays as the Triton kernels want them: rows that begin at whole loads, at addresses that stay."""

from __future__ import annotations

import torch
from torch import Tensor

from vnm_compile.format import Packed
from vnm_compile.prepack import Prepack

WIDEST_LOAD = 16
"""Bytes that a thread loads at once."""

SCALES_LOAD = 4
"""Bytes of scales that are loaded at once: the fewest that can be copied asynchronously."""


class AlignedRows(Prepack):
    """Every row of values and metadata begins at a multiple of 16 bytes, of scales at one of 4.

    Where a row is no multiple of that (64:2:5 has rows of 205 bytes of metadata at K = 4096), loads would shrink to 2
    bytes. The kernels take the distance of rows as a parameter and work on unpadded ones too.
    """

    canonical = False

    def prepare(self, packed: Packed) -> Packed:
        """The arrays with aligned rows: views of padded copies where they are not so already. What begins elsewhere in
        its memory than at a multiple of 16 bytes is copied."""
        values, metadata, columns, *scales = packed
        if not (columns.is_contiguous() and _begins_aligned(columns)):
            columns = columns.clone(memory_format=torch.contiguous_format)
        scales = [_aligned(array, SCALES_LOAD) for array in scales]
        return packed.remade((_aligned(values), _aligned(metadata), columns, *scales))

    def renew(self, kept: Packed, fresh: Packed) -> Packed:
        """The arrays that are kept, written: CUDA graphs have recorded their addresses."""
        if [_form(array) for array in kept] != [_form(array) for array in fresh]:
            return fresh
        for old, new in zip(kept, fresh, strict=True):
            old.copy_(new)
        return kept


def _aligned(array: Tensor, load: int = WIDEST_LOAD) -> Tensor:
    rows, width = array.shape
    multiple = load // array.element_size()
    if array.stride() == (width, 1) and width % multiple == 0 and _begins_aligned(array):
        return array
    return array.new_zeros(rows, -(-width // multiple) * multiple)[:, :width].copy_(array)


def _begins_aligned(array: Tensor) -> bool:
    return array.storage_offset() * array.element_size() % WIDEST_LOAD == 0


def _form(array: Tensor) -> tuple[object, ...]:
    return array.shape, array.dtype, array.device
