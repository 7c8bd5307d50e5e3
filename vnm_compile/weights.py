"""The packed arrays of dense weights: made once, kept as long as the weight lives, remade when it changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from vnm_compile.contents import Content, Place, Watch, contents, on_real_values
from vnm_compile.format import Packed, align_rows, detect, matches, pack
from vnm_compile.spec import Spec
from vnm_compile.tensor import VNMTensor

_TRIES = 3  # at packing a weight that is being written to

_detected: dict[bool, WeakKeyDictionary[Content, Spec | None]] = {False: WeakKeyDictionary(), True: WeakKeyDictionary()}
_last_detected: dict[tuple[Place, bool], Spec] = {}


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


_held: WeakKeyDictionary[Content, set[tuple[bool, Spec]]] = WeakKeyDictionary()


def hold_to_pattern(weight: Tensor, transposed: bool, spec: Spec, name: str) -> None:
    """Check a weight against its annotation, once for what it holds, whether it is going to be packed or not.

    Raises:
        VNMError: the weight breaks `spec`; the message names the layer and shows the place.
    """
    known = _held.setdefault(contents.watch(weight).content, set())
    if (transposed, spec) not in known:
        with on_real_values():
            matrix = weight.t() if transposed else weight
            if not matches(matrix, spec):
                pack(matrix, spec, name)  # raises, and shows where
        known.add((transposed, spec))


class Kept(NamedTuple):
    """Packed arrays, and what the tensors that they were made from were when they were made."""

    packed: Packed
    watches: tuple[Watch, ...]


_Key = tuple[tuple[Place, ...], tuple[bool, ...], Spec]


class PackStore:
    """Packed arrays by the place of the weights they were made from; holds no weight alive."""

    def __init__(self) -> None:
        self._entries: dict[_Key, Kept] = {}
        contents.on_death.append(self._bury)

    def get(self, weights: Sequence[Tensor], transposed: Sequence[bool], names: Sequence[str], spec: Spec) -> Kept:
        """Return the arrays of dense weights, joined along the rows; packed again if one has changed.

        On a GPU the rows are aligned (`format.align_rows`).

        Args:
            weights: each `[out, in]`, or `[in, out]` where `transposed`.
            names: of the layers, for errors.

        Raises:
            VNMError: a weight breaks `spec`.
        """

        def make() -> Packed:
            packed = _pack(weights, transposed, names, spec)
            return align_rows(packed) if packed.values.is_cuda else packed

        return self._get(weights, tuple(transposed), spec, make)

    def aligned(self, weight: VNMTensor) -> Kept:
        """The aligned arrays of a compressed weight on a GPU: its own where they are so already, else copies."""
        return self._get(weight.packed, (weight._transposed,), weight.spec, lambda: align_rows(weight.packed))

    def _get(self, sources: Sequence[Tensor], transposed: tuple[bool, ...], spec: Spec, make) -> Kept:  # type: ignore[no-untyped-def]
        with contents.lock:
            for _ in range(_TRIES):
                watches = tuple(map(contents.watch, sources))
                key = (tuple(watch.place for watch in watches), transposed, spec)
                kept = self._entries.get(key)
                if kept is not None and _same_contents(kept.watches, watches):
                    return Kept(kept.packed, watches)
                with on_real_values():
                    packed = make()
                    if kept is not None and packed.values.is_cuda and _same_form(kept.packed, packed):
                        # Written into the arrays whose addresses CUDA graphs have recorded. Elsewhere another thread
                        # may be reading the old ones.
                        for old, new in zip(kept.packed, packed, strict=True):
                            old.copy_(new)
                        packed = kept.packed
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
    return parts[0] if len(parts) == 1 else Packed(*map(torch.cat, zip(*parts, strict=True)))


def _same_form(one: Packed, other: Packed) -> bool:
    def form(array: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
        return array.shape, array.dtype, array.device

    return all(form(a) == form(b) for a, b in zip(one, other, strict=True))
