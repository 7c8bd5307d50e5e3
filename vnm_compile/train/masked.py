"""The parametrization of a layer's weight while it trains: the weight, a mask, and what a recipe makes of both."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vnm_compile._torch import parameter_moved, without_fsdp_class
from vnm_compile.errors import BadOption, at_layer
from vnm_compile.layers import Layer
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

    def layer_at(self, path: str, modules: Mapping[str, nn.Module]) -> MaskedLayer:
        """The layer whose weight this masks, where `path` is its own among the modules of the model."""
        name = path.rsplit(".", 3)[0] if path.count(".") > 2 else ""  # without parametrizations.weight.0
        return MaskedLayer(name, modules[name], self, path)

    def as_stored(self, matrix: Tensor) -> Tensor:
        """A matrix `[out_features, in_features]` the way round that the layer stores its weight; and the reverse."""
        return matrix.t() if self.transposed else matrix


@dataclass(frozen=True)
class MaskedLayer:
    """A layer that trains into a pattern.

    Attributes:
        name: in the model.
        module: whose weight it is.
        masked: its mask.
        path: where that is in the model, and its buffers in a state dict.
    """

    name: str
    module: nn.Module
    masked: Masked
    path: str

    @property
    def parameter(self) -> nn.Parameter | None:
        """The parameter that the weight is computed from; None where there is more than one."""
        return self.module.parametrizations["weight"].original  # type: ignore[index,union-attr,return-value]

    def weight(self) -> Tensor:
        """The whole weight before the mask, as the layer stores it; without gradient, not to be written."""
        return _whole(self.parameter)  # type: ignore[arg-type]

    def holds_nan(self) -> bool:
        """Whether one of the layer's trained parameters does: every process that holds a part of it hears the same."""
        trained = (each for each in self.module.parameters() if each.requires_grad)
        return any(bool(_whole(each.detach().isnan().any())) for each in trained)

    def pruned(self) -> Tensor:
        """The weight whose zeros are those of the pattern, where the layer was pruned before."""
        return self.weight()

    def make_ordinary(self, model: nn.Module, kept: Tensor) -> nn.Module:
        """Take the mask off and leave the layer with the weight `kept`; return the module whose weight it is then."""
        parameter: Any = self.parameter
        if hasattr(parameter, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            kept = distribute_tensor(kept, parameter.device_mesh, parameter.placements)
        parameter.copy_(kept)
        self.undo(model)
        return self.module

    def undo(self, model: nn.Module) -> None:
        """Take the mask off, the weight as it is."""
        place: Any = self.module.parametrizations["weight"]  # type: ignore[union-attr,index]
        with without_fsdp_class(self.module):
            parametrize.remove_parametrizations(self.module, "weight", leave_parametrized=False)
        parameter_moved(model, (place, "original"), (self.module, "weight"))


def masked_layers(model: nn.Module) -> list[MaskedLayer]:
    """Every layer of the model that trains into a pattern."""
    modules = dict(model.named_modules())
    return [module.layer_at(path, modules) for path, module in modules.items() if isinstance(module, Masked)]


def put_mask(layer: Layer, spec: Spec, recipe: Recipe) -> None:
    """Mask the weight of a layer by a parametrization."""
    assert layer.stored is not None
    masked = Masked(recipe, spec, layer.stored, layer.transposed)
    parametrize.register_parametrization(layer.module, "weight", masked)


def guard_loading(model: nn.Module) -> None:
    """Have `model.load_state_dict` refuse what another recipe has saved, before anything is loaded."""
    model.register_load_state_dict_pre_hook(_same_recipe)


def unguard_loading(model: nn.Module) -> None:
    """Undo `guard_loading`, also of a model that was copied since."""
    for number, hook in list(model._load_state_dict_pre_hooks.items()):
        if getattr(hook, "hook", hook) is _same_recipe:
            del model._load_state_dict_pre_hooks[number]


def _same_recipe(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for layer in masked_layers(module):
        key = state.get(f"{prefix}{layer.path}.key")
        if key is not None and int(key) != int(layer.masked.key):
            raise at_layer(
                layer.name, "its masks in this state dict are of another recipe or pattern than this run's.", BadOption
            )


def _whole(weight: Tensor) -> Tensor:
    """All of a weight that FSDP2 has sharded."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight.detach()  # type: ignore[operator]
