"""`vnm.load`: what `vnm.save` wrote, into a model of the same architecture."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from vnm_compile.annotate import set_annotation
from vnm_compile.checkpoint.files import Checkpoint, open_checkpoint
from vnm_compile.checks import why_not_writable, why_unusable
from vnm_compile.errors import BadFile, BadModel, UnsupportedWeight, at_layer
from vnm_compile.layers import Layer, check_module, linear_layers, plain_name, shared_weights
from vnm_compile.memory import return_freed_memory
from vnm_compile.names import some_of
from vnm_compile.printing import tracked
from vnm_compile.tensor import VNMTensor
from vnm_compile.validation import stores_otherwise

Model = TypeVar("Model", bound=nn.Module)

_FLOATS = ("f", "bf")  # how torch's and safetensors' names of floating-point dtypes begin


def load(directory: str | Path, model: Model, *, progress: bool = True) -> Model:
    """Load a saved model's weights into `model`, in place, and return it; compressed weights stay compressed.

    Everything is checked first: every tensor of the model's state dict is in the files and fits, there are no others,
    and compressed weights hold what the format allows. On an error the model is as it was. Weights take dtype and
    device of those that they replace, and of the files (on the CPU) where the model is on the meta device: build it
    there, and no dense copy is ever made.

    Args:
        directory: of the model, or one safetensors file.
        model: a module with the names and shapes of the one that was saved, its weights dense or compressed.
        progress: show a progress bar.

    Raises:
        VNMError: a file is missing or damaged, a compressed weight breaks the format, or files and model do not fit.
    """
    check_module(model)
    with torch.inference_mode(False), torch.no_grad(), open_checkpoint(directory) as found:
        places = {plain_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
        layers = {f"{layer.name}.weight": layer for layer in linear_layers(getattr(model, "_orig_mod", model))}
        _check_buffers(model)
        _check_names(Path(directory), found, places)
        _check_plain(Path(directory), found, places)
        _check_compressed(Path(directory), found, places, layers, shared_weights(model))
        weights = {name: found.weight(name) for name in tracked(list(found.weights), "loading", progress)}
        _fill(model, found, weights, places, layers)
    return_freed_memory()
    return model


def _check_buffers(model: nn.Module) -> None:
    """Buffers that are part of no state dict come from the constructor, which makes none on the meta device."""
    saved = set(model.state_dict())
    missing = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in saved]
    if missing:
        raise BadModel(
            f"{some_of(missing)}: a buffer that no file holds, on the meta device. Make the weights alone there "
            "(accelerate's init_empty_weights does), or set it before."
        )


def _check_names(directory: Path, found: Checkpoint, places: dict[str, Tensor]) -> None:
    stored = {*found.plain, *found.weights}
    loaded = {id(places[name]) for name in stored & set(places)}
    missing = [name for name, tensor in places.items() if name not in stored and id(tensor) not in loaded]
    if missing:
        raise BadFile(f"{directory} does not hold all of the model's weights: {some_of(missing)} missing.")
    unexpected = stored - set(places)
    if unexpected:
        raise BadFile(f"{directory} holds weights that the model has no place for: {some_of(unexpected)}.")


def _check_plain(directory: Path, found: Checkpoint, places: dict[str, Tensor]) -> None:
    for name in found.plain:
        (shape, kind), place = found.tensors[name], places[name]
        if nn.parameter.is_lazy(place):
            lazy = "the model's has no shape yet (a lazy module); run one batch through the model first."
            raise at_layer(name, lazy, UnsupportedWeight)
        if stores_otherwise(type(place)) and not isinstance(place, VNMTensor):
            other = f"the model's is a {type(place).__name__}, which stores its values in a way of its own"
            raise at_layer(name, f"{other}; load before it is quantised or sharded.", UnsupportedWeight)
        if place.is_floating_point() != kind.lower().startswith(_FLOATS):
            raise at_layer(name, f"{directory} holds {kind}, the model's is {place.dtype}.", BadFile)
        if shape != tuple(place.shape):
            raise at_layer(name, f"{directory} holds {list(shape)}, the model's is {list(place.shape)}.", BadFile)


def _check_compressed(
    directory: Path,
    found: Checkpoint,
    places: dict[str, Tensor],
    layers: dict[str, Layer],
    shared: dict[int, list[str]],
) -> None:
    for name, stored in found.weights.items():
        layer, place = layers.get(name), places[name]
        if layer is None:
            here = "it is compressed in the files, and in the model no weight of a linear layer"
            raise at_layer(name, f"{here}; decompress the model before it is saved.", UnsupportedWeight)
        reason = why_unusable(layer, values=False)
        if reason is not None:
            raise at_layer(name, reason, UnsupportedWeight)
        if stored.shape != tuple(place.shape) or stored.transposed != layer.transposed:
            raise at_layer(name, f"{directory} holds {stored}, the model's weight is {list(place.shape)}.", BadFile)
        if id(place) in shared:
            others = ", ".join(other for other in shared[id(place)] if other != name)
            raise at_layer(
                name, f"it is compressed in the files, and shared with {others} in the model.", UnsupportedWeight
            )


def _fill(
    model: nn.Module,
    found: Checkpoint,
    weights: dict[str, VNMTensor],
    places: dict[str, Tensor],
    layers: dict[str, Layer],
) -> None:
    for name in list(weights):
        weight, layer = weights.pop(name), layers[name]
        layer.module.weight = nn.Parameter(_like(weight, places[name]), requires_grad=False)
        set_annotation(layer.module, weight.spec, layer.name)
    for name in found.plain:
        place = places[name]
        if place.is_meta or isinstance(place, VNMTensor) or why_not_writable(place):
            own = _like(found.tensor(name).clone(), place)
            _replace(model, place, nn.Parameter(own, place.requires_grad) if isinstance(place, nn.Parameter) else own)
        else:
            place.copy_(found.tensor(name))


def _like(tensor: Tensor, place: Tensor) -> Tensor:
    """A tensor as the one in whose place it comes; as it is in the file for a meta tensor."""
    return tensor if place.is_meta else tensor.to(device=place.device, dtype=place.dtype)


def _replace(model: nn.Module, old: Tensor, new: Tensor) -> None:
    """Put a tensor wherever the model has another."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is old:
                    held[name] = new  # type: ignore[assignment]
