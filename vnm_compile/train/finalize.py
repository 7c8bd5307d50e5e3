"""`vnm.finalize`: the end of a training into a pattern."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vnm_compile.annotate import set_annotation
from vnm_compile.errors import NothingSelected, UnfinishedTraining, at_layer
from vnm_compile.format import check_pattern
from vnm_compile.layers import check_module, on_values, plain_name
from vnm_compile.train.masked import MaskedLayer, masked_layers, unguard_loading
from vnm_compile.train.pattern import Pattern
from vnm_compile.train.values import make_ordinary


@torch.no_grad()
def finalize(model: nn.Module, *, now: bool = False) -> list[str]:
    """Take the masks off a model that was trained into a pattern, and leave exact, annotated V:N:M weights, in place.

    Layers that train on their values (`vnm.train.compress_for_training`) become ordinary, too.

    The parameters are those that were trained, with zeros where the masks are. `torch.compile(model, backend="vnm")`
    runs the model sparse from then on, and `vnm.compress_model(model)` stores it so.

    Args:
        model: what `vnm.train.begin` or `compress_for_training` was given.
        now: end before the recipe has: masks are chosen from the weights as they are.

    Returns:
        The names of the layers.

    Raises:
        VNMError: the model has no masks, or they are not final yet. Nothing is changed then.
    """
    check_module(model)
    model = getattr(model, "_orig_mod", model)
    layers = masked_layers(model)
    if not layers and not on_values(model):
        raise NothingSelected("no layer of the model has masks; vnm.train.begin(model, spec, ...) puts them on.")
    for layer in layers:
        if not (now or bool(layer.masked.final)):
            raise at_layer(
                plain_name(layer.name),
                "its masks are not final: the recipe has not come to its end. Train on, or end now, at the cost of "
                "what the last steps would have mended: vnm.finalize(model, now=True).",
                UnfinishedTraining,
            )
        check_pattern(layer.masked.as_stored(_kept(layer)), layer.masked.spec, plain_name(layer.name))
    ordinary = make_ordinary(model)
    for layer in layers:  # one after another: no second copy of the model
        module = layer.make_ordinary(model, _kept(layer))
        set_annotation(module, layer.masked.spec, plain_name(layer.name))
    unguard_loading(model)
    return [plain_name(layer.name) for layer in layers] + ordinary


def _kept(layer: MaskedLayer) -> Tensor:
    """The weight with zeros where the final mask has them."""
    weight, masked = layer.weight(), layer.masked
    mask = masked.mask
    if not (bool(masked.final) or masked.recipe.keeps_zeros):
        mask = masked.as_stored(Pattern.of(masked.spec).mask(masked.as_stored(weight).abs()))
    return torch.where(mask, weight, 0)
