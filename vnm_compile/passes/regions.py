"""The modes in which each node of a graph runs: gradients, autocast, and transforms of torch.func.

A graph may switch gradients off and on again, and what a backend sees when it is called is only how it starts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from vnm_compile._torch import open_transforms


@dataclass(frozen=True)
class Mode:
    """The state of torch at a node.

    Attributes:
        grad: gradients are recorded.
        transforms: how many transforms of torch.func (vmap, grad, jvp) and levels of forward-mode AD are open.
        autocast: the types of device for which autocast is on.
    """

    grad: bool
    transforms: int = 0
    autocast: frozenset[str] = frozenset()


RECORDING = Mode(grad=True)


def modes(graph: fx.Graph, start: Mode | None = None) -> dict[fx.Node, Mode]:
    """Return the mode in which each node runs; `start` is that of the first, by default the current one."""
    mode = start if start is not None else current_mode()
    before: dict[fx.Node, Mode] = {}  # the mode to go back to, by the node that left it
    found: dict[fx.Node, Mode] = {}
    for node in graph.nodes:
        found[node] = mode
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name == "_set_grad_enabled":
            mode = replace(mode, grad=bool(node.args[0]))
        elif name == "_enter_inference_mode":
            before[node] = mode
            mode = replace(mode, grad=not node.args[0])  # inference_mode(False) switches gradients on
        elif name == "_exit_inference_mode":
            left = before.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
            mode = replace(mode, grad=left.grad if left is not None else mode.grad)
        elif name == "_enter_autocast":
            before[node] = mode
            device, _, enabled, *_ = node.args
            others = mode.autocast - {device}
            mode = replace(mode, autocast=others | {device} if enabled else others)
        elif name == "_exit_autocast":
            left = before.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
            mode = replace(mode, autocast=left.autocast if left is not None else mode.autocast)
        elif name.endswith("_increment_nesting") or name == "_enter_dual_level":
            mode = replace(mode, transforms=mode.transforms + 1)
        elif name.endswith("_decrement_nesting") or name == "_exit_dual_level":
            mode = replace(mode, transforms=mode.transforms - 1)
    return found


def current_mode() -> Mode:
    """The mode of the caller."""
    autocast = frozenset(device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device))
    return Mode(torch.is_grad_enabled(), open_transforms(), autocast)
