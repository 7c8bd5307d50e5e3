"""Move a graph to another device: the same computation, and inputs that are fakes of the given ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from vnm_compile._torch import FakeTensor, FakeTensorMode, is_traceable_wrapper_subclass

_DEVICE_NAMES = ("cpu", "cuda")


def fake_inputs(
    inputs: Sequence[Any], device: torch.device | str, dynamic: Mapping[int, Sequence[int]] | None = None
) -> list[Any]:
    """Fake tensors on `device` with the sizes, strides, offsets and dtypes of `inputs`; what is no tensor is passed on.

    Args:
        inputs: tensors, real or fake, on any device; their values are neither read nor copied.
        device: where the fakes seem to be; it need not exist.
        dynamic: dimensions whose sizes are symbols, by position of the input. A fake input keeps its own symbols.
    """
    given = next((x.fake_mode for x in inputs if _is_fake(x)), None)
    mode = given or FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with torch.no_grad():
        return [_fake(x, mode, device, tuple((dynamic or {}).get(i, ()))) for i, x in enumerate(inputs)]


def relocate(gm: fx.GraphModule, device: torch.device | str) -> tuple[fx.GraphModule, list[Tensor]]:
    """Return a copy of `gm` that computes on `device`, and the tensor constants that it takes as further inputs.

    Whatever names a device in the graph (factories, `.to`, autocast regions) names the new one in the copy. Tensors
    that the graph holds as attributes become placeholders after the others, so that they can be faked like these.
    """
    device = torch.device(device)
    if device.type != "cpu" and device.index is None:  # spares torch the question which device is the current one
        device = torch.device(device.type, 0)
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, new))
    result = fx.GraphModule(gm, graph, class_name=gm.__class__.__name__)
    result.meta = dict(gm.meta)
    _hold_literals(result)
    for node in graph.nodes:
        # Autocast regions are for a type of device.
        name = device.type if "autocast" in str(node.target) else str(device)
        move = partial(_moved, device=device, name=name)
        node.args = fx.node.map_aggregate(node.args, move)  # type: ignore[assignment]
        node.kwargs = fx.node.map_aggregate(node.kwargs, move)  # type: ignore[assignment]
    constants = _lift_constants(result)
    for name, child in list(result.named_children()):
        if isinstance(child, fx.GraphModule):
            moved, held = relocate(child, device)
            assert not held, "the bodies of higher-order ops take everything as inputs"
            setattr(result, name, moved)
    result.recompile()
    return result, constants


def _hold_literals(gm: fx.GraphModule) -> None:
    """Turn tensors that the graph makes of numbers into attributes: tracing would make them on the device."""
    for i, node in enumerate(gm.graph.find_nodes(op="call_function", target=torch.tensor)):
        if node.all_input_nodes:
            continue
        name = f"literal_{i}"
        gm.register_buffer(name, torch.tensor(*node.args, **{**node.kwargs, "device": "cpu"}))
        with gm.graph.inserting_before(node):
            node.replace_all_uses_with(gm.graph.get_attr(name))
        gm.graph.erase_node(node)


def _lift_constants(gm: fx.GraphModule) -> list[Tensor]:
    """Turn attributes of the graph that are tensors into placeholders, in place; return them."""
    constants: list[Tensor] = []
    for node in gm.graph.find_nodes(op="get_attr"):
        value = gm
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if not isinstance(value, Tensor):
            continue
        placeholders = gm.graph.find_nodes(op="placeholder")
        after = gm.graph.inserting_after(placeholders[-1]) if placeholders else gm.graph.inserting_before(node)
        with after:
            placeholder = gm.graph.placeholder(f"constant_{len(constants)}")
        node.replace_all_uses_with(placeholder)
        gm.graph.erase_node(node)
        constants.append(value)
    return constants


def _moved(arg: Any, device: torch.device, name: str) -> Any:
    if isinstance(arg, torch.device):
        return device
    return name if isinstance(arg, str) and arg in _DEVICE_NAMES else arg


def _is_number(value: Tensor) -> bool:
    """Whether it is a Python float that Dynamo passes as a tensor; such stay on the CPU."""
    return value.dim() == 0 and value.dtype == torch.float64 and value.device.type == "cpu"


def _is_fake(value: Any) -> bool:
    return isinstance(value, FakeTensor)


def _fake(value: Any, mode: FakeTensorMode, device: torch.device | str, dynamic: tuple[int, ...]) -> Any:
    if not isinstance(value, Tensor) or _is_number(value):
        return value
    if is_traceable_wrapper_subclass(value):  # a VNMTensor; the rewritten graph takes its arrays instead
        value = torch.empty(value.shape, dtype=value.dtype, device="meta")
    if not _is_fake(value):
        sizes = [DimDynamic.DYNAMIC if dim in dynamic else DimDynamic.STATIC for dim in range(value.dim())]
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        value = mode.from_tensor(value.detach(), symbolic_context=context)
    with mode:
        fake = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)
        # Where it begins decides whether its address is aligned.
        offset = value.storage_offset()
        if isinstance(offset, int) and offset == 0:
            return fake
        whole = torch.empty(offset + _extent(value), dtype=value.dtype, device=device)
        return whole.as_strided(value.size(), value.stride(), offset)


def _extent(value: Tensor) -> Any:
    """Elements from a tensor's first to its last."""
    if value.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(value.size(), value.stride(), strict=True))
