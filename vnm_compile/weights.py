"""The packed arrays of dense weights: made once, kept as long as the weight lives, remade when it changes."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from vnm_compile.format import Packed, align_rows, detect, matches, pack
from vnm_compile.spec import Spec
from vnm_compile.tensor import VNMTensor

Stamp = tuple[int, ...]


def counts_versions(weight: Tensor) -> bool:
    """Whether `stamp` is the version counter and the address: inference tensors have no counter, ours no address."""
    return not (isinstance(weight, VNMTensor) or weight.is_inference())


def stamp(weight: Tensor) -> Stamp:
    """What changes when a weight is written to or its storage is replaced: version counter and address.

    Writes that bypass the version counter (`weight.data.copy_`, numpy, DLPack) leave no trace here; `refresh` is for
    those.
    """
    if isinstance(weight, VNMTensor):
        return tuple(id(array) for array in weight.packed)
    # Inference tensors have no version counter, and nobody may write to them.
    return (0 if weight.is_inference() else weight._version, weight.data_ptr())


_detected: dict[bool, WeakIdKeyDictionary] = {False: WeakIdKeyDictionary(), True: WeakIdKeyDictionary()}


def detected_spec(weight: Tensor, transposed: bool) -> Spec | None:
    """`format.detect`, remembered for as long as the weight lives and is not written to."""
    remembered = _detected[transposed]
    seen, spec = remembered.get(weight, (None, None))
    if seen != stamp(weight):
        with torch.no_grad(), _disable_current_modes():
            matrix = weight.t() if transposed else weight
            if spec is None or not matches(matrix, spec):
                spec = detect(matrix)
        remembered[weight] = (stamp(weight), spec)
    return spec


_Key = tuple[tuple[int, ...], tuple[bool, ...], Spec]


class _Entry(NamedTuple):
    packed: Packed
    stamps: tuple[Stamp, ...]


class PackStore:
    """Packed arrays by the identity of the weights they were made from; holds no weight alive."""

    def __init__(self) -> None:
        self._entries: dict[_Key, _Entry] = {}

    def get(self, weights: Sequence[Tensor], transposed: Sequence[bool], names: Sequence[str], spec: Spec) -> Packed:
        """Return the canonical arrays of `weights`, joined along the rows; packed again if one has changed.

        On a GPU the rows are aligned (`format.align_rows`).

        Args:
            weights: each `[out, in]`, or `[in, out]` where `transposed`.
            names: of the layers, for errors.

        Raises:
            VNMError: a weight breaks `spec`.
        """
        stored = weights[0].packed if len(weights) == 1 and isinstance(weights[0], VNMTensor) else None
        if stored is not None and not stored.values.is_cuda:
            return stored
        key = (tuple(map(id, weights)), tuple(transposed), spec)
        stamps = tuple(map(stamp, weights))
        entry = self._entries.get(key)
        if entry is not None and entry.stamps == stamps:
            return entry.packed
        # Packing runs on real values also where the caller is tracing with fake ones.
        with torch.no_grad(), _disable_current_modes():
            packed = stored if stored is not None else _pack(weights, transposed, names, spec)
            if packed.values.is_cuda:
                packed = align_rows(packed)
            if entry is not None and _same_form(entry.packed, packed):
                # Written into the arrays that compiled code knows, whose addresses CUDA graphs have recorded.
                for old, new in zip(entry.packed, packed, strict=True):
                    old.copy_(new)
                packed = entry.packed
        if entry is None:
            for weight in weights:
                weakref.finalize(weight, self._entries.pop, key, None)
        self._entries[key] = _Entry(packed, stamps)
        return packed

    def forget(self, weights: Sequence[Tensor]) -> None:
        """Drop what was packed from any of `weights`, so that it is packed again when next needed."""
        gone = set(map(id, weights))
        for weight in weights:
            for remembered in _detected.values():
                remembered.pop(weight, None)
        for key, entry in self._entries.items():
            if gone & set(key[0]):
                self._entries[key] = _Entry(entry.packed, ())


def _pack(weights: Sequence[Tensor], transposed: Sequence[bool], names: Sequence[str], spec: Spec) -> Packed:
    matrices = [w.t() if flip else w for w, flip in zip(weights, transposed, strict=True)]
    parts = [pack(matrix, spec, name) for matrix, name in zip(matrices, names, strict=True)]
    return parts[0] if len(parts) == 1 else Packed(*map(torch.cat, zip(*parts, strict=True)))


def _same_form(one: Packed, other: Packed) -> bool:
    def form(array: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
        return array.shape, array.dtype, array.device

    return all(form(a) == form(b) for a, b in zip(one, other, strict=True))
