"""What of a model multiplies by stored weights and is no linear layer: it stays dense, and reports must not omit it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from vnm_compile.layers import OnValues, linear_layers, plain_name

_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_LEAST_SIDE = 4  # what is narrower is no matrix that a pattern could be meant for


@dataclass(frozen=True)
class DenseWeight:
    """A weight that stays dense.

    Attributes:
        name: qualified name of the parameter, without a last `.weight`.
        shape: of the weight as it is stored.
        nbytes: bytes that it takes.
        reason: why, in one line.
        parameter: the parameter itself.
    """

    name: str
    shape: tuple[int, ...]
    nbytes: int
    reason: str
    parameter: Tensor


def dense_weights(model: nn.Module) -> list[DenseWeight]:
    """Every parameter of `model` that takes part in products, other than the weights of linear layers, each once.

    What multiplies by compressed weights (`OnValues`) is not among them, nor are embedding tables (rows are looked
    up, not multiplied), position embeddings, norms and biases.
    """
    linears = {id(layer.module): layer for layer in linear_layers(model)}
    seen = {id(layer.module._parameters.get("weight")) for layer in linears.values()}
    found = []
    for prefix, module in model.named_modules():
        if id(module) in linears or ".parametrizations" in f".{prefix}" or isinstance(module, OnValues):
            continue
        for key, parameter in module._parameters.items():
            reason = None if parameter is None or id(parameter) in seen else _reason(module, parameter)
            if parameter is None or reason is None:
                continue
            seen.add(id(parameter))
            name = f"{prefix}.{key}" if prefix else key
            name = plain_name(name.removesuffix(".weight"))
            size = parameter.numel() * parameter.element_size()
            found.append(DenseWeight(name, tuple(parameter.shape), size, reason, parameter))
    return found


def others(model: nn.Module, chosen: set[int]) -> list[DenseWeight]:
    """What multiplies by weights beside the chosen layers (ids of their modules): linears left out, and the rest."""
    return [*_left_out(model, chosen), *dense_weights(model)]


def _left_out(model: nn.Module, chosen: set[int]) -> Iterator[DenseWeight]:
    for layer in linear_layers(model):
        weight = layer.module._parameters.get("weight")
        if id(layer.module) not in chosen and isinstance(weight, Tensor) and not nn.parameter.is_lazy(weight):
            size = weight.numel() * weight.element_size()
            reason = (
                "not selected: left out by the arguments, the output head, tied, an adapter, or smaller than a block"
            )
            yield DenseWeight(layer.name, tuple(weight.shape), size, reason, weight)


def _reason(module: nn.Module, parameter: Tensor) -> str | None:
    """Why a parameter stays dense; None where nothing is multiplied by it."""
    kind = type(module).__name__
    if nn.parameter.is_lazy(parameter) or parameter.dim() < 2 or ("Embedding" in kind and isinstance(
        module, nn.Embedding | nn.EmbeddingBag
    )):  # fmt: skip
        return None
    if isinstance(module, _CONVOLUTIONS):
        if all(size == 1 for size in module.kernel_size):
            return "a 1x1 convolution: only linear layers are handled; as an nn.Linear it could follow a pattern"
        return "a convolution: only linear layers are handled"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return f"inside nn.{kind}, which computes on its own"
    if isinstance(module, nn.MultiheadAttention):
        return "a projection that nn.MultiheadAttention keeps to itself, no linear layer"
    if isinstance(module, nn.Bilinear):
        return "a bilinear form: only linear layers are handled"
    if "norm" in kind.lower() or parameter.shape[0] == 1 or min(parameter.shape[-2:]) < _LEAST_SIDE:
        return None  # scales, and embeddings of positions
    if parameter.dim() > 2:
        return "a batch of weights (experts): only single matrices are handled, one nn.Linear an expert could be"
    return f"a parameter of {kind}, not the weight of a linear layer"
