"""Which channel stands where in a tensor: the algebra under the absorption of permutations.

A *channel axis* is an axis of weights whose order may be ours to choose, such as the hidden features of a feed-forward
layer. Tensors hold its channels in one dimension, or, once a view has split heads off, in several: dimension
`H * D` becomes the digits `H` and `D` of the channel's number. An order may then still be changed inside each head, for
each head differently, which is what `ChannelAxis.block` records: channels stay in their block of `block` channels.

Axes that meet in an operation become one (`unify`). An axis whose order turns out to matter is *pinned*, with the
reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(eq=False)
class ChannelAxis:
    """An axis of `size` channels.

    Attributes:
        name: the first weight that has it, with the dimension: `encoder.layer.0.output.dense.weight[1]`.
        size: its number of channels.
        block: channels may change places with those of the same `number // block` only.
        reason: why the order must stay as it is; None while it is free.
        bound: what it was found to be, once it has met another axis.
    """

    name: str
    size: int
    block: int
    reason: str | None = None
    bound: Dim | None = None


class Digit(NamedTuple):
    """`(number // stride) % size` of a channel's number; with no axis, an index of fixed order."""

    size: int
    stride: int = 1
    axis: ChannelAxis | None = None

    @property
    def open(self) -> bool:
        """Whether the order of this index depends on an order that is free."""
        return self.axis is not None and self.axis.reason is None and self.stride < self.axis.block

    @property
    def whole(self) -> bool:
        """Whether this is the channel's number itself, of an axis that no view has split."""
        return self.axis is not None and self.size == self.axis.size == self.axis.block


Dim = tuple[Digit, ...]
"""One dimension of a tensor, most significant digit first; its size is the product of theirs."""

Layout = tuple[Dim, ...]
"""The dimensions of a tensor."""


def new_axis(name: str, size: int) -> Dim:
    """A dimension that is an axis of its own."""
    return (Digit(size, 1, ChannelAxis(name, size, size)),)


def fixed(shape: Iterable[int]) -> Layout:
    """The layout of a tensor of this shape without any channel axis."""
    return tuple((Digit(int(size)),) for size in shape)


def resolve(dim: Dim) -> Dim:
    """The dimension in terms of the axes that its own were found to be."""
    digits: list[Digit] = []
    for digit in dim:
        if digit.axis is None or digit.axis.bound is None:
            digits.append(digit)
            continue
        bound = resolve(digit.axis.bound)
        if digit.size == digit.axis.size:
            digits += bound
        else:  # an axis that has been split is bound to one of the same size only: digits map one to one
            digits.append(Digit(digit.size, digit.stride, bound[0].axis))
    return tuple(digit for digit in digits if digit.size > 1)


def size_of(dim: Dim) -> int:
    """Number of indices of a dimension."""
    result = 1
    for digit in dim:
        result *= digit.size
    return result


def pin(dims: Iterable[Dim], reason: str) -> None:
    """Fix the order of every axis that is open in these dimensions."""
    for dim in dims:
        for digit in resolve(dim):
            if digit.open and digit.axis is not None:
                digit.axis.reason = reason


def is_open(dims: Iterable[Dim]) -> bool:
    """Whether any of the dimensions depends on an order that is free."""
    return any(digit.open for dim in dims for digit in resolve(dim))


def take(digits: list[Digit], size: int) -> list[Digit] | None:
    """Remove the least significant digits that make up `size` from the end of a list; None where they do not.

    A digit that reaches beyond `size` is split in two, which its axis remembers.
    """
    taken: list[Digit] = []
    while size > 1:
        if not digits:
            return None
        digit = digits.pop()
        if size % digit.size == 0:
            taken.insert(0, digit)
            size //= digit.size
        elif digit.size % size == 0:
            digits.append(Digit(digit.size // size, digit.stride * size, digit.axis))
            taken.insert(0, Digit(size, digit.stride, digit.axis))
            _split(digit.axis, digit.stride * size)
            size = 1
        else:
            return None
    return taken


def _split(axis: ChannelAxis | None, boundary: int) -> None:
    """Remember that the axis' channels were told apart by `number // boundary`."""
    if axis is None or boundary % axis.block == 0:
        return
    if axis.block % boundary == 0:
        axis.block = boundary
    elif axis.reason is None:
        axis.reason = f"it is split both by {axis.block} and by {boundary} channels"


def recut(layout: Layout, shape: Sequence[int], reason: str) -> Layout:
    """The layout after a view to `shape`: the same indices in the same order, other boundaries."""
    digits = [digit for dim in layout for digit in resolve(dim)]
    dims: list[Dim] = []
    for size in reversed(shape):
        taken = take(digits, int(size))
        if taken is None:
            pin(layout, reason)
            return fixed(shape)
        dims.insert(0, tuple(taken))
    return tuple(dims)


def unify(pairs: Sequence[tuple[Dim, Dim]], reason: str) -> None:
    """Make the orders of dimensions that meet index by index in one operation the same, or pin them.

    Args:
        pairs: the dimensions of two operands that are aligned. Those of size 1 may be left out: they are broadcast.
        reason: what to say of an axis that this pins.
    """
    matched: list[tuple[Digit, Digit]] = []
    for a, b in pairs:
        a, b = resolve(a), resolve(b)
        if size_of(a) != size_of(b):
            continue  # broadcast
        if _bind(a, b, reason) or _bind(b, a, reason):
            continue
        together = _refine(a, b)
        if together is None:
            pin((a, b), reason)
        else:
            matched += together
    for one, other in matched:
        if one.open and other.open:
            _merge(one, other, matched, reason)
        else:
            pin(((one,), (other,)), reason)


def _bind(a: Dim, b: Dim, reason: str) -> bool:
    """Bind `a`, if it is an axis that nothing is known of, to what `b` is."""
    if len(a) != 1 or not a[0].whole:
        return False
    if a == b:
        return True
    axis = a[0].axis
    assert axis is not None
    if not a[0].open or not is_open((b,)) or any(digit.axis is axis for digit in b):
        pin((a, b), reason)
    else:
        axis.bound = b
    return True


def _refine(a: Dim, b: Dim) -> list[tuple[Digit, Digit]] | None:
    """Pairs of digits of equal size, least significant first; None where the two cannot be cut alike."""
    left, right = list(a), list(b)
    pairs: list[tuple[Digit, Digit]] = []
    while left and right:
        size = min(left[-1].size, right[-1].size)
        one, other = take(left, size), take(right, size)
        if one is None or other is None:
            return None
        pairs.append((one[0], other[0]))
    return pairs


def _merge(one: Digit, other: Digit, matched: Sequence[tuple[Digit, Digit]], reason: str) -> None:
    """Make two axes one, digits of which meet; their more significant digits must meet as well."""
    meeting = [(x, y) for x, y in matched if x.axis is one.axis and y.axis is other.axis and _same_place(x, y)]
    digits = [(x.stride, x.size) for x, _ in meeting]
    a, b = one.axis, other.axis
    assert a is not None
    assert b is not None
    if a.size != b.size or not _same_place(one, other) or not tiles(digits, a.size):
        pin(((one,), (other,)), reason)
    elif a is not b and b.bound is None and a.bound is None:
        b.bound = (Digit(a.size, 1, a),)
        _split(a, b.block)


def _same_place(one: Digit, other: Digit) -> bool:
    return (one.stride, one.size) == (other.stride, other.size)


def tiles(digits: Iterable[tuple[int, int]], size: int) -> bool:
    """Whether (stride, size) digits make up the number of a channel, each exactly once."""
    stride = 1
    for each_stride, each_size in sorted(digits):
        if each_stride != stride:
            return False
        stride *= each_size
    return stride == size


def pin_incomplete(layout: Layout, reason: str) -> None:
    """Pin the axes of which a tensor holds the free digit, but not, once each, the digits that number the blocks."""
    by_axis: dict[ChannelAxis, list[Digit]] = {}
    for dim in layout:
        for digit in resolve(dim):
            if digit.axis is not None and digit.axis.reason is None:
                by_axis.setdefault(digit.axis, []).append(digit)
    for axis, digits in by_axis.items():
        whole = all(digit.size == axis.size for digit in digits)
        if any(d.open for d in digits) and not whole and not tiles([(d.stride, d.size) for d in digits], axis.size):
            axis.reason = reason


def positions(dim: Dim, axis: ChannelAxis) -> Tensor:
    """Where in a dimension each channel of the axis stands: int64 `[size, copies]`; `[size, 0]` if nowhere."""
    channel = _channels(resolve(dim), axis)
    if channel is None:
        return torch.zeros(axis.size, 0, dtype=torch.int64, device="cpu")
    return channel.argsort(stable=True).view(axis.size, -1)


def reordered(dim: Dim, axis: ChannelAxis, order: Tensor) -> Tensor | None:
    """The index that brings a dimension into a new order of the axis; None where the axis is not in it.

    Args:
        order: int64 `[axis.size]`, the old number of the channel at each new place.
    """
    place = positions(dim, axis)
    if place.shape[1] == 0:
        return None
    index = torch.empty(size_of(resolve(dim)), dtype=torch.int64, device="cpu")
    index[place] = place[order]
    return index


def _channels(dim: Dim, axis: ChannelAxis) -> Tensor | None:
    """The channel number at each index of a resolved dimension that holds all digits of the axis."""
    mine = [(digit.stride, digit.size) for digit in dim if digit.axis is axis]
    if not mine or not tiles(mine, axis.size):
        return None
    total, weight = torch.zeros(size_of(dim), dtype=torch.int64, device="cpu"), 1
    index = torch.arange(size_of(dim), device="cpu")
    for digit in reversed(dim):
        if digit.axis is axis:
            total += index // weight % digit.size * digit.stride
        weight *= digit.size
    return total
