"""The table of activations: every entry, in every form that it is written in."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.passes.running import check, linears
from vnm_compile.activations import ACTIVATIONS, activation_of
from vnm_compile.format import pack
from vnm_compile.layout import Layout
from vnm_compile.ops import gated_linear
from vnm_compile.spec import Spec


def forms(entry):
    """The ways to write an activation that its entry lists."""
    calls = [lambda x, call=function: call(x, **entry.keywords) for function in entry.functions]
    return calls + [lambda x, name=name: getattr(x, name)(**entry.keywords) for name in entry.methods]


@pytest.mark.parametrize("entry", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_each_form_is_the_eager_function_and_is_joined(entry):
    model, x = linears("a", "b", bias=False), torch.randn(4, 32)
    for form in forms(entry):
        torch.testing.assert_close(form(x), entry.eager(x), rtol=0, atol=0)
        with torch.no_grad():
            units, reasons = check(lambda x, form=form: form(model.a(x)) * model.b(x), x)
        assert units == [("gated", "a", "b")]
        assert not reasons


@pytest.mark.parametrize("entry", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_each_entry_is_the_only_one_that_knows_its_forms(entry):
    x = torch.fx.Graph().placeholder("x")
    for kind, calls in (("call_function", entry.functions), ("call_method", entry.methods)):
        for call in calls:
            node = x.graph.create_node(kind, call, (x,), dict(entry.keywords))
            assert [name for name, each in ACTIVATIONS.items() if each.is_applied_by(node)] == [entry.name]


@pytest.mark.parametrize("entry", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_over_the_range_of_a_float(entry):
    """`activation(x) * x`, in C++ against float64: the smallest, the largest, and where a formula may cancel."""
    magnitudes = torch.cat([torch.logspace(-15, 4, 60), torch.linspace(0.1, 30, 68)])
    values = torch.cat([magnitudes, -magnitudes])
    spec, width = Spec(1, 1, 4), len(values)
    weight = torch.zeros(width, 4 * width)
    weight[range(width), range(0, 4 * width, 4)] = 1.0
    joined = [torch.cat([each, each]) for each in pack(weight, spec)]

    layout = Layout(spec, width, 4 * width)

    @torch.compile(backend="vnm")
    def run(x, *arrays):
        return gated_linear(x, arrays, layout, entry.name)

    x = torch.zeros(1, 4 * width)
    x[0, ::4] = values
    exact = entry.eager(values.double()) * values.double()
    error = (run(x, *joined)[0].double() - exact).abs()
    # An activation that has become small is known as well as its argument is, to a unit of fp32 relative to that.
    assert (error <= 2**-21 * values.double().abs().clamp(max=30) * values.double().abs() + 2**-21 * exact.abs()).all()


def test_calls_that_do_more_than_apply_an_activation_are_left_alone():
    model, x = linears("a", "b", bias=False), torch.randn(4, 32)
    others = {
        "in place": lambda x: F.silu(model.a(x), inplace=True) * model.b(x),
        "in place by position": lambda x: F.relu(model.a(x), True) * model.b(x),
        "not in the table": lambda x: F.softsign(model.a(x)) * model.b(x),
    }
    for name, other in others.items():
        with torch.no_grad():
            assert "gated" not in {kind for kind, *_ in check(other, x)[0]}, name
    assert activation_of(None) is None


def test_what_an_activation_writes_to_is_written():
    model, into = linears("a", "b", bias=False), torch.zeros(4, 32)

    def function(x, into):
        h = x * 2
        return torch.sigmoid(model.a(h), out=into) * model.b(h), into

    with torch.no_grad():
        units, _ = check(function, torch.randn(4, 32), into)
    assert "gated" not in {kind for kind, *_ in units}


def test_modules_are_their_functions():
    modules = nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.ReLU(), nn.Sigmoid(), nn.Mish()
    model, x = linears("a", "b", bias=False), torch.randn(4, 32)
    for module in modules:
        with torch.no_grad():
            assert check(lambda x, module=module: module(model.a(x)) * model.b(x), x)[0] == [("gated", "a", "b")]
