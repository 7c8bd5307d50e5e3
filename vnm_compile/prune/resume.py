"""Pruned layers on disk, so that a long run that was interrupted goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vnm_compile.errors import BadCalibration, BadFile, at_layer
from vnm_compile.filenames import file_name
from vnm_compile.format import matches
from vnm_compile.layers import Layer
from vnm_compile.spec import Spec


class PrunedLayers:
    """A directory with one file a pruned layer: its weight and how it was made.

    Every file states the run it belongs to: method and settings, the layers and patterns of the run, fingerprints of
    the calibration data, of the layer's dense weight and of the pruned one. A file of another run, or a damaged one, is
    an error, never reused. The files are safetensors: nothing in them is executed when they are read.

    Raises:
        VNMError: the directory cannot be made.
    """

    def __init__(self, directory: str | Path, settings: Mapping[str, Any], batches: Iterable[Any]) -> None:
        self.directory = Path(directory)
        self.settings = {**settings, "calibration": fingerprint(list(batches))}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadFile(f"checkpoint={str(directory)!r} is no directory that can be written to: {error}.") from error

    def load(self, layer: Layer, spec: Spec) -> tuple[Tensor, float | None] | None:
        """The pruned weight `[out_features, in_features]` of a layer and its output error, or None: not pruned yet.

        Raises:
            VNMError: the layer's file is of another run, or damaged.
        """
        path = self._path(layer)
        if not path.exists():
            return None
        try:
            found, weight = _read(path)
        except Exception as error:
            raise at_layer(layer.name, f"{path} cannot be read ({error}); delete it.", BadFile) from error
        wanted = self._description(layer, spec)
        differing = [key for key in wanted if found.get(key) != wanted[key]]
        if "method" in differing:
            differing = ["method"]  # which has other options
        if differing:
            raise at_layer(
                layer.name,
                f"{path} is of a run with another {', '.join(differing)}; give another checkpoint directory, "
                "or delete this one.",
                BadFile,
            )
        damage = _damage(layer, spec, found, weight)
        if damage:
            raise at_layer(layer.name, f"{path} cannot be read ({damage}); delete it.", BadFile)
        return weight.to(layer.weight.device), found["output_error"]

    def save(self, layer: Layer, spec: Spec, weight: Tensor, output_error: float | None) -> None:
        """Store `weight` as the pruned one of a layer, which still holds its dense one.

        Raises:
            VNMError: the file cannot be written.
        """
        from safetensors.torch import save_file

        weight = weight.detach().cpu().contiguous()
        content = {**self._description(layer, spec), "output_error": output_error, "pruned": fingerprint(weight)}
        path = self._path(layer)
        unfinished = path.with_name(path.name + ".unfinished")
        try:
            unfinished.unlink(missing_ok=True)  # a link that lies there is not followed
            save_file({"weight": weight}, unfinished, metadata={"vnm_compile": json.dumps(content)})
            os.replace(unfinished, path)
        except Exception as error:  # safetensors has an exception of its own for a full disk
            raise at_layer(layer.name, f"its checkpoint {path} cannot be written: {error}.", BadFile) from error

    def _path(self, layer: Layer) -> Path:
        return self.directory / file_name(layer.name, ".safetensors")

    def _description(self, layer: Layer, spec: Spec) -> dict[str, Any]:
        return {**self.settings, "spec": str(spec), "weight": fingerprint(layer.weight)}


def _read(path: Path) -> tuple[dict[str, Any], Tensor]:
    from safetensors import safe_open  # compiling does not need it

    with safe_open(path, framework="pt", device="cpu") as file:
        found = json.loads((file.metadata() or {})["vnm_compile"])
        weight: Tensor = file.get_tensor("weight")
    if not isinstance(found, dict):
        raise ValueError("its description is no JSON object")
    return found, weight


def _damage(layer: Layer, spec: Spec, found: Mapping[str, Any], weight: Tensor) -> str | None:
    """What is wrong with a stored weight."""
    error = found.get("output_error")
    if weight.shape != layer.weight.shape or weight.dtype != layer.weight.dtype:
        return f"it holds a weight {weight.dtype} {list(weight.shape)}"
    if found.get("pruned") != fingerprint(weight) or not matches(weight, spec):
        return "its weight is not the one that was stored"
    if error is not None and not isinstance(error, int | float):
        return f"its output error is {error!r}"
    return None


def fingerprint(data: Any) -> str:
    """A hash of tensors, however nested in lists, tuples and dicts.

    Raises:
        VNMError: there is something else than these, numbers, text and None.
    """
    digest = hashlib.sha256()

    def add(each: Any) -> None:
        if isinstance(each, Tensor):
            digest.update(f"{each.dtype}{tuple(each.shape)}".encode())
            digest.update(each.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(each, Mapping):
            for key in each:
                digest.update(f"{key}=".encode())
                add(each[key])
        elif isinstance(each, list | tuple):
            digest.update(f"{len(each)}:".encode())
            for item in each:
                add(item)
        elif each is None or isinstance(each, bool | int | float | str):
            digest.update(repr(each).encode())
        else:
            raise BadCalibration(
                f"checkpoint=: calibration data with a {type(each).__name__} cannot be told from other data."
            )

    add(data)
    return digest.hexdigest()
