"""What became of each layer, as records: from graphs that have been through the passes, or from weights alone."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from vnm_compile.annotate import annotation_of
from vnm_compile.backend import Prepared
from vnm_compile.checks import why_unusable
from vnm_compile.codegen.inductor import why_no_kernel
from vnm_compile.cost import CostModel
from vnm_compile.explanation.explanation import Explanation
from vnm_compile.explanation.layer import COMPRESSED, LayerReport
from vnm_compile.format import check_pattern
from vnm_compile.hardware import Target
from vnm_compile.inventory import dense_weights
from vnm_compile.layers import Layer, OnValues, linear_layers, on_values, plain_name
from vnm_compile.layout import Layout
from vnm_compile.passes import Decision
from vnm_compile.spec import Spec
from vnm_compile.tensor import VNMTensor
from vnm_compile.weights import detected_spec

Place = str | Target
"""A device, or a GPU that need not be there."""


def describe_graphs(
    model: nn.Module,
    graphs: Sequence[Prepared],
    in_graphs: Container[int] = (),
    run: Container[int] | None = None,
    target: Target | None = None,
) -> Explanation:
    """The explanation of a model whose graphs have been through the passes; without any, by its weights alone.

    Args:
        in_graphs: ids of the parameters that the graphs take.
        run: ids of those that a call of the model uses; None where that is not known.
        target: the GPU that the model is taken to run on; None for where it is.
    """
    device = target.name if target else next((p.device.type for p in model.parameters()), "cpu")
    linears = list(linear_layers(model))
    devices: dict[str, Place] = {plain_name(layer.name): target or _device(layer) for layer in linears}
    reports: dict[str, LayerReport] = {}
    for graph in graphs:
        for report in _graph_reports(graph, devices, target or device):
            # A layer that runs several times is sparse if it is once.
            if report.name not in reports or report.decision == "sparse":
                reports[report.name] = report
    for layer in linears:
        if plain_name(layer.name) not in reports:
            report = _by_weight(layer, devices[plain_name(layer.name)])
            if graphs or run is not None:
                report = _outside(report, id(layer.stored), in_graphs, run)
            reports[report.name] = report
    for name, module in on_values(model):
        report = _on_values(name, module)
        if run is not None and id(module.values) not in in_graphs:
            report = _outside(report, id(module.values), in_graphs, run)
        reports[report.name] = report
    for each in dense_weights(model):
        known = reports.get(each.name)
        if known is not None and known.dense_bytes is None:
            reports[each.name] = replace(
                known, shape=each.shape, dense_bytes=each.nbytes, stored_bytes=each.nbytes, linear=False
            )
        elif known is None:
            report = LayerReport(
                each.name, each.shape, None, 1.0, each.nbytes, each.nbytes, "dense", each.reason, linear=False
            )
            if run is not None and id(each.parameter) not in in_graphs:
                report = _outside(report, id(each.parameter), in_graphs, run)
            reports[report.name] = report
    return Explanation(reports.values(), len(graphs), device)


def _on_values(name: str, module: OnValues) -> LayerReport:
    """The report of a layer whose parameter is what its weight keeps (`vnm.train.compress_for_training`)."""
    layout, dtype = module.stored_layout, module.values.dtype
    shape, stored = (layout.out_features, layout.in_features), layout.nbytes(dtype)
    reason = f"{COMPRESSED}, its values train" if module.values.requires_grad else COMPRESSED
    dense = shape[0] * shape[1] * dtype.itemsize
    density = layout.spec.n / layout.spec.m
    return LayerReport(name, shape, str(layout.spec), density, dense, stored, "sparse", reason)


def _outside(report: LayerReport, weight: int, in_graphs: Container[int], run: Container[int] | None) -> LayerReport:
    """The report of a layer that no graph multiplies by as a linear does."""
    if weight in in_graphs:
        reason = "a graph reads its weight, but in no linear that is rewritten (a higher-order op, or combined first)"
    elif run is None:
        reason = "it is in none of the graphs that these inputs lead to"
    elif weight in run:
        reason = (
            "it runs outside of the graphs that torch.compile makes (a graph break, torch.compiler.disable, or code "
            "that Dynamo skips); fullgraph=True shows where"
        )
    else:
        return replace(report, decision="not run", reason="the given inputs did not reach it")
    stored = report.stored_bytes if report.reason.startswith(COMPRESSED) else report.dense_bytes
    return replace(report, decision="dense", reason=reason, stored_bytes=stored)


def _device(layer: Layer) -> str:
    """Where a layer's weight lies, with its index: a machine may have GPUs of several kinds."""
    return next((str(each.device) for each in (layer.stored, *layer.module.parameters()) if each is not None), "cpu")


def _graph_reports(graph: Prepared, devices: Mapping[str, Place], device: Place) -> list[LayerReport]:
    """`devices`: where the weights of layers lie, by name; `device`: where those of others may be taken to lie."""
    companions: dict[int, tuple[str, ...]] = {}
    for unit in graph.units:
        for member in unit.members:
            companions[id(member)] = tuple(plain_name(other.name) for other in unit.members if other is not member)
    return [
        _decided(each, companions.get(id(each), ()), devices.get(plain_name(each.name), device))
        for each in graph.decisions
    ]


def _decided(decision: Decision, joined: tuple[str, ...], device: Place) -> LayerReport:
    facts = _weight_facts(decision.shape, decision.dtype, decision.layout, decision.tokens, device)
    outcome, reason = _told(
        "sparse" if decision.sparse else "dense", decision.reason, decision.layout, decision.dtype, device
    )
    return LayerReport(
        name=plain_name(decision.name),
        decision=outcome,
        reason=reason,
        joined=joined,
        tokens=decision.tokens,
        sparse_seconds=decision.timing.sparse if decision.timing else None,
        dense_seconds=decision.timing.dense if decision.timing else None,
        **facts,
    )


def _by_weight(layer: Layer, device: Place) -> LayerReport:
    """The report of a layer of which no graph is known: from its weight alone.

    Raises:
        VNMError: it is annotated, and its weight breaks the pattern; so compiling it would.
    """
    weight, annotation = layer.stored, annotation_of(layer.module)
    unusable = why_unusable(layer)
    spec: Spec | None
    if isinstance(weight, VNMTensor):
        spec, reason = weight.spec, COMPRESSED
    elif unusable is not None:
        spec, reason = None, unusable
    elif annotation is not None:
        spec, reason = annotation.spec, "annotated"
        with torch.no_grad():
            check_pattern(layer.weight, spec, layer.name)
    else:
        assert weight is not None, "a usable weight is stored"
        spec = detected_spec(weight, layer.transposed)
        reason = f"found {spec} in the weight" if spec else "no V:N:M pattern in its weight"
    decision = "dense" if spec is None else "sparse"
    if spec is not None:
        reason = f"{reason}; with inputs, vnm.explain says what is decided for them"
    shape, dtype = _size(layer)
    stored = Layout(spec, *shape) if spec is not None and shape is not None else None
    if isinstance(weight, VNMTensor):
        stored = weight.layout_of_arrays
    facts = _weight_facts(shape, dtype, stored, None, device)
    decision, reason = _told(decision, reason, stored, dtype, device)
    return LayerReport(name=plain_name(layer.name), decision=decision, reason=reason, **facts)


def _told(
    decision: str, reason: str, layout: Layout | None, dtype: torch.dtype | None, device: Place
) -> tuple[str, str]:
    """Decision and reason of a layer: how quantised values are stored, and why a weight is unpacked if it is."""
    if layout is None:
        return decision, reason
    if layout.quantization is not None:
        how = f"values as {layout.exact.quantization}"
        how += ", activations rounded to int8" if layout.rounds else ""
        reason = reason.replace(COMPRESSED, f"{COMPRESSED}, {how}", 1)
    kind = "cuda" if isinstance(device, Target) else torch.device(device).type
    if decision == "dense" or dtype is None or kind == "meta":
        return decision, reason
    lacking = why_no_kernel(kind, layout, dtype)
    return ("dense", f"{reason}; {lacking}: the weight is unpacked on every call") if lacking else (decision, reason)


def _size(layer: Layer) -> tuple[tuple[int, int] | None, torch.dtype | None]:
    """`[out_features, in_features]` and dtype of a layer; of a computed weight, those of what it is computed from."""
    candidates = [layer.stored] if layer.stored is not None else layer.module.parameters()
    for each in candidates:
        if not nn.parameter.is_lazy(each) and each.dim() == 2:
            rows, columns = reversed(each.shape) if layer.transposed else each.shape
            return (rows, columns), each.dtype
    return None, None


def _weight_facts(
    shape: tuple[int, ...] | None, dtype: torch.dtype | None, layout: Layout | None, tokens: int | None, device: Place
) -> dict[str, Any]:
    """Size, pattern and limits of a weight."""
    known = shape is not None and dtype is not None
    dense = shape[0] * shape[1] * dtype.itemsize if known else None  # type: ignore[index, union-attr]
    facts = {"shape": shape, "density": 1.0, "spec": None, "dense_bytes": dense, "stored_bytes": dense}
    if layout is not None and dtype is not None:
        limit, crossover = _limits(device, layout, dtype, tokens or 1)
        facts |= {"spec": str(layout.spec), "density": layout.spec.density, "limit": limit, "crossover": crossover}
        facts["stored_bytes"] = layout.nbytes(dtype)
    return facts


@lru_cache(maxsize=1024)
def _limits(device: Place, layout: Layout, dtype: torch.dtype, tokens: int) -> tuple[float, float | None]:
    """The speed-up limit at `tokens`, and from how many tokens arithmetic bounds the sparse kernel."""
    model = CostModel.on(device, layout.out_features, layout.in_features, layout, dtype)
    return model.speedup_at(tokens), model.compute_bound_from(sparse=True)
