"""`vnm.select_spec`: which pattern, or which patterns, a model should get for a speed-up that is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from vnm_compile.annotate import ANY_SIZE, Selector, select_layers
from vnm_compile.checks import check_usable
from vnm_compile.errors import BadOption, NoCandidate, NothingSelected, VNMError
from vnm_compile.layers import Layer
from vnm_compile.prune.calibration.batches import as_batches
from vnm_compile.quantization import Quantization
from vnm_compile.selection.knapsack import assign
from vnm_compile.selection.layer_errors import layer_errors
from vnm_compile.selection.measured import Measured
from vnm_compile.selection.table import Candidate, Selection
from vnm_compile.selection.times import Seconds, Times
from vnm_compile.selection.trial import Trial
from vnm_compile.spec import Spec

CANDIDATES = (Spec(64, 2, 4), *(Spec(v, 2, m) for m in (5, 6, 7, 8, 10, 12, 16, 20, 32) for v in (16, 32, 64, 128)))
"""The patterns that are looked at unless others are given."""


def select_spec(
    model: nn.Module,
    speedup: float = 2.0,
    candidates: Iterable[Spec | str] = CANDIDATES,
    include: Iterable[Selector] | Selector | None = None,
    exclude: Iterable[Selector] | Selector | None = None,
    tokens: int = 1,
    seconds: Seconds | str | None = None,
    calibration: Iterable[Any] | None = None,
    trial: Trial | None = None,
    per_layer: bool = False,
    values: str | None = None,
    group: int | str = 64,
    progress: bool = True,
) -> Selection:
    """Choose the pattern that costs least quality among those that make the linears of `model` fast enough.

    Uniform: of the candidates that reach the speed-up, the one that allows the most masks, which is what predicts
    quality without training (arXiv 2410.16135, section 4); with calibration data the first few of that ranking are
    tried out on copies of the model, and the lowest loss wins. Per layer: a knapsack, the least sum of the layers'
    squared relative errors within the time that the speed-up leaves, one pattern (or none) a layer.

    Args:
        model: left as it is.
        speedup: dense time over sparse time, over the linears that are selected, all of them taken together.
        candidates: patterns. Layers smaller than a block of one stay dense under it, and count with their dense time.
        include, exclude: which linears, as for `vnm.annotate`.
        tokens: rows of the activations that the time is for: 1 when generating, batch x length otherwise.
        seconds: measured times, or "measured" to time the kernels of this machine (each takes some seconds to compile,
            and is remembered, as under policy "latency"); without them those of `vnm_compile.cost.CostModel`, limits
            that kernels approach, on the device that holds the layer.
        calibration: batches of model inputs, as for `vnm.sparsify`, for the trial and for the errors per layer.
        trial: how the best candidates are tried out where there is calibration data: `vnm_compile.selection.Trial`,
            with its defaults unless given.
        per_layer: choose a pattern for each layer; needs scipy.
        values, group: the speed is that of values which are quantised so, as by `vnm.quantize`; quality is compared as
            it is without.
        progress: show a progress bar.

    Returns:
        The table, and the choice, which `vnm.sparsify` takes as it is.

    Raises:
        VNMError: no candidate reaches the speed-up, there are no layers or one whose weight cannot be pruned, a number
            is out of range, the data is no model input, or scipy is missing.
    """
    specs = list(dict.fromkeys(Spec.parse(each) for each in candidates))
    trial = Trial() if trial is None else trial
    numbers = all(isinstance(number, int | float) for number in (speedup, tokens, trial.candidates))
    if not specs or not numbers or not speedup > 0 or tokens < 1 or trial.candidates < 1:
        raise BadOption("select_spec takes at least one candidate, a speedup above 0, and tokens from 1 on.")
    model = getattr(model, "_orig_mod", model)
    layers = [layer for layer, _ in select_layers(model, ANY_SIZE, include, exclude)]
    if not layers:
        raise NothingSelected("the model has no linear layer that a pattern could be chosen for.")
    check_usable(layers)
    quantization = None if values is None else Quantization.of(values, group)
    if isinstance(seconds, str):
        if seconds != "measured":
            raise BadOption(f'seconds is a function, None or "measured", not {seconds!r}.')
        times = Times(layers, tokens, Measured(layers, specs, tokens, quantization, progress))
    else:
        times = Times(layers, tokens, seconds, quantization)
    search = _Search(model, layers, specs, times, speedup, progress)
    batches = as_batches(calibration)
    return search.one_a_layer(batches) if per_layer else search.one_for_all(batches, trial)


class _Search:
    """What every way of choosing looks at: the layers, and what each pattern would gain them."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        specs: Sequence[Spec],
        times: Times,
        speedup: float,
        progress: bool,
    ) -> None:
        self.model, self.layers, self.specs, self.times = model, layers, specs, times
        self.speedup, self.progress = speedup, progress
        self.rows = {spec: self.row(str(spec), [self.fitting(layer, spec) for layer in layers]) for spec in specs}

    def fitting(self, layer: Layer, spec: Spec) -> Spec | None:
        """The pattern where the layer is at least a block of it."""
        return spec if spec.fits(*layer.weight.shape) else None

    def row(self, name: str, specs: Sequence[Spec | None]) -> Candidate:
        """What a pattern for each layer comes to."""
        pairs = list(zip(self.layers, specs, strict=True))
        weights = sum(layer.weight.numel() for layer in self.layers)
        return Candidate(
            spec=name,
            speedup=self.times.dense / sum(self.times(layer, spec) for layer, spec in pairs),
            density=sum(layer.weight.numel() * (spec.density if spec else 1.0) for layer, spec in pairs) / weights,
            log_masks=sum(spec.log_mask_diversity(*layer.weight.shape) for layer, spec in pairs if spec),
        )

    def one_for_all(self, batches: Sequence[Any], trial: Trial) -> Selection:
        rows = self.rows
        ranked = sorted(self.specs, key=lambda spec: (rows[spec].speedup < self.speedup, -rows[spec].log_masks))
        fast = [spec for spec in ranked if rows[spec].speedup >= self.speedup]
        if not fast:
            raise self.too_slow(max(rows.values(), key=lambda row: row.speedup))
        best = fast[0]
        if batches:
            tried = fast[: trial.candidates]
            for spec in tried:
                names = [layer.name for layer in self.layers if self.fitting(layer, spec)]
                loss = trial.run(self.model, spec, names, batches, self.progress)
                rows[spec] = replace(rows[spec], loss=loss)
            best = min(tried, key=lambda spec: rows[spec].loss or 0.0)
        return Selection(best, [rows[spec] for spec in ranked], rows[best], self.speedup)

    def one_a_layer(self, batches: Sequence[Any]) -> Selection:
        layers, times = self.layers, self.times
        options = [[None, *(spec for spec in self.specs if self.fitting(layer, spec))] for layer in layers]
        errors = layer_errors(self.model, layers, options, batches, self.progress)
        costs = [[times(layer, spec) for spec in offered] for layer, offered in zip(layers, options, strict=True)]
        chosen = assign([[error**2 for error in row] for row in errors], costs, times.dense / self.speedup)
        if chosen is None:
            fastest = [offered[row.index(min(row))] for offered, row in zip(options, costs, strict=True)]
            raise self.too_slow(self.row("the fastest patterns", fastest))
        choice = {layer.name: offered[i] for layer, offered, i in zip(layers, options, chosen, strict=True)}
        mean = sum(error[i] for error, i in zip(errors, chosen, strict=True)) / len(layers)
        row = replace(self.row("per layer", list(choice.values())), loss=mean)
        # The uniform patterns stand beside it with the same measure, their mean error over the layers.
        for spec in self.specs:
            known = [e[o.index(spec)] if spec in o else 0.0 for e, o in zip(errors, options, strict=True)]
            self.rows[spec] = replace(self.rows[spec], loss=sum(known) / len(layers))
        others = sorted(self.rows.values(), key=lambda each: (each.speedup < self.speedup, each.loss))
        return Selection(choice, [row, *others], row, self.speedup)

    def too_slow(self, fastest: Candidate) -> VNMError:
        return NoCandidate(
            f"no candidate reaches {self.speedup:g}x: {fastest.spec} comes closest with {fastest.speedup:.2f}x. "
            "Ask for less, or give candidates with a larger M."
        )
