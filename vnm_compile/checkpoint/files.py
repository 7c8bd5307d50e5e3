"""The weight files of a checkpoint: found, held to each other and to the format, then read by name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from vnm_compile.checkpoint.flat import StoredWeight, array_name, check_arrays, read_metadata
from vnm_compile.errors import BadFile, VNMError
from vnm_compile.tensor import VNMTensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I8": "int8",
    "U8": "uint8",
    "U16": "uint16",
}


class Checkpoint:
    """Weight files that are open and fit together; made by `open_checkpoint`.

    Attributes:
        weights: the compressed weights, by name, and how each is stored.
        tensors: shape and dtype (`"float32"`) of every tensor in the files.
        files: the files.
    """

    weights: dict[str, StoredWeight]
    tensors: dict[str, tuple[tuple[int, ...], str]]

    def __init__(self, handles: Mapping[Path, Any], weight_map: Mapping[str, str] | None) -> None:
        self.weights, self.tensors, self.files = {}, {}, list(handles)
        self._holder: dict[str, Any] = {}
        self._path: dict[str, Path] = {}
        for path, handle in handles.items():
            if weight_map is not None:
                _check_indexed(path, set(handle.keys()), weight_map)
            with _about(path):
                self._take(path, handle)

    def _take(self, path: Path, handle: Any) -> None:
        for name, stored in read_metadata(handle.metadata() or {}).items():
            if self.weights.setdefault(name, stored) != stored:
                raise BadFile(f"{name} is listed as {stored}, and in another file as {self.weights[name]}.")
        names: list[str] = handle.keys()
        for name in names:
            if name in self._holder:
                raise BadFile(f"it holds {name}, and so does {self._path[name].name}.")
            found = handle.get_slice(name)
            kind = str(found.get_dtype())
            self.tensors[name] = tuple(found.get_shape()), _DTYPES.get(kind, kind)
            self._holder[name], self._path[name] = handle, path

    @cached_property
    def plain(self) -> list[str]:
        """Names of the tensors that are no part of a compressed weight."""
        parts = {array_name(name, array) for name, stored in self.weights.items() for array in stored.layout.names}
        return [name for name in self.tensors if name not in parts and name not in self.weights]

    def tensor(self, name: str) -> Tensor:
        """A tensor as it is stored; its memory may be that of the file."""
        return self._holder[name].get_tensor(name)

    def weight(self, name: str) -> VNMTensor:
        """A compressed weight in memory of its own, its contents checked.

        Raises:
            VNMError: its arrays hold what the format does not allow.
        """
        stored = self.weights[name]
        # Copied first: what is checked must not change with the file.
        arrays = [self.tensor(array_name(name, array)).clone() for array in stored.layout.names]
        try:
            return stored.weight(arrays)
        except VNMError as error:
            where = self._path[array_name(name, stored.layout.names[0])]
            raise BadFile(f"{where}: {name} is {error}") from error


@contextmanager
def open_checkpoint(where: str | Path | Iterable[str | Path]) -> Iterator[Checkpoint]:
    """Open the weight files of a directory, one file, or files, and hold them to the format; see docs/format.md.

    Nothing is read but their headers. All tensors are there by name, each once.

    Raises:
        VNMError: files are missing, damaged, or do not fit together.
    """
    weight_map = None
    if isinstance(where, str | Path):
        paths, weight_map = _weight_files(Path(where))
    else:
        paths = [Path(each) for each in where]
    with ExitStack() as opened:
        found = Checkpoint({path: opened.enter_context(_opened(path)) for path in paths}, weight_map)
        with _about(paths[0] if len(paths) == 1 else paths[0].parent):
            check_arrays(found.weights, found.tensors)
        yield found


def _weight_files(where: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files that hold the weights of a directory, or the one file that was given; and their index."""
    if where.is_file():
        return [where], None
    if not where.is_dir():
        raise BadFile(f"{where} is no file or directory.")
    if (where / WEIGHTS).is_file():
        return [where / WEIGHTS], None
    if not (where / INDEX).is_file():
        raise BadFile(f"{where} holds neither {WEIGHTS} nor {INDEX}; give the directory of a saved model.")
    weight_map = indexed(where / INDEX)
    return [where / name for name in sorted(set(weight_map.values()))], weight_map


def _check_indexed(path: Path, names: set[str], weight_map: Mapping[str, str]) -> None:
    disagreed = names ^ {name for name, file in weight_map.items() if file == path.name}
    if disagreed:
        raise BadFile(f"{path} and {INDEX} do not agree on whether it holds {min(disagreed)}.")


def indexed(index: Path) -> dict[str, str]:
    """The file of each tensor, as the index of a sharded checkpoint names them: files beside it, which exist.

    Raises:
        VNMError: it is no index, leads out of the directory, or names a file that is missing.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadFile(f"{index} has no weight_map; expected the file of each weight.")
    for name in sorted({str(each) for each in weight_map.values()}):
        if name in ("", ".", "..") or set(name) & set("/\\\0"):
            raise BadFile(f"{index} names the file {name!r}; weights are only read from the model's directory.")
        if not (index.parent / name).is_file():
            raise BadFile(f"{index} names the file {name}, which is missing.")
    return {str(name): str(file) for name, file in weight_map.items()}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        VNMError: it cannot be read, is no UTF-8 or no JSON, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadFile(f"{path} cannot be read as JSON: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise BadFile(f"{path} holds a {type(found).__name__}; expected a JSON object.")
    return found


def first_line(error: Any) -> str:
    """What an error says first, with its class where it is none of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = f"{type(error).__name__}: " if isinstance(error, Exception) and not isinstance(error, VNMError) else ""
    return kind + (lines[0] if lines else "no further reason is given")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise BadFile(f"{path} cannot be read as safetensors: {first_line(error)}") from error
    with opened as handle:
        yield handle


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Say in errors which file they are about."""
    try:
        yield
    except BadFile as error:
        raise BadFile(f"{path}: {error}") from error
