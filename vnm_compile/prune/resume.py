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

from vnm_compile.annotate import Layer
from vnm_compile.errors import VNMError, at_layer
from vnm_compile.filenames import file_name
from vnm_compile.spec import Spec


class PrunedLayers:
    """A directory with one file a pruned layer: `NAME.safetensors`, its weight and how it was made.

    Every file states the run it belongs to: method and settings, the layers and patterns of the run, fingerprints of
    the calibration data and of the layer's dense weight. A file of another run is an error, never reused.
    """

    def __init__(self, directory: str | Path, settings: Mapping[str, Any], batches: Iterable[Any]) -> None:
        self.directory = Path(directory)
        self.settings = {**settings, "calibration": fingerprint(list(batches))}
        self.directory.mkdir(parents=True, exist_ok=True)

    def load(self, layer: Layer, spec: Spec) -> tuple[Tensor, float | None] | None:
        """The pruned weight `[out_features, in_features]` of a layer and its output error, or None: not pruned yet.

        Raises:
            VNMError: the layer's file is of another run, or damaged.
        """
        from safetensors import safe_open  # compiling does not need it

        path = self._path(layer)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                found = json.loads((file.metadata() or {})["vnm_compile"])
                weight = file.get_tensor("weight")
        except Exception as error:
            raise at_layer(layer.name, f"{path} cannot be read ({error}); delete it.") from error
        wanted = self._description(layer, spec)
        differing = [key for key in wanted if found.get(key) != wanted[key]]
        if differing:
            raise at_layer(
                layer.name,
                f"{path} is of a run with another {', '.join(differing)}; give another checkpoint directory, "
                "or delete this one.",
            )
        return weight, found["output_error"]

    def save(self, layer: Layer, spec: Spec, dense: Tensor, output_error: float | None) -> None:
        """Store the layer's present weight as the pruned one of `dense`."""
        from safetensors.torch import save_file

        content = {**self._description(layer, spec, dense), "output_error": output_error}
        path = self._path(layer)
        unfinished = path.with_name(path.name + ".unfinished")
        unfinished.unlink(missing_ok=True)  # a link that lies there is not followed
        weight = layer.weight.detach().cpu().contiguous()
        save_file({"weight": weight}, unfinished, metadata={"vnm_compile": json.dumps(content)})
        os.replace(unfinished, path)

    def _path(self, layer: Layer) -> Path:
        return self.directory / file_name(layer.name, ".safetensors")

    def _description(self, layer: Layer, spec: Spec, dense: Tensor | None = None) -> dict[str, Any]:
        weight = layer.weight if dense is None else dense
        return {**self.settings, "spec": str(spec), "weight": fingerprint(weight)}


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
            raise VNMError(
                f"checkpoint=: calibration data with a {type(each).__name__} cannot be told from other data."
            )

    add(data)
    return digest.hexdigest()
