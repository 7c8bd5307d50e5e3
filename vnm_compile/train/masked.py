"""The parametrization of a layer's weight while it trains: the weight, a mask, and what a recipe makes of both."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vnm_compile.errors import BadOption, at_layer
from vnm_compile.spec import Spec
from vnm_compile.train.recipes import Recipe


class Masked(nn.Module):
    """What `torch.nn.utils.parametrize` computes a weight by.

    Attributes:
        mask: bool, of the weight's shape as the layer stores it; part of the state dict.
        dial: the recipe's number of the moment.
        final: whether the mask is that of the goal and stays.
        key: of recipe and pattern, for checkpoints: a run that goes on from another recipe's is refused.
    """

    computed_in = "training into the pattern; vnm.finalize(model) makes it an ordinary, exact weight"
    """What a layer's weight is computed in, for explanations."""

    mask: Tensor
    dial: Tensor
    final: Tensor
    key: Tensor

    def __init__(self, recipe: Recipe, spec: Spec, weight: Tensor, transposed: bool) -> None:
        super().__init__()
        self.recipe, self.spec, self.transposed = recipe, spec, transposed
        device = weight.device
        self.register_buffer("mask", torch.ones(weight.shape, dtype=torch.bool, device=device))
        self.register_buffer("dial", torch.ones((), dtype=torch.float32, device=device))
        self.register_buffer("final", torch.zeros((), dtype=torch.bool, device=device))
        told = repr((recipe.options(), str(spec))).encode()
        key = int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "big", signed=True)
        self.register_buffer("key", torch.tensor(key, dtype=torch.int64, device=device))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer multiplies by."""
        return self.recipe.masked(weight, self.mask, self.dial)

    def as_stored(self, matrix: Tensor) -> Tensor:
        """A matrix `[out_features, in_features]` the way round that the layer stores its weight; and the reverse."""
        return matrix.t() if self.transposed else matrix


def masked_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Masked]]:
    """Name, module and parametrization of every layer that trains into a pattern."""
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            for each in module.parametrizations["weight"]:  # type: ignore[index,union-attr]
                if isinstance(each, Masked):
                    yield name, module, each


def guard_loading(model: nn.Module) -> None:
    """Have `model.load_state_dict` refuse what another recipe has saved, before anything is loaded."""
    model.register_load_state_dict_pre_hook(_same_recipe)


def unguard_loading(model: nn.Module) -> None:
    """Undo `guard_loading`, also of a model that was copied since."""
    for number, hook in list(model._load_state_dict_pre_hooks.items()):
        if getattr(hook, "hook", hook) is _same_recipe:
            del model._load_state_dict_pre_hooks[number]


def _same_recipe(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, _module, masked in masked_layers(module):
        key = state.get(f"{prefix}{name}.parametrizations.weight.0.key")
        if key is not None and int(key) != int(masked.key):
            raise at_layer(
                name, "its masks in this state dict are of another recipe or pattern than this run's.", BadOption
            )


def trained_weight(module: nn.Module) -> nn.Parameter:
    """The parameter that a masked layer's weight is computed from."""
    return module.parametrizations["weight"].original  # type: ignore[index,union-attr,return-value]
