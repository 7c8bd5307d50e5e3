"""Joining moves multiplications: never past a write to what they read."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vnm_compile as vnm
from tests.passes.running import assert_alike, check, copies, linears, run_rewritten
from vnm_compile.passes.effects import effect_of

SINGLES = [("single", "a"), ("single", "b")]

torch.library.define(
    "vnm_tests::bump", "(Tensor(a!) x, Tensor y) -> Tensor", lib=(_lib := torch.library.Library("vnm_tests", "DEF"))
)
_lib.impl("bump", lambda x, y: x.add_(1).sum() + y.sum(), "CompositeExplicitAutograd")
_lib.impl("bump", lambda x, y: x.new_empty(()), "Meta")

WRITES = {
    "add_": lambda h: h.add_(1),
    "keyword": lambda h: h.clamp_(min=0.5),
    "operator": lambda h: h.__iadd__(2),
    "view": lambda h: h.view(-1)[3:9].mul_(5),
    "transposed": lambda h: h.t().mul_(2),
    "chunk": lambda h: h.chunk(2, -1)[1].zero_(),
    "unbind": lambda h: h.unbind(0)[0].fill_(2),
    "detached": lambda h: h.detach().mul_(2),
    "data": lambda h: h.data.mul_(2),
    "copy_": lambda h: h.copy_(torch.ones(4, 32)),
    "item assignment": lambda h: h.__setitem__(0, 1),
    "masked assignment": lambda h: h.__setitem__(h > 0, 1),
    "masked_fill_": lambda h: h.masked_fill_(h > 0, 3),
    "index_put_": lambda h: h.index_put_((torch.tensor([0]),), torch.ones(1, 32)),
    "scatter_": lambda h: h.scatter_(1, torch.zeros(4, 1, dtype=torch.long), 7.0),
    "out": lambda h: torch.add(h, 1, out=h),
    "out of a view": lambda h: torch.add(h[0], 1, out=h[1]),
    "foreach": lambda h: torch._foreach_add_([h[0], h[1]], 1),
    "inplace": lambda h: F.relu(h, inplace=True),
    "inplace by position": lambda h: (F.dropout(h, 0.0, True, True), F.silu(h, True)),
    "init": lambda h: nn.init.ones_(h),
    "custom op": lambda h: torch.ops.vnm_tests.bump(h, torch.ones(3)),
    "statistics": lambda h: F.batch_norm(torch.eye(4, 32), h[0], h[1], training=True),
}


@pytest.mark.parametrize("write", WRITES)
def test_siblings_do_not_cross_a_write(write):
    model = linears("a", "b")

    def function(x):
        h = x * 2
        y = model.a(h)
        WRITES[write](h)
        return y + model.b(h), h

    with torch.no_grad():
        units, _ = check(function, torch.randn(4, 32))
    assert units == SINGLES


def test_a_write_to_something_else_does_not_keep_siblings_apart():
    model = linears("a", "b")

    def function(x):
        h = x * 2
        y = model.a(h)
        other = (x + 1).add_(1)
        other[0] = h[0] * 3
        return y + model.b(h), other

    with torch.no_grad():
        units, _ = check(function, torch.randn(4, 32))
    assert units == [("siblings", "a", "b")]


def test_the_input_of_a_graph_is_written():
    """Also where another input may be a view of it: nobody guards that they share no memory."""
    model = linears("a", "b")

    def function(x, other):
        y = model.a(x)
        other.mul_(3)
        return y + model.b(x)

    x = torch.randn(4, 32)
    with torch.no_grad():
        for other in (torch.randn(2, 32), x[1:3]):
            torch._dynamo.reset()
            prepared, _ = run_rewritten(function, x, other)
            assert [unit.kind for unit in prepared[0].units] == ["single", "single"]


@pytest.mark.parametrize("write", ["add_", "view", "item assignment", "out", "custom op"])
def test_gated_pairs_do_not_cross_a_write(write):
    model = linears("a", "b", bias=False)

    def between(x):
        h = x * 2
        gate = F.silu(model.a(h))
        WRITES[write](h)
        return gate * model.b(h)

    def before_the_product(x):
        h = x * 2
        gate, up = model.a(h), model.b(h)
        WRITES[write](h)
        return F.silu(gate) * up, h

    with torch.no_grad():
        assert check(between, torch.randn(4, 32))[0] == SINGLES
        # The two are next to each other, so they are joined; but not moved down to the product.
        assert check(before_the_product, torch.randn(4, 32))[0] == [("siblings", "a", "b")]


def test_outputs_of_siblings_are_written():
    model = linears("a", "b")

    def function(x):
        y, z = model.a(x), model.b(x)
        y.add_(1)
        z[:, 0] = y[:, 1]
        return y, z

    with torch.no_grad():
        units, _ = check(function, torch.randn(4, 32))
    assert units == [("siblings", "a", "b")]


def test_a_bias_that_is_written_computed_or_of_another_size():
    model = linears("a", "b")

    def written(x):
        y = model.a(x)
        model.b.bias.add_(1)
        z = model.b(x)
        model.b.bias.sub_(1)
        return y, z

    def computed(x):
        return model.a(x), F.linear(x, model.b.weight, model.b.bias * 2), F.linear(x, model.a.weight, model.b.bias[:])

    one, scalar, matrix = torch.randn(1), torch.tensor(3.0), torch.randn(4, 32)

    def other_sizes(x):
        biases = (one, scalar, matrix)
        return [F.linear(x, layer.weight, bias) for layer in (model.a, model.b) for bias in biases]

    with torch.no_grad():
        for function in (written, computed, other_sizes):
            units, reasons = check(function, torch.randn(4, 32))
            assert {kind for kind, *_ in units} == {"single"}, function
            assert not reasons


def test_a_weight_that_the_graph_writes_stays_dense():
    model, buffer = linears("a", "b"), torch.zeros(2, 32, 32)

    def double(x):
        model.a.weight.mul_(2)
        y = model.a(x), model.b(x)
        model.a.weight.div_(2)
        return y

    def double_data(x):
        model.a.weight.data.mul_(2)
        y = model.a(x), model.b(x)
        model.a.weight.data.div_(2)
        return y

    def double_view(x):
        model.a.weight.t()[0].mul_(2)
        y = model.a(x), model.b(x)
        model.a.weight.t()[0].div_(2)
        return y

    def flat_buffer(x):
        buffer.mul_(2)
        y = model.a(x), model.b(x)
        buffer.div_(2)
        return y

    with torch.no_grad():
        for function in (double, double_data, double_view, flat_buffer):
            if function is flat_buffer:
                buffer[0] = model.a.weight
                model.a.weight.data = buffer[0]
            units, reasons = check(function, torch.randn(4, 32))
            assert units == [("single", "b")]
            assert ["write" in reason or "written" in reason for reason in reasons] == [True], reasons


def test_compiled():
    """Several of them at once, through Inductor."""
    model = linears("a", "b", bias=False)
    writes = [WRITES[name] for name in ("view", "item assignment", "out", "inplace")]

    def function(x):
        results = []
        for write in writes:
            h = x * 2
            y = model.a(h)
            write(h)
            results.append(F.silu(y) * model.b(h))
        return results

    x = torch.randn(4, 32)
    with torch.no_grad():
        actual = torch.compile(function, backend="vnm", options={"vnm.policy": "memory"})(*copies([x]))
        assert_alike(actual, function(x), 2e-5)
    assert vnm.explain(model).totals["layers"] == 2


def test_what_is_not_known_counts_as_writing():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    unknown = graph.call_function(print, (x,))
    unknown.target = copies  # a Python function that torch knows nothing of
    assert effect_of(unknown).written == (x,)
    assert effect_of(unknown).barrier
    hooked = graph.call_method("register_hook", (x, print))
    assert effect_of(hooked).barrier
    for harmless in (graph.call_method("view", (x, -1)), graph.call_function(torch.split, (x, 2))):
        assert effect_of(harmless).written == ()
        assert not effect_of(harmless).barrier
