"""The canonical V:N:M arrays: packing, unpacking, checking and finding the pattern.

Letters, here and everywhere: a weight is `[O, K]`; R is O rounded up to a multiple of V, G = ceil(K / M).

    values   [R, G*N]            the weight's dtype
    metadata [R, ceil(G*N / 4)]  uint8, four 2-bit indices a byte, the first value's in the low bits
    columns  [R/V, G, 4]         uint8 (uint16 when M > 256), offsets in [0, M), strictly increasing

An index says which of the block's 4 kept columns a value stands in. Inside a group the indices of a row are
strictly increasing; a row with fewer than N non-zeros is filled with zero values at unused indices. The offsets of
the tail group (K mod M real columns) may point past K where fewer than 4 columns are real: the values there are
zero, and a kernel must not read the activation there.

Values may be quantised: integers with scales, in an array more; see `vnm_compile.quantization`.

Everything is vectorised; the loops below are over a handful of candidates, never over rows or groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from vnm_compile.errors import PatternViolation, UnsupportedWeight, at_layer
from vnm_compile.layout import Layout
from vnm_compile.quantization import dequantised
from vnm_compile.spec import KEPT_COLUMNS, Spec

DETECTED_V = (256, 128, 64, 32, 16, 8, 1)
DETECTED_M = range(4, 257)
_SAMPLED_ROWS = 64
_WORD = 8  # flags that are counted at once


class Packed(tuple[Tensor, ...]):
    """The canonical arrays of one weight, in the order of `Layout.names`."""

    def __new__(cls, *arrays: Tensor) -> Packed:
        """The arrays one after the other."""
        return super().__new__(cls, arrays)

    @property
    def values(self) -> Tensor:
        """What the weight is a linear function of."""
        return self[0]

    @property
    def metadata(self) -> Tensor:
        """Which of a block's kept columns each value stands in."""
        return self[1]

    @property
    def columns(self) -> Tensor:
        """Which columns each block keeps."""
        return self[2]

    @property
    def scales(self) -> Tensor:
        """Of quantised values: one for every so many of a row."""
        return self[3]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.numel() * array.element_size() for array in self)

    def __getnewargs__(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(self)

    def remade(self, arrays: Iterable[Tensor]) -> Packed:
        """The same weight with other arrays, of the same names in the same order."""
        return type(self)(*arrays)

    def replaced(self, index: int, array: Tensor) -> Packed:
        """The same weight with another array in one place."""
        return self.remade([*self[:index], array, *self[index + 1 :]])


def pack(weight: Tensor, spec: Spec, layer: str | None = None) -> Packed:
    """Return the canonical arrays of a weight that follows `spec`.

    Args:
        weight: `[O, K]`, any dtype and device, any strides. -0.0 counts as zero, NaN as a non-zero.
        spec: the pattern.
        layer: name that an error message starts with.

    Raises:
        VNMError: the weight is no 2-D tensor with values, or breaks the pattern; the message shows the first block that
            does.
    """
    blocks = _as_blocks(weight, spec, layer)  # [B, V, G, M]
    used = _used_columns(blocks)  # [B, G, M]
    columns = _first_flagged(used, KEPT_COLUMNS)  # [B, G, 4]
    kept = blocks.gather(3, columns.unsqueeze(1).expand(-1, spec.v, -1, -1))  # [B, V, G, 4]
    nonzero = _nibbles(kept != 0)  # [B, V, G], one bit a kept column
    too_many_columns = (used.sum(-1) > KEPT_COLUMNS).any()
    if too_many_columns or (_table(_BITS, nonzero) > spec.n).any():
        raise _violation(weight, spec, layer)
    indices = _table(_FIRST_TWO[spec.n], nonzero).view(*nonzero.shape, spec.n)  # [B, V, G, N]
    values = kept.gather(3, indices.long())
    values = torch.where(values == 0, torch.zeros_like(values), values)  # -0.0 is stored as 0.0
    rows, groups = blocks.shape[0] * spec.v, blocks.shape[2]
    return Packed(
        values.reshape(rows, groups * spec.n),
        _pack_indices(indices.reshape(rows, groups * spec.n)),
        columns.to(spec.column_dtype),
    )


def unpack(packed: Packed, layout: Layout) -> Tensor:
    """Return the dense weight `[O, K]` of canonical arrays, bit for bit what was packed (with -0.0 as 0.0)."""
    values = kept_values(packed, layout)
    offsets = kept_offsets(packed.metadata, packed.columns, layout)
    dense = values.new_zeros(*offsets.shape[:3], layout.spec.m)
    dense.scatter_(3, offsets, values.reshape(offsets.shape))
    dense = dense.view(layout.rows, layout.groups * layout.spec.m)
    return dense[: layout.out_features, : layout.in_features].contiguous()


def kept_values(packed: Packed, layout: Layout) -> Tensor:
    """The kept values `[R, G*N]`, in the weight's dtype: as they are stored, or what quantised ones stand for."""
    if layout.quantization is None:
        return packed.values
    return dequantised(packed.values, packed.scales, layout.quantization, layout.kept)


def kept_offsets(metadata: Tensor, columns: Tensor, layout: Layout) -> Tensor:
    """The column of each kept value, counted from the start of its group: int64 `[R/V, V, G, N]`."""
    spec, groups = layout.spec, layout.groups
    chosen = unpack_indices(metadata, groups * spec.n).reshape(layout.rows // spec.v, spec.v, groups, spec.n)
    return columns.long().unsqueeze(1).expand(-1, spec.v, -1, -1).gather(3, chosen.long())


def unpack_indices(metadata: Tensor, count: int) -> Tensor:
    """Return the 2-bit indices of `metadata` `[R, ceil(count / 4)]` as uint8 `[R, count]`."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=metadata.device)
    return ((metadata.unsqueeze(-1) >> shifts) & 3).flatten(1)[:, :count]


def matches(weight: Tensor, spec: Spec | str) -> bool:
    """Whether every non-zero of `weight` `[O, K]` stands where `spec` allows one.

    Raises:
        VNMError: the weight is no 2-D tensor with values.
    """
    spec = Spec.parse(spec)
    _check_matrix(weight, None)
    nonzero = weight != 0
    return _rows_fit(nonzero, spec.m) <= spec.n and spec.v in _matching_v(nonzero, spec.m, (spec.v,))


def check_pattern(weight: Tensor, spec: Spec, layer: str | None = None) -> None:
    """Raise where `weight` `[O, K]` breaks `spec`; nothing is packed where it does not.

    Raises:
        VNMError: as `pack`: the message starts with `layer` and shows the first block that breaks the pattern.
    """
    if not matches(weight, spec):
        raise _violation(weight, spec, layer)


def detect(weight: Tensor) -> Spec | None:
    """Return the pattern that `weight` `[O, K]` follows, or None.

    Candidates are N in {1, 2}, M from 4 to 256 and V in {1, 8, 16, 32, 64, 128, 256}. The smallest density that
    fits is taken, then the largest V, then the smallest M; a V above O or an M above K would only store padding.
    V = 1 alone means N:M inside every row. A weight of zeros follows every pattern and tells of none (an adapter before
    training, a layer that is to be loaded): None.

    Raises:
        VNMError: the weight is no 2-D tensor with values.
    """
    _check_matrix(weight, None)
    out_features, in_features = weight.shape
    if weight.numel() == 0:
        return None
    nonzero = weight != 0
    count = int(torch.count_nonzero(nonzero))
    if count == 0:
        return None
    # Rows from all over the matrix reject almost every candidate at a small cost.
    sample = nonzero[:: max(1, out_features // _SAMPLED_ROWS)]
    for n, m in _candidates(in_features):
        if count > out_features * -(-in_features // m) * n:
            continue
        if _rows_fit(sample, m) <= n and _rows_fit(nonzero, m) <= n:
            fitting = _matching_v(nonzero, m, tuple(v for v in DETECTED_V if v <= out_features))
            return Spec(max(fitting), n, m)
    return None


def _candidates(in_features: int) -> list[tuple[int, int]]:
    """(n, m) pairs worth trying on this many columns, smallest density first, then smallest m."""
    pairs = ((n, m) for n in (1, 2) for m in DETECTED_M if m <= max(KEPT_COLUMNS, in_features))
    return sorted(pairs, key=lambda pair: (pair[0] / pair[1], pair[1]))


def _rows_fit(nonzero: Tensor, m: int) -> int:
    """Largest number of non-zeros in a row's group of m columns. `nonzero`: bool [O, K]."""
    padded = _pad(nonzero, 1, m).contiguous()
    if not padded.numel():
        return 0
    if m % _WORD:
        counts = padded.view(padded.shape[0], padded.shape[1] // m, m).sum(-1, dtype=torch.int32)
    else:
        # The product adds up the eight 0/1 bytes of a word in its top byte; sums of rows as short as a group are slow.
        counts = (padded.view(torch.uint8).view(torch.int64) * 0x0101010101010101) >> 56
        counts = counts.view(padded.shape[0], padded.shape[1] // m, m // _WORD).sum(-1) if m > _WORD else counts
    return int(counts.max())


def _matching_v(nonzero: Tensor, m: int, candidates: tuple[int, ...]) -> set[int]:
    """The v of `candidates` at which no block of v rows and m columns uses more than 4 columns."""
    fitting: set[int] = set()
    finest: tuple[int, Tensor] = (1, nonzero.view(torch.uint8))
    for v in sorted(candidates):
        # A block of v rows is the union of smaller blocks where they divide it.
        start, rows = finest if v % finest[0] == 0 else (1, nonzero.view(torch.uint8))
        padded = _pad(rows, 0, v // start)
        used = padded.reshape(padded.shape[0] // (v // start), v // start, padded.shape[1]).amax(1) if v > 1 else rows
        finest = (v, used)
        per_block = _rows_fit(used.view(torch.bool), m)
        if per_block <= KEPT_COLUMNS:
            fitting.add(v)
        else:
            break  # a larger block uses at least as many columns, where it is a union of these
    return fitting


def _check_matrix(weight: Tensor, layer: str | None) -> None:
    if not isinstance(weight, Tensor):
        raise at_layer(
            layer, f"a weight is a tensor [out, in]; this one is a {type(weight).__name__}.", UnsupportedWeight
        )
    if weight.layout != torch.strided:
        raise at_layer(
            layer,
            f"a weight is a plain matrix; this one is stored as {weight.layout}; use .to_dense().",
            UnsupportedWeight,
        )
    if weight.is_meta:
        raise at_layer(layer, "the weight is on the meta device and has no values; load it first.", UnsupportedWeight)
    if weight.dim() != 2:
        raise at_layer(
            layer,
            f"a V:N:M weight has 2 dimensions [out, in]; this one has shape {list(weight.shape)}.",
            UnsupportedWeight,
        )


def _as_blocks(weight: Tensor, spec: Spec, layer: str | None) -> Tensor:
    """[O, K] as [B, V, G, M], padded with zeros at the tails."""
    _check_matrix(weight, layer)
    padded = _pad(_pad(weight.detach(), 0, spec.v), 1, spec.m)
    return padded.reshape(padded.shape[0] // spec.v, spec.v, padded.shape[1] // spec.m, spec.m)


def _pad(tensor: Tensor, dim: int, multiple: int) -> Tensor:
    """Pad `dim` of a matrix with zeros up to a multiple; no copy where nothing is missing."""
    missing = -tensor.shape[dim] % multiple
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _used_columns(blocks: Tensor) -> Tensor:
    """Which columns of a block have a non-zero: [B, V, G, M] to bool [B, G, M]."""
    b, v, g, m = blocks.shape
    nonzero = (blocks != 0).view(torch.uint8).view(b, v, g * m)
    return nonzero.amax(1).view(b, g, m).view(torch.bool)


def _first_flagged(flags: Tensor, count: int) -> Tensor:
    """Positions of the first `count` set flags of the last dimension, in order; unset ones fill up from the left."""
    size = flags.shape[-1]
    position = torch.arange(size, device=flags.device, dtype=torch.int32)
    order = torch.where(flags, position, position + size)
    return order.topk(count, dim=-1, largest=False).values.remainder(size).sort(-1).values.long()


def _nibbles(flags: Tensor) -> Tensor:
    """bool [..., 4] to uint8 [...], flag i in bit i."""
    # The product moves the four 0/1 bytes of an int32 into neighbouring bits of its top byte.
    word = flags.contiguous().view(torch.int32).squeeze(-1)
    return ((word * 0x01020408) >> 24 & 15).to(torch.uint8)


def _table(rows: Tensor, code: Tensor) -> Tensor:
    return rows.to(code.device).index_select(0, code.flatten().int()).view(*code.shape, *rows.shape[1:])


def _first_two(n: int) -> Iterator[list[int]]:
    """For each 4-bit mask the indices of its first n set bits, filled up with unset ones, in increasing order."""
    for mask in range(16):
        flagged = [i for i in range(4) if mask >> i & 1]
        unused = [i for i in range(4) if not mask >> i & 1]
        yield sorted((flagged + unused)[:n])


_BITS = torch.tensor([mask.bit_count() for mask in range(16)], dtype=torch.uint8)
_FIRST_TWO = {n: torch.tensor(list(_first_two(n)), dtype=torch.uint8) for n in (1, 2)}


def _pack_indices(indices: Tensor) -> Tensor:
    """uint8 [R, G*N], values 0 to 3, to uint8 [R, ceil(G*N / 4)], the first in the low bits."""
    padded = _pad(indices, 1, 4)
    quads = padded.reshape(padded.shape[0], padded.shape[1] // 4, 4)
    return quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6


def _violation(weight: Tensor, spec: Spec, layer: str | None) -> Exception:
    """The error that shows the first block that breaks the pattern."""
    blocks = _as_blocks(weight, spec, layer) != 0
    too_many = blocks.any(1).sum(-1) > KEPT_COLUMNS  # [B, G]
    if too_many.any():
        block, group = (int(i) for i in too_many.nonzero()[0])
        count = int(blocks[block, :, group].any(0).sum())
        what = (
            f"block rows {block * spec.v}-{min((block + 1) * spec.v, weight.shape[0]) - 1}, "
            f"columns {_span(group, spec, weight)} has {count} non-zero columns ({KEPT_COLUMNS} allowed)"
        )
    else:
        per_row = blocks.sum(-1).flatten(0, 1)  # [R, G]
        row, group = (int(i) for i in (per_row > spec.n).nonzero()[0])
        what = (
            f"row {row}, columns {_span(group, spec, weight)} has {int(per_row[row, group])} non-zeros "
            f"({spec.n} allowed)"
        )
    way_out = f'Run vnm.sparsify(model, "{spec}") or exclude this layer.'
    message = f"weight {list(weight.shape)} is not {spec}: {what}. {way_out}"
    return at_layer(layer, message, PatternViolation, expected=str(spec), found=what, way_out=way_out)


def _span(group: int, spec: Spec, weight: Tensor) -> str:
    return f"{group * spec.m}-{min((group + 1) * spec.m, weight.shape[1]) - 1}"
