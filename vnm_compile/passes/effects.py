"""What the nodes of a graph write to and which modes they change: what decides whether a multiplication may move.

A compiler that moves an operation past a write, or out of a region that ran it with other gradients or another
precision, computes something else. The graphs that Dynamo hands over are not functional: in-place methods, `out=`,
item assignment and custom ops write into tensors and into whatever views them. So everything here errs on one side:
what is not known to be harmless writes to all that it is given and counts as a change of mode.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from vnm_compile._torch import (
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
    is_traceable_wrapper_subclass,
    tree_leaves,
)

_ARITHMETIC = (
    "add",
    "sub",
    "mul",
    "matmul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
)
_IN_PLACE_OPERATORS = {"setitem", "delitem", "iconcat", *(f"i{name}" for name in _ARITHMETIC)}
_IN_PLACE_METHODS = {f"__{name}__" for name in _IN_PLACE_OPERATORS}
_HARMLESS = {
    "_get_data_attr",
    "_log_api_usage_once",
    "as_tensor",
    "broadcast_shapes",
    "broadcast_tensors",
    "finfo",
    "iinfo",
    "promote_types",
}
# Their schemas do not say that they keep statistics in what they are given.
_KEEPS_STATISTICS = ("batch_norm", "instance_norm", "moving_avg")
# Changes what a tensor is, not only what it holds; and hooks, which run code that the graph does not show.
_REPLACES = {"set_", "resize_", "resize_as_", "requires_grad_", "swap_", "backward", "_set_data_attr"}
INLINED = "vnm_inlined"
"""Marks, in `node.meta`, what was written out from a graph within the graph: the storages of its example values are
those of another call."""

_HOOKS = ("register_hook", "register_post_accumulate_grad_hook")


@dataclass(frozen=True)
class Effect:
    """What a node does besides computing its value.

    Attributes:
        written: nodes into whose memory, or a view of it, it writes.
        barrier: it changes a mode, or does what is not known; nothing may move past it.
    """

    written: tuple[fx.Node, ...] = ()
    barrier: bool = False


_NOTHING = Effect()


def effect_of(node: fx.Node) -> Effect:
    """The effect of one node, by the schema of what it calls where there is one, else by name, else the worst."""
    if node.op in ("placeholder", "get_attr", "output"):
        return _NOTHING
    if node.op == "call_method":
        return _method_effect(node, str(node.target))
    if node.op != "call_function":
        return _unknown(node)
    target = node.target
    if isinstance(target, OpOverload | OpOverloadPacket):
        return Effect(_written_by_schema(node, _schemas(target)))
    if isinstance(target, HigherOrderOperator):
        return _higher_order_effect(node)
    if inspect.ismethoddescriptor(target):
        return _method_effect(node, target.__name__)
    return _function_effect(node)


def _function_effect(node: fx.Node) -> Effect:
    target: Any = node.target
    name, module = getattr(target, "__name__", ""), getattr(target, "__module__", None) or ""
    if module in ("_operator", "operator"):
        return Effect(_tensors(node.args[:1])) if name in _IN_PLACE_OPERATORS else _NOTHING
    if module == "builtins":
        return _unknown(node) if name in ("setattr", "delattr", "exec", "eval") else _NOTHING
    if module == "math" or name in _HARMLESS or name.startswith(("sym_", "_check", "_sym_")):
        return _NOTHING
    if module.startswith(("torch._functorch", "torch._C._functorch")):
        return Effect(barrier=True)  # it wraps and unwraps tensors, and writes to none
    if not module.startswith("torch") or name in _REPLACES:
        return _unknown(node)
    if any(part in name for part in _KEEPS_STATISTICS):
        return Effect(tuple(node.all_input_nodes))
    if module in ("torch.nn.functional", "torch.functional"):
        return Effect(_written_by_arguments(node))
    packet = _aten(name)
    if packet is not None:
        return Effect(_written_by_schema(node, _schemas(packet)))
    return _unknown(node)


def _method_effect(node: fx.Node, name: str) -> Effect:
    if name in _REPLACES or name in _HOOKS or not hasattr(Tensor, name):
        return _unknown(node)
    if name in _IN_PLACE_METHODS:
        return Effect(_tensors(node.args[:1]))
    if any(part in name for part in _KEEPS_STATISTICS):
        return Effect(tuple(node.all_input_nodes))
    packet = _aten(name)
    if packet is not None:
        written = _written_by_schema(node, _schemas(packet))
        return Effect(written or (_tensors(node.args[:1]) if _is_in_place_name(name) else ()))
    return Effect(tuple(node.all_input_nodes)) if _is_in_place_name(name) else _NOTHING


def _higher_order_effect(node: fx.Node) -> Effect:
    """Of an op that runs graphs: it writes to what it is given if one of its graphs does."""
    bodies = list(subgraphs(node))
    if not bodies:
        return _unknown(node)
    return (
        Effect(tuple(node.all_input_nodes)) if any(Effects(body.graph).writes_inputs for body in bodies) else _NOTHING
    )


def subgraphs(node: fx.Node) -> Iterator[fx.GraphModule]:
    """The graphs that a higher-order op runs."""
    owner = node.graph.owning_module
    for each in node.all_input_nodes:
        if each.op == "get_attr" and owner is not None:
            value = attribute(owner, str(each.target))
            if isinstance(value, fx.GraphModule):
                yield value


def attribute(owner: torch.nn.Module, name: str) -> Any:
    """The attribute of a module by its qualified name, or None."""
    value: Any = owner
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def _unknown(node: fx.Node) -> Effect:
    return Effect(tuple(node.all_input_nodes), barrier=True)


def _tensors(arguments: Any) -> tuple[fx.Node, ...]:
    return tuple(leaf for leaf in tree_leaves(arguments, is_leaf=_is_node) if isinstance(leaf, fx.Node))


def _is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)


def _is_in_place_name(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


@lru_cache(maxsize=4096)
def _aten(name: str) -> Any:
    """The aten op behind a function of torch or a method of Tensor, or None."""
    return getattr(torch.ops.aten, name, None) if name.isidentifier() and not name.startswith("__") else None


@lru_cache(maxsize=4096)
def _schemas(target: Any) -> tuple[Any, ...]:
    if isinstance(target, OpOverload):
        return (target._schema,)
    return tuple(getattr(target, overload)._schema for overload in target.overloads())


def _written_by_schema(node: fx.Node, schemas: Iterable[Any]) -> tuple[fx.Node, ...]:
    """The arguments that one of the schemas says it writes to."""
    written: list[fx.Node] = []
    for schema in schemas:
        for i, argument in enumerate(schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write or "Tensor" not in str(argument.type):
                continue
            if argument.name in node.kwargs:
                written += _tensors(node.kwargs[argument.name])
            elif i < len(node.args) and not argument.kwarg_only:
                written += _tensors(node.args[i])
    if node.kwargs.get("out") is not None:
        written += _tensors(node.kwargs["out"])
    return tuple(dict.fromkeys(written))


def _written_by_arguments(node: fx.Node) -> tuple[fx.Node, ...]:
    """What a Python function of torch writes to: its first argument where `inplace` is set, and `out`."""
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return tuple(node.all_input_nodes)
    # Arguments of functions with overloads hide in *args and **kwargs.
    given = {**given, **given.get("kwargs", {})}
    in_place = given.get("inplace") or _is_in_place_name(getattr(node.target, "__name__", ""))
    first = _tensors(next(iter(given.values()), ())) if in_place else ()
    return (*first, *_tensors(given.get("out") or ()))


class Effects:
    """The effects of a graph's nodes, in order, and which tensors share memory.

    Two tensors share memory where their example values do (views share the storage of what they view), where an
    example value is missing and one is made from the other, and where the given inputs do.
    """

    def __init__(self, graph: fx.Graph, inputs: Sequence[Any] = ()) -> None:
        """Look at a graph in torch IR; `inputs` are the values of its placeholders, where known."""
        self._placeholders = graph.find_nodes(op="placeholder")
        self._parent: dict[Hashable, Hashable] = {}
        self._place: dict[fx.Node, int] = {}
        self._region: dict[fx.Node, int] = {}
        self._writers: list[tuple[int, fx.Node, fx.Node]] = []
        for node in graph.nodes:
            self._join(node)
        for node, value in zip(self._placeholders, inputs, strict=False):
            for key in _storages(value):
                self._union(node, ("input", key))
        region = 0
        for place, node in enumerate(graph.nodes):
            effect = effect_of(node)
            self._writers += [(place, node, each) for each in effect.written if each.op != "get_attr"]
            # A barrier is a region of its own: what lies on its two sides is not together.
            region += effect.barrier
            self._place[node], self._region[node] = place, region
            region += effect.barrier
        # Nobody guards that two activations given to the graph share no memory.
        self._activations = {self._find(n) for n in self._placeholders if not _is_parameter(n)}

    def together(self, *nodes: fx.Node) -> bool:
        """Whether no mode changes between the nodes."""
        return len({self._region[node] for node in nodes}) == 1

    def writer_between(self, one: fx.Node, other: fx.Node, *read: fx.Node) -> fx.Node | None:
        """A node between two others, whichever comes first, that may write to one of `read`, or None."""
        groups = {self._find(node) for node in read}
        first, last = sorted((self._place[one], self._place[other]))
        for place, writer, written in self._writers:
            if first < place < last and self._touches(self._find(written), groups):
                return writer
        return None

    def writer_of(self, node: fx.Node) -> fx.Node | None:
        """A node, anywhere in the graph, that writes to the memory of `node`, or None."""
        group = self._find(node)
        return next((writer for _, writer, written in self._writers if self._find(written) == group), None)

    @property
    def writes(self) -> list[tuple[fx.Node, fx.Node]]:
        """Every write: the node that writes, and the node into which it does."""
        return [(writer, written) for _, writer, written in self._writers]

    @property
    def written_inputs(self) -> tuple[int, ...]:
        """Positions of the placeholders that are written to."""
        groups = {self._find(written) for _, _, written in self._writers}
        return tuple(i for i, node in enumerate(self._placeholders) if self._find(node) in groups)

    @property
    def writes_inputs(self) -> bool:
        """Whether the graph writes to one of its placeholders."""
        return bool(self.written_inputs)

    def share(self, one: fx.Node, other: fx.Node) -> bool:
        """Whether two nodes may share memory."""
        return self._find(one) == self._find(other)

    def _touches(self, written: Hashable, groups: set[Hashable]) -> bool:
        return written in groups or (written in self._activations and bool(groups & self._activations))

    def _join(self, node: fx.Node) -> None:
        value = node.meta.get("example_value")
        keys = _storages(value)
        for key in keys:
            self._union(node, ("storage", key))
        unknown = not keys and _holds_tensors(value)
        if ((unknown or INLINED in node.meta) and _may_alias(node)) or _returns_an_input(node):
            for each in node.all_input_nodes:
                if each.op != "get_attr":
                    self._union(node, each)

    def _find(self, key: Hashable) -> Hashable:
        while self._parent.setdefault(key, key) != key:
            self._parent[key] = key = self._parent[self._parent[key]]
        return key

    def _union(self, one: Hashable, other: Hashable) -> None:
        self._parent[self._find(one)] = self._find(other)


def _holds_tensors(value: Any) -> bool:
    """Whether a node may have tensors as its value; without an example nobody knows."""
    return value is None or any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def _may_alias(node: fx.Node) -> bool:
    """Whether the value of a node may be a view of what it is made from, by its schema if there is one."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name in ("setitem", "delitem"):
        return False  # they have no value
    known = isinstance(node.target, OpOverload | OpOverloadPacket)
    packet = node.target if known else _aten(name)
    if packet is None:
        return True
    arguments = [argument for schema in _schemas(packet) for argument in schema.arguments]
    return any(argument.alias_info is not None and not argument.is_out for argument in arguments)


def _returns_an_input(node: fx.Node) -> bool:
    """Whether a higher-order op returns what it was given, or a view of it."""
    if node.op != "call_function" or not isinstance(node.target, HigherOrderOperator):
        return False
    bodies = list(subgraphs(node))
    for body in bodies:
        effects = Effects(body.graph)
        results = _tensors(body.graph.output_node().args)
        if any(effects.share(result, given) for result in results for given in effects._placeholders):
            return True
    return not bodies


def _is_parameter(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.nn.Parameter) or bool(getattr(value, "_is_param", False))


def _storages(value: Any) -> list[Hashable]:
    """What identifies the memory of the tensors in a value; empty for a tensor that has none of its own."""
    found: list[Hashable] = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found += _storage(leaf)
    return found


def _storage(tensor: Tensor) -> list[Hashable]:
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return [key for name in names for key in _storage(getattr(tensor, name))]
    try:
        return [tensor.untyped_storage()._cdata]
    except (NotImplementedError, RuntimeError):  # a batched or otherwise wrapped tensor
        return []
