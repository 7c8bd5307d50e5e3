"""The layers of a model that multiply by a weight matrix, as everything here means them: name, module, weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vnm_compile.errors import BadModel
from vnm_compile.layout import Layout

_COMPILED = "_orig_mod"


@dataclass(frozen=True)
class Layer:
    """A layer that multiplies by a weight matrix: an nn.Linear, or a Conv1D, whose weight is stored `[in, out]`."""

    name: str
    module: nn.Module

    @property
    def transposed(self) -> bool:
        """Whether the module stores its weight as `[in_features, out_features]`."""
        return not isinstance(self.module, nn.Linear)

    @property
    def stored(self) -> nn.Parameter | None:
        """The parameter as it is stored; None where `module.weight` is computed, which may change the model's state."""
        return self.module._parameters.get("weight")

    @property
    def weight(self) -> Tensor:
        """The weight as `[out_features, in_features]`, a view of the module's own."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight.t() if self.transposed else weight


def check_module(model: object) -> None:
    """Raise a VNMError where what was given as a model is none."""
    if not isinstance(model, nn.Module):
        raise BadModel(f"the model is a {type(model).__name__}; give an nn.Module.")


def linear_layers(model: nn.Module) -> Iterator[Layer]:
    """Every nn.Linear and transformers Conv1D of a model, by its qualified name, each once.

    The `_orig_mod` that torch.compile puts into names is left out: a model and its compiled form name layers alike.
    """
    check_module(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or _is_conv1d(module):
            yield Layer(plain_name(name), module)


def shared_weights(model: nn.Module) -> dict[int, list[str]]:
    """The parameters that have more than one place in the model, by id, with the names of all their places.

    Two parameters over the same memory count as one.
    """
    places: dict[int, list[str]] = {}
    spans: list[tuple[int, int, int]] = []
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in places:
                spans += _span(parameter)
            places.setdefault(id(parameter), []).append(plain_name(f"{prefix}.{name}".lstrip(".")))
    shared = {key: names for key, names in places.items() if len(names) > 1}
    furthest, one = 0, 0
    for start, end, other in sorted(spans):
        if start < furthest:
            shared[one] = shared[other] = places[one] + places[other]
        if end > furthest:
            furthest, one = end, other
    return shared


def _span(parameter: Tensor) -> list[tuple[int, int, int]]:
    """First and last byte of a contiguous parameter, and its id; nothing where that is not known."""
    plain = type(parameter) in (Tensor, nn.Parameter) and parameter.layout == torch.strided
    if not plain or parameter.is_meta or not parameter.numel() or not parameter.is_contiguous():
        return []
    start = parameter.data_ptr()
    return [(start, start + parameter.numel() * parameter.element_size(), id(parameter))] if start else []


class OnValues(nn.Module):
    """A module that multiplies by a compressed weight whose values are its parameter.

    Attributes:
        values: `[R, G*N]`.
        stored_layout: of the weight.
    """

    values: nn.Parameter
    stored_layout: Layout


def on_values(model: nn.Module) -> list[tuple[str, OnValues]]:
    """The modules of a model that multiply by compressed weights, by their qualified names, each once."""
    return [(plain_name(name), module) for name, module in model.named_modules() if isinstance(module, OnValues)]


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` stands in the model, which may be in several places."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def plain_name(name: str) -> str:
    """A layer's name without what torch.compile puts into it."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D (GPT-2's linear), without importing transformers."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
