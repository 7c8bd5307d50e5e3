"""What Inductor's scheduler knows about a kernel: the ops fused into it, the bytes it moves, its matrix products.

Read while the graph is being generated; what is returned is plain data that outlives it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from vnm_compile.codegen.inductor import V, ir, template_name
from vnm_compile.layout import Layout
from vnm_compile.spec import KEPT_COLUMNS

_LINEAR, _GATED = torch.ops.vnm.linear.default, torch.ops.vnm.gated_linear.default


@dataclass(frozen=True)
class Access:
    """One buffer that a kernel reads or writes.

    Attributes:
        buffer: its name in the generated code.
        nbytes: bytes that are touched, each counted once.
        activation: the buffer follows from the graph's activations, not from its weights alone.
    """

    buffer: str
    nbytes: int
    activation: bool


@dataclass(frozen=True)
class Schedule:
    """What a kernel computes.

    Attributes:
        fused_ops: the ops, in graph order, as `vnm.linear` or `aten.gelu`; views are left out.
        template: name of the template it was generated from, or None.
        reads, writes: the buffers.
        flops: floating-point operations of its matrix products, as they are carried out (on tensor cores a sparse
            linear computes on all kept columns; on sparse ones the zeros among them are counted, as their rate does).
        tokens: rows of the activation of its sparse linear; None where it has none.
        dtype: of its first activation.
        sparse_cores: it multiplies on sparse tensor cores.
    """

    fused_ops: tuple[str, ...]
    template: str | None
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    flops: int
    tokens: int | None
    dtype: torch.dtype | None
    sparse_cores: bool


def describe(nodes: Sequence[Any], static: frozenset[int]) -> Schedule:
    """Describe a kernel by its scheduler nodes.

    Args:
        nodes: as Inductor schedules them; markers among them are skipped.
        static: positions of the graph's inputs that are weights or buffers.
    """
    computed = [each for node in nodes if hasattr(node, "get_nodes") for each in node.get_nodes()]
    activations = _activations(static)
    origins = _origins(computed)
    reads, writes = _accesses(computed, activations)
    template = next((node.node for node in computed if node.is_template()), None)
    sparse = next((origin for origin in origins if origin.target in (_LINEAR, _GATED)), None)
    moved = [each for each in (*reads, *writes) if each.activation]
    name = template_name(template) if template is not None else None
    return Schedule(
        fused_ops=_op_names(origins),
        template=name,
        reads=reads,
        writes=writes,
        flops=sum(_flops(node) for node in computed),
        tokens=_hint(_rows(sparse)) if sparse is not None else None,
        dtype=V.graph.get_dtype(moved[0].buffer) if moved else None,
        sparse_cores=name is not None and "_sparse_cores" in name,
    )


def library_calls(static: frozenset[int]) -> list[tuple[str, Schedule]]:
    """Name and description of every call in the graph of a kernel that Inductor did not generate, in their order."""
    calls = []
    for node in V.graph.scheduler.nodes:
        name = getattr(node.node, "python_kernel_name", None) if node.is_extern() else None
        if name:
            calls.append((name, describe([node], static)))
    return calls


def _activations(static: frozenset[int]) -> set[fx.Node]:
    """Nodes of the aten graph that depend on an input which is neither weight nor buffer."""
    found: set[fx.Node] = set()
    placeholders = 0
    for node in V.graph.graph.nodes:
        if node.op == "placeholder":
            placeholders += 1
            if placeholders - 1 not in static:
                found.add(node)
        elif any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _origins(nodes: Iterable[Any]) -> list[fx.Node]:
    """The aten nodes that a kernel computes, in graph order."""
    order = {node: i for i, node in enumerate(V.graph.graph.nodes)}
    origins = {origin for node in nodes if node.node is not None for origin in node.node.get_origins()}
    return sorted((origin for origin in origins if origin in order), key=order.__getitem__)


def _op_names(origins: Iterable[fx.Node]) -> tuple[str, ...]:
    names: list[str] = []
    last: Any = None
    for origin in origins:
        if origin.op != "call_function" or _is_view(origin.target):
            continue
        original = origin.meta.get("original_aten") or origin.target
        packet = getattr(original, "overloadpacket", original)
        # What an op was decomposed into is one op; two that were written as such are two.
        decomposed = packet is not getattr(origin.target, "overloadpacket", None)
        if not (decomposed and packet is last):
            names.append(str(packet))
        last = packet
    return tuple(names)


def _is_view(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and any(result.alias_info for result in schema.returns)


def _accesses(nodes: Sequence[Any], activations: set[fx.Node]) -> tuple[tuple[Access, ...], tuple[Access, ...]]:
    """Buffers that a kernel reads from and writes to memory: not those that live and die inside it."""
    written = {dep.name for node in nodes for dep in node.read_writes.writes if _has_memory(dep)}
    written |= {name for node in nodes for name in _unpacked(node)}
    read: dict[str, int] = {}
    for node in nodes:
        for dep in node.read_writes.reads:
            if dep.name not in written and _has_memory(dep):
                read[dep.name] = read.get(dep.name, 0) + _elements(dep)
    names = {node.get_name() for node in nodes}
    kept = [name for name in sorted(written) if _outlives(name, names)]

    def access(name: str, elements: int) -> Access:
        elements = min(elements, _hint(V.graph.get_numel(name)))
        return Access(name, elements * V.graph.get_dtype(name).itemsize, _is_activation(name, activations))

    reads = tuple(access(name, count) for name, count in read.items())
    return reads, tuple(access(name, _hint(V.graph.get_numel(name))) for name in kept)


def _has_memory(dep: Any) -> bool:
    if type(dep).__name__ == "WeakDep" or dep.name not in {*V.graph.name_to_buffer, *V.graph.graph_inputs}:
        return False
    return not _is_tuple(V.graph.name_to_buffer.get(dep.name))


def _is_tuple(buffer: Any) -> bool:
    """Whether a buffer stands for what a library call returns, which other buffers name the tensors of."""
    return buffer is not None and isinstance(buffer.layout, ir.MultiOutputLayout)


def _unpacked(node: Any) -> list[str]:
    """The tensors that a library call returns in a tuple."""
    if not _is_tuple(node.node):
        return []
    return [user.get_name() for output in node.get_outputs() for user in output.users]


def _elements(dep: Any) -> int:
    """Elements that one read touches; an indirect one (an embedding) as many as it is made for."""
    if hasattr(dep, "is_indirect") and dep.is_indirect():
        return _hint(torch.Size([_hint(size) for size in dep.size]).numel())
    return _hint(dep.get_numel())


def _outlives(name: str, computed: set[str]) -> bool:
    """Whether a buffer that a kernel computes is used by anything else."""
    buffer = V.graph.scheduler.name_to_buf.get(name)
    if buffer is None or name in V.graph.removed_buffers:
        return False
    return any(user.get_name() not in computed for user in buffer.users)


def _is_activation(name: str, activations: set[fx.Node]) -> bool:
    if name in V.graph.graph_inputs:
        return any(node.op == "placeholder" and node.name == name for node in activations)
    buffer: Any = V.graph.name_to_buffer[name]
    return any(origin in activations for origin in buffer.get_origins())


def _flops(node: Any) -> int:
    """Floating-point operations of a scheduler node's matrix product; 0 where it is none."""
    origins = node.node.get_origins() if node.node is not None else ()
    sparse = next((origin for origin in origins if origin.target in (_LINEAR, _GATED)), None)
    if sparse is None:
        return int(node.estimate_flops() or 0)
    if not (node.is_template() or node.is_extern()):
        return 0  # something fused, or a step that follows, such as the sum of partial results
    layout = Layout.parse(str(sparse.args[3]))
    kept = KEPT_COLUMNS if _multiplies_zeros(node) else layout.spec.n
    matrices = 2 if sparse.target is _GATED else 1
    return 2 * _hint(_rows(sparse)) * matrices * layout.rows * layout.groups * kept


def _multiplies_zeros(node: Any) -> bool:
    """Whether a sparse kernel multiplies all kept columns, those that hold zeros too, as on tensor cores."""
    on_gpu = node.node.get_device().type != "cpu"
    return on_gpu and not (node.is_template() and "_vector" in template_name(node.node))


def _rows(linear: fx.Node) -> Any:
    *leading, _ = linear.meta["val"].shape
    rows = 1
    for size in leading:
        rows = rows * size
    return rows


def _hint(size: Any) -> int:
    """A size as a number; the hint of a symbolic one."""
    if isinstance(size, torch.SymInt):
        size = size.node.expr
    return int(size) if isinstance(size, int) else int(V.graph.sizevars.optimization_hint(size))
