"""Store the weights of a model compressed, and back: what makes its memory really smaller."""

from __future__ import annotations

from collections.abc import Iterable
from glob import escape

import torch
from torch import nn

from vnm_compile.annotate import (
    ANY_SIZE,
    Annotation,
    Selector,
    annotation_of,
    select_layers,
    set_annotation,
)
from vnm_compile.checks import check_usable
from vnm_compile.errors import NothingSelected
from vnm_compile.format import check_pattern
from vnm_compile.integrations import tell
from vnm_compile.layers import Layer, linear_layers, shared_weights
from vnm_compile.memory import return_freed_memory
from vnm_compile.spec import Spec
from vnm_compile.tensor import VNMTensor, compress
from vnm_compile.weights import detected_spec


def compress_model(
    model: nn.Module,
    spec: Spec | str | None = None,
    include: Iterable[Selector] | Selector | None = None,
    exclude: Iterable[Selector] | Selector | None = None,
) -> list[str]:
    """Replace the V:N:M weights of `model` by compressed ones, in place, one layer at a time.

    Args:
        spec: the pattern of all selected layers; when None, annotated layers take theirs, and the pattern is looked
            for in the rest, where layers without one stay dense.
        include, exclude: as for `annotate`.

    Returns:
        The names of the layers that are compressed now. Their weights are `VNMTensor` parameters that do not require
        grad. Either all of them are replaced, or, on an error, none.

    Raises:
        VNMError: a layer breaks its pattern, its weight is none that can be compressed (see `vnm_compile.checks`) or is
            shared with another module, or nothing in the model follows a pattern.
    """
    chosen = [
        (layer, found)
        for layer, found in patterns(model, spec, include, exclude)
        if not isinstance(layer.stored, VNMTensor)
    ]
    if not chosen and not compressed_layers(model):
        raise NothingSelected(
            "no linear layer of the model follows a V:N:M pattern; vnm.sparsify(model, ...) makes one."
        )
    for layer, layer_spec in chosen:
        check_pattern(layer.weight, layer_spec, layer.name)
    for layer, layer_spec in chosen:
        # One at a time: the dense weight is freed before the next one is packed.
        with torch.inference_mode(False), torch.no_grad():
            weight = compress(layer.weight, layer_spec, layer.name)
            packed = weight.t() if layer.transposed else weight
            layer.module.weight = nn.Parameter(packed, requires_grad=False)
        set_annotation(layer.module, layer_spec, layer.name)
    return_freed_memory()
    tell(model)
    return [layer.name for layer, _ in chosen]


def compressed_layers(model: nn.Module) -> list[Layer]:
    """The layers whose weight is compressed."""
    return [layer for layer in linear_layers(model) if isinstance(layer.stored, VNMTensor)]


def decompress_model(model: nn.Module) -> list[str]:
    """Replace the compressed weights of `model` by dense ones, in place; returns the names of those layers.

    The dense weights equal, bit for bit, those that were compressed (of quantised values, what these stand for), and do
    not require grad. Weights that are shared stay shared. Annotations stay.

    Raises:
        VNMError: a compressed weight has no values (it is on the meta device, or offloaded). Nothing is changed then.
    """
    compressed = compressed_layers(model)
    check_usable(compressed)
    holders = [module for module in model.modules() if any(map(_is_compressed, module._parameters.values()))]
    for layer in compressed:
        weight = layer.module.weight
        if not isinstance(weight, VNMTensor):
            continue  # shared with a layer before
        with torch.inference_mode(False), torch.no_grad():
            dense = nn.Parameter(weight.to_dense().contiguous(), requires_grad=False)
        for module in holders:
            for name, parameter in module._parameters.items():
                if parameter is weight:
                    setattr(module, name, dense)
    tell(model)
    return [layer.name for layer in compressed]


def _is_compressed(parameter: nn.Parameter | None) -> bool:
    return isinstance(parameter, VNMTensor)


def patterns(
    model: nn.Module,
    spec: Spec | str | None,
    include: Iterable[Selector] | Selector | None,
    exclude: Iterable[Selector] | Selector | None,
) -> list[tuple[Layer, Spec]]:
    """The layers that follow a pattern, or were said to, and which; those that are compressed already among them."""
    selected = select_layers(model, spec or ANY_SIZE, include, exclude)
    if spec is None and include is None:
        selected += _annotated(model, {id(layer.module) for layer, _ in selected}, exclude)
    check_usable(layer for layer, _ in selected)
    chosen = []
    for layer, given in selected:
        if isinstance(layer.stored, VNMTensor):
            chosen.append((layer, layer.stored.spec))
            continue
        annotation: Annotation | None = annotation_of(layer.module)
        if spec is not None:
            found: Spec | None = given
        elif annotation is not None:
            found = annotation.spec
        else:
            found = detected_spec(layer.module.weight, layer.transposed)  # type: ignore[arg-type]
        if found is not None:
            chosen.append((layer, found))
    return chosen


def _annotated(
    model: nn.Module, known: set[int], exclude: Iterable[Selector] | Selector | None
) -> list[tuple[Layer, Spec]]:
    """Annotated layers that a selection without names leaves out: the output head, layers smaller than a block."""
    shared = shared_weights(model)
    more = [
        escape(layer.name)
        for layer in linear_layers(model)
        if annotation_of(layer.module) and id(layer.module) not in known and id(layer.stored) not in shared
    ]
    return select_layers(model, ANY_SIZE, more, exclude) if more else []
