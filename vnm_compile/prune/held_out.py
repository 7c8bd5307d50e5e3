"""What pruning did to the outputs of layers, measured on data that it did not see."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vnm_compile.annotate import Layer
from vnm_compile.errors import VNMError
from vnm_compile.prune.calibrate import as_evaluated, layer_input, run_model, unreached


def held_out_errors(
    model: nn.Module, layers: Sequence[Layer], dense: Sequence[Tensor], batches: Iterable[Any]
) -> list[float]:
    """Return `||X W' - X W|| / ||X W||` of each layer, X being its inputs in the dense model.

    The model gets its dense weights back for the time of the measurement. Nothing of size K x K is held.

    Args:
        model: pruned; its layers hold W'.
        dense: the weights W, `[out_features, in_features]` each.
        batches: model inputs.

    Raises:
        VNMError: there is no batch, or no token reached a layer.
    """
    pruned = [layer.weight.detach().clone() for layer in layers]
    squares = torch.zeros(2, len(layers), dtype=torch.float64)
    reached = [False] * len(layers)

    def hook(index: int) -> Any:
        def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = layer_input(args, kwargs).float()
            before, after = dense[index].float(), pruned[index].float()
            squares[0, index] += (x @ (after - before).T).square().sum(dtype=torch.float64).cpu()
            squares[1, index] += (x @ before.T).square().sum(dtype=torch.float64).cpu()
            reached[index] |= len(x) > 0

        return compare

    hooks = [layer.module.register_forward_pre_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        with torch.no_grad(), as_evaluated(model):
            _assign(layers, dense)
            for batch in batches:
                run_model(model, batch)
    finally:
        for each in hooks:
            each.remove()
        _assign(layers, pruned)
    if not any(reached):
        raise VNMError("held_out= holds no data; give held_out=[batch, ...], or leave it out.")
    for layer, was in zip(layers, reached, strict=True):
        if not was:
            raise unreached(model, layer)
    change, total = squares
    return torch.where(total > 0, (change / total).sqrt(), 0.0).tolist()


def _assign(layers: Sequence[Layer], weights: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.copy_(weight)
