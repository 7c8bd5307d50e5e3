"""Graphs within the graph: checkpointing, nested regions, control flow, autograd functions, and DDP's split graphs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import vnm_compile as vnm
from tests.passes.running import assert_alike, check, linears, run_rewritten

MODEL = linears("a", "b", "c").requires_grad_(False)


def block(x):
    return F.silu(MODEL.a(x)) * MODEL.b(x)


@torch.compiler.nested_compile_region
def region(x):
    return block(x)


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return MODEL.a(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


def checkpointed(x):
    y = checkpoint(lambda t: block(checkpoint(block, t, use_reentrant=False)), x, use_reentrant=False)
    return MODEL.c(y)


def test_checkpointed_blocks_run_sparse_without_gradients():
    with torch.no_grad():
        units, reasons = check(checkpointed, torch.randn(4, 32))
    assert units == [("siblings", "a", "b"), ("siblings", "a", "b"), ("single", "c")]
    assert not reasons


def test_nested_regions_run_sparse_without_gradients():
    """The second call shares its graph with the first, and nothing of what that one wrote or read."""

    def function(x):
        y = region(region(x))
        y.mul_(2)
        return region(y), MODEL.c(y)

    with torch.no_grad():
        units, reasons = check(function, torch.randn(4, 32), tolerance=1e-4)
    assert units == [("siblings", "a", "b"), ("siblings", "a", "b"), ("siblings", "a", "b", "c")]
    assert not reasons


def test_writes_within_a_written_out_block():
    def shifts(x):
        h = x * 2
        y = MODEL.a(h)
        h.view(-1)[:40].add_(1)
        return y + MODEL.b(h)

    def function(x):
        return checkpoint(shifts, x, use_reentrant=False)

    with torch.no_grad():
        assert check(function, torch.randn(4, 32))[0] == [("single", "a"), ("single", "b")]


DENSE = {
    "checkpoint": (checkpointed, "activation checkpointing"),
    "autograd.Function": (lambda x: Own.apply(x) + MODEL.c(x), "autograd.Function"),
    "cond": (lambda x: MODEL.c(torch.cond(x.sum() > 0, MODEL.a, MODEL.b, (x,))), "torch.cond"),
}


@pytest.mark.parametrize("name", DENSE)
def test_other_graphs_are_dense_and_say_why(name):
    function, part = DENSE[name]
    x = torch.randn(4, 32, requires_grad=name != "cond")
    with torch.set_grad_enabled(name != "cond"):
        units, reasons = check(function, x)
    assert units == [("single", "c")]
    assert reasons
    assert all(part in reason for reason in reasons)


def test_explain_names_what_is_in_them():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = linears("a", "b")

        def forward(self, x):
            return torch.cond(x.sum() > 0, self.inner.a, self.inner.b, (x,))

    report = vnm.explain(Model(), torch.randn(4, 32), options={"vnm.policy": "memory"})
    assert {layer.name: layer.decision for layer in report.layers} == {"inner.a": "dense", "inner.b": "dense"}
    assert all("torch.cond" in layer.reason for layer in report.layers)


def test_compiled_checkpoints_with_and_without_gradients():
    compiled = torch.compile(checkpointed, backend="vnm", options={"vnm.policy": "memory"})
    x = torch.randn(4, 32)
    with torch.no_grad():
        assert_alike(compiled(x), checkpointed(x), 1e-5)
    grads = []
    for each in (checkpointed, compiled):
        y = x.clone().requires_grad_()
        each(y).square().sum().backward()
        grads.append(y.grad)
    torch.testing.assert_close(grads[1], grads[0], atol=1e-4, rtol=1e-4)


def test_a_graph_without_inner_graphs_is_not_copied():
    with torch.no_grad():
        prepared, _ = run_rewritten(lambda x: x + 1, torch.randn(4))
    assert prepared[0].rewritten is None
