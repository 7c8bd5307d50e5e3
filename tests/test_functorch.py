"""Derivatives in every mode and vmap: of the ops, of compressed weights, and of compiled functions."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import vnm_compile as vnm
from tests.passes.running import check, linears
from tests.support import random_sparse
from vnm_compile import ops
from vnm_compile.format import pack
from vnm_compile.layout import Layout

SPEC = vnm.Spec(16, 2, 5)
TEXT = Layout(SPEC, 33, 42).text
WEIGHT = random_sparse(33, 42, SPEC, torch.float64)


def cubes(function):
    return lambda x: function(x).pow(3).sum()


def dual(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x.cos()))).tangent


def double_backward(function, x):
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(cubes(function)(x), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


TRANSFORMS = {
    "vmap": lambda f, x: torch.vmap(f)(x),
    "vmap over columns": lambda f, x: torch.vmap(f, in_dims=1, out_dims=1)(x.movedim(0, 1)),
    "grad": lambda f, x: grad(cubes(f))(x),
    "grad of grad": lambda f, x: grad(lambda y: grad(cubes(f))(y).square().sum())(x),
    "per-sample grad": lambda f, x: torch.vmap(grad(cubes(f)))(x),
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "hessian": lambda f, x: hessian(cubes(f))(x),
    "jvp": lambda f, x: jvp(f, (x,), (x.cos(),))[1],
    "dual": dual,
    "dual without gradients": torch.no_grad()(dual),
    "double backward": double_backward,
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_compressed_weight(transform):
    """All in eager mode; the same ops as a dense weight, so the answers are equal but for rounding."""
    compressed, x = vnm.compress(WEIGHT, SPEC), torch.randn(3, 42, dtype=torch.float64)
    bias = torch.randn(33, dtype=torch.float64)
    actual = transform(lambda t: torch.tanh(F.linear(t, compressed, bias)), x)
    torch.testing.assert_close(actual, transform(lambda t: torch.tanh(F.linear(t, WEIGHT, bias)), x))


def test_every_derivative_of_every_op():
    """Gradients of gradients and forward mode against finite differences, for activations and values."""
    values, *structure = pack(WEIGHT, SPEC)
    x, y = torch.randn(2, 42, dtype=torch.float64), torch.randn(2, 33, dtype=torch.float64)
    ops = torch.ops.vnm
    cases = [
        (lambda a, b: ops.linear(a, b, structure, TEXT), (x, values)),
        (lambda a, b: ops.linear_input_grad(a, b, structure, TEXT), (y, values)),
        (lambda a, b: ops.linear_values_grad(a, b, structure, TEXT), (y, x)),
        (
            lambda a, b: ops.sections(a * b, [30, 60], [32, 64]),
            (torch.randn(2, 96).double(), torch.tensor(2.0).double()),
        ),
    ]
    two = [torch.cat([array, array]) for array in structure]
    cases.append((lambda a, b: ops.gated_linear(a, torch.cat([b, b]), two, TEXT, "silu"), (x, values)))
    for function, args in cases:
        args = tuple(arg.clone().requires_grad_() for arg in args)
        torch.autograd.gradcheck(function, args, check_forward_ad=True, fast_mode=True)
        torch.autograd.gradgradcheck(function, args, check_fwd_over_rev=True, fast_mode=True)


def test_vmap_over_weights_and_over_every_op():
    packed = pack(WEIGHT, SPEC)
    values, *structure = [torch.stack([array, array]) for array in packed]
    x = torch.randn(2, 5, 42, dtype=torch.float64)
    run = torch.ops.vnm.linear
    batched = torch.vmap(run, (0, 0, [0, 0], None))(x, values, structure, TEXT)
    torch.testing.assert_close(batched, x @ WEIGHT.T)
    y = torch.randn(3, 2, 96)
    for one, other in zip(
        torch.vmap(lambda t: torch.ops.vnm.sections(t, [30, 60], [32, 64]))(y), y.split([32, 64], -1), strict=True
    ):
        assert torch.equal(one, other[..., : one.shape[-1]])


def test_functional_call():
    model = nn.Linear(42, 33, bias=False, dtype=torch.float64)
    x, compressed = torch.randn(3, 42, dtype=torch.float64), vnm.compress(WEIGHT, SPEC)
    torch.testing.assert_close(functional_call(model, {"weight": compressed}, x), x @ WEIGHT.T)
    actual = torch.vmap(lambda t: functional_call(model, {"weight": compressed}, t))(x)
    torch.testing.assert_close(actual, x @ WEIGHT.T)


INSIDE = {
    "vmap": lambda layer, x: torch.vmap(layer)(x),
    "grad": lambda layer, x: grad(cubes(layer))(x),
    "jvp": lambda layer, x: jvp(layer, (x,), (x,))[1],
    "jacrev": lambda layer, x: jacrev(layer)(x),
}


def test_transforms_inside_of_the_compiled_function():
    """What lies in a transform stays dense and says so; what lies outside is sparse."""
    model = linears("a", "b").requires_grad_(False)

    def function(x):
        return [each(model.a, x) for each in INSIDE.values()], model.b(x)

    units, reasons = check(function, torch.randn(4, 32), tolerance=1e-4)
    assert units == [("single", "b")]
    assert any("torch.func" in reason for reason in reasons)
    x = torch.randn(4, 32)
    compiled = torch.compile(function, backend="vnm", options={"vnm.policy": "memory"})
    torch.testing.assert_close(compiled(x), function(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transform", INSIDE.values(), ids=INSIDE)
def test_transforms_of_compressed_layers_under_autocast(transform, bias):
    """Torch cuts a linear in a transform into a product, which autocast casts, and an addition, which it does not."""
    dense = nn.Linear(42, 33, bias=bias).requires_grad_(False)
    dense.weight.copy_(WEIGHT)
    layer, x = nn.Linear(42, 33, bias=bias).requires_grad_(False), torch.randn(3, 42)
    layer.weight, layer.bias = nn.Parameter(vnm.compress(dense.weight, SPEC), requires_grad=False), dense.bias

    def function(t):
        return transform(layer, t)

    with torch.autocast("cpu", torch.bfloat16):
        expected = transform(dense, x)
        actual = torch.compile(function, backend="vnm", options={"vnm.policy": "memory"})(x)
    assert (actual.dtype, actual.shape, actual.stride()) == (expected.dtype, expected.shape, expected.stride())
    torch.testing.assert_close(actual, expected, atol=2e-2 * expected.abs().max().item(), rtol=2e-2)


@pytest.mark.parametrize("store", ["dense", "compressed"])
def test_around_the_compiled_function(store):
    weight = vnm.compress(WEIGHT.float(), SPEC) if store == "compressed" else WEIGHT.float()
    weight, x = nn.Parameter(weight, requires_grad=False), torch.randn(3, 42)

    def layer(t):
        return F.linear(t, weight)

    compiled = torch.compile(layer, backend="vnm", options={"vnm.policy": "memory"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), atol=1e-5, rtol=1e-5)
    for name in ("dual without gradients", "dual", "jvp", "vmap", "grad"):
        transform = TRANSFORMS[name]
        torch.testing.assert_close(transform(compiled, x), transform(layer, x), atol=1e-3, rtol=1e-4)


def test_flops_of_kept_values_are_counted():
    compressed, x = vnm.compress(random_sparse(32, 64, "16:2:8"), "16:2:8"), torch.randn(2, 5, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        ops.linear(x, compressed.packed, compressed.layout_of_arrays).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 10 * 32 * 64 * 2 // 8)
