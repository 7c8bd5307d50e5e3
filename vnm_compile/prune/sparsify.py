"""`vnm.sparsify`: prune a model into the pattern, in place, all chosen layers or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from rich.progress import track
from torch import Tensor, nn

from vnm_compile.annotate import Layer, Selector, select_layers, set_annotation
from vnm_compile.errors import VNMError, at_layer
from vnm_compile.prune.project import project
from vnm_compile.prune.report import LayerPruned, SparsifyReport
from vnm_compile.spec import Spec
from vnm_compile.tensor import VNMTensor

Norm = Literal["l1", "l2"]


def sparsify(
    model: nn.Module,
    spec: Spec | str | Mapping[Selector, Spec | str | None],
    method: str = "magnitude",
    include: Iterable[Selector] | Selector | None = None,
    exclude: Iterable[Selector] | Selector | None = None,
    norm: Norm = "l1",
    progress: bool = True,
) -> SparsifyReport:
    """Prune the linears of `model` into a V:N:M pattern, in place, and annotate them.

    Args:
        model: its selected weights are written to; on an error none is.
        spec, include, exclude: which layers and patterns, as for `vnm.annotate`.
        method: a key of `METHODS`. "magnitude" keeps the largest weights (VENOM, arXiv 2310.02065, section 5).
        norm: what is summed over a block: absolute values ("l1") or squares ("l2").
        progress: show a progress bar while it runs.

    Returns:
        What is left of each layer.

    Raises:
        VNMError: an unknown method, no layer to prune, or a weight that is compressed already or holds NaN.
    """
    if method not in METHODS:
        raise VNMError(f"unknown method {method!r}; there are {', '.join(METHODS)}.")
    if norm not in ("l1", "l2"):
        raise VNMError(f"norm={norm!r}; it takes 'l1' or 'l2'.")
    selected = select_layers(model, spec, include, exclude)
    if not selected:
        raise VNMError("no layer of the model is large enough for this pattern; choose a smaller V or name the layers.")
    for layer, _ in selected:
        _check(layer)
    masks = []
    with torch.no_grad():
        for layer, layer_spec in track(selected, "pruning", disable=not progress, transient=True):
            masks.append(METHODS[method](layer.weight, layer_spec, norm))
        return SparsifyReport(method, [_apply(*each, mask) for each, mask in zip(selected, masks, strict=True)])


def _magnitude(weight: Tensor, spec: Spec, norm: Norm) -> Tensor:
    scores = weight.detach().float()
    return project(scores.abs() if norm == "l1" else scores.square(), spec)


METHODS: dict[str, Callable[[Tensor, Spec, Norm], Tensor]] = {"magnitude": _magnitude}
"""The mask of a weight, by the name of the method that finds it."""


def _check(layer: Layer) -> None:
    if isinstance(layer.module.weight, VNMTensor):
        raise at_layer(layer.name, "its weight is compressed already; call vnm.decompress_model(model) first.")
    if not layer.weight.isfinite().all():
        raise at_layer(layer.name, "its weight holds NaN or infinity; repair or exclude the layer.")


def _apply(layer: Layer, spec: Spec, mask: Tensor) -> LayerPruned:
    weight = layer.weight
    total = weight.abs().sum(dtype=torch.float64).item()
    weight.mul_(mask)
    kept = weight.abs().sum(dtype=torch.float64).item()
    set_annotation(layer.module, spec, layer.name)
    shape = (weight.shape[0], weight.shape[1])
    return LayerPruned(layer.name, shape, str(spec), kept / total if total else 1.0)
