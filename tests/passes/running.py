"""Running rewritten graphs as they are, without a compiler behind them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tests.support import make_sparse_
from vnm_compile.backend import Prepared, prepare
from vnm_compile.options import Options


def linears(*names: str, bias: bool = True, width: int = 32, **factory: Any) -> nn.Module:
    """A module with sparse linears of these names."""
    module = nn.Module()
    for name in names:
        setattr(module, name, nn.Linear(width, width, bias=bias, **factory))
    return make_sparse_(module, "16:2:8").eval()


def run_rewritten(function, *args: Any, **options: Any) -> tuple[list[Prepared], Any]:
    """What the passes made of the graphs of `function`, and its value with those graphs run by torch.fx."""
    prepared: list[Prepared] = []

    def backend(gm, inputs):
        mine = prepare(gm, inputs, Options(policy="memory", **options))
        prepared.append(mine)
        new = mine.rewritten
        return gm.forward if new is None else lambda *given: new.gm(*given, *mine.arrays)

    return prepared, torch.compile(function, backend=backend)(*copies(args))


def check(function, *args: Any, tolerance: float = 1e-5, **options: Any) -> tuple[list[tuple[str, ...]], list[str]]:
    """Assert that the rewritten graphs of `function` are as eager is; return units as (kind, *names), and reasons."""
    torch._dynamo.reset()
    expected = function(*copies(args))
    prepared, actual = run_rewritten(function, *args, **options)
    assert_alike(actual, expected, tolerance)
    units = [(unit.kind, *(member.name for member in unit.members)) for each in prepared for unit in each.units]
    return units, [decision.reason for each in prepared for decision in each.decisions if not decision.sparse]


def assert_alike(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Value, dtype, shape, strides, and whether gradients flow: all as in eager mode."""
    for one, other in zip(tensors(actual), tensors(expected), strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance, check_stride=True)
        assert one.requires_grad == other.requires_grad


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def copies(args: Any) -> list[Any]:
    """The arguments, with tensors of their own: the functions under test write to them."""
    return [a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args]
