"""`vnm.sparsify`: prune a model into the pattern, in place, all chosen layers or none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from glob import escape
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vnm_compile.annotate import Selector, select_layers, set_annotation
from vnm_compile.checks import check_finite, check_usable
from vnm_compile.errors import BadCalibration, BadOption, NothingSelected
from vnm_compile.inventory import others
from vnm_compile.layers import Layer
from vnm_compile.memory import return_freed_memory
from vnm_compile.prune.calibration import as_batches
from vnm_compile.prune.held_out import held_out_errors
from vnm_compile.prune.methods import Job, Method, find_method, undone_on_error
from vnm_compile.prune.outcome import LayerPruned
from vnm_compile.prune.permutation import permuted
from vnm_compile.prune.pruned import Pruned, uninterrupted, write_all
from vnm_compile.prune.resume import PrunedLayers
from vnm_compile.prune.sparsify_report import SparsifyReport
from vnm_compile.quantization import Quantization
from vnm_compile.spec import Spec

Shares = Mapping[str, tuple[float, float]]
"""By layer, what the best mask keeps of its importance, before and after a permutation."""


def sparsify(
    model: nn.Module,
    spec: Spec | str | Mapping[Selector, Spec | str | None],
    method: str | Method = "magnitude",
    include: Iterable[Selector] | Selector | None = None,
    exclude: Iterable[Selector] | Selector | None = None,
    calibration: Iterable[Any] | None = None,
    held_out: Iterable[Any] | None = None,
    checkpoint: str | Path | None = None,
    permute: bool = False,
    values: str | None = None,
    group: int | str = 64,
    progress: bool = True,
) -> SparsifyReport:
    """Prune the linears of `model` into a V:N:M pattern, in place, and annotate them.

    With `Wanda` and `SecondOrder` the layers are pruned block by block in the order in which they run; the data is
    passed over once a block, and the second moments of one block are held at a time (4 K squared bytes a layer). Data
    runs through the model in eval mode, eagerly, without gradients. Positions that a batch's attention_mask (or torch's
    key_padding_mask) says are padding do not count.

    The model is written to when all is done. Until then the pruned weights are held packed: beside the statistics, a
    run takes about the share of the weights that the pattern keeps.

    Args:
        model: its selected weights are written to; on an error nothing of it is changed.
        spec, include, exclude: which layers and patterns, as for `vnm.annotate`.
        method: `vnm.prune.Magnitude`, `Wanda`, `SecondOrder` or `Fisher` with the options that each has, or a key of
            `vnm.prune.METHODS` ("magnitude", "wanda", "second_order", "fisher") for its defaults.
        calibration: an iterable of batches of model inputs, a tensor, a tuple or a dict each; a single tensor or dict
            is one batch.
        held_out: batches that the calibration data does not hold, for the report to measure the layers' errors on.
        checkpoint: a directory in which finished layers are stored, and from which a run that was interrupted takes
            them up again; not for `Fisher`, whose layers are pruned together.
        permute: reorder channels first, wherever their order is free: the model computes what it did, and keeps more of
            its importance under the pattern (`vnm_compile.prune.permutation.permute`). Needs calibration data for every
            method, of which the first batch says how channels run through the model, and SciPy. Weights of other
            layers, biases, norms and embeddings move along. A run that goes on from its `checkpoint` searches again and
            finds the same.
        values, group: "int8" or "int4": quantise what is kept, too, as `vnm.quantize` does, with the same calibration
            data. The weights are compressed then.
        progress: show a progress bar while it runs.

    Returns:
        What is left of each layer, and what else of the model multiplies by weights and stays dense.

    Raises:
        VNMError: an unknown method, no layer to prune, a weight that is compressed already, holds NaN or cannot be
            written to, calibration data that is missing, empty, not finite, no model input, or does not reach a layer,
            a checkpoint of another run, or, with `permute`, a model that torch.export cannot export.
    """
    from rich.progress import Progress  # compiling does not need it

    model, method = getattr(model, "_orig_mod", model), find_method(method)
    if values is not None:
        Quantization.of(values, group)  # before anything is pruned
    _check_checkpoint(method, checkpoint)
    selected = _selected(model, spec, include, exclude)
    layers = [layer for layer, _ in selected]
    batches = _batches(calibration, method, permute)
    unseen = None if held_out is None else as_batches(held_out, "held_out")
    reordered: AbstractContextManager[Shares] = nullcontext({})
    with ExitStack() as last, _own_modes(layers):
        with Progress(disable=not progress) as bar:
            if permute:
                reordered = permuted(model, selected, batches, method.needs_calibration, bar)
            with reordered as shares, undone_on_error() as undo:
                store = _store(checkpoint, method, permute, selected, batches)
                found = method.prune(Job(model, selected, batches, store, bar, undo))
                by_layer = {id(each.layer): each for each in found}
                pruned = [by_layer[id(layer)] for layer in layers]
                errors = [None] * len(layers) if unseen is None else held_out_errors(model, pruned, unseen)
                last.enter_context(uninterrupted())
                write_all(pruned)
        for layer, layer_spec in selected:
            set_annotation(layer.module, layer_spec, layer.name)
    rows = [_row(each, error, shares) for each, error in zip(pruned, errors, strict=True)]
    del found, by_layer, pruned
    return_freed_memory()
    quantized = None
    if values is not None:
        from vnm_compile.quantizing import quantize  # which stands on this part

        names = [escape(layer.name) for layer in layers]
        quantized = quantize(model, values, group, calibration=batches or None, include=names, progress=progress)
    return SparsifyReport(method.name, rows, others(model, {id(layer.module) for layer in layers}), quantized)


def _selected(
    model: nn.Module,
    spec: Spec | str | Mapping[Selector, Spec | str | None],
    include: Iterable[Selector] | Selector | None,
    exclude: Iterable[Selector] | Selector | None,
) -> list[tuple[Layer, Spec]]:
    """The layers that are meant, all of them looked at."""
    selected = select_layers(model, spec, include, exclude)
    if not selected:
        raise NothingSelected(
            "no layer of the model is large enough for this pattern; choose a smaller V or name the layers."
        )
    _check([layer for layer, _ in selected])
    return selected


def _store(
    checkpoint: str | Path | None,
    method: Method,
    permute: bool,
    selected: Sequence[tuple[Layer, Spec]],
    batches: Sequence[Any],
) -> PrunedLayers | None:
    """Where finished layers are kept, with all that a run depends on."""
    if checkpoint is None:
        return None
    names = [[layer.name, str(spec)] for layer, spec in selected]
    return PrunedLayers(
        checkpoint, {"method": method.name, **method.options(), "permute": permute, "layers": names}, batches
    )


def _row(pruned: Pruned, unseen: float | None, shares: Shares) -> LayerPruned:
    out_features, in_features = pruned.layer.weight.shape
    return LayerPruned(
        pruned.layer.name,
        (out_features, in_features),
        str(pruned.spec),
        pruned.retained,
        pruned.output_error,
        unseen,
        *shares.get(pruned.layer.name, (None, None)),
    )


def _check_checkpoint(method: Method, checkpoint: str | Path | None) -> None:
    if checkpoint is not None and not method.resumable:
        raise BadOption(
            f'checkpoint= is for methods that prune layer by layer; "{method.name}" prunes all layers in every step. '
            "Save the model in the retrain callback instead."
        )


def _batches(calibration: Iterable[Any] | None, method: Method, permute: bool) -> list[Any]:
    batches = as_batches(calibration)
    if (method.needs_calibration or permute) and not batches:
        found = "there is none" if calibration is None else "it is empty (a generator that was used up?)"
        what = f'method="{method.name}"' if method.needs_calibration else "permute=True"
        raise BadCalibration(f"{what} needs calibration data, and {found}; give calibration=[batch, ...].")
    return batches


@contextmanager
def _own_modes(layers: Sequence[Layer]) -> Iterator[None]:
    """Leave the caller's inference mode, in which no gradient can be taken; weights that were made in it stay in it."""
    inference = torch.is_inference_mode_enabled() and any(layer.weight.is_inference() for layer in layers)
    with torch.inference_mode(inference):
        yield


def _check(layers: Sequence[Layer]) -> None:
    check_usable(layers, written=True)
    for layer in layers:
        check_finite(layer)
