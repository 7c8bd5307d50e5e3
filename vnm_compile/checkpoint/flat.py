"""What a checkpoint holds: plain tensors by name, and a text that says which of them make up a compressed weight.

A compressed weight `layer.weight` becomes an array each of `layer.weight.vnm_values`, `layer.weight.vnm_metadata` and
`layer.weight.vnm_columns` (see docs/format.md; where values are quantised, `vnm_scales` too), and an empty tensor
`layer.weight`. The empty one is for readers that do not know the format: they find a shape that does not fit and stop,
where they would go on with a random weight if they found nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vnm_compile.errors import BadFile, VNMError
from vnm_compile.format import Packed
from vnm_compile.layout import Layout
from vnm_compile.tensor import VNMTensor

VERSION = 1
"""Of the format of checkpoints; a reader refuses others."""

VERSION_KEY, WEIGHTS_KEY = "vnm_format", "vnm_weights"
_MARK = ".vnm_"
_TRANSPOSED = " transposed"
_LONGEST_TEXT = 200


@dataclass(frozen=True)
class StoredWeight:
    """How one weight of a checkpoint is stored; `transposed` where its tensor is `[in_features, out_features]`."""

    layout: Layout
    transposed: bool = False

    @classmethod
    def of(cls, weight: VNMTensor) -> StoredWeight:
        """How `weight` is stored."""
        return cls(weight.layout_of_arrays, weight._transposed)

    @classmethod
    def parse(cls, name: str, text: object) -> StoredWeight:
        """What the text of a weight in a file's header says.

        Raises:
            VNMError: it says nothing that can be.
        """
        if not isinstance(text, str) or len(text) > _LONGEST_TEXT:
            raise BadFile(f"{name} is said to be stored as {text!r:.100}; expected such as '64:2:8 4096x11008'.")
        try:
            return cls(Layout.parse(text.removesuffix(_TRANSPOSED)), text.endswith(_TRANSPOSED))
        except (VNMError, ValueError) as error:
            raise BadFile(f"{name}: {error}") from error

    def __str__(self) -> str:
        return self.layout.text + (_TRANSPOSED if self.transposed else "")

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight, as its module holds it."""
        out_features, in_features = self.layout.out_features, self.layout.in_features
        return (in_features, out_features) if self.transposed else (out_features, in_features)

    def weight(self, arrays: Iterable[Tensor]) -> VNMTensor:
        """The weight that these arrays make up, in the order of the layout's names.

        Raises:
            VNMError: they hold what the format does not allow.
        """
        return VNMTensor._owning(Packed(*arrays), self.layout, self.transposed)

    def arrays(self, weight: str, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor that makes up the weight of this name, the empty one included."""
        kinds = zip(self.layout.names, self.layout.shapes, self.layout.dtypes(dtype), strict=True)
        empty = {weight: ((0,), dtype)}
        return empty | {array_name(weight, name): (shape, kind) for name, shape, kind in kinds}


def array_name(weight: str, array: str) -> str:
    """The name of one array of a weight."""
    return f"{weight}{_MARK}{array}"


def split_name(name: str) -> tuple[str, str] | None:
    """The weight and the array that a tensor's name means; None for a plain tensor."""
    weight, mark, array = name.rpartition(_MARK)
    return (weight, array) if mark else None


def flatten(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, StoredWeight]]:
    """Replace the compressed weights of a state dict by their arrays, over the same memory.

    Returns:
        The plain tensors, those of one weight one after the other; and how each compressed weight is stored.
    """
    tensors: dict[str, Tensor] = {}
    weights: dict[str, StoredWeight] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, VNMTensor):
            tensors[name] = tensor
            continue
        weights[name] = StoredWeight.of(tensor)
        tensors[name] = torch.empty(0, dtype=tensor.dtype, device="cpu")
        names = (array_name(name, array) for array in tensor.layout_of_arrays.names)
        tensors |= zip(names, (array.detach() for array in tensor.packed), strict=True)
    return tensors, weights


def metadata(weights: Mapping[str, StoredWeight]) -> dict[str, str]:
    """What the header of a file with these weights says, beside its tensors."""
    if not weights:
        return {}
    listed = {name: str(weights[name]) for name in sorted(weights)}
    return {VERSION_KEY: str(VERSION), WEIGHTS_KEY: json.dumps(listed, separators=(",", ":"))}


def read_metadata(found: Mapping[str, str]) -> dict[str, StoredWeight]:
    """The compressed weights that a header lists; none where it is that of an ordinary file.

    Raises:
        VNMError: the format's version is unknown, or the list cannot be read.
    """
    version, text = found.get(VERSION_KEY), found.get(WEIGHTS_KEY)
    if version is None and text is None:
        return {}
    if version != str(VERSION):
        raise BadFile(
            f"the format of its compressed weights is version {version!r:.20}; this vnm_compile reads {VERSION}. "
            "Update vnm_compile, or save the model again."
        )
    try:
        listed = json.loads(text or "")
    except (ValueError, RecursionError) as error:
        raise BadFile(f"the list of its compressed weights cannot be read: {error}.") from error
    if not isinstance(listed, dict):
        raise BadFile("the list of its compressed weights is no JSON object.")
    return {name: StoredWeight.parse(name, layout) for name, layout in listed.items()}


def check_arrays(weights: Mapping[str, StoredWeight], tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    """Hold names, shapes and dtypes of a checkpoint's tensors to the weights that its headers list.

    Args:
        weights: how the compressed weights are stored.
        tensors: shape of every tensor, and its dtype as torch writes it (`"float32"`).

    Raises:
        VNMError: an array is missing, there are others, or one has another shape or dtype.
    """
    for name, stored in weights.items():
        typed = array_name(name, stored.layout.typed)
        if typed not in tensors:
            raise BadFile(f"{name} is listed as a compressed weight, and its {typed} is missing.")
        dtype = getattr(torch, tensors[typed][1], None)
        if not isinstance(dtype, torch.dtype):
            raise BadFile(f"{typed} is stored as {tensors[typed][1]}, which no weight is.")
        for array, (shape, kind) in stored.arrays(name, dtype).items():
            _check_array(array, shape, kind, tensors.get(array), stored)
    _check_no_others(weights, tensors)


def _check_array(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    found: tuple[tuple[int, ...], str] | None,
    stored: StoredWeight,
) -> None:
    if found is None:
        raise BadFile(f"{name} is missing, a part of a compressed weight.")
    expected = str(dtype).removeprefix("torch.")
    if found != (shape, expected):
        raise BadFile(
            f"{name} is {found[1]} {list(found[0])}, expected {expected} {list(shape)} for a weight stored as {stored}."
        )


def _check_no_others(weights: Mapping[str, StoredWeight], tensors: Iterable[str]) -> None:
    for name in tensors:
        split = split_name(name)
        if split is None:
            continue
        weight, array = split
        if weight not in weights:
            raise BadFile(f"{name} is an array of a compressed weight {weight} that no header lists.")
        if array not in weights[weight].layout.names:
            raise BadFile(f"{name} is no array of a weight stored as {weights[weight]}.")
