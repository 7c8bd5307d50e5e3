"""Generate the code of a graph without running it, or watch it being generated for a run."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import fx

from vnm_compile.codegen.inductor import compile_graph, watch_codegen
from vnm_compile.codegen.relocate import fake_inputs, relocate
from vnm_compile.codegen.schedule import Schedule, describe, library_calls
from vnm_compile.codegen.virtual_device import device_guard, virtual_device
from vnm_compile.hardware import Target

WATCHED = {"fx_graph_cache": False, "cpp_wrapper": False}
"""Inductor's options where generated code is watched: no cache that could answer instead, and a wrapper in Python, in
which the kernels are found. A wrapper in C++ calls the same ones."""

# Inductor's options where nothing can be run: no measuring, no worker processes.
_WITHOUT_DEVICE = {
    **WATCHED,
    "compile_threads": 1,
    "shape_padding": False,
    "joint_graph_constant_folding": False,  # it computes on the device
    "benchmark_epilogue_fusion": False,
    "triton.cudagraphs": False,
}


@dataclass(frozen=True)
class GeneratedKernel:
    """A kernel as Inductor wrote it.

    Attributes:
        name: as the wrapper calls it.
        language: "triton" or "cpp".
        source: the complete file.
        schedule: what it computes.
        launches: calls of it in the wrapper.
    """

    name: str
    language: str
    source: str
    schedule: Schedule
    launches: int


@dataclass(frozen=True)
class Generated:
    """The code of one graph.

    Attributes:
        wrapper: the Python module that allocates and launches, the kernels' sources in it.
        kernels: the generated kernels, in the order of their definition.
        library_calls: (name, what it computes) of kernels that Inductor did not generate (cuBLAS, attention).
    """

    wrapper: str
    kernels: tuple[GeneratedKernel, ...]
    library_calls: tuple[tuple[str, Schedule], ...]


class _Written(BaseException):
    """Ends a compilation when the code is written; no Exception, so that nothing on the way handles it."""


def generate(
    graph: fx.GraphModule | Callable[..., Any],
    inputs: Sequence[Any],
    target: Target | str,
    *,
    static: Sequence[int] = (),
    dynamic: Mapping[int, Sequence[int]] | None = None,
    options: Mapping[str, Any] | None = None,
    options_key: str = "generate",
) -> Generated:
    """Return the code that Inductor generates for a graph on `target`, which need not exist here.

    Args:
        graph: an FX graph as Dynamo makes them, or a function that `fx.symbolic_trace` takes.
        inputs: its inputs, real or fake, on any device; only sizes, strides and dtypes count.
        target: a `Target` or its name.
        static: positions of inputs that are weights or buffers.
        dynamic: dimensions with symbolic sizes, by position of the input.
        options: Inductor's options.
        options_key: as for `compile_graph`.

    Raises:
        VNMError: there is no such target.
    """
    gm = graph if isinstance(graph, fx.GraphModule) else fx.symbolic_trace(graph)
    moved, constants = relocate(gm, "cuda")
    weights = [*static, *range(len(inputs), len(inputs) + len(constants))]
    written: list[Generated] = []

    def stop() -> NoReturn:
        raise _Written

    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(device_guard())
        fakes = fake_inputs([*inputs, *constants], "cuda", dynamic)
        written = stack.enter_context(watch_generated(weights, stop))
        patches = {**(options or {}), **_WITHOUT_DEVICE}
        with suppress(_Written):
            compile_graph(moved, fakes, patches, options_key, lambda: virtual_device(target))
    return written[0] if written else Generated("", (), ())


@contextmanager
def watch_generated(static: Sequence[int] = (), then: Callable[[], Any] = lambda: None) -> Iterator[list[Generated]]:
    """Collect the code of every graph that Inductor generates in this block.

    Args:
        static: positions of the graph's inputs that are weights or buffers.
        then: called when the code of a graph is written.
    """
    results: list[Generated] = []
    schedules: dict[str, Schedule] = {}
    weights = frozenset(static)

    def on_kernel(name: str, nodes: Sequence[Any]) -> None:
        if name not in schedules:
            schedules[name] = describe(nodes, weights)

    def on_graph(wrapper: str) -> None:
        results.append(Generated(wrapper, tuple(_kernels(wrapper, schedules)), tuple(library_calls(weights))))
        schedules.clear()
        then()

    with watch_codegen(on_kernel, on_graph):
        yield results


def _kernels(wrapper: str, schedules: Mapping[str, Schedule]) -> Iterator[GeneratedKernel]:
    """The kernels that a wrapper defines: `name = async_compile.triton(..., source)`, or `.cpp_pybinding`."""
    for statement in ast.parse(wrapper).body:
        if not (isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call)):
            continue
        call, name = statement.value, ast.unparse(statement.targets[0])
        if not ast.unparse(call.func).startswith("async_compile.") or name not in schedules:
            continue
        language = "triton" if ast.unparse(call.func).endswith(".triton") else "cpp"
        source = next(arg.value for arg in call.args[1:] if isinstance(arg, ast.Constant))
        run = f"{name}.run(" if language == "triton" else f"{name}("
        yield GeneratedKernel(name, language, str(source), schedules[name], wrapper.count(run))
