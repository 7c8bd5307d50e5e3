"""`vnm.select_spec`: which pattern, or which patterns, a model should get for a speed-up that is asked for."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vnm_compile.annotate import ANY_SIZE, Selector, select_layers
from vnm_compile.checks import check_usable
from vnm_compile.cost import CostModel
from vnm_compile.errors import VNMError
from vnm_compile.layers import Layer
from vnm_compile.prune import Method, sparsify
from vnm_compile.prune.calibration import calibrating
from vnm_compile.prune.calibration.batches import as_batches
from vnm_compile.selection.knapsack import assign
from vnm_compile.selection.layer_errors import layer_errors
from vnm_compile.selection.table import Candidate, Selection
from vnm_compile.spec import Spec

CANDIDATES = (Spec(64, 2, 4), *(Spec(v, 2, m) for m in (5, 6, 7, 8, 10, 12, 16, 20, 32) for v in (32, 64, 128)))
"""The patterns that are looked at unless others are given."""

Seconds = Callable[[int, int, Spec | None], float]
"""`seconds(out_features, in_features, spec)`: measured time of a linear; dense for spec None."""


def select_spec(
    model: nn.Module,
    speedup: float = 2.0,
    candidates: Iterable[Spec | str] = CANDIDATES,
    include: Iterable[Selector] | Selector | None = None,
    exclude: Iterable[Selector] | Selector | None = None,
    tokens: int = 1,
    seconds: Seconds | None = None,
    calibration: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], float] | None = None,
    method: str | Method = "magnitude",
    check: int = 3,
    per_layer: bool = False,
    progress: bool = True,
) -> Selection:
    """Choose the pattern that costs least quality among those that make the linears of `model` fast enough.

    Uniform: of the candidates that reach the speed-up, the one that allows the most masks, which is what predicts
    quality without training (arXiv 2410.16135, section 4); with calibration data the first `check` of that ranking are
    tried out on copies of the model, and the lowest loss wins. Per layer: a knapsack, the least sum of the layers'
    squared relative errors within the time that the speed-up leaves, one pattern (or none) a layer.

    Args:
        model: left as it is.
        speedup: dense time over sparse time, over the linears that are selected, all of them taken together.
        candidates: patterns. Layers smaller than a block of one stay dense under it, and count with their dense time.
        include, exclude: which linears, as for `vnm.annotate`.
        tokens: rows of the activations that the time is for: 1 when generating, batch x length otherwise.
        seconds: measured times; without them those of `vnm_compile.cost.CostModel`, limits that kernels approach,
            on the device that holds the model.
        calibration: batches of model inputs, as for `vnm.sparsify`, for the check and for the errors per layer.
        loss: `loss(model, batch)`, a number; without it the mean relative output error of the layers is compared.
        method: how copies are pruned for the check.
        check: how many of the best candidates are tried out where there is calibration data.
        per_layer: choose a pattern for each layer; needs scipy.
        progress: show a progress bar.

    Returns:
        The table, and the choice, which `vnm.sparsify` takes as it is.

    Raises:
        VNMError: no candidate reaches the speed-up, there are no layers or one whose weight cannot be pruned, a number
            is out of range, the data is no model input, or scipy is missing.
    """
    specs = list(dict.fromkeys(Spec.parse(each) for each in candidates))
    numbers = all(isinstance(number, int | float) for number in (speedup, tokens, check))
    if not specs or not numbers or not speedup > 0 or tokens < 1 or check < 1:
        raise VNMError("select_spec takes at least one candidate, a speedup above 0, and tokens and check from 1 on.")
    model = getattr(model, "_orig_mod", model)
    layers = [layer for layer, _ in select_layers(model, ANY_SIZE, include, exclude)]
    if not layers:
        raise VNMError("the model has no linear layer that a pattern could be chosen for.")
    check_usable(layers)
    times = _Times(layers, tokens, seconds)
    fitting = {spec: _fitting(layers, spec) for spec in specs}
    rows = {spec: _candidate(layers, fitting[spec], spec, times) for spec in specs}
    ranked = sorted(specs, key=lambda spec: (rows[spec].speedup < speedup, -rows[spec].log_masks))
    batches = as_batches(calibration)
    if per_layer:
        return _per_layer(model, layers, specs, rows, fitting, times, speedup, batches, progress)
    fast = [spec for spec in ranked if rows[spec].speedup >= speedup]
    if not fast:
        raise _too_slow(max(rows.values(), key=lambda row: row.speedup), speedup)
    best = fast[0]
    if batches:
        for spec in fast[:check]:
            names = [layer.name for layer in fitting[spec]]
            rows[spec] = replace(rows[spec], loss=_try_out(model, spec, names, batches, loss, method, progress))
        best = min(fast[:check], key=lambda spec: rows[spec].loss or 0.0)
    return Selection(best, [rows[spec] for spec in ranked], rows[best], speedup)


class _Times:
    """The time of a layer, dense or in a pattern; layers of one size are asked for once."""

    def __init__(self, layers: Sequence[Layer], tokens: int, seconds: Seconds | None) -> None:
        self._tokens, self._seconds = tokens, seconds
        self._known: dict[tuple[int, int, torch.dtype, Spec | None], float] = {}
        self.dense = sum(self(layer, None) for layer in layers)

    def __call__(self, layer: Layer, spec: Spec | None) -> float:
        out_features, in_features = layer.weight.shape
        key = out_features, in_features, layer.weight.dtype, spec
        if key not in self._known:
            if self._seconds is not None:
                time = self._seconds(out_features, in_features, spec)
            else:
                device = layer.weight.device.type
                model = CostModel.on(device, out_features, in_features, spec or Spec(1, 2, 4), layer.weight.dtype)
                time = model.time_at(self._tokens, sparse=spec is not None)
            if not isinstance(time, int | float) or not time > 0:
                raise VNMError(
                    f"seconds({out_features}, {in_features}, {spec}) returned {time!r}; it must be positive."
                )
            self._known[key] = time
        return self._known[key]


def _fitting(layers: Sequence[Layer], spec: Spec) -> list[Layer]:
    return [layer for layer in layers if layer.weight.shape[0] >= spec.v and layer.weight.shape[1] >= spec.m]


def _candidate(layers: Sequence[Layer], fitting: Sequence[Layer], spec: Spec, times: _Times) -> Candidate:
    inside = {layer.name for layer in fitting}
    return _row(str(spec), layers, [spec if layer.name in inside else None for layer in layers], times)


def _row(name: str, layers: Sequence[Layer], specs: Sequence[Spec | None], times: _Times) -> Candidate:
    pairs = list(zip(layers, specs, strict=True))
    weights = sum(layer.weight.numel() for layer in layers)
    return Candidate(
        spec=name,
        speedup=times.dense / sum(times(layer, spec) for layer, spec in pairs),
        density=sum(layer.weight.numel() * (spec.density if spec else 1.0) for layer, spec in pairs) / weights,
        log_masks=sum(spec.log_mask_diversity(*layer.weight.shape) for layer, spec in pairs if spec),
    )


def _try_out(
    model: nn.Module,
    spec: Spec,
    names: list[str],
    batches: Sequence[Any],
    loss: Callable[[nn.Module, Any], float] | None,
    method: str | Method,
    progress: bool,
) -> float:
    """Prune a copy of the model, and measure it."""
    pruned = copy.deepcopy(model)
    unseen = batches if loss is None else None
    report = sparsify(
        pruned, spec, method, include=names, calibration=batches, held_out=unseen, progress=progress
    )  # fmt: skip
    if loss is None:
        return sum(layer.held_out_error or 0.0 for layer in report.layers) / len(report.layers)
    with torch.no_grad(), calibrating(pruned):
        mean = sum(float(loss(pruned, batch)) for batch in batches) / len(batches)
    if not math.isfinite(mean):
        raise VNMError(f"the mean loss of the model pruned to {spec} is {mean}; a loss has to be a finite number.")
    return mean


def _per_layer(
    model: nn.Module,
    layers: Sequence[Layer],
    specs: Sequence[Spec],
    rows: dict[Spec, Candidate],
    fitting: dict[Spec, list[Layer]],
    times: _Times,
    speedup: float,
    batches: Sequence[Any],
    progress: bool,
) -> Selection:
    inside = {spec: {layer.name for layer in fitting[spec]} for spec in specs}
    options = [[None, *(spec for spec in specs if layer.name in inside[spec])] for layer in layers]
    errors = layer_errors(model, layers, options, batches, progress)
    costs = [[times(layer, spec) for spec in offered] for layer, offered in zip(layers, options, strict=True)]
    chosen = assign([[error**2 for error in row] for row in errors], costs, times.dense / speedup)
    if chosen is None:
        fastest = [offered[row.index(min(row))] for offered, row in zip(options, costs, strict=True)]
        raise _too_slow(_row("the fastest patterns", layers, fastest, times), speedup)
    choice = {layer.name: offered[i] for layer, offered, i in zip(layers, options, chosen, strict=True)}
    row = _row("per layer", layers, list(choice.values()), times)
    mean = sum(error[i] for error, i in zip(errors, chosen, strict=True)) / len(layers)
    row = replace(row, loss=mean)
    # The uniform patterns stand beside it with the same measure, their mean error over the layers.
    for spec in specs:
        known = [e[o.index(spec)] if spec in o else 0.0 for e, o in zip(errors, options, strict=True)]
        rows[spec] = replace(rows[spec], loss=sum(known) / len(layers))
    others = sorted(rows.values(), key=lambda each: (each.speedup < speedup, each.loss))
    return Selection(choice, [row, *others], row, speedup)


def _too_slow(fastest: Candidate, speedup: float) -> VNMError:
    return VNMError(
        f"no candidate reaches {speedup:g}x: {fastest.spec} comes closest with {fastest.speedup:.2f}x. "
        "Ask for less, or give candidates with a larger M."
    )
