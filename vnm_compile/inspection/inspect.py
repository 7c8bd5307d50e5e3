"""`vnm.inspect`: the kernels that a model compiles to, on a GPU that need not be there, or here."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx, nn

from vnm_compile.backend import Prepared, compile_prepared
from vnm_compile.codegen.generate import WATCHED, Generated, GeneratedKernel, generate, watch_generated
from vnm_compile.codegen.triton.prepack import AlignedRows
from vnm_compile.codegen.virtual_device import device_target, virtual_device
from vnm_compile.explanation.describe import describe_graphs
from vnm_compile.format import Packed
from vnm_compile.hardware import Target, find_target
from vnm_compile.inspection.kernel import Kernel, LibraryCall
from vnm_compile.inspection.kernel_report import KernelReport
from vnm_compile.inspection.machine_code import compile_kernel
from vnm_compile.options import split_options
from vnm_compile.tracing import record_graphs

log = logging.getLogger(__name__)


def inspect(
    model: nn.Module,
    *args: Any,
    target: Target | str | None = None,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> KernelReport:
    """Return the kernels that `torch.compile(model, backend="vnm")` generates for these inputs.

    The model is traced and called once in eager mode, gradients off, where it is; its weights are not copied. With a
    `target` code is generated and compiled to machine code for that GPU, without one in the machine: nothing can be
    measured then, so every layer with a pattern is made sparse, and of several configurations of a kernel the one is
    taken that the static model ranks first.

    Args:
        model: the model; a compiled one is inspected by what it was compiled from.
        args, kwargs: its inputs, on its device.
        target: a GPU architecture: "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942" or "gfx1100". None
            for the device that the model is on.
        options: as for `torch.compile`; with `cpp_wrapper` the kernels are shown as a wrapper in Python calls them.
        dynamic: as for `torch.compile`.

    Raises:
        VNMError: an unknown target or option, or an annotated weight that breaks its pattern.
    """
    ours, inductors = split_options(options)
    model = getattr(model, "_orig_mod", model)
    goal = find_target(target) if target is not None else None
    if goal is not None:
        ours = replace(ours, policy="memory")
    fixed = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    generated: list[Generated] = []

    def generate_code(gm: fx.GraphModule, inputs: Sequence[Any], prepared: Prepared) -> None:
        # What Dynamo passes for a weight is the weight itself, or an alias of it.
        static = [i for i, value in enumerate(inputs) if id(value) in fixed or isinstance(value, nn.Parameter)]
        static += range(len(inputs), len(inputs) + len(prepared.arrays))
        if goal is not None:
            graph = prepared.rewritten.gm if prepared.rewritten else gm
            everything = [*_as_traced(gm, inputs), *_as_on_a_gpu(prepared)]
            generated.append(generate(graph, everything, goal, static=static, options=inductors))
        else:
            with watch_generated(static) as written:
                compile_prepared(gm, inputs, prepared, {**inductors, **WATCHED}, ours)
            generated.extend(written)

    graphs = record_graphs(model, args, kwargs, ours, generate_code, dynamic)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if goal is None and device.type == "cuda":
        goal = device_target(device)
    with virtual_device(goal) if target is not None and goal is not None else nullcontext():
        kernels = [_kernel(each, i, goal) for i, graph in enumerate(generated) for each in graph.kernels]
    calls = [
        LibraryCall(name, schedule.fused_ops, schedule.flops)
        for graph in generated
        for name, schedule in graph.library_calls
    ]
    explanation = describe_graphs(model, graphs, target=goal if target is not None else None)
    return KernelReport(kernels, calls, [graph.wrapper for graph in generated], explanation, goal)


def _as_traced(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """The inputs of a graph with the sizes that Dynamo traced it with, symbolic ones among them."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    return [node.meta.get("example_value", value) for node, value in zip(placeholders, inputs, strict=True)]


def _as_on_a_gpu(prepared: Prepared) -> Iterator[Tensor]:
    """The packed arrays of a graph as kernels would want them there."""
    arrays = iter(prepared.arrays)
    for group in prepared.rewritten.packed if prepared.rewritten else ():
        for _ in range(group.parts):
            yield from AlignedRows().prepare(Packed(*islice(arrays, len(group.layout.names))))


def _kernel(generated: GeneratedKernel, graph: int, target: Target | None) -> Kernel:
    code = None
    if generated.language == "triton":
        assert target is not None, "Triton kernels are for a GPU"
        log.debug("compiling %s for %s", generated.name, target.name)
        code = compile_kernel(generated.source, generated.name, target)
    return Kernel(generated, graph, code, target)
