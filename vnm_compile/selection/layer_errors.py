"""What each pattern would cost each layer, before anything is pruned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vnm_compile.layers import Layer
from vnm_compile.prune import project
from vnm_compile.prune.calibration import output_error, second_moments
from vnm_compile.spec import Spec


def layer_errors(
    model: nn.Module,
    layers: Sequence[Layer],
    options: Sequence[Sequence[Spec | None]],
    batches: Sequence[Any],
    progress: bool,
) -> list[list[float]]:
    """Return the relative error of every layer under every pattern that it may get; 0 for None, which is dense.

    With data the error is that of the outputs under masks by weight times input norm (the layers' second moments are
    held one layer at a time, a pass over the data each); without, that of the weight under masks by magnitude.

    Raises:
        VNMError: the data does not reach a layer, or is not finite.
    """
    from rich.progress import track

    pairs = list(zip(layers, options, strict=True))
    errors = []
    for layer, offered in track(pairs, "errors of patterns", transient=True, disable=not progress):
        moment = second_moments(model, [layer], batches)[0] if batches else None
        errors.append([0.0 if spec is None else _error(layer, spec, moment) for spec in offered])
    return errors


def _error(layer: Layer, spec: Spec, moment: Tensor | None) -> float:
    weight = layer.weight.detach().float()
    if moment is not None:
        mask = project(weight.abs() * moment.diagonal().sqrt(), spec)
        return output_error(weight, weight * mask, moment)
    mask = project(weight.abs(), spec)
    total = float(weight.norm())
    return float((weight * ~mask).norm()) / total if total else 0.0
