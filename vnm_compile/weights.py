"""The packed arrays of dense weights: made once, kept as long as the weight lives, remade when it changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from vnm_compile.contents import Content, Place, Watch, contents, on_real_values
from vnm_compile.format import Packed, check_pattern, detect, matches, pack
from vnm_compile.prepack import Prepack
from vnm_compile.session import session
from vnm_compile.spec import Spec
from vnm_compile.tensor import VNMTensor

_TRIES = 3  # at packing a weight that is being written to

_PATTERNS = "patterns found"
_detected: dict[bool, WeakKeyDictionary[Content, Spec | None]] = {
    transposed: session.keep(_PATTERNS, WeakKeyDictionary()) for transposed in (False, True)
}
_last_detected: dict[tuple[Place, bool], Spec] = session.keep(_PATTERNS, {})


def detected_spec(weight: Tensor, transposed: bool) -> Spec | None:
    """`format.detect`, remembered for as long as the weight lives and holds what it held."""
    watch = contents.watch(weight)
    remembered = _detected[transposed]
    if watch.content not in remembered:
        with on_real_values():
            matrix = weight.t() if transposed else weight
            likely = _last_detected.get((watch.place, transposed))
            spec = likely if likely is not None and matches(matrix, likely) else detect(matrix)
        remembered[watch.content] = spec
        if spec is not None:
            _last_detected[watch.place, transposed] = spec
    return remembered[watch.content]


_held: WeakKeyDictionary[Content, set[tuple[bool, Spec]]] = session.keep(_PATTERNS, WeakKeyDictionary())


def hold_to_pattern(weight: Tensor, transposed: bool, spec: Spec, name: str) -> None:
    """Check a weight against its annotation, once for what it holds, whether it is going to be packed or not.

    Raises:
        VNMError: the weight breaks `spec`; the message names the layer and shows the place.
    """
    known = _held.setdefault(contents.watch(weight).content, set())
    if (transposed, spec) not in known:
        with on_real_values():
            matrix = weight.t() if transposed else weight
            check_pattern(matrix, spec, name)
        known.add((transposed, spec))


class Kept(NamedTuple):
    """Packed arrays, and what the tensors that they were made from were when they were made."""

    packed: Packed
    watches: tuple[Watch, ...]


_Key = tuple[tuple[Place, ...], tuple[bool, ...], Spec]


class PackStore:
    """Packed arrays by the place of the weights they were made from; holds no weight alive."""

    def __init__(self, prepack_of: Callable[[str], Prepack] = lambda device: Prepack()) -> None:
        """`prepack_of` tells what kernels want on a type of device."""
        self._prepack_of = prepack_of
        self._entries: dict[_Key, Kept] = {}
        contents.on_death.append(self._bury)

    def clear(self) -> None:
        """Keep nothing."""
        with session.lock:
            self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, weights: Sequence[Tensor], transposed: Sequence[bool], names: Sequence[str], spec: Spec) -> Kept:
        """Return the arrays of dense weights, joined along the rows; packed again if one has changed.

        They are as the kernels of the device want them (`vnm_compile.prepack`).

        Args:
            weights: each `[out, in]`, or `[in, out]` where `transposed`.
            names: of the layers, for errors.

        Raises:
            VNMError: a weight breaks `spec`.
        """

        return self._get(weights, tuple(transposed), spec, lambda: _pack(weights, transposed, names, spec))

    def prepared(self, weight: VNMTensor) -> Kept | None:
        """The arrays of a compressed weight as the kernels want them: its own where they are so already, else copies.
        None where they are its own whatever they are like."""
        if self._prepack_of(weight.device.type).canonical:
            return None
        return self._get(weight.packed, (weight._transposed,), weight.spec, lambda: weight.packed)

    def _get(
        self, sources: Sequence[Tensor], transposed: tuple[bool, ...], spec: Spec, make: Callable[[], Packed]
    ) -> Kept:
        prepack = self._prepack_of(sources[0].device.type)
        with session.lock:
            for _ in range(_TRIES):
                watches = tuple(map(contents.watch, sources))
                key = (tuple(watch.place for watch in watches), transposed, spec)
                kept = self._entries.get(key)
                if kept is not None and _same_contents(kept.watches, watches):
                    return Kept(kept.packed, watches)
                with on_real_values():
                    packed = prepack.prepare(make())
                    if kept is not None:
                        packed = prepack.renew(kept.packed, packed)
                if all(contents.watch(source) is watch for source, watch in zip(sources, watches, strict=True)):
                    self._entries[key] = Kept(packed, watches)
                    return self._entries[key]
            # Somebody writes all the time. What was packed last is as good as what a dense kernel would have read; it
            # is not kept, and the next call looks again.
            return Kept(packed, watches)

    def _bury(self, storage: int) -> None:
        for key in list(self._entries):
            if any(place.storage == storage for place in key[0]):
                self._entries.pop(key, None)
        for place, transposed in list(_last_detected):
            if place.storage == storage:
                _last_detected.pop((place, transposed), None)


def _same_contents(one: Sequence[Watch], other: Sequence[Watch]) -> bool:
    return all(a.content is b.content for a, b in zip(one, other, strict=True))


def _pack(weights: Sequence[Tensor], transposed: Sequence[bool], names: Sequence[str], spec: Spec) -> Packed:
    matrices = [w.t() if flip else w for w, flip in zip(weights, transposed, strict=True)]
    parts = [pack(matrix, spec, name) for matrix, name in zip(matrices, names, strict=True)]
    return parts[0] if len(parts) == 1 else parts[0].remade(map(torch.cat, zip(*parts, strict=True)))
