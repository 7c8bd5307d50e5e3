"""Quantised weights through torch.compile, files and reports."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vnm_compile as vnm
from tests.support import assert_as_accurate_as_dense, make_sparse_, with_slow
from vnm_compile.codegen.random_arrays import random_packed
from vnm_compile.explanation.describe import _told
from vnm_compile.explanation.layer import COMPRESSED
from vnm_compile.format import unpack
from vnm_compile.layout import Layout
from vnm_compile.ops import gated_linear, linear
from vnm_compile.quantization import Quantization, rounded_activations
from vnm_compile.tensor import VNMTensor

CASES = [
    ("int8/64", "64:2:8", 128, 256),
    ("int4/64", "64:2:8", 130, 260),
    ("int4/row", "16:1:16", 50, 330),
    ("int8/row", "24:2:5", 50, 111),
    ("int4/32", "1:2:4", 37, 41),
    ("int8/32", "128:2:16", 200, 1000),
]
ROUNDED = [
    ("int8/64/a8", "64:2:8", 128, 520),
    ("int4/32/a8", "32:1:8", 70, 300),
    ("int8/row/a8", "24:2:5", 50, 111),
    ("int4/128/a8", "1:2:4", 37, 41),
    ("int8/32/a8", "128:2:300", 200, 1000),
]
TOKENS = (1, 3, 6, 33)


def exact(packed, layout):
    """The weight in float64, from levels and scales without rounding."""
    return unpack(packed.replaced(3, packed.scales.double()), layout)


@pytest.mark.parametrize("dtype", with_slow([torch.float32, torch.bfloat16, torch.float16], [torch.bfloat16]), ids=str)
@pytest.mark.parametrize("case", with_slow(CASES, CASES[1::2]), ids=lambda case: " ".join(case[:2]))
def test_kernels_are_as_accurate_as_dense(case, dtype):
    kind, spec, out_features, in_features = case
    layout = Layout(vnm.Spec.parse(spec), out_features, in_features, Quantization.parse(kind))
    packed = random_packed(layout, dtype, torch.device("cpu"))
    run = torch.compile(lambda x, *arrays: linear(x, arrays, layout), backend="vnm")
    dense, weight = unpack(packed, layout), exact(packed, layout)
    for tokens in TOKENS:
        x = torch.randn(tokens, in_features).to(dtype)
        expected = x.double() @ weight.T
        assert_as_accurate_as_dense(run(x, *packed), F.linear(x, dense), expected)


@pytest.mark.parametrize("dtype", with_slow([torch.float32, torch.bfloat16, torch.float16], [torch.float32]), ids=str)
@pytest.mark.parametrize("case", with_slow(ROUNDED, ROUNDED[:3]), ids=lambda case: " ".join(case[:2]))
def test_kernels_round_activations_as_they_say(case, dtype):
    kind, spec, out_features, in_features = case
    layout = Layout(vnm.Spec.parse(spec), out_features, in_features, Quantization.parse(kind))
    packed = random_packed(layout, dtype, torch.device("cpu"))
    run = torch.compile(lambda x, *arrays: linear(x, arrays, layout), backend="vnm")
    weight = exact(packed, layout)
    for tokens in TOKENS:
        x = torch.randn(tokens, in_features).to(dtype)
        x[0] *= 1000
        x[-1, 3] = 40
        largest = x.double().abs().amax(1, keepdim=True)
        levels = (x.float() * torch.tensor(127.0).div(largest.float())).round().double()
        expected = levels @ weight.T * (largest / 127)
        # Levels are small integers: what is left is what sums and results are rounded to.
        dense = (F.linear(levels.float(), weight.float()) * (largest.float() / 127)).to(dtype)
        assert_as_accurate_as_dense(run(x, *packed), dense, expected)
        assert_as_accurate_as_dense(linear(x, packed, layout), dense, expected)
        far = (run(x, *packed).double() - x.double() @ weight.T).norm() / (x.double() @ weight.T).norm()
        assert 1e-4 < far < 0.05  # rounded, and not by much


@pytest.mark.parametrize("bits", [256, 1], ids=["AVX2", "portable"])
@pytest.mark.parametrize(
    "kind", with_slow(["int8/32", "int4/64", "int4/row/a8", "int8/64/a8"], ["int4/64", "int8/64/a8"])
)
def test_other_instruction_sets(kind, bits):
    layout = Layout(vnm.Spec(32, 2, 5), 100, 203, Quantization.parse(kind))
    packed = random_packed(layout, torch.bfloat16, torch.device("cpu"))
    run = torch.compile(lambda x, *arrays: linear(x, arrays, layout), backend="vnm", options={"cpp.simdlen": bits})
    dense, weight = unpack(packed, layout), exact(packed, layout)
    for tokens in TOKENS:
        x = torch.randn(tokens, 203).bfloat16()
        given, step = rounded_activations(x) if layout.rounds else (x, torch.ones(()))
        found = (F.linear(given.float(), dense.float()) * step).bfloat16()
        assert_as_accurate_as_dense(run(x, *packed), found, given.double() @ weight.T * step.double())


def test_tokens_that_cannot_be_rounded():
    layout = Layout(vnm.Spec(16, 2, 8), 48, 72, Quantization(8, 32, 8))
    packed = random_packed(layout, torch.float32, torch.device("cpu"))
    run = torch.compile(lambda x, *arrays: linear(x, arrays, layout), backend="vnm")
    for tokens in (4, 20):
        x = torch.randn(tokens, 72)
        x[0, 5], x[1, 71], x[2] = torch.nan, -torch.inf, 0
        x[3] = 1e-35
        for y in (run(x, *packed), linear(x, packed, layout)):
            assert y[:2].isnan().all()
            assert (y[2:4] == 0).all()
            assert y[4:].isfinite().all()
    assert run(torch.randn(0, 72), *packed).shape == (0, 48)


def test_derivatives_take_rounding_for_the_identity():
    layout = Layout(vnm.Spec(16, 2, 8), 48, 72, Quantization(8, 32, 8))
    packed = random_packed(layout, torch.float64, torch.device("cpu"))
    weight = exact(packed, layout)
    x, tangent, grad = (
        torch.randn(3, 72).double().requires_grad_(),
        torch.randn(3, 72).double(),
        torch.randn(3, 48).double(),
    )
    (found,) = torch.autograd.grad(linear(x, packed, layout), x, grad)
    torch.testing.assert_close(found, grad @ weight)
    _, forward = torch.func.jvp(lambda x: linear(x, packed, layout), (x.detach(),), (tangent,))
    torch.testing.assert_close(forward, tangent @ weight.T)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_weight_that_requires_grad_gets_one_at_rounded_activations(compiled):
    torch.manual_seed(0)
    net = make_sparse_(nn.Sequential(nn.Linear(64, 48)), "16:2:8").eval()
    vnm.quantize(net, "int8", 32, activations="int8", progress=False)
    weight, x = net[0].weight, torch.randn(40, 80)[3:15, 8:72].requires_grad_()
    dense = weight.to_dense()
    with torch.no_grad():
        rounded = net(x)
    weight.requires_grad_()
    y = (torch.compile(net, backend="vnm") if compiled else net)(x)
    torch.testing.assert_close(y.detach(), rounded)
    grad = torch.randn_like(y)
    y.backward(grad)
    levels, step = rounded_activations(x.detach())
    torch.testing.assert_close(weight.grad, grad.T @ (levels * step))
    torch.testing.assert_close(x.grad, grad @ dense)


@pytest.mark.parametrize("quantization", [Quantization(4, 32), Quantization(8, 32, 8)], ids=str)
def test_gated_pairs(quantization):
    layout = Layout(vnm.Spec(16, 2, 8), 48, 72, quantization)
    halves = [random_packed(layout, torch.float32, torch.device("cpu"), seed) for seed in (0, 1)]
    joined = [torch.cat(pair) for pair in zip(*halves, strict=True)]
    run = torch.compile(lambda x, *arrays: gated_linear(x, arrays, layout, "silu"), backend="vnm")
    for tokens in TOKENS:
        x = torch.randn(tokens, 72)
        gate, up = (linear(x, half, layout) for half in halves)
        torch.testing.assert_close(run(x, *joined), F.silu(gate) * up)


class Block(nn.Module):
    """q, k and v side by side, a gated pair, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, width) for width in (64, 32, 32))
        self.gate, self.up = nn.Linear(64, 128, bias=False), nn.Linear(64, 128, bias=False)
        self.down = nn.Linear(128, 64)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        x = x + q + torch.cat([k, v], -1)
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def block(values="int4", dtype=torch.float32):
    torch.manual_seed(0)
    net = make_sparse_(Block(), "16:2:8").to(dtype).eval()
    vnm.quantize(net, values, 32, progress=False)
    return net


@pytest.mark.parametrize("values", with_slow(["int8", "int4"], ["int4"]))
def test_a_block_compiles_and_is_explained(values):
    net = block(values)
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(torch.compile(net, backend="vnm")(x), expected)
        explanation = vnm.explain(net, x)
        report = vnm.inspect(net, x)
    assert {layer.decision for layer in explanation.layers} == {"sparse"}
    assert explanation["down"].stored_bytes == net.down.weight.nbytes
    assert values in explanation["down"].reason
    level = {"int8": "int8_t", "int4": "uint8_t"}[values]
    assert all(f"LevelValues<float, {level}, 32>" in kernel.source for kernel in report.sparse)
    assert explanation["q"].joined == ("k", "v")
    assert len(report.sparse) == 3  # q, k and v are one kernel, gate and up another


def test_a_model_that_rounds_activations(tmp_path):
    torch.manual_seed(0)
    net = make_sparse_(Block(), "16:2:8").eval()
    plain = copy.deepcopy(net)
    vnm.quantize(plain, "int8", 32, progress=False)
    vnm.quantize(net, "int8", 32, activations="int8", progress=False)
    assert net.down.weight.layout_of_arrays.stored_as == "16:2:8 int8/32/a8"
    assert torch.equal(net.down.weight.to_dense(), plain.down.weight.to_dense())
    x = torch.randn(4, 5, 64)
    with torch.no_grad():
        expected = net(x)
        far = (expected - plain(x)).norm() / plain(x).norm()
        # Where a sum differs in its last bits an activation may be rounded to the next level.
        assert (torch.compile(net, backend="vnm")(x) - expected).norm() / expected.norm() < 0.01
        one = torch.cat([net.q(each[None]) for each in x])
    assert 1e-5 < far < 0.03
    torch.testing.assert_close(one, net.q(x))  # tokens are rounded one by one
    vnm.save(net, tmp_path, progress=False)
    loaded = vnm.load(tmp_path, Block(), progress=False)
    assert loaded.down.weight.layout_of_arrays == net.down.weight.layout_of_arrays
    with torch.no_grad():
        assert torch.equal(loaded(x), expected)
    with pytest.raises(vnm.VNMError, match="int8"):
        vnm.quantize(make_sparse_(Block(), "16:2:8"), "int8", activations="int4", progress=False)


@pytest.mark.slow
def test_modes_of_torch():
    net = block("int8")
    compiled = torch.compile(net, backend="vnm")
    x = torch.randn(3, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, found = net(x), compiled(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.05)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), net(x))
    x.requires_grad_()
    found, expected = (torch.autograd.grad(call(x).square().sum(), x)[0] for call in (compiled, net))
    torch.testing.assert_close(found, expected)
    each = torch.func.vmap(net)(x.detach())
    torch.testing.assert_close(each, net(x).detach())


def test_a_weight_that_is_quantised_anew_is_not_stale():
    net = make_sparse_(nn.Sequential(nn.Linear(64, 64)), "16:2:8").eval()
    compiled = torch.compile(net, backend="vnm")
    x = torch.randn(2, 64)
    with torch.no_grad():
        for values in (None, "int8", "int4"):
            if values:
                vnm.decompress_model(net)
                vnm.quantize(net, values, progress=False)
            torch.testing.assert_close(compiled(x), net(x))
        net[0].weight.scales.mul_(2)
        torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.parametrize("tokens", with_slow([1, 4], [4]))
@pytest.mark.parametrize("values", with_slow(["int8", "int4"], ["int4"]))
@pytest.mark.parametrize("target", with_slow(["sm_90", "gfx942"], ["sm_90"]))
def test_kernels_for_gpus(values, target, tokens):
    """Every weight of a block has a kernel there, and nothing calls the reference, which unpacks."""
    with torch.no_grad():
        x = torch.randn(tokens, 64).to(torch.bfloat16)
        report = vnm.inspect(block(values, torch.bfloat16), x, target=target)
    vector = tokens == 1 and target == "sm_90"
    gated = "vnm_gated_vector_silu" if vector else "vnm_gated_silu"
    assert {kernel.template for kernel in report.sparse} == {"vnm_vector" if vector else "vnm_linear", gated}
    assert sum(kernel.launches for kernel in report.sparse) == 3
    assert not [call.name for call in report.library_calls if "vnm" in call.name]
    assert {layer.decision for layer in report.explanation.layers} == {"sparse"}
    assert f"values as {values}/32" in report.explanation["down"].reason


def test_gpus_round_no_activations_and_explain_says_so():
    torch.manual_seed(0)
    net = make_sparse_(Block(), "16:2:8").eval()
    vnm.quantize(net, "int8", 32, activations="int8", progress=False)
    report = vnm.inspect(net, torch.randn(4, 64), target="sm_90")
    assert not report.sparse
    assert {layer.decision for layer in report.explanation.layers} == {"dense"}
    assert report.explanation.device == "sm_90"
    decision, reason = _told("sparse", COMPRESSED, net.down.weight.layout_of_arrays, torch.float32, "cuda:0")
    assert decision == "dense"
    assert "values as int8/32, activations rounded to int8; no kernel on GPUs rounds activations" in reason


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_saved_and_loaded(values, tmp_path):
    net = block(values, torch.bfloat16)
    vnm.save(net, tmp_path / "one", progress=False)
    other = vnm.load(tmp_path / "one", Block().to(torch.bfloat16), progress=False)
    for name, weight in net.state_dict().items():
        loaded = other.state_dict()[name]
        assert type(loaded) is type(weight)
        if isinstance(weight, VNMTensor):
            assert loaded.layout_of_arrays == weight.layout_of_arrays
            assert all(torch.equal(a, b) for a, b in zip(loaded.packed, weight.packed, strict=True))
    vnm.save(other, tmp_path / "two", progress=False)
    one, two = ((tmp_path / each / "model.safetensors").read_bytes() for each in ("one", "two"))
    assert one == two
