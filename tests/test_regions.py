"""Regions of another mode: gradients, inference, autocast, as functions, nested, and across graph breaks."""

from __future__ import annotations

import warnings

import torch
from torch import nn

import vnm_compile as vnm
from tests.passes.running import assert_alike, check, linears
from vnm_compile import backend
from vnm_compile.options import Options
from vnm_compile.session import session

SINGLES = [("single", "a"), ("single", "b")]
SIBLINGS = [("siblings", "a", "b")]


def test_siblings_with_and_without_gradients():
    model = linears("a", "b").requires_grad_(False)

    def function(x):
        with torch.no_grad():
            y = model.a(x)
        return y + model.b(x)

    x = torch.randn(4, 32, requires_grad=True)
    units, _ = check(function, x)
    assert units == SINGLES
    grads = []
    for each in (function, torch.compile(function, backend="vnm", options={"vnm.policy": "memory"})):
        x.grad = None
        each(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0], atol=1e-4, rtol=1e-4)


def test_what_trains_is_decided_where_it_runs():
    model = linears("a", "b")

    @torch.no_grad()
    def decorated(x):
        return model.a(x), model.b(x)

    def frozen_then_trained(x):
        with torch.no_grad():
            y = model.a(x)
        return y, model.b(x)

    def nested(x):
        with torch.no_grad():
            with torch.enable_grad():
                y = model.a(x)
            return y, model.b(x)

    def inference(x):
        with torch.inference_mode():
            return model.a(x), model.b(x)

    x = torch.randn(4, 32)
    assert check(decorated, x) == (SIBLINGS, [])
    assert check(inference, x) == (SIBLINGS, [])
    for function, sparse in ((frozen_then_trained, "a"), (nested, "b")):
        units, reasons = check(function, x)
        assert units == [("single", sparse)]
        assert "trains" in reasons[0]


def test_a_weight_under_enable_grad_gets_its_gradient():
    model = linears("a", "b")

    @torch.no_grad()
    def step(x):
        with torch.enable_grad():
            y = model.a(x)
        with torch.inference_mode(False):
            z = model.b(x)
        return y, z

    x = torch.randn(4, 32)
    grads = []
    for each in (step, torch.compile(step, backend="vnm", options={"vnm.policy": "memory"})):
        model.zero_grad()
        y, z = each(x)
        (y.square().sum() + z.square().sum()).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0], atol=1e-4, rtol=1e-4)


def test_branches_of_another_precision():
    model = linears("a", "b")

    def function(x):
        with torch.autocast("cpu", torch.bfloat16):
            y = model.a(x)
            with torch.autocast("cpu", enabled=False):
                z = model.b(x)
            return y, z, model.b(x)

    with torch.no_grad():
        units, _ = check(function, torch.randn(4, 32), tolerance=5e-2)
        assert len(units) == 3
        x = torch.randn(4, 32)
        compiled = torch.compile(function, backend="vnm", options={"vnm.policy": "memory"})
        assert_alike(compiled(x), function(x), 5e-2)


def test_regions_that_a_graph_break_cuts():
    model = linears("a", "b")

    def function(x):
        with torch.no_grad():
            y = model.a(x)
            torch._dynamo.graph_break()
            y = model.b(y)
        z = model.a(y)
        torch._dynamo.graph_break()
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            u = model.b(x)
            torch._dynamo.graph_break()
            return y, z, u, model.a(u), model.b(u)

    units, reasons = check(function, torch.randn(4, 32), tolerance=5e-2)
    assert units == [*SINGLES, ("single", "b"), ("siblings", "a", "b")]
    assert len(reasons) == 1


def test_the_decorated_block_of_a_training_model():
    """A frozen encoder under no_grad inside a model that trains: sparse there, dense and trained elsewhere."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = linears("a", "b"), nn.Linear(32, 32)

        def forward(self, x):
            with torch.no_grad():
                x = self.inner.a(x) * self.inner.b(x)
            return self.head(x)

    model, x = Model(), torch.randn(4, 32)
    vnm.annotate(model, "16:2:8", include=["inner.a", "inner.b"])
    grads = []
    for each in (model, torch.compile(model, backend="vnm", options={"vnm.policy": "memory"})):
        model.zero_grad()
        each(x).square().sum().backward()
        grads.append(model.head.weight.grad.clone())
    torch.testing.assert_close(grads[1], grads[0], atol=1e-4, rtol=1e-4)


def test_inference_with_gradients_on_is_warned_of_once():
    """An annotated model in evaluation mode, and never while it trains."""

    def messages(training):
        model = linears("a", "b").train(training)
        vnm.annotate(model, "16:2:8")
        torch._dynamo.reset()

        def as_it_is(gm, inputs):
            return backend.compile_with(gm, inputs, Options(policy="memory"), lambda graph, _: graph.forward)

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.compile(lambda x: model.b(model.a(x)), backend=as_it_is)(torch.randn(4, 32))
        return [str(each.message) for each in caught if "V:N:M" in str(each.message)]

    session.reset()
    assert not messages(training=True)
    (message,) = messages(training=False)
    for part in ("2 V:N:M layers in evaluation mode (a, ...)", "torch.no_grad()", "requires_grad_(False)"):
        assert part in message
    assert not messages(training=False)
