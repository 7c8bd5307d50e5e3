"""Arrays that come from outside (a checkpoint, another process, a caller), checked before a kernel sees them.

A kernel takes offsets and indices from `columns` and `metadata` and trusts the sizes it is given: arrays that do not
hold what the format promises make it read memory that is not the weight's, or the activation's.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from vnm_compile._torch import FakeTensor
from vnm_compile.errors import BadFile, DamagedWeight, VNMError
from vnm_compile.format import Packed
from vnm_compile.layout import Layout
from vnm_compile.quantization import Quantization, stored_levels
from vnm_compile.spec import Spec

VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes that weights are pruned and compressed in; kernels exist for the first three."""

_PLAIN = (Tensor, nn.Parameter, FakeTensor)
_REMEDY = "The file or the arrays are damaged or not made by vnm_compile; compress the weight again."


def stores_otherwise(kind: type) -> bool:
    """Whether a class of tensors keeps its values in a way of its own, as quantised and sharded ones do."""
    ordinary = (Tensor.__torch_dispatch__, nn.Parameter.__torch_dispatch__)
    return getattr(kind, "__torch_dispatch__", ordinary[0]) not in ordinary


def own_arrays(packed: Packed, layout: Layout) -> Packed:
    """Check arrays from outside and return them as tensors that nobody else can resize, over the same memory.

    Args:
        packed: what are to be the canonical arrays (see `vnm_compile.format`).
        layout: of the weight.

    Returns:
        The arrays, contiguous; copies where they were not. Contents are looked at where there are any (fake and meta
        arrays have none).

    Raises:
        VNMError: types, dtypes, devices, shapes or contents are not those of the format.
    """
    for name, array in zip(layout.names, packed, strict=True):
        if type(array) not in _PLAIN or array.layout != torch.strided or array.is_quantized:
            raise _refused(f"its {name} are a {type(array).__name__}, not a plain tensor")
    _check_form(packed, layout)
    owned = packed.remade(map(_owned, layout.names, packed))
    if _storages_come_later():
        raise BadFile("a compressed weight cannot be read from torch's format before 1.6; save it with torch.save.")
    if not any(array.is_meta or isinstance(array, FakeTensor) for array in owned):
        with torch.no_grad():
            _check_contents(owned, layout)
    return owned


def _check_form(packed: Packed, layout: Layout) -> None:
    values = packed.values
    weight_dtype = layout.weight_dtype([array.dtype for array in packed])
    if weight_dtype not in VALUE_DTYPES:
        raise _refused(f"its {layout.typed} are {weight_dtype}; float32, bfloat16, float16 and float64 are handled")
    for name, array, dtype in zip(layout.names, packed, layout.dtypes(weight_dtype), strict=True):
        if array.dtype != dtype:
            raise _refused(f"its {name} are {array.dtype}, expected {dtype}")
        if array.device != values.device:
            raise _refused(f"its {name} are on {array.device}, its values on {values.device}")
    for name, array, shape in zip(layout.names, packed, layout.shapes, strict=True):
        if tuple(array.shape) != shape:
            raise _refused(
                f"its {name} have shape {list(array.shape)}, expected {list(shape)} for a weight "
                f"[{layout.out_features}, {layout.in_features}] stored as {layout.stored_as}"
            )


def _owned(name: str, array: Tensor) -> Tensor:
    """A tensor object of our own over the memory of `array`."""
    array = array.detach().resolve_neg().contiguous()
    if isinstance(array, FakeTensor) or array.is_meta:
        return array
    storage = array.untyped_storage()
    if (array.storage_offset() + array.numel()) * array.element_size() > storage.nbytes():
        raise _refused(f"its {name} reach beyond their storage")
    return array


def _storages_come_later() -> bool:
    """Whether this runs inside torch.load of an old file, which fills storages after the objects are made from them."""
    code = getattr(getattr(torch.serialization, "_legacy_load", None), "__code__", None)
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _check_contents(packed: Packed, layout: Layout) -> None:
    metadata, columns, spec = packed.metadata, packed.columns, layout.spec
    values = packed.values if layout.quantization is None else _levels(packed.values, layout.quantization, layout.kept)
    if not columns.numel():
        return
    offsets = columns.int()
    if int(offsets.max()) >= spec.m:
        raise _refused(f"a column offset is {int(offsets.max())}, beyond the {spec.m} columns of a group")
    if not bool((offsets[..., 1:] > offsets[..., :-1]).all()):
        raise _refused("the column offsets of a block are not increasing")
    if spec.n == 2 and not _increasing(metadata, layout.groups):
        raise _refused("the two indices of a group in its metadata are not increasing")
    if bool((values[layout.out_features :] != 0).any()):
        raise _refused(f"rows past the {layout.out_features} of the weight hold values")
    if layout.tail and not _tail_is_empty(values, packed, spec, layout.tail):
        raise _refused(f"columns past the {layout.in_features} of the weight hold values")


def _increasing(metadata: Tensor, groups: int) -> bool:
    """Whether the two indices of every group increase, where n is 2: a byte holds two groups."""
    low = (metadata & 3) < (metadata >> 2 & 3)
    high = (metadata >> 4 & 3) < (metadata >> 6)
    # With an odd number of groups the upper half of a row's last byte is padding.
    return bool(low.all() and high[:, : groups // 2].all())


def _levels(values: Tensor, quantization: Quantization, kept: int) -> Tensor:
    """Stored integers as levels, checked."""
    levels = stored_levels(values, quantization, kept)
    if quantization.bits == 8 and bool((levels < quantization.lowest).any()):
        raise _refused("a value is -128; levels of int8 are -127 to 127")
    if quantization.bits == 4 and kept % 2 and bool((values[:, -1] > 15).any()):
        raise _refused("the second half of a row's last byte holds a value")
    return levels


def _tail_is_empty(values: Tensor, packed: Packed, spec: Spec, real: int) -> bool:
    """Whether no value of the tail group stands in a column that the weight does not have."""
    width = values.shape[1]
    tail = values[:, width - spec.n :]
    position = torch.arange(width - spec.n, width, device=tail.device)
    shifts = (position % 4 * 2).to(torch.uint8)
    indices = packed.metadata[:, position // 4] >> shifts & 3
    offsets = packed.columns[:, -1].int().repeat_interleave(spec.v, 0).gather(1, indices.long())
    return not bool(((tail != 0) & (offsets >= real)).any())


def _refused(what: str) -> VNMError:
    return DamagedWeight(f"not a compressed weight: {what}. {_REMEDY}")
