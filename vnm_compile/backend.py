"""`torch.compile(model, backend="vnm")`: the only place that knows the order of things.

    Dynamo's graph ── find ── plan ── merge ── rewrite ── Inductor (our lowerings) ── dispatcher

Registered through the entry point group `torch_dynamo_backends`, so it works where vnm_compile was never imported.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from vnm_compile import dispatch
from vnm_compile._torch import (
    FakeTensor,
    TracingContext,
    fake_modes,
    forget_descriptions,
    in_forward_mode,
    trace_artifact,
)
from vnm_compile.codegen.inductor import check_options, compile_graph, mode_options
from vnm_compile.codegen.measure import measure
from vnm_compile.contents import contents, known_storages
from vnm_compile.errors import BadModel, VNMError, for_dynamo
from vnm_compile.options import Options, split_options
from vnm_compile.passes import (
    FIND,
    PASSES,
    PLAN,
    WRITE,
    Decision,
    Progress,
    Rewritten,
    Unit,
    own_copy,
    read_only_results,
    rewrite,
    run_passes,
)
from vnm_compile.session import session

log = logging.getLogger(__name__)


def vnm(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    name: str | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Compile a Dynamo graph with its V:N:M linears made sparse; the function behind `backend="vnm"`.

    Args:
        gm: the graph; it is not changed.
        example_inputs: its inputs, the real parameters among them.
        mode: as `torch.compile` takes it.
        options: Inductor's own options, and ours with the prefix `vnm.` (see `vnm_compile.options.Options`).
        name: accepted and unused (torch 2.15 passes it on).

    Raises:
        VNMError: an unknown option or mode, an annotated weight that breaks its pattern, or a write into a view of a
            compressed weight.
    """
    try:
        ours, inductors = split_options(options)
        patches = {**mode_options(mode), **check_options(inductors)}
        finish = partial(compile_graph, patches=patches, options_key=ours.key)
        return compile_with(gm, example_inputs, ours, finish)
    except VNMError as error:
        raise for_dynamo(error) from None


Finish = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
"""Turns a rewritten graph and its inputs into something callable."""


@dataclass(frozen=True)
class Prepared:
    """A graph after the passes.

    Attributes:
        decisions: one a linear.
        units: what was joined.
        rewritten: the graph; None where nothing is sparse and the graph stays as it was.
        arrays: the inputs that the rewritten graph takes after those of the original one.
    """

    decisions: list[Decision]
    units: list[Unit]
    rewritten: Rewritten | None
    arrays: tuple[Tensor, ...]


def prepare(
    gm: fx.GraphModule, inputs: Sequence[Any], options: Options, names: Mapping[int, str] | None = None
) -> Prepared:
    """Run the passes on a Dynamo graph: what the backend does short of compiling it.

    `names` are those of layers by the id of their weight, where more is known than the graph tells.
    """
    return _packed(run_passes(PASSES, Progress(gm, inputs, options, measure, names)))


def compile_prepared(
    gm: fx.GraphModule, inputs: Sequence[Any], prepared: Prepared, patches: Mapping[str, Any], options: Options
) -> Callable[..., Any]:
    """Compile a graph that has been through the passes, for these inputs only (no dispatcher watches the weights)."""
    graph = prepared.rewritten.gm if prepared.rewritten else _plain_copy(gm)
    return compile_graph(graph, [*inputs, *_faked(prepared.arrays)], dict(patches), options.key)


def compile_with(gm: fx.GraphModule, inputs: Sequence[Any], options: Options, finish: Finish) -> Callable[..., Any]:
    """Run the passes, compile with `finish`, and return the dispatcher; the dense graph itself if nothing is sparse."""
    try:
        return _compile_with(gm, inputs, options, finish)
    finally:
        _let_go(gm.graph, inputs)


def _compile_with(gm: fx.GraphModule, inputs: Sequence[Any], options: Options, finish: Finish) -> Callable[..., Any]:
    own = own_copy(gm)
    found = run_passes(FIND, Progress(own, inputs, options, measure))
    found = replace(found, inputs=())  # it is kept, and holds no weight

    def decide(args: Sequence[Any]) -> list[Decision]:
        return list(run_passes(PLAN, replace(found, inputs=args)).decisions)

    def build(args: Sequence[Any], decisions: list[Decision], first: bool) -> dispatch.Variant:
        prepared = _packed(run_passes(WRITE, replace(found, inputs=args, decisions=decisions)))
        graph = prepared.rewritten.gm if prepared.rewritten else _plain_copy(own)
        # A later variant is not compiled inside Dynamo's call to the backend: Dynamo traces the graph itself then, and
        # keeps those shapes dynamic that have to be.
        inputs = [*args, *_faked(prepared.arrays)]
        call = finish(graph, inputs) if first else torch.compile(graph, backend=finish)
        return dispatch.Variant(decisions, prepared.rewritten.packed if prepared.rewritten else (), call)

    positions = sorted({site.index for site in found.sites if site.reason is None and site.index is not None})
    if not positions:
        _report(decide(inputs))
        return read_only_results(finish(gm, inputs), found.read_only)
    dispatcher = dispatch.Dispatcher(positions, decide, build)
    if any(isinstance(inputs[i], FakeTensor) for i in positions):
        log.info("the weights of this graph have no values yet; it is compiled at its first call")
        return read_only_results(_with_tangents(own, dispatcher), found.read_only)
    # Whatever was known of the weights, and however they were written to since: a fresh compilation looks at them anew.
    contents.suspect(known_storages(inputs[i] for i in positions))
    _report(dispatcher.bind(inputs, first=True).variant.decisions)
    return read_only_results(_with_tangents(own, dispatcher), found.read_only)


def _let_go(graph: fx.Graph, inputs: Sequence[Any]) -> None:
    """Drop the weak references to the inputs that the fake tensors of a graph hold through their modes."""
    forget_descriptions(fake_modes([node.meta.get("example_value") for node in graph.nodes]), inputs)


def _with_tangents(gm: fx.GraphModule, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled graph, but the graph itself where forward-mode AD is under way: kernels drop tangents silently."""

    def run(*args: Any) -> Any:
        return gm(*args) if in_forward_mode() else compiled(*args)

    return run


def refresh(model: nn.Module) -> None:
    """Have every weight looked at anew, element by element, before its next use; what has changed is packed again.

    Only needed after a write that changes few elements of a weight behind torch's back (a single row, through `.data`,
    numpy or DLPack). Every other change is noticed on its own. `model` is the one that was written to; as weights need
    not belong to a module, all that were packed are looked at, which takes as long as reading them once.
    """
    if not isinstance(model, nn.Module):
        raise BadModel(f"vnm.refresh takes a module, not a {type(model).__name__}.")
    dispatch.forget()


def _packed(progress: Progress) -> Prepared:
    """What the passes made, with the arrays of the weights that it needs."""
    rewritten = progress.rewritten
    if rewritten is None:
        return Prepared(list(progress.decisions), [], None, ())
    trace_artifact("vnm_graph", lambda: str(rewritten.gm.graph))
    arrays = tuple(array for group in rewritten.packed for array in dispatch.packed_arrays(progress.inputs, group))
    return Prepared(list(progress.decisions), list(progress.units), rewritten, arrays)


def _plain_copy(gm: fx.GraphModule) -> fx.GraphModule:
    # Inductor takes ownership of the graph it is given; ours is needed again if a weight changes.
    return rewrite(gm, []).gm


def _faked(arrays: Sequence[Tensor]) -> list[Tensor]:
    """The packed arrays with static shapes, as fake tensors where Dynamo traces with them (dynamic=True would
    otherwise make the sizes of a weight symbolic)."""
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return list(arrays)
    return [context.fake_mode.from_tensor(array, static_shapes=True) for array in arrays]


def _warn_of_gradients(decisions: Sequence[Decision]) -> None:
    """Say, once a process, that a model in evaluation mode runs dense only because gradients are on."""
    dense = [decision.name for decision in decisions if decision.only_for_gradients]
    if dense and session.first_time("dense for gradients"):
        warnings.warn(
            f"{len(dense)} V:N:M layers in evaluation mode ({dense[0]}, ...) run dense because gradients are on and "
            "their weights require them. For inference, call it under torch.no_grad() or torch.inference_mode(), "
            "or freeze it with model.requires_grad_(False).",
            stacklevel=2,
        )


def _report(decisions: Sequence[Decision]) -> None:
    _warn_of_gradients(decisions)
    trace_artifact("vnm_decisions", lambda: "\n".join(f"{d.name}\t{d.spec or 'dense'}\t{d.reason}" for d in decisions))
