"""Every means by which the weights of a model change between two calls; each keeps the pattern.

A write gets the model and a generator; it must do the same to two models whose weights are equal. It returns None, or
a model that takes the place of the one it got.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import vnm_compile as vnm
from vnm_compile import VNMTensor

Write = Callable[[nn.Module, torch.Generator], nn.Module | None]
DENSE_WRITES: dict[str, Write] = {}
COMPRESSED_WRITES: dict[str, Write] = {}


def _dense(function: Write) -> Write:
    DENSE_WRITES[function.__name__] = function
    return function


def _compressed(function: Write) -> Write:
    COMPRESSED_WRITES[function.__name__] = function
    return function


def _both(function: Write) -> Write:
    return _dense(_compressed(function))


def matrices(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """The weight matrices of a model, each once: owner, attribute, tensor."""
    seen: set[int] = set()
    found = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() == 2 and min(parameter.shape) > 1:
                if id(parameter) not in seen:
                    found.append((module, name, parameter))
                seen.add(id(parameter))
    return found


def _noise(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Random values where the weight is not zero."""
    dense = weight.detach().to_dense() if isinstance(weight, VNMTensor) else weight.detach()
    fresh = torch.randn(dense.shape, generator=generator).to(dense.dtype)
    return torch.where(dense != 0, fresh * dense.float().std().to(dense.dtype), torch.zeros_like(dense))


def _step(kind: type[torch.optim.Optimizer], **kwargs: Any) -> Write:
    def write(model: nn.Module, generator: torch.Generator) -> None:
        parameters = [parameter for _, _, parameter in matrices(model)]
        needed = [parameter.requires_grad for parameter in parameters]
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.grad = _noise(parameter, generator)
        kind(parameters, **kwargs).step()
        for parameter, need in zip(parameters, needed, strict=True):
            parameter.grad = None
            parameter.requires_grad_(need)

    return write


# The default epsilons are zero in half precision, where a step then makes NaN of what the pattern leaves out.
_EPS = {"eps": 1e-4}
for _name, _kind, _kwargs in (
    ("sgd", torch.optim.SGD, {"lr": 0.7}),
    ("adam", torch.optim.Adam, {"lr": 0.2, "foreach": False, **_EPS}),
    ("adamw", torch.optim.AdamW, {"lr": 0.2, **_EPS}),
    ("rmsprop", torch.optim.RMSprop, {"lr": 0.1, "foreach": True, **_EPS}),
    ("adagrad", torch.optim.Adagrad, {"lr": 0.2, "foreach": True, **_EPS}),
):
    DENSE_WRITES[_name] = _step(_kind, **_kwargs)  # type: ignore[arg-type]
for _name, _kind, _kwargs in (
    ("sgd_fused", torch.optim.SGD, {"lr": 0.7, "fused": True}),
    ("adam_fused", torch.optim.Adam, {"lr": 0.2, "fused": True, **_EPS}),
    ("adamw_fused", torch.optim.AdamW, {"lr": 0.2, "fused": True, **_EPS}),
    ("adagrad_fused", torch.optim.Adagrad, {"lr": 0.2, "fused": True, **_EPS}),
    ("sgd_foreach", torch.optim.SGD, {"lr": 0.7, "foreach": True, "momentum": 0.9}),
):
    DENSE_WRITES[_name] = _step(_kind, **_kwargs)  # type: ignore[arg-type]


@_dense
def in_place(model: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for _, _, weight in matrices(model):
            weight.add_(_noise(weight, generator))


@_both
def data_copy(model: nn.Module, generator: torch.Generator) -> None:
    for _, _, weight in matrices(model):
        weight.data.copy_(_noise(weight, generator))


@_dense
def data_new(model: nn.Module, generator: torch.Generator) -> None:
    for _, _, weight in matrices(model):
        weight.data = _noise(weight, generator)


@_dense
def data_new_twice(model: nn.Module, generator: torch.Generator) -> None:
    for _, _, weight in matrices(model):
        weight.data = weight.data * 2
        weight.data = _noise(weight, generator)


@_dense
def data_mul(model: nn.Module, generator: torch.Generator) -> None:
    for _, _, weight in matrices(model):
        weight.data.mul_(-1.5)


@_dense
def data_add(model: nn.Module, generator: torch.Generator) -> None:
    """As peft merges an adapter, and the pattern put back."""
    for _, _, weight in matrices(model):
        o, k = weight.shape
        b, a = torch.randn(o, 2, generator=generator), torch.randn(2, k, generator=generator)
        mask = weight.data != 0
        weight.data += (b @ a * k**-0.5).to(weight.dtype)
        weight.data *= mask


@_dense
def detach_mul(model: nn.Module, generator: torch.Generator) -> None:
    for _, _, weight in matrices(model):
        weight.detach().mul_(-0.5)


@_dense
def foreach(model: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        torch._foreach_mul_([weight for _, _, weight in matrices(model)], -1.5)


@_dense
def one_row(model: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for _, _, weight in matrices(model):
            weight[1] *= -2


@_dense
def numpy_alias(model: nn.Module, generator: torch.Generator) -> None:
    for _, _, weight in matrices(model):
        bits = weight.detach().view(torch.int16) if weight.element_size() == 2 else weight.detach()
        alias = bits.numpy()
        alias[...] = np.where(alias != 0, alias ^ np.int16(-(2**15)), alias) if alias.dtype == np.int16 else -alias


@_dense
def dlpack(model: nn.Module, generator: torch.Generator) -> None:
    for _, _, weight in matrices(model):
        torch.from_dlpack(weight.detach()).mul_(-0.5)


@_dense
def untyped_storage(model: nn.Module, generator: torch.Generator) -> None:
    for _, _, weight in matrices(model):
        if weight.untyped_storage().nbytes() == weight.nbytes:
            new = torch.empty_like(weight.detach()).copy_(_noise(weight, generator))
            weight.untyped_storage().copy_(new.untyped_storage())
        else:
            weight.data.mul_(-1)


@_dense
def flat_vector(model: nn.Module, generator: torch.Generator) -> None:
    """vector_to_parameters, then the vector is written."""
    weights = [weight for _, _, weight in matrices(model)]
    if len({weight.dtype for weight in weights}) == 1 and all(weight.is_contiguous() for weight in weights):
        vector = nn.utils.parameters_to_vector(weights).detach().clone()
        nn.utils.vector_to_parameters(vector, weights)
        vector.mul_(-0.8)


@_dense
def flat_buffer(model: nn.Module, generator: torch.Generator) -> None:
    """The storage underneath is written where the parameters are views of one (`Settings.flat`)."""
    buffer = getattr(model, "flat_buffer", None)
    if buffer is not None:
        buffer.mul_(-0.9)
    else:
        data_mul(model, generator)


def _state(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for owner, attribute, weight in matrices(model):
        prefix = next(name for name, module in model.named_modules() if module is owner)
        state[f"{prefix}.{attribute}".lstrip(".")] = _noise(weight, generator)
    return state


@_both
def load_state_dict(model: nn.Module, generator: torch.Generator) -> None:
    model.load_state_dict(_state(model, generator))


@_dense
def load_state_dict_assign(model: nn.Module, generator: torch.Generator) -> None:
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.load_state_dict(_state(model, generator), assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(grads[name])


@_dense
def new_parameter(model: nn.Module, generator: torch.Generator) -> None:
    for owner, name, weight in matrices(model):
        setattr(owner, name, nn.Parameter(_noise(weight, generator), requires_grad=weight.requires_grad))


@_both
def round_trip(model: nn.Module, generator: torch.Generator) -> None:
    dtype = next(iter(model.parameters())).dtype
    model.to(torch.bfloat16 if dtype != torch.bfloat16 else torch.float32)
    model.to(dtype)


@_dense
def round_trip_scaled(model: nn.Module, generator: torch.Generator) -> None:
    dtype = next(iter(model.parameters())).dtype
    model.double()
    data_mul(model, generator)
    model.to(dtype)


@_dense
def requires_grad(model: nn.Module, generator: torch.Generator) -> None:
    for _, _, weight in matrices(model):
        weight.requires_grad_(not weight.requires_grad)


@_both
def deep_copy(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Go on with a copy; the original is written, which the copy must not see."""
    other = copy.deepcopy(model)
    for _, _, weight in matrices(model):
        weight.data.copy_(_noise(weight, generator))
    return other


@_both
def functional(model: nn.Module, generator: torch.Generator) -> None:
    """The next call takes its weights from torch.func.functional_call."""
    model.called_with = {  # type: ignore[assignment]
        name: value.detach().clone() if value.dim() != 2 or min(value.shape) < 2 else _noise(value, generator)
        for name, value in model.named_parameters()
    }


@_both
def compile_again(model: nn.Module, generator: torch.Generator) -> None:
    """Write behind the version counter, then compile afresh."""
    for _, _, weight in matrices(model):
        weight.data.copy_(_noise(weight, generator))
    model.compile_again = True  # type: ignore[assignment]


def _one_row_behind(model: nn.Module) -> None:
    """A write that neither counts nor changes most of a weight: nothing on a call can see it."""
    for _, _, weight in matrices(model):
        weight.data[1].mul_(-2)


@_dense
def one_row_and_refresh(model: nn.Module, generator: torch.Generator) -> None:
    _one_row_behind(model)
    vnm.refresh(model)


@_dense
def one_row_and_compile_again(model: nn.Module, generator: torch.Generator) -> None:
    _one_row_behind(model)
    model.compile_again = True  # type: ignore[assignment]


@_dense
def one_row_by_fused_sgd(model: nn.Module, generator: torch.Generator) -> None:
    """A fused step whose gradient is zero but for one row, as an expert's or an embedding's may be."""
    parameters = [parameter for _, _, parameter in matrices(model)]
    needed = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad[1] = _noise(parameter, generator)[1] * 4
    torch.optim.SGD(parameters, lr=1.0, fused=True).step()
    for parameter, need in zip(parameters, needed, strict=True):
        parameter.grad = None
        parameter.requires_grad_(need)


@_dense
def inference_tensors(model: nn.Module, generator: torch.Generator) -> None:
    """Weights that are inference tensors, written in inference mode."""
    for owner, name, weight in matrices(model):
        with torch.inference_mode():
            new = nn.Parameter(_noise(weight, generator), requires_grad=False)
        setattr(owner, name, new)


@_dense
def written_in_inference_mode(model: nn.Module, generator: torch.Generator) -> None:
    with torch.inference_mode():
        for _, _, weight in matrices(model):
            weight.mul_(-1.5)


@_dense
def pattern_lost(model: nn.Module, generator: torch.Generator) -> None:
    """A dense weight where nothing asks for a pattern."""
    if getattr(model, "annotated", False):
        data_copy(model, generator)
        return
    with torch.no_grad():
        for _, _, weight in matrices(model)[:1]:
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)


@_compressed
def compressed_parameter(model: nn.Module, generator: torch.Generator) -> None:
    for owner, name, weight in matrices(model):
        new: Tensor = _noise(weight, generator)
        if isinstance(weight, VNMTensor):
            flip = weight.stride() != (weight.shape[1], 1)
            new = vnm.compress(new.t(), weight.spec).t() if flip else vnm.compress(new, weight.spec)
        needed = weight.requires_grad and not isinstance(weight, VNMTensor)
        setattr(owner, name, nn.Parameter(new, requires_grad=needed))


@_compressed
def compressed_data(model: nn.Module, generator: torch.Generator) -> None:
    for _, _, weight in matrices(model):
        new: Tensor = _noise(weight, generator)
        if isinstance(weight, VNMTensor):
            flip = weight.stride() != (weight.shape[1], 1)
            new = vnm.compress(new.t(), weight.spec).t() if flip else vnm.compress(new, weight.spec)
        weight.data = new


@_compressed
def compressed_values(model: nn.Module, generator: torch.Generator) -> None:
    for _, _, weight in matrices(model):
        (weight.values if isinstance(weight, VNMTensor) else weight.data).mul_(-0.75)


@_compressed
def decompress(model: nn.Module, generator: torch.Generator) -> None:
    for owner, name, weight in matrices(model):
        if isinstance(weight, VNMTensor):
            setattr(owner, name, nn.Parameter(weight.to_dense().contiguous() * -1.5, requires_grad=False))
        else:
            weight.data.mul_(-1.5)


def _values_of_twin(model: nn.Module, generator: torch.Generator) -> None:
    for _, _, weight in matrices(model):
        weight.data.mul_(-0.75)


AS_DENSE: dict[str, Write] = {
    "compressed_parameter": new_parameter,
    "compressed_data": data_copy,
    "compressed_values": _values_of_twin,
    "decompress": data_mul,
}
"""What does to a dense model what these writes do to a compressed one."""
