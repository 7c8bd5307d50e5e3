"""The ops against the masked dense layer, and against torch's own checks of custom ops."""

from __future__ import annotations

import pytest
import torch

from tests.support import random_sparse
from vnm_compile.activations import ACTIVATIONS
from vnm_compile.format import pack
from vnm_compile.layout import Layout
from vnm_compile.ops import gated_linear, linear, weight_args
from vnm_compile.spec import Spec

SPEC = Spec(16, 2, 5)
LAYOUT = Layout(SPEC, 33, 42)


def operands(dtype=torch.float64):
    weight = random_sparse(33, 42, SPEC, dtype)
    return weight, pack(weight, SPEC), torch.randn(2, 3, 42, dtype=dtype)


def test_opcheck():
    _, packed, x = operands(torch.float32)
    two = [torch.cat([array, array]) for array in packed]
    grad = torch.randn(2, 3, 33)
    ops = torch.ops.vnm
    weight, joined = weight_args(packed, LAYOUT), weight_args(two, LAYOUT)
    torch.library.opcheck(ops.linear_input_grad.default, (grad, *weight))
    torch.library.opcheck(ops.linear_values_grad.default, (grad, x, *weight[1:]))
    torch.library.opcheck(ops.gated_linear.default, (x, *joined, "silu"))
    x.requires_grad_(), packed.values.requires_grad_()
    torch.library.opcheck(ops.linear.default, (x, *weight))
    torch.library.opcheck(ops.sections.default, (torch.randn(2, 96, requires_grad=True), [30, 60], [32, 64]))


def test_linear_and_its_gradients_equal_dense():
    weight, packed, x = operands()
    x.requires_grad_()
    values = packed.values.requires_grad_()
    y = linear(x, packed, LAYOUT)
    dense = weight.clone().requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    y2 = torch.nn.functional.linear(x2, dense)
    assert torch.equal(y, y2)
    grad = torch.randn_like(y)
    y.backward(grad)
    y2.backward(grad)
    torch.testing.assert_close(x.grad, x2.grad)
    # The gradient of the values is that of the dense weight at the kept places.
    kept = weight != 0
    dense_of_grad = pack(torch.where(kept, dense.grad, 0), SPEC).values
    filled = values.grad * (packed.values != 0)
    torch.testing.assert_close(filled, dense_of_grad * (packed.values != 0))
    assert bool((values.grad[33:] == 0).all()), "padding rows get no gradient"


@pytest.mark.parametrize("shape", [(42,), (0, 42), (4, 42), (1, 2, 3, 42)])
def test_any_number_of_leading_dimensions(shape):
    weight, packed, _ = operands()
    x = torch.randn(shape, dtype=torch.float64)
    assert torch.equal(linear(x, packed, LAYOUT), torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated(name):
    weight, packed, x = operands()
    up = random_sparse(33, 42, SPEC, torch.float64, seed=1)
    joined = [torch.cat(pair) for pair in zip(packed, pack(up, SPEC), strict=True)]
    y = gated_linear(x, joined, LAYOUT, name)
    torch.testing.assert_close(y, ACTIVATIONS[name].eager(x @ weight.T) * (x @ up.T))


def test_sections_and_their_gradient():
    y = torch.randn(2, 96, requires_grad=True)
    one, two = torch.ops.vnm.sections(y, [30, 60], [32, 64])
    assert torch.equal(one, y[:, :30])
    assert torch.equal(two, y[:, 32:92])
    (one.sum() + 2 * two.sum()).backward()
    expected = torch.zeros(2, 96)
    expected[:, :30], expected[:, 32:92] = 1, 2
    assert torch.equal(y.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_it_does_for_linear(dtype):
    weight, packed, x = operands(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        y = linear(x, packed, LAYOUT)
        assert y.dtype == dtype
        assert torch.equal(y, torch.nn.functional.linear(x, weight))


def test_dtypes_must_agree():
    _, packed, x = operands(torch.float32)
    with pytest.raises(Exception, match="must agree"):
        torch.compile(lambda t: linear(t, packed, LAYOUT), backend="eager")(x.double())
