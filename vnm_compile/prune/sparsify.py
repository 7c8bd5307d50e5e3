"""`vnm.sparsify`: prune a model into the pattern, in place, all chosen layers or none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vnm_compile.annotate import Layer, Selector, select_layers, set_annotation
from vnm_compile.errors import VNMError, at_layer
from vnm_compile.prune.calibrate import execution_order, output_error, second_moments
from vnm_compile.prune.project import project
from vnm_compile.prune.report import LayerPruned, SparsifyReport
from vnm_compile.prune.second_order import DAMPING, second_order
from vnm_compile.spec import Spec
from vnm_compile.tensor import VNMTensor

Norm = Literal["l1", "l2"]
METHODS = {
    "magnitude": "keep the largest weights",
    "wanda": "keep the largest weights times the norm of their inputs; needs calibration data",
    "second_order": "change the layers' outputs least, and make up for what is dropped; needs calibration data",
}
"""The methods of `sparsify`, and what each does."""


def sparsify(
    model: nn.Module,
    spec: Spec | str | Mapping[Selector, Spec | str | None],
    method: str = "magnitude",
    include: Iterable[Selector] | Selector | None = None,
    exclude: Iterable[Selector] | Selector | None = None,
    calibration: Iterable[Any] | None = None,
    norm: Norm = "l1",
    damping: float = DAMPING,
    progress: bool = True,
) -> SparsifyReport:
    """Prune the linears of `model` into a V:N:M pattern, in place, and annotate them.

    With calibration data the layers are pruned block by block in the order in which they run, each on the inputs that
    the blocks pruned before it produce; the data is passed over once a block, and the second moments of one block are
    held at a time (4 K squared bytes a layer).

    Args:
        model: its selected weights are written to; on an error none is.
        spec, include, exclude: which layers and patterns, as for `vnm.annotate`.
        method: a key of `METHODS`. "magnitude" is VENOM's (arXiv 2310.02065, section 5); "wanda" scores as arXiv
            2306.11695 does; "second_order" is described in `vnm_compile.prune.second_order`.
        calibration: batches of model inputs, a tensor, a tuple or a dict each; put the model into eval mode first.
        norm: what is summed over a block by "magnitude" and "wanda": the scores ("l1") or their squares ("l2").
        damping: of the second moments, as a share of their mean diagonal.
        progress: show a progress bar while it runs.

    Returns:
        What is left of each layer.

    Raises:
        VNMError: an unknown method, no layer to prune, a weight that is compressed already or holds NaN, or calibration
            data that is missing, empty, not finite, or does not reach a layer.
    """
    from rich.progress import Progress  # compiling does not need it

    if method not in METHODS:
        raise VNMError(f"unknown method {method!r}; there are {', '.join(METHODS)}.")
    if norm not in ("l1", "l2"):
        raise VNMError(f"norm={norm!r}; it takes 'l1' or 'l2'.")
    selected = select_layers(model, spec, include, exclude)
    if not selected:
        raise VNMError("no layer of the model is large enough for this pattern; choose a smaller V or name the layers.")
    for layer, _ in selected:
        _check(layer)
    batches = _batches(calibration, method)
    with _all_or_none(selected), Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task(f"pruning by {method}", total=len(selected))
        reports: dict[str, LayerPruned] = {}
        for block in _blocks(model, selected, batches):
            moments: Sequence[Tensor | None] = [None] * len(block)
            if method != "magnitude":
                moments = second_moments(model, [layer for layer, _ in block], batches)
            for (layer, layer_spec), moment in zip(block, moments, strict=True):
                reports[layer.name] = _prune(layer, layer_spec, moment, method, norm, damping)
                bar.advance(task)
    for layer, layer_spec in selected:
        set_annotation(layer.module, layer_spec, layer.name)
    return SparsifyReport(method, [reports[layer.name] for layer, _ in selected])


def _prune(layer: Layer, spec: Spec, moment: Tensor | None, method: str, norm: Norm, damping: float) -> LayerPruned:
    """Prune one layer in place."""
    with torch.no_grad():
        weight = layer.weight
        before = weight.detach().clone()
        if method == "second_order" and moment is not None:
            weight.copy_(second_order(weight, moment, spec, damping))
        else:
            scores = before.float().abs()
            scores = scores if moment is None else scores * moment.diagonal().sqrt()
            weight.mul_(project(scores if norm == "l1" else scores.square(), spec))
        total = before.abs().sum(dtype=torch.float64).item()
        kept = (before.abs() * (weight != 0)).sum(dtype=torch.float64).item()
        error = output_error(before, weight, moment) if moment is not None else None
    shape = (weight.shape[0], weight.shape[1])
    return LayerPruned(layer.name, shape, str(spec), kept / total if total else 1.0, error)


def _batches(calibration: Iterable[Any] | None, method: str) -> list[Any]:
    batches = list(calibration) if calibration is not None else []
    if method != "magnitude" and not batches:
        found = "there is none" if calibration is None else "it is empty"
        raise VNMError(f'method="{method}" needs calibration data, and {found}; give calibration=[batch, ...].')
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
def _all_or_none(selected: Sequence[tuple[Layer, Spec]]) -> Iterator[None]:
    """Give every layer its weight back if pruning fails, or is interrupted, half way."""
    before = [layer.weight.detach().clone() for layer, _ in selected]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for (layer, _), weight in zip(selected, before, strict=True):
                layer.weight.copy_(weight)
        raise


def _check(layer: Layer) -> None:
    if isinstance(layer.module.weight, VNMTensor):
        raise at_layer(layer.name, "its weight is compressed already; call vnm.decompress_model(model) first.")
    if not layer.weight.isfinite().all():
        raise at_layer(layer.name, "its weight holds NaN or infinity; repair or exclude the layer.")
