"""`vnm.finalize`: the end of a training into a pattern."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from vnm_compile.annotate import set_annotation
from vnm_compile.errors import NothingSelected, UnfinishedTraining, at_layer
from vnm_compile.format import check_pattern
from vnm_compile.layers import check_module, plain_name
from vnm_compile.train.masked import masked_layers, trained_weight, unguard_loading
from vnm_compile.train.pattern import Pattern


@torch.no_grad()
def finalize(model: nn.Module, *, now: bool = False) -> list[str]:
    """Take the masks off a model that was trained into a pattern, and leave exact, annotated V:N:M weights, in place.

    The parameters are those that were trained, with zeros where the masks are. `torch.compile(model, backend="vnm")`
    runs the model sparse from then on, and `vnm.compress_model(model)` stores it so.

    Args:
        model: what `vnm.train.begin` was given.
        now: end before the recipe has: masks are chosen from the weights as they are.

    Returns:
        The names of the layers.

    Raises:
        VNMError: the model has no masks, or they are not final yet. Nothing is changed then.
    """
    check_module(model)
    model = getattr(model, "_orig_mod", model)
    layers = list(masked_layers(model))
    if not layers:
        raise NothingSelected("no layer of the model has masks; vnm.train.begin(model, spec, ...) puts them on.")
    exact = []
    for name, module, masked in layers:
        weight = trained_weight(module)
        if not (now or bool(masked.final)):
            raise at_layer(
                plain_name(name),
                "its masks are not final: the recipe has not come to its end. Train on, or end now, at the cost of "
                "what the last steps would have mended: vnm.finalize(model, now=True).",
                UnfinishedTraining,
            )
        mask = masked.mask
        if not bool(masked.final):
            mask = masked.as_stored(Pattern.of(masked.spec).mask(masked.as_stored(weight).abs()))
        kept = torch.where(mask, weight, 0)
        check_pattern(masked.as_stored(kept), masked.spec, plain_name(name))
        exact.append(kept)
    for kept, (name, module, masked) in zip(exact, layers, strict=True):
        trained_weight(module).copy_(kept)
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        set_annotation(module, masked.spec, plain_name(name))
    unguard_loading(model)
    return [plain_name(name) for name, _, _ in layers]
