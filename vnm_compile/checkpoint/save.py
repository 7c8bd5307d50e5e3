"""`vnm.save`: a model's weights as safetensors files, the compressed ones compressed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vnm_compile._torch import FakeTensor
from vnm_compile.checkpoint.directory import check_writable, new_directory
from vnm_compile.checkpoint.files import INDEX, WEIGHTS
from vnm_compile.checkpoint.flat import StoredWeight, flatten, metadata, split_name
from vnm_compile.errors import BadOption, UnsupportedWeight, at_layer
from vnm_compile.integrations import is_pretrained, tell
from vnm_compile.layers import check_module, plain_name
from vnm_compile.printing import tracked
from vnm_compile.tensor import VNMTensor
from vnm_compile.validation import stores_otherwise

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?B)")
SHARD_BYTES = 5 * 10**9
"""Bytes of a file, where nobody says otherwise."""

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    max_shard_size: int | str = SHARD_BYTES,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write a model to a directory that `vnm.load` reads, and transformers where the model is one of its own.

    Compressed weights (see `vnm.compress_model`) take what they take in memory, to the byte; docs/format.md has the
    names of the tensors. The rest of the state dict is written as it is. Nothing is pickled. The directory is written
    beside its place first and then takes it, so an interrupted run leaves what was there.

    Args:
        model: any module. Of a transformers model everything that its `save_pretrained` writes is written.
        directory: must be new or empty.
        max_shard_size: bytes a file, as a number or such as `"500MB"`; a model that takes more becomes several files
            with an index.
        overwrite: replace the model in a directory that is not empty; its files other than weights are kept.
        progress: show a progress bar.

    Returns:
        The directory.

    Raises:
        VNMError: the directory cannot be written, or a weight has no values here or is stored in a way that no file
            can hold (sharded over processes, quantised by something else).
    """
    check_module(model)
    limit, out = _bytes(max_shard_size), Path(directory)
    check_writable(out, overwrite, "give overwrite=True")
    unwrapped = getattr(model, "_orig_mod", model)
    state = _state(unwrapped)
    with new_directory(out) as new:
        if is_pretrained(unwrapped):
            write_pretrained(unwrapped, new, limit)
        else:
            new.mkdir()
            _write(new, state, limit, progress)
    return out


def write_pretrained(model: Any, folder: Path, limit: int) -> None:
    """Write a transformers model to a folder as its `save_pretrained` does, in files of at most `limit` bytes."""
    tell(model)  # it may not know yet that weights are compressed
    model.save_pretrained(folder, max_shard_size=limit)
    for path in folder.glob("*.safetensors"):
        _order_header(path)


def _bytes(size: int | str) -> int:
    found = _SIZE.fullmatch(size.strip().upper()) if isinstance(size, str) else None
    number = int(float(found[1]) * _UNITS[found[2]]) if found else size
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise BadOption(f'max_shard_size={size!r}: give a number of bytes, or such as "500MB".')
    return number


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, each tensor once; tied ones under their first name."""
    state: dict[str, Tensor] = {}
    seen = set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        name = plain_name(key)
        if not isinstance(tensor, Tensor):
            held = f"the state dict holds a {type(tensor).__name__} there; only tensors are saved."
            raise at_layer(name, held, UnsupportedWeight)
        _check_savable(name, tensor)
        if id(tensor) not in seen:
            state[name] = tensor.detach()
            seen.add(id(tensor))
    return state


def _check_savable(name: str, tensor: Tensor) -> None:
    inner = tensor.values if isinstance(tensor, VNMTensor) else tensor
    if split_name(name) is not None:
        raise at_layer(name, "the name is one of an array of a compressed weight; rename it.", UnsupportedWeight)
    if inner.is_meta or isinstance(inner, FakeTensor):
        raise at_layer(name, "it has no values here (meta device, or offloaded); load it first.", UnsupportedWeight)
    if tensor is inner and (stores_otherwise(type(tensor)) or tensor.layout != torch.strided):
        kind = type(tensor).__name__ if stores_otherwise(type(tensor)) else str(tensor.layout)
        raise at_layer(
            name, f"a {kind} is stored in a way of its own; make it a plain tensor first.", UnsupportedWeight
        )


def _write(folder: Path, state: Mapping[str, Tensor], limit: int, progress: bool) -> None:
    from safetensors.torch import save_file

    tensors, weights = flatten(state)
    shards = list(_shards(tensors, weights, limit))
    names = [WEIGHTS] if len(shards) == 1 else [_shard_name(i + 1, len(shards)) for i in range(len(shards))]
    files = list(zip(names, shards, strict=True))
    for name, shard in tracked(files, "writing", progress):
        listed = {key: weights[key] for key in shard if key in weights}
        header = {"format": "pt", **metadata(listed)}
        save_file(_separate({key: tensors[key] for key in shard}), folder / name, metadata=header)
        _order_header(folder / name)
    if len(shards) > 1:
        total = sum(_size(tensor) for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": {key: name for name, shard in files for key in shard}}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, Tensor], weights: Mapping[str, StoredWeight], limit: int) -> Iterator[list[str]]:
    """Names of the tensors file by file; the arrays of one weight stay together."""
    shard: list[str] = []
    filled = 0
    for unit in _units(tensors, weights):
        size = sum(_size(tensors[name]) for name in unit)
        if shard and filled + size > limit:
            yield shard
            shard, filled = [], 0
        shard += unit
        filled += size
    yield shard


def _units(tensors: Mapping[str, Tensor], weights: Mapping[str, StoredWeight]) -> Iterator[list[str]]:
    unit: list[str] = []
    for name in tensors:
        part_of = split_name(name)
        if unit and not (part_of is not None and part_of[0] in weights):
            yield unit
            unit = []
        unit.append(name)
    if unit:
        yield unit


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, none of which lies in the memory of another: safetensors takes no others."""
    seen = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return tensors


def _order_header(path: Path) -> None:
    """Put the metadata of a safetensors file in order: as written, it is in another one every time."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # as it is unless a name is written with other escapes
            file.seek(8)
            file.write(text.ljust(size))
