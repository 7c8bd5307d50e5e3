"""Training into the pattern through low-rank adapters: masks on peft's LoRA layers, which act on `W + BA`.

A LoRA layer computes `x W^T + s (x A^T) B^T`, which no mask of a weight fits into. A masked one multiplies by
`(W + s B A) * mask` instead. That weight is made on every call, again in the backward, and never kept: what training
takes beside LoRA's own memory is the masks and one layer's weights.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vnm_compile.checks import why_more_than_a_product
from vnm_compile.errors import BadOption, UnsupportedWeight, at_layer
from vnm_compile.layers import Layer, replace_module
from vnm_compile.spec import Spec
from vnm_compile.tensor import VNMTensor, compress
from vnm_compile.train.masked import Masked, MaskedLayer
from vnm_compile.train.recipes import SRSTE, Recipe

_PLACE = "lora_pattern"
"""The attribute that holds the mask; by "lora_" and the adapter's name peft saves and loads it with the adapter."""


def adapted_layers(model: nn.Module) -> dict[nn.Module, tuple[str, nn.Module]]:
    """Name and LoRA layer by the linear that the layer adapts."""
    peft = sys.modules.get("peft")
    if peft is None:  # without it there is no such layer
        return {}
    return {
        module.base_layer: (name, module)
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.Linear) and isinstance(module.base_layer, nn.Module)
    }


def check_adapter(name: str, module: Any, layer: Layer, recipe: Recipe) -> None:
    """Refuse a LoRA layer whose product with a mask cannot be computed; `layer` is the linear that it adapts.

    Raises:
        VNMError: names the layer and what is in the way.
    """

    def refuse(why: str) -> None:
        raise at_layer(name, why, UnsupportedWeight)

    if isinstance(module, _MaskedAdapter):
        refuse("it trains into a pattern already; end that first: vnm.finalize(model, now=True).")
    more = why_more_than_a_product(layer)
    if more is not None:
        refuse(more)
    kind = sys.modules["peft"].tuners.lora.Linear
    if type(module).forward is not kind.forward:
        refuse(f"its class {type(module).__name__} has a forward of its own, which a mask would leave out.")
    if module.merged:
        refuse("its adapter is merged; call model.unmerge_adapter() first.")
    if not _active(module):
        refuse("it has no active adapter; call model.set_adapter(...) first, or exclude this layer.")
    if recipe.needs_optimizer:
        raise BadOption(f"{type(recipe).__name__} writes weights after each step; those under adapters are frozen.")
    for adapter in _active(module):
        variant = _variant(module, adapter)
        if variant not in (None, "DoraLinearVariant"):
            refuse(f"its adapter is a {variant}, which is no weight that could be masked; use LoRA, rsLoRA or DoRA.")
        if variant and len(_active(module)) > 1:
            refuse("DoRA and another adapter are active together; masks act on one or the other.")
        if isinstance(module.lora_dropout[adapter], nn.Dropout) and (variant or isinstance(recipe, SRSTE)):
            what = "DoRA" if variant else "SRSTE"
            refuse(f"lora_dropout acts on the adapter alone, {what} on the sum; give LoraConfig(lora_dropout=0).")


def put_adapter_mask(module: Any, layer: Layer, spec: Spec, recipe: Recipe) -> None:
    """Mask a LoRA layer, which keeps its parameters; `layer` is the linear that it adapts."""
    assert layer.stored is not None
    kind: type[nn.Module] = type(module)
    masked = _AdapterMask(recipe, spec, layer.stored, layer.transposed)
    # One name more: peft puts the adapter's into the path by replacing what follows the first name of its own.
    setattr(module, _PLACE, nn.ModuleDict({_active(module)[0]: nn.ModuleDict({"vnm": masked})}))
    module.__class__ = _masked_kind(kind)  # type: ignore[arg-type]


class _AdapterMask(Masked):
    """The mask of a LoRA layer."""

    def layer_at(self, path: str, modules: Mapping[str, nn.Module]) -> MaskedLayer:
        """The layer whose weight this masks, where `path` is its own among the modules of the model."""
        name = path.rpartition(f".{_PLACE}.")[0] if not path.startswith(f"{_PLACE}.") else ""
        return AdaptedLayer(name, modules[name], self, path)


class AdaptedLayer(MaskedLayer):
    """A LoRA layer that trains into a pattern; at the end its adapter is merged and the plain linear is left."""

    @property
    def parameter(self) -> nn.Parameter | None:
        """None: the weight is computed from the frozen one and the adapter's."""
        return None

    def weight(self) -> Tensor:
        """The sum of the weight and the adapter."""
        with torch.no_grad():
            return _adapted(self.module)

    def pruned(self) -> Tensor:
        """The frozen weight: the adapter has no zeros."""
        return _dense(self.module.base_layer.weight).detach()  # type: ignore[union-attr,arg-type]

    def make_ordinary(self, model: nn.Module, kept: Tensor) -> nn.Module:
        """Merge, and put the linear in the LoRA layer's place."""
        base: Any = self.module.base_layer
        bias = _bias(self.module)
        if bias is not None and bias is not base.bias:
            base.bias.copy_(bias)
        if isinstance(base.weight, VNMTensor):
            spec = self.masked.spec
            base.weight = nn.Parameter(compress(kept, spec, self.name), requires_grad=False)
        else:
            base.weight.copy_(kept)
        # Who holds the LoRA layer where no model shows it has one whose adapters are merged.
        self.undo(model)
        self.module.merged_adapters.extend(_active(self.module))  # type: ignore[union-attr,operator]
        replace_module(model, self.module, base)
        return base  # type: ignore[no-any-return]

    def undo(self, model: nn.Module) -> None:
        """Take the mask off; the LoRA layer is what it was."""
        module: Any = self.module
        module.__class__ = module.adapter_kind
        delattr(module, _PLACE)


@cache
def _masked_kind(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Masked{kind.__name__}", (_MaskedAdapter, kind), {"adapter_kind": kind})


class _MaskedAdapter:
    """What a LoRA layer does otherwise once it has a mask; mixed into its class."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The product with the masked sum; without adapters (`disable_adapter`) that of the layer as it was loaded."""
        if args or any(value is not None for value in kwargs.values()):
            raise BadOption(f"a LoRA layer that trains into a pattern takes its input only, not {[*kwargs] or 'more'}.")
        if self.disable_adapters:
            return self.base_layer(x)  # type: ignore[no-any-return]
        dropped = [(name, self.lora_dropout[name]) for name in _active(self) if self.training]
        dropped = [(name, dropout) for name, dropout in dropped if isinstance(dropout, nn.Dropout)]
        result = _product(self, x, without=tuple(name for name, _ in dropped))
        for name, dropout in dropped:
            result = result + _product(self, dropout(x), only=name)
        return result  # type: ignore[no-any-return]

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Refused: peft would merge without the mask."""
        raise UnsupportedWeight("adapters that train into a pattern are merged by vnm.finalize(model).")

    def unmerge(self) -> None:
        """Nothing is merged."""


def _product(module: Any, x: Tensor, without: tuple[str, ...] = (), only: str | None = None) -> Tensor:
    """The layer without some adapters; or `x` times what one adapter adds, masked.

    The weight is computed anew in the backward: kept, those of all layers would be a second model.
    """
    masked = next(iter(module.lora_pattern.values()))["vnm"]

    def product(x: Tensor) -> Tensor:
        weight = _adapted(module, without) if only is None else _delta(module, only)
        weight = masked(weight.to(module.base_layer.weight.dtype))
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(weight.dtype)
        bias = _bias(module) if only is None else None
        return F.linear(x, masked.as_stored(weight), bias if bias is None else bias.to(weight.dtype))

    if torch.is_grad_enabled():
        return checkpoint(product, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
    return product(x)


def _adapted(module: Any, without: tuple[str, ...] = ()) -> Tensor:
    """The weight with the active adapters in it, as the layer stores it."""
    base = module.base_layer.weight
    weight = _dense(base)
    for name in _active(module):
        if name in without:
            continue
        weight = weight + _delta(module, name)
        if _variant(module, name):  # DoRA, arXiv 2402.09353: the length of rows is a parameter of its own
            along = 0 if module.fan_in_fan_out else 1
            length = torch.linalg.norm(weight, dim=along, keepdim=True).detach()
            magnitude = module.lora_magnitude_vector[name].weight
            weight = weight * (magnitude.view_as(length) / length)
    return weight.to(base.dtype)


def _delta(module: Any, name: str) -> Tensor:
    """What an adapter adds, in the adapter's precision also under autocast: masks are chosen outside of it."""
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    with torch.autocast(a.device.type, enabled=False):
        delta = (b @ a) * module.scaling[name]
    return delta.t() if module.fan_in_fan_out else delta


def _bias(module: Any) -> Tensor | None:
    """The bias with those of the active adapters in it."""
    bias: Tensor | None = module.base_layer.bias
    for name in _active(module):
        if module.lora_bias.get(name):
            added = module.lora_B[name].bias * module.scaling[name]
            bias = added if bias is None else bias + added
    return bias


def _active(module: Any) -> list[str]:
    return [name for name in module.active_adapters if name in module.lora_A]


def _variant(module: Any, name: str) -> str | None:
    """The kind of a LoRA variant; None for LoRA itself."""
    variant = module.lora_variant.get(name)
    return None if variant is None else (variant if isinstance(variant, type) else type(variant)).__name__


def _dense(weight: Tensor) -> Tensor:
    return weight.to_dense() if isinstance(weight, VNMTensor) else weight
