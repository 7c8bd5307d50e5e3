"""Calibration data as users have it: what is one batch, what is none, and a clear word about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vnm_compile.errors import BadCalibration

_FORMS = "a tensor, a tuple or a dict of tensors each"


def as_batches(data: Iterable[Any] | None, what: str = "calibration") -> list[Any]:
    """Return the batches of `data`, all of them looked at.

    A tensor, or a mapping (a dict, a tokenizer's BatchEncoding), is one batch. Everything else is iterated: a list, a
    generator (which is used up), a DataLoader.

    Args:
        data: None is no batch.
        what: the argument it was given as, for messages.

    Raises:
        VNMError: it is text or an array of another library, cannot be iterated, or holds a batch that is no model
            input: text, arrays of another library, plain numbers.
    """
    if data is None:
        return []
    if isinstance(data, Tensor | Mapping):
        found: list[Any] = [data]
    elif isinstance(data, str | bytes) or _is_array(data) or not _iterable(data):
        raise BadCalibration(
            f"{what}= is a {type(data).__name__}; give batches of model inputs, {_FORMS}.{_way_out(data)}"
        )
    else:
        found = list(data)
    return [_checked(batch, i, what) for i, batch in enumerate(found)]


def described(batch: Any) -> str:
    """A batch in a few words: `{input_ids: int64 [2, 8]}`."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {list(batch.shape)}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key}: {described(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, tuple | list):
        return "(" + ", ".join(map(described, batch[:8])) + (", ...)" if len(batch) > 8 else ")")
    return type(batch).__name__


def _checked(batch: Any, number: int, what: str) -> Any:
    """The batch, its inference tensors copied: these can take no part in a gradient."""
    label = f"{what} batch {number}, of {what}=,"
    if not isinstance(batch, Tensor | Mapping | tuple | list):
        raise BadCalibration(f"{label} is a {type(batch).__name__}; give {_FORMS}.{_way_out(batch)}")
    if isinstance(batch, Mapping) and not all(isinstance(key, str) for key in batch):
        raise BadCalibration(f"{label} is a dict whose keys are not all names of arguments: {list(batch)[:4]}.")
    values = list(_leaves(batch))
    foreign = next((value for value in values if _is_array(value)), None)
    if foreign is not None:
        raise BadCalibration(f"{label} holds a {type(foreign).__name__}; give {_FORMS}.{_way_out(foreign)}")
    if not any(isinstance(value, Tensor) for value in values):
        raise BadCalibration(f"{label} holds no tensor, but {described(batch)}; give {_FORMS}.{_way_out(*values[:1])}")
    return _map(batch, _ordinary)


def _leaves(batch: Any) -> Iterable[Any]:
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, tuple | list):
        for each in batch:
            yield from _leaves(each)
    else:
        yield batch


def _map(batch: Any, change: Any) -> Any:
    """The same batch with some tensors changed; containers of their own kind only where something changes."""
    if isinstance(batch, Tensor):
        return change(batch)
    if not any(isinstance(value, Tensor) and value.is_inference() for value in _leaves(batch)):
        return batch
    if isinstance(batch, Mapping):
        return {key: _map(value, change) for key, value in batch.items()}
    return type(batch)(_map(value, change) for value in batch) if type(batch) in (tuple, list) else batch


def _ordinary(value: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return value.clone() if value.is_inference() else value


def _iterable(data: Any) -> bool:
    try:
        iter(data)
    except TypeError:
        return False
    return True


def _is_array(value: Any) -> bool:
    return not isinstance(value, Tensor) and hasattr(value, "__array_interface__")


def _way_out(*values: Any) -> str:
    for value in values:
        if isinstance(value, str | bytes):
            return ' Text has to be tokenized first: tokenizer(texts, return_tensors="pt", padding=True).'
        if _is_array(value):
            return " torch.from_numpy makes a tensor of an array."
        if isinstance(value, bool | int | float):
            return " torch.tensor makes a tensor of numbers."
    return ""


def check_ids(ids: Any, size: int, name: str) -> None:
    """Refuse indices outside an embedding of `size` rows: on GPUs they would end the process's use of the device.

    Raises:
        VNMError: names the embedding and the index.
    """
    if not isinstance(ids, Tensor) or ids.is_meta or not ids.numel() or ids.dtype not in (torch.int64, torch.int32):
        return
    low, high = map(int, torch.aminmax(ids))
    if low < 0 or high >= size:
        raise BadCalibration(
            f"{name}: index {low if low < 0 else high} of the calibration data is outside of this embedding of {size} "
            "rows; use the model's own tokenizer, and sequences no longer than it takes."
        )
