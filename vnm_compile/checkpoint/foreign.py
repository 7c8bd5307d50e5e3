"""Sparse weights as others stored them, made dense again: what is then compressed as any pruned model is.

- `sparse-24-bitmask` and `sparse-bitmask` of compressed-tensors (until 0.14; later ones cannot read them): per layer
  `shape`, `compressed` (the kept values, row by row) and `bitmask` (a bit a weight, the first one lowest).
- `semi-structured`: `torch.sparse.SparseSemiStructuredTensor` in a file of torch.save, in CUTLASS's form. cuSPARSELt's
  is known to that library only.

Spatha keeps no files: its scripts pack dense weights with zeros when they start, and those are read as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vnm_compile.checkpoint.files import INDEX, WEIGHTS, first_line, indexed, open_checkpoint
from vnm_compile.errors import BadFile, BadOption, UnsupportedWeight, at_layer
from vnm_compile.names import printable
from vnm_compile.validation import VALUE_DTYPES

State = dict[str, Tensor]

_BITMASK = ("shape", "compressed", "bitmask")
_BITMASK_FORMATS = ("sparse-24-bitmask", "sparse-bitmask")
_PICKLED = "pytorch_model.bin"


def dense_state(directory: Path, kind: str) -> State:
    """The weights of a model directory as dense tensors, by their names in it.

    Args:
        directory: of the model.
        kind: a key of `READERS`.

    Raises:
        VNMError: an unknown kind, or files that are not of it, or are damaged.
    """
    if kind not in READERS:
        raise BadOption(f"there is no reader of {kind!r}; there are {', '.join(READERS)}.")
    return READERS[kind](directory)


def kind_of(directory: Path, config: Mapping[str, Any]) -> str:
    """Which of `READERS` a directory is for, by its config and the names of its files.

    Raises:
        VNMError: its weights are quantised by something.
    """
    quantized = config.get("quantization_config") or config.get("compression_config") or {}
    sparsity = quantized.get("sparsity_config") if isinstance(quantized, dict) else None
    stored = sparsity.get("format") if isinstance(sparsity, dict) else None
    if stored in _BITMASK_FORMATS:
        return "sparse-24-bitmask"
    method = quantized.get("quant_method") if isinstance(quantized, dict) else None
    if method not in (None, "vnm"):
        raise BadFile(
            f"{directory}: its weights are quantised (quant_method {printable(str(method))[:40]}); V:N:M weights are "
            "made of float ones."
        )
    has_safetensors = (directory / WEIGHTS).is_file() or (directory / INDEX).is_file()
    return "dense" if has_safetensors or not (directory / _PICKLED).is_file() else "semi-structured"


def _read_bitmask(directory: Path) -> State:
    with open_checkpoint(directory) as found:
        layers = sorted(name.removesuffix(".bitmask") for name in found.tensors if name.endswith(".bitmask"))
        parts = {f"{layer}.{part}" for layer in layers for part in (*_BITMASK, "row_offsets")}
        state = {name: found.tensor(name) for name in found.tensors if name not in parts}
        if not layers:
            raise BadFile(f"{directory} holds no weight with a bitmask.")
        for layer in layers:
            arrays = {}
            for part in _BITMASK:
                if f"{layer}.{part}" not in found.tensors:
                    raise at_layer(layer, f"{directory} holds its bitmask and not its {part}.", BadFile)
                arrays[part] = found.tensor(f"{layer}.{part}")
            name = layer if layer.endswith(".weight") else f"{layer}.weight"
            if name in state:
                raise at_layer(layer, f"{directory} holds it twice, with a bitmask and dense.", BadFile)
            state[name] = from_bitmask(layer, **arrays)
    return state


def from_bitmask(layer: str, shape: Tensor, compressed: Tensor, bitmask: Tensor) -> Tensor:
    """The dense weight of compressed-tensors' arrays.

    Args:
        layer: named in errors.
        shape: `[2]` or `[2, 1]`, rows and columns.
        compressed: the values whose bits are set, row by row, in any shape.
        bitmask: `[rows, ceil(columns / 8)]` uint8, a row's first weight in the lowest bit.

    Raises:
        VNMError: the arrays do not fit together, or hold quantised values.
    """
    sizes = shape.flatten().tolist()
    if len(sizes) != 2 or not all(isinstance(size, int) and 0 <= size < 2**31 for size in sizes):
        raise at_layer(layer, f"its shape is {str(sizes)[:80]}; a weight has two dimensions.", BadFile)
    if compressed.dtype not in VALUE_DTYPES:
        raise at_layer(layer, f"its values are {compressed.dtype}, quantised; float ones are read.", UnsupportedWeight)
    rows, columns = sizes
    if bitmask.dtype != torch.uint8 or tuple(bitmask.shape) != (rows, -(-columns // 8)):
        raise at_layer(layer, f"its bitmask is {bitmask.dtype} {list(bitmask.shape)}, for a weight {sizes}.", BadFile)
    bits = torch.arange(8, dtype=torch.uint8)
    kept = (bitmask.unsqueeze(-1) >> bits & 1).flatten(1)[:, :columns].bool()
    if int(kept.sum()) != compressed.numel():
        raise at_layer(layer, f"its bitmask keeps {int(kept.sum())} values; it has {compressed.numel()}.", BadFile)
    dense = torch.zeros(rows, columns, dtype=compressed.dtype)
    dense[kept] = compressed.flatten()
    return dense


def _read_semi_structured(directory: Path) -> State:
    state: State = {}
    for path in _pickled_files(directory):
        for name, tensor in _unpickled(path).items():
            if not isinstance(tensor, Tensor):
                raise BadFile(f"{path}: {printable(str(name))} is a {type(tensor).__name__}, not a tensor.")
            state[str(name)] = _dense_of(str(name), tensor)
    return state


def _pickled_files(directory: Path) -> list[Path]:
    index = directory / f"{_PICKLED}.index.json"
    if index.is_file():
        return [directory / name for name in sorted(set(indexed(index).values()))]
    if not (directory / _PICKLED).is_file():
        raise BadFile(f"{directory} holds no {_PICKLED}, where semi-structured weights are.")
    return [directory / _PICKLED]


def _unpickled(path: Path) -> Mapping[str, Any]:
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

    # Tensors and nothing else; the classes' state is checked where they are made dense.
    kinds: list[Any] = [SparseSemiStructuredTensorCUTLASS, SparseSemiStructuredTensorCUSPARSELT]
    try:
        with torch.serialization.safe_globals(kinds):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # anything may come of a damaged file
        raise BadFile(f"{path} cannot be read, or holds more than tensors: {first_line(error)}") from error
    if not isinstance(found, Mapping):
        raise BadFile(f"{path} holds a {type(found).__name__}; expected a state dict.")
    return found


def _dense_of(name: str, tensor: Tensor) -> Tensor:
    from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUTLASS

    if not isinstance(tensor, SparseSemiStructuredTensor):
        return tensor.detach()
    if not isinstance(tensor, SparseSemiStructuredTensorCUTLASS):
        raise at_layer(
            name,
            "it is stored by cuSPARSELt, whose order only that library knows; on the GPU that wrote it, replace it by "
            "weight.to_dense() and save again.",
            UnsupportedWeight,
        )
    try:
        dense = tensor.to_dense()
    except Exception as error:  # arrays that do not fit together
        raise at_layer(name, f"its arrays are damaged: {first_line(error)}", BadFile) from error
    if tuple(dense.shape) != tuple(tensor.shape):
        raise at_layer(name, f"its arrays hold {list(dense.shape)}, it is said to be {list(tensor.shape)}.", BadFile)
    return dense


def _read_dense(directory: Path) -> State:
    with open_checkpoint(directory) as found:
        if found.weights:
            raise BadFile(f"{directory} is compressed already.")
        return {name: found.tensor(name) for name in found.plain}


READERS: dict[str, Callable[[Path], State]] = {
    "dense": _read_dense,
    "sparse-24-bitmask": _read_bitmask,
    "semi-structured": _read_semi_structured,
}
"""The forms that are read, by the name that the command line knows them by."""
