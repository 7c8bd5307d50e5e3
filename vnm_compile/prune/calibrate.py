"""What calibration data says about the inputs of layers: their second moment, gathered while the model runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vnm_compile.annotate import Layer
from vnm_compile.errors import VNMError, at_layer


def run_model(model: nn.Module, batch: Any) -> Any:
    """Return the model's output for a batch of calibration data: a tensor, a tuple or list of arguments, or a dict.

    Raises:
        VNMError: the batch is none of these.
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    raise VNMError(f"a batch of calibration data is a {type(batch).__name__}; give a tensor, a tuple or a dict each.")


@contextmanager
def as_evaluated(model: nn.Module) -> Iterator[None]:
    """Run the model as it will be used: without dropout, and through its modules.

    Modules that are in train mode return to it. The fused path of nn.TransformerEncoderLayer is switched off: it reads
    the weights without calling the layers, which then could not see their inputs.
    """
    training = [module for module in model.modules() if module.training]
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        for module in training:
            module.training = False
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module in training:
            module.training = True


def execution_order(model: nn.Module, layers: Sequence[Layer], batch: Any) -> list[int]:
    """Indices of `layers` in the order in which the model first calls them; those it does not call come last."""
    seen: list[int] = []
    hooks = [layer.module.register_forward_pre_hook(lambda *_, i=i: seen.append(i)) for i, layer in enumerate(layers)]
    try:
        with torch.no_grad(), as_evaluated(model):
            run_model(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    called = list(dict.fromkeys(seen))
    return called + [i for i in range(len(layers)) if i not in seen]


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input of a linear, as its forward hook gets it, with one token a row: `[T, K]`."""
    given: Tensor = args[0] if args else next(iter(kwargs.values()))
    return given.detach().reshape(-1, given.shape[-1])


def second_moments(model: nn.Module, layers: Sequence[Layer], batches: Iterable[Any]) -> list[Tensor]:
    """Return the mean of `x xᵀ` over all tokens that reach each layer: float32 `[K, K]` a layer.

    Raises:
        VNMError: no batch, a layer that no token reached, or inputs that are not finite.
    """
    sums = [torch.zeros(()) for _ in layers]
    counts = [0] * len(layers)

    def hook(index: int) -> Any:
        def gather(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = layer_input(args, kwargs).float()
            sums[index] = sums[index] + x.T @ x
            counts[index] += x.shape[0]

        return gather

    hooks = [layer.module.register_forward_pre_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        with torch.no_grad(), as_evaluated(model):
            for batch in batches:
                run_model(model, batch)
    finally:
        for each in hooks:
            each.remove()
    for layer, moment, count in zip(layers, sums, counts, strict=True):
        if count == 0:
            raise unreached(model, layer)
        if not moment.isfinite().all():
            raise at_layer(layer.name, "its calibration inputs hold NaN or infinity; repair the data or the model.")
    return [moment / count for moment, count in zip(sums, counts, strict=True)]


def input_energy(model: nn.Module, layers: Sequence[Layer], batches: Iterable[Any]) -> list[Tensor | None]:
    """Return the mean square of each input of each layer over all tokens: float32 `[K]`; None where none reached it.

    Raises:
        VNMError: inputs that are not finite.
    """
    sums: list[Tensor | None] = [None] * len(layers)
    counts = [0] * len(layers)

    def hook(index: int) -> Any:
        def gather(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = layer_input(args, kwargs).float()
            total, squares = sums[index], x.square().sum(0)
            sums[index] = squares if total is None else total + squares
            counts[index] += x.shape[0]

        return gather

    hooks = [layer.module.register_forward_pre_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        with torch.no_grad(), as_evaluated(model):
            for batch in batches:
                run_model(model, batch)
    finally:
        for each in hooks:
            each.remove()
    for layer, total in zip(layers, sums, strict=True):
        if total is not None and not total.isfinite().all():
            raise at_layer(layer.name, "its calibration inputs hold NaN or infinity; repair the data or the model.")
    return [total / n if total is not None and n else None for total, n in zip(sums, counts, strict=True)]


def unreached(model: nn.Module, layer: Layer) -> VNMError:
    """The error for a layer that saw no input, with the reason where it is known."""
    parent = model.get_submodule(layer.name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return at_layer(
            layer.name,
            "nn.MultiheadAttention multiplies by this weight without calling the layer, so its inputs cannot be seen; "
            f'exclude it (exclude="*.{layer.name.rpartition(".")[2]}"), or use method="magnitude" or "fisher".',
        )
    return at_layer(layer.name, "no calibration data reached it; give batches that do, or exclude the layer.")


def output_error(weight: Tensor, pruned: Tensor, moment: Tensor) -> float:
    """Relative output error `||X W' - X W|| / ||X W||` for inputs with this second moment."""
    weight, change, moment = weight.detach().double(), (pruned - weight).detach().double(), moment.double()
    total = ((weight @ moment) * weight).sum()
    return float((((change @ moment) * change).sum().clamp_min(0) / total).sqrt()) if total > 0 else 0.0
