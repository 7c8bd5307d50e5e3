"""`vnm.sparsify`: prune a model into the pattern, in place, all chosen layers or none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from vnm_compile.annotate import Layer, Selector, select_layers, set_annotation
from vnm_compile.errors import VNMError, at_layer
from vnm_compile.prune.calibrate import execution_order, output_error, second_moments
from vnm_compile.prune.fisher import Fisher, prune_by_fisher
from vnm_compile.prune.held_out import held_out_errors
from vnm_compile.prune.permute import permuted
from vnm_compile.prune.project import project
from vnm_compile.prune.report import LayerPruned, SparsifyReport
from vnm_compile.prune.resume import PrunedLayers
from vnm_compile.prune.second_order import DAMPING, second_order
from vnm_compile.spec import Spec
from vnm_compile.tensor import VNMTensor

if TYPE_CHECKING:
    from rich.progress import Progress

Norm = Literal["l1", "l2"]
METHODS = {
    "magnitude": "keep the largest weights",
    "wanda": "keep the largest weights times the norm of their inputs; needs calibration data",
    "second_order": "change the layers' outputs least, and make up for what is dropped; needs calibration data",
    "fisher": "change the loss least, in steps with retraining; needs calibration data",
}
"""The methods of `sparsify`, and what each does."""


def sparsify(
    model: nn.Module,
    spec: Spec | str | Mapping[Selector, Spec | str | None],
    method: str | Fisher = "magnitude",
    include: Iterable[Selector] | Selector | None = None,
    exclude: Iterable[Selector] | Selector | None = None,
    calibration: Iterable[Any] | None = None,
    norm: Norm = "l1",
    damping: float = DAMPING,
    held_out: Iterable[Any] | None = None,
    checkpoint: str | Path | None = None,
    permute: bool = False,
    sequential: bool = True,
    progress: bool = True,
) -> SparsifyReport:
    """Prune the linears of `model` into a V:N:M pattern, in place, and annotate them.

    With "wanda" and "second_order" the layers are pruned block by block in the order in which they run; the data is
    passed over once a block, and the second moments of one block are held at a time (4 K squared bytes a layer). Data
    runs through the model in eval mode.

    Args:
        model: its selected weights are written to; on an error nothing of it is changed.
        spec, include, exclude: which layers and patterns, as for `vnm.annotate`.
        method: a key of `METHODS`. "magnitude" is VENOM's (arXiv 2310.02065, section 5); "wanda" scores as arXiv
            2306.11695 does; "second_order" is described in `vnm_compile.prune.second_order`; "fisher" is VENOM's in
            one step, and a `vnm.prune.Fisher` says how many steps, of which loss, with what retraining.
        calibration: batches of model inputs, a tensor, a tuple or a dict each.
        norm: what is summed over a block by "magnitude" and "wanda": the scores ("l1") or their squares ("l2").
        damping: of the second moments, as a share of their mean diagonal.
        held_out: batches that the calibration data does not hold, for the report to measure the layers' errors on.
        checkpoint: a directory in which finished layers are stored, and from which a run that was interrupted takes
            them up again; not for "fisher", whose layers are pruned together.
        permute: reorder channels first, wherever their order is free: the model computes what it did, and keeps more of
            its importance under the pattern (`vnm_compile.prune.permute`). Needs calibration data for every method, of
            which the first batch says how channels run through the model, and SciPy. Weights of other layers, biases,
            norms and embeddings move along. A run that goes on from its `checkpoint` searches again and finds the same.
        sequential: prune a block on the inputs that the blocks pruned before it produce, which keeps the whole model
            closer to the dense one; False: on those of the dense model, which keeps each layer closer to itself. For
            "wanda" and "second_order".
        progress: show a progress bar while it runs.

    Returns:
        What is left of each layer.

    Raises:
        VNMError: an unknown method, no layer to prune, a weight that is compressed already or holds NaN, calibration
            data that is missing, empty, not finite, or does not reach a layer, a checkpoint of another run, or, with
            `permute`, a model that torch.export cannot export.
    """
    from rich.progress import Progress  # compiling does not need it

    name = "fisher" if isinstance(method, Fisher) else method
    _check_arguments(name, norm, checkpoint)
    selected = select_layers(model, spec, include, exclude)
    if not selected:
        raise VNMError("no layer of the model is large enough for this pattern; choose a smaller V or name the layers.")
    layers = [layer for layer, _ in selected]
    for layer in layers:
        _check(layer)
    batches = _batches(calibration, name, permute)
    fisher = method if isinstance(method, Fisher) else Fisher()
    retrained = name == "fisher" and fisher.retrain is not None
    with (
        Progress(disable=not progress) as bar,
        permuted(model, selected, batches, name, bar) if permute else _not_permuted() as shares,
        _all_or_none(model if retrained else None, layers) as dense,
    ):
        errors: dict[str, float | None] = {}
        if name == "fisher":
            prune_by_fisher(model, selected, batches, fisher, bar)
        else:
            settings = {
                "method": name,
                "norm": norm,
                "damping": damping,
                "permute": permute,
                "sequential": sequential,
                "layers": [[each.name, str(s)] for each, s in selected],
            }
            store = PrunedLayers(checkpoint, settings, batches) if checkpoint is not None else None
            blocks = list(_blocks(model, selected, batches))
            if not sequential:
                blocks.reverse()  # what comes before a block is dense when its turn comes
            errors = _prune_by_layers(model, blocks, batches, name, norm, damping, store, bar)
        unseen = [None] * len(layers) if held_out is None else held_out_errors(model, layers, dense, held_out)
    for layer, layer_spec in selected:
        set_annotation(layer.module, layer_spec, layer.name)
    rows = [
        _report(*pair, before, errors.get(pair[0].name), error, shares.get(pair[0].name, (None, None)))
        for pair, before, error in zip(selected, dense, unseen, strict=True)
    ]
    return SparsifyReport(name, rows)


def _prune_by_layers(
    model: nn.Module,
    blocks: Sequence[Sequence[tuple[Layer, Spec]]],
    batches: Sequence[Any],
    method: str,
    norm: Norm,
    damping: float,
    store: PrunedLayers | None,
    bar: Progress,
) -> dict[str, float | None]:
    """Prune in place, block by block; returns the output errors on the calibration data by name."""
    task = bar.add_task(f"pruning by {method}", total=sum(map(len, blocks)))
    errors: dict[str, float | None] = {}
    for block in blocks:
        stored = [store.load(*pair) if store else None for pair in block]
        open_layers = [pair for pair, found in zip(block, stored, strict=True) if found is None]
        moments: Sequence[Tensor | None] = [None] * len(open_layers)
        if method != "magnitude" and open_layers:
            moments = second_moments(model, [layer for layer, _ in open_layers], batches)
        for (layer, _), found in zip(block, stored, strict=True):
            if found is not None:
                with torch.no_grad():
                    layer.weight.copy_(found[0])
                errors[layer.name] = found[1]
                bar.advance(task)
        for (layer, spec), moment in zip(open_layers, moments, strict=True):
            before = layer.weight.detach().clone()
            errors[layer.name] = _prune(layer, spec, moment, method, norm, damping)
            if store:
                store.save(layer, spec, before, errors[layer.name])
            bar.advance(task)
    return errors


def _prune(layer: Layer, spec: Spec, moment: Tensor | None, method: str, norm: Norm, damping: float) -> float | None:
    """Prune one layer in place; returns its output error."""
    with torch.no_grad():
        weight = layer.weight
        before = weight.detach().clone()
        if method == "second_order" and moment is not None:
            weight.copy_(second_order(weight, moment, spec, damping))
        else:
            scores = before.float().abs()
            scores = scores if moment is None else scores * moment.diagonal().sqrt()
            weight.mul_(project(scores if norm == "l1" else scores.square(), spec))
        return output_error(before, weight, moment) if moment is not None else None


def _report(
    layer: Layer,
    spec: Spec,
    dense: Tensor,
    error: float | None,
    unseen: float | None,
    importance: Sequence[float | None],
) -> LayerPruned:
    weight = layer.weight.detach()
    total = dense.abs().sum(dtype=torch.float64).item()
    kept = (dense.abs() * (weight != 0)).sum(dtype=torch.float64).item()
    shape = (weight.shape[0], weight.shape[1])
    return LayerPruned(layer.name, shape, str(spec), kept / total if total else 1.0, error, unseen, *importance)


def _check_arguments(method: str, norm: str, checkpoint: str | Path | None) -> None:
    if method not in METHODS:
        raise VNMError(f"unknown method {method!r}; there are {', '.join(METHODS)}.")
    if norm not in ("l1", "l2"):
        raise VNMError(f"norm={norm!r}; it takes 'l1' or 'l2'.")
    if method == "fisher" and checkpoint is not None:
        raise VNMError(
            'checkpoint= is for methods that prune layer by layer; "fisher" prunes all layers in every step. '
            "Save the model in the retrain callback instead."
        )


def _batches(calibration: Iterable[Any] | None, method: str, permute: bool) -> list[Any]:
    batches = list(calibration) if calibration is not None else []
    if (method != "magnitude" or permute) and not batches:
        found = "there is none" if calibration is None else "it is empty"
        what = f'method="{method}"' if method != "magnitude" else "permute=True"
        raise VNMError(f"{what} needs calibration data, and {found}; give calibration=[batch, ...].")
    return batches


def _blocks(
    model: nn.Module, selected: Sequence[tuple[Layer, Spec]], batches: Sequence[Any]
) -> Iterator[list[tuple[Layer, Spec]]]:
    """The layers in the order in which they run, those of one repeated block (`layers.3`) together."""
    order: Sequence[int] = range(len(selected))
    if batches:
        order = execution_order(model, [layer for layer, _ in selected], batches[0])
    block: list[tuple[Layer, Spec]] = []
    for i in order:
        if block and _block_name(block[0][0].name) != _block_name(selected[i][0].name):
            yield block
            block = []
        block.append(selected[i])
    yield block


def _block_name(name: str) -> str:
    """A layer's name up to its first number: `encoder.layer.3`; the whole name where there is none."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return found.group() if found else name


@contextmanager
def _not_permuted() -> Iterator[dict[str, tuple[float, float]]]:
    """What `permuted` yields where nothing is permuted."""
    yield {}


@contextmanager
def _all_or_none(model: nn.Module | None, layers: Sequence[Layer]) -> Iterator[list[Tensor]]:
    """Yield the layers' dense weights, and give them back to the layers if pruning fails, or is interrupted, half way.

    With a model, all its parameters and buffers come back: retraining changes them too.
    """
    before = [layer.weight.detach().clone() for layer in layers]
    state = {} if model is None else {name: value.clone() for name, value in model.state_dict().items()}
    try:
        yield before
    except BaseException:
        with torch.no_grad():
            if model is not None:
                model.load_state_dict(state)
            for layer, weight in zip(layers, before, strict=True):
                layer.weight.copy_(weight)
        raise


def _check(layer: Layer) -> None:
    if isinstance(layer.module.weight, VNMTensor):
        raise at_layer(layer.name, "its weight is compressed already; call vnm.decompress_model(model) first.")
    if not layer.weight.isfinite().all():
        raise at_layer(layer.name, "its weight holds NaN or infinity; repair or exclude the layer.")
