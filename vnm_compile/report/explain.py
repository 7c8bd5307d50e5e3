"""`vnm.explain`: run the passes as the backend would, and say layer by layer what came of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from vnm_compile._torch import static_sizes, tree_leaves, unwrapped_errors
from vnm_compile.annotate import Layer, annotation_of, linear_layers
from vnm_compile.backend import Prepared, prepare
from vnm_compile.checks import why_unusable
from vnm_compile.errors import VNMError
from vnm_compile.format import matches, pack
from vnm_compile.inventory import dense_weights
from vnm_compile.options import split_options
from vnm_compile.passes import Decision
from vnm_compile.report.cost import CostModel
from vnm_compile.report.explanation import Explanation, LayerReport
from vnm_compile.spec import Spec
from vnm_compile.tensor import VNMTensor
from vnm_compile.weights import detected_spec

log = logging.getLogger(__name__)

COMPRESSED = "stored compressed"


def explain(model: nn.Module, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Explanation:
    """Return, for every linear of `model`, whether `backend="vnm"` runs it sparse, why, and what that is worth.

    With inputs the model is traced and called once (in eager mode, gradients off), and the decisions are those that
    compiling it with the same inputs would take, measurements included. Where a layer is in no graph, the model is
    called once more, to tell whether it runs outside of the graphs or not at all. Without inputs the weights alone are
    looked at.

    What else multiplies by weights (experts, convolutions) is listed as dense and counted, too.

    Args:
        model: the model; a compiled one, or one with compiled parts, is explained by what it was compiled from. Names
            are those of the model before it was compiled.
        args, kwargs: its inputs.
        options: as for `torch.compile`.

    Raises:
        VNMError: an annotated weight breaks its pattern, or an unknown `vnm.` option.
    """
    model = getattr(model, "_orig_mod", model)
    if options is not None and not isinstance(options, Mapping):
        raise VNMError(f"options is a {type(options).__name__}; give a dict, as to torch.compile.")
    ours, _ = split_options(options)
    graphs: list[Prepared] = []
    in_graphs: set[int] = set()
    names = layer_names(model)

    def record(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        graphs.append(prepare(gm, inputs, ours, names))
        in_graphs.update(map(id, inputs))
        return gm.forward

    if not args and not kwargs:
        return describe_graphs(model, graphs)
    trace(model, args, kwargs, record)
    missing = [p for p in _multiplying(model) if id(p) not in in_graphs]
    run = in_graphs | (used_parameters(model, args, kwargs) if missing else set())
    return describe_graphs(model, graphs, in_graphs, run)


def layer_names(model: nn.Module) -> dict[int, str]:
    """Names of what multiplies by weights, by the id of the weight; a graph after a graph break knows only a part."""
    others = {id(each.parameter): each.name for each in dense_weights(model)}
    return {**others, **{id(layer.stored): _plain(layer.name) for layer in linear_layers(model)}}


def describe_graphs(
    model: nn.Module, graphs: Sequence[Prepared], in_graphs: Container[int] = (), run: Container[int] | None = None
) -> Explanation:
    """The explanation of a model whose graphs have been through the passes; without any, by its weights alone.

    Args:
        in_graphs: ids of the parameters that the graphs take.
        run: ids of those that a call of the model uses; None where that is not known.
    """
    device = next((p.device.type for p in model.parameters()), "cpu")
    reports: dict[str, LayerReport] = {}
    for graph in graphs:
        for report in _graph_reports(graph, device):
            # A layer that runs several times is sparse if it is once.
            if report.name not in reports or report.decision == "sparse":
                reports[report.name] = report
    for layer in linear_layers(model):
        if _plain(layer.name) not in reports:
            report = _by_weight(layer, device)
            if graphs or run is not None:
                report = _outside(report, id(layer.stored), in_graphs, run)
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


def _multiplying(model: nn.Module) -> list[Any]:
    linears = [layer.stored for layer in linear_layers(model)]
    return [*linears, *(each.parameter for each in dense_weights(model))]


def _plain(name: str) -> str:
    """A name without the wrappers that torch.compile puts around modules."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def trace(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    backend: Callable[[fx.GraphModule, Sequence[Any]], Any],
    dynamic: bool | None = None,
) -> None:
    """Call the model under Dynamo, gradients off; `backend` gets its graphs and returns what runs them."""
    # Dynamo caches by code object: with one of our own, neither does an earlier compilation answer for this one, nor
    # does this one count against the recompile limit of the model.
    call = FunctionType(_call.__code__.replace(), globals())
    # What was traced before with other sizes, here or elsewhere, must not make these dynamic: the answer would depend
    # on what was asked before.
    with unwrapped_errors(VNMError), torch.no_grad(), static_sizes():
        torch.compile(call, backend=backend, dynamic=dynamic)(model, args, kwargs)


def used_parameters(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> set[int]:
    """Ids of the parameters that functions get in one eager call of the model, gradients off.

    All where the call fails: a cache among the inputs may have been used up by the call before.
    """
    watched = {id(parameter) for parameter in model.parameters()}
    used: set[int] = set()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "") != "__get__":  # .dtype, .shape: nothing is computed
                used.update(watched & {id(leaf) for leaf in tree_leaves((args, kwargs))})
            return func(*args, **(kwargs or {}))

    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), Watch():
            model(*args, **kwargs)
    except Exception as error:
        log.debug("the model cannot be called a second time: %s", error)
        return watched
    return used


def _call(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return model(*args, **kwargs)


def _graph_reports(graph: Prepared, device: str) -> list[LayerReport]:
    companions: dict[int, tuple[str, ...]] = {}
    for unit in graph.units:
        for member in unit.members:
            companions[id(member)] = tuple(_plain(other.name) for other in unit.members if other is not member)
    return [_decided(decision, companions.get(id(decision), ()), device) for decision in graph.decisions]


def _decided(decision: Decision, joined: tuple[str, ...], device: str) -> LayerReport:
    facts = _weight_facts(decision.shape, decision.dtype, decision.spec, decision.tokens, device)
    return LayerReport(
        name=_plain(decision.name),
        decision="sparse" if decision.sparse else "dense",
        reason=decision.reason,
        joined=joined,
        tokens=decision.tokens,
        sparse_seconds=decision.timing.sparse if decision.timing else None,
        dense_seconds=decision.timing.dense if decision.timing else None,
        **facts,
    )


def _by_weight(layer: Layer, device: str) -> LayerReport:
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
            if not matches(layer.weight, spec):
                pack(layer.weight, spec, layer.name)  # raises, and shows where
    else:
        assert weight is not None, "a usable weight is stored"
        spec = detected_spec(weight, layer.transposed)
        reason = f"found {spec} in the weight" if spec else "no V:N:M pattern in its weight"
    decision = "dense" if spec is None else "sparse"
    if spec is not None:
        reason = f"{reason}; with inputs, vnm.explain says what is decided for them"
    facts = _weight_facts(*_size(layer), spec, None, device)
    return LayerReport(name=_plain(layer.name), decision=decision, reason=reason, **facts)


def _size(layer: Layer) -> tuple[tuple[int, int] | None, torch.dtype | None]:
    """`[out_features, in_features]` and dtype of a layer; of a computed weight, those of what it is computed from."""
    candidates = [layer.stored] if layer.stored is not None else layer.module.parameters()
    for each in candidates:
        if not nn.parameter.is_lazy(each) and each.dim() == 2:
            rows, columns = reversed(each.shape) if layer.transposed else each.shape
            return (rows, columns), each.dtype
    return None, None


def _weight_facts(
    shape: tuple[int, ...] | None, dtype: torch.dtype | None, spec: Spec | None, tokens: int | None, device: str
) -> dict[str, Any]:
    """Size, pattern and limits of a weight."""
    known = shape is not None and dtype is not None
    dense = shape[0] * shape[1] * dtype.itemsize if known else None  # type: ignore[index, union-attr]
    facts = {"shape": shape, "density": 1.0, "spec": None, "dense_bytes": dense, "stored_bytes": dense}
    if known and spec is not None:
        out_features, in_features = shape  # type: ignore[misc]
        limit, crossover = _limits(device, out_features, in_features, spec, dtype, tokens or 1)  # type: ignore[arg-type]
        facts |= {"spec": str(spec), "density": spec.density, "limit": limit, "crossover": crossover}
        facts["stored_bytes"] = spec.nbytes(out_features, in_features, dtype)  # type: ignore[arg-type]
    return facts


@lru_cache(maxsize=1024)
def _limits(
    device: str, out_features: int, in_features: int, spec: Spec, dtype: torch.dtype, tokens: int
) -> tuple[float, float | None]:
    """The speed-up limit at `tokens`, and from how many tokens arithmetic bounds the sparse kernel."""
    model = CostModel.on(device, out_features, in_features, spec, dtype)
    return model.speedup_at(tokens), model.compute_bound_from(sparse=True)
