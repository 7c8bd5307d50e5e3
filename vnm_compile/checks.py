"""Why the weight of a layer cannot be handled: asked before anything of a model is changed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vnm_compile._torch import FakeTensor, disabled_torch_function, is_wrapped_by_transform
from vnm_compile.errors import UnsupportedWeight, at_layer
from vnm_compile.layers import Layer
from vnm_compile.tensor import VNMTensor
from vnm_compile.validation import VALUE_DTYPES, stores_otherwise

_ORDINARY_FUNCTIONS = (Tensor.__torch_function__, disabled_torch_function)


def why_unusable(layer: Layer, *, written: bool = False, values: bool = True) -> str | None:
    """Return why the weight of `layer` cannot be pruned or compressed, and the way out; None where it can.

    Nothing of the layer is computed or changed: only what it holds is looked at. A weight that is compressed already
    is usable, but for writing.

    Args:
        written: the weight will be written in place, as pruning does: its memory must then be its own.
        values: the weight's values are needed; False where only its shape and dtype are (annotating a model that is
            still on the meta device).
    """
    weight = layer.module._parameters.get("weight")
    if weight is None:
        return _why_no_parameter(layer.module)
    if nn.parameter.is_lazy(weight):
        return "its weight has no shape yet (a lazy module); run one batch through the model first."
    if isinstance(weight, VNMTensor) and written:
        return "its weight is compressed already; call vnm.decompress_model(model) first."
    if isinstance(weight, VNMTensor):
        return _why_no_values(layer.module, weight.values) if values else None
    return (
        (_why_no_values(layer.module, weight) if values else None)
        or _why_other_storage(weight)
        or _why_other_form(layer, weight)
        or (why_not_writable(weight) if written else None)
    )


def check_usable(layers: Iterable[Layer], *, written: bool = False, values: bool = True) -> None:
    """Raise for the first of `layers` whose weight cannot be handled; see `why_unusable`.

    Raises:
        VNMError: names the layer, what its weight is, and the way out.
    """
    for layer in layers:
        reason = why_unusable(layer, written=written, values=values)
        if reason is not None:
            raise at_layer(layer.name, reason, UnsupportedWeight)


def check_finite(layer: Layer) -> None:
    """Raise where the weight of a layer, which is usable, holds NaN or infinity.

    Raises:
        VNMError: names the layer.
    """
    stored = layer.stored
    # NaN is passed on by both; isfinite() would make copies of the weight.
    low, high = torch.aminmax((stored.values if isinstance(stored, VNMTensor) else layer.weight).detach())
    if not bool(low.isfinite() & high.isfinite()):
        raise at_layer(layer.name, "its weight holds NaN or infinity; repair or exclude the layer.", UnsupportedWeight)


def why_more_than_a_product(layer: Layer) -> str | None:
    """Why the module of `layer` cannot be replaced by a product with its weight, and the way out; None where it can."""
    module, kind = layer.module, type(layer.module)
    ordinary = nn.Linear.forward if isinstance(module, nn.Linear) else _forward_of_conv1d(kind)
    if kind.forward is not ordinary:
        return f"its class {kind.__name__} has a forward of its own; exclude this layer, or make it a plain nn.Linear."
    if "forward" in module.__dict__:
        return "its forward was replaced (by accelerate's hooks?); undo that first, or exclude this layer."
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks, which would not be called any more; remove them first, or exclude this layer."
    more = sorted(set(module._parameters) - {"weight", "bias"} | set(module._buffers) | set(module._modules))
    return f"it holds {', '.join(more)} beside weight and bias; exclude this layer." if more else None


def _forward_of_conv1d(kind: type[nn.Module]) -> object:
    """The forward of transformers' own class, where `kind` derives from it."""
    own = (
        each for each in kind.__mro__ if each.__name__ == "Conv1D" and each.__module__ == "transformers.pytorch_utils"
    )
    return getattr(next(own, None), "forward", None)


def _why_no_parameter(module: nn.Module) -> str:
    """Why `module` has no parameter `weight`, although it has, or should have, a weight."""
    if parametrize.is_parametrized(module, "weight"):
        for each in module.parametrizations["weight"]:  # type: ignore[index,union-attr]
            if hasattr(each, "computed_in"):
                return f"its weight is computed in {each.computed_in}."
        by = ", ".join(type(each).__name__.strip("_") for each in module.parametrizations["weight"])  # type: ignore[index,union-attr]
        return (
            f"its weight is computed by a parametrization ({by}) and overwritten by it; call "
            'torch.nn.utils.parametrize.remove_parametrizations(module, "weight") first, or exclude this layer.'
        )
    for parameter, what, undo in (
        ("weight_g", "weight_norm", "torch.nn.utils.remove_weight_norm(module)"),
        ("weight_mask", "torch.nn.utils.prune", 'torch.nn.utils.prune.remove(module, "weight")'),
        ("weight_orig", "spectral_norm", "torch.nn.utils.remove_spectral_norm(module)"),
    ):
        if parameter in module._parameters or parameter in module._buffers:
            return (
                f"its weight is computed from {parameter} by {what} on every call; call {undo} first, "
                "or exclude this layer."
            )
    if "weight" in module._buffers:
        return "its weight is a buffer; store it as an nn.Parameter, frozen if need be, or exclude this layer."
    return (
        "its weight is no parameter of the layer, but computed, or a view of something else (FSDP's flat parameter?); "
        "give the layer an nn.Parameter of its own, or exclude it."
    )


def _why_no_values(module: nn.Module, weight: Tensor) -> str | None:
    if isinstance(weight, FakeTensor):
        return "its weight is a FakeTensor and has no values; leave FakeTensorMode and load the model for real."
    if weight.is_meta and hasattr(module, "_hf_hook"):
        return (
            "its weight is offloaded (accelerate holds its values, the layer a meta tensor); load the model without "
            "offloading, or call accelerate.hooks.remove_hook_from_module(model, recurse=True)."
        )
    if weight.is_meta:
        return "its weight is on the meta device and has no values; load the model's weights first."
    return None


def _why_other_storage(weight: Tensor) -> str | None:
    """Why the values of a weight are not where those of a plain tensor are."""
    kind = type(weight)
    if isinstance(weight, FakeTensor):
        return None
    if is_wrapped_by_transform(weight):
        return "its weight is inside torch.func.vmap or grad; do this outside of the transformed function."
    if kind.__name__ == "DTensor":
        return (
            "its weight is a DTensor, of which this process holds a part; do this before the model is sharded, or "
            "exclude this layer."
        )
    if kind.__torch_function__ not in _ORDINARY_FUNCTIONS or stores_otherwise(kind):
        return (
            f"its weight is a {kind.__name__}, which stores its values in a way of its own (quantised?); prune and "
            "compress before quantising, or exclude this layer."
        )
    if weight.layout != torch.strided:
        return f"its weight is stored as {weight.layout}; convert it by .to_dense(), or exclude this layer."
    return None


def _why_other_form(layer: Layer, weight: Tensor) -> str | None:
    """Why dtype or shape of a weight are not those of a layer's matrix."""
    if weight.dtype not in VALUE_DTYPES:
        return (
            f"its weight is {weight.dtype}; weights of float32, bfloat16 and float16 (and float64) are handled. "
            "Convert it, or exclude this layer."
        )
    expected = _size(layer)
    if weight.dim() != 2 or (expected is not None and weight.numel() != expected[0] * expected[1]):
        shown = f" of a layer {list(expected)}" if expected else ""
        return (
            f"its weight{shown} has shape {list(weight.shape)}: it is stored in another form (quantised, or a shard?). "
            "Load it as a plain matrix, or exclude this layer."
        )
    if weight.numel() == 0:
        return f"its weight {list(weight.shape)} has no elements; exclude this layer."
    return None


def _size(layer: Layer) -> tuple[int, int] | None:
    """Rows and columns that the layer's attributes promise for its weight, as stored."""
    names = ("nx", "nf") if layer.transposed else ("out_features", "in_features")
    sizes = tuple(getattr(layer.module, name, None) for name in names)
    return sizes if all(isinstance(size, int) for size in sizes) else None  # type: ignore[return-value]


def why_not_writable(weight: Tensor) -> str | None:
    """Why a tensor cannot be written in place, and the way out; None where it can."""
    if weight.is_inference() and not torch.is_inference_mode_enabled():
        return (
            "its weight was made under torch.inference_mode and cannot be written; load the model outside of it, or "
            "replace the weight by a clone."
        )
    if any(stride == 0 and size > 1 for size, stride in zip(weight.shape, weight.stride(), strict=True)):
        return "its weight repeats its memory (expanded); replace it by weight.clone(), or exclude this layer."
    return None
