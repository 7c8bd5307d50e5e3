"""The generated C++ kernels: as accurate as dense, at every tail, and fused into one."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

from tests.support import assert_as_accurate_as_dense, make_sparse_, random_sparse, with_slow
from vnm_compile.activations import ACTIVATIONS
from vnm_compile.format import pack
from vnm_compile.layout import Layout
from vnm_compile.ops import gated_linear, linear
from vnm_compile.spec import Spec

# The second count makes the tokens dynamic: one kernel serves all that follow.
TOKENS = (1, 2, 3, 4, 5, 8, 9, 12, 13, 16, 17, 50, 64, 65, 131, 300)

# Pattern, out_features, in_features: tails in rows, columns, metadata bytes and vectors, V from 1 to 128 and one that
# is no multiple of a vector's lanes, wide columns, and more groups than are looked up at a time.
CASES = [
    ("64:2:8", 128, 256),
    ("32:2:5", 100, 203),
    ("16:2:4", 70, 90),
    ("32:1:8", 65, 131),
    ("128:2:16", 150, 300),
    ("1:2:4", 9, 37),
    ("8:1:6", 30, 50),
    ("16:2:300", 40, 650),
    ("32:2:20", 40, 210),
    ("64:2:4", 70, 2606),
    ("24:2:6", 50, 110),
]


compiled = partial(torch.compile, backend="vnm")


def operands(spec, out_features, in_features, dtype):
    weight = random_sparse(out_features, in_features, spec, dtype)
    return weight, pack(weight, spec)


def quick(i, dtype):
    """Whether a case runs in every run: the first in each dtype, the others in fp32, bf16 and fp16 by turns; and those
    whose sums in fp32 would be less exact than a dense kernel's if they were as long as others'."""
    if dtype == torch.float32 and CASES[i][0] in ("128:2:16", "32:2:20"):
        return True
    return i == 0 or i % 3 == (torch.float32, torch.bfloat16, torch.float16).index(dtype)


@pytest.mark.parametrize(
    ("spec", "out_features", "in_features", "dtype"),
    [
        pytest.param(*each, dtype, id=f"{dtype}-{each[0]}", marks=[] if quick(i, dtype) else pytest.mark.slow)
        for i, each in enumerate(CASES)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ],
)
def test_linear_is_as_accurate_as_dense(spec, out_features, in_features, dtype):
    spec = Spec.parse(spec)
    if dtype == torch.float16 and spec.m not in (8, 5):
        spec, out_features, in_features = Spec(64, 2, 8), 64, 72
    weight, packed = operands(spec, out_features, in_features, dtype)

    layout = Layout(spec, out_features, in_features)

    @compiled
    def run(x, *arrays):
        return linear(x, arrays, layout)

    for tokens in TOKENS:
        x = torch.randn(tokens, in_features).to(dtype)
        reference = x.double() @ weight.double().T
        assert_as_accurate_as_dense(run(x, *packed), nn.functional.linear(x, weight), reference)


@pytest.mark.parametrize("bits", [256, 1], ids=["AVX2", "portable"])
@pytest.mark.parametrize("dtype", with_slow([torch.float32, torch.bfloat16], quick=[torch.bfloat16]), ids=str)
def test_other_instruction_sets(bits, dtype):
    """What older x86 and other machines run; simdlen is Inductor's own switch for the vector width."""
    for text, out_features, in_features in (("32:2:5", 100, 203), ("16:1:8", 40, 70)):
        spec = Spec.parse(text)
        weight, packed = operands(spec, out_features, in_features, dtype)
        layout = Layout(spec, out_features, in_features)
        run = compiled(lambda x, *a, layout=layout: linear(x, a, layout), options={"cpp.simdlen": bits})
        for tokens in (1, 3, 6, 33):
            x = torch.randn(tokens, in_features).to(dtype)
            reference = x.double() @ weight.double().T
            assert_as_accurate_as_dense(run(x, *packed), nn.functional.linear(x, weight), reference)


@pytest.mark.parametrize("name", with_slow(ACTIVATIONS, quick=("silu", "gelu_tanh")))
def test_gated(name):
    spec = Spec(32, 2, 8)
    gate, up = (random_sparse(50, 90, spec, seed=seed) * 0.3 for seed in (0, 1))
    joined = [torch.cat(pair) for pair in zip(pack(gate, spec), pack(up, spec), strict=True)]

    layout = Layout(spec, 50, 90)

    @compiled
    def run(x, *arrays):
        return gated_linear(x, arrays, layout, name)

    for tokens in (1, 4, 7, 40, 70):
        x = torch.randn(tokens, 90)
        reference = ACTIVATIONS[name].eager(x.double() @ gate.double().T) * (x.double() @ up.double().T)
        dense = ACTIVATIONS[name].eager(x @ gate.T) * (x @ up.T)
        torch.testing.assert_close(run(x, *joined).double(), reference, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(run(x, *joined), dense, atol=2e-5, rtol=2e-5)


def kernels(function, *args):
    """The result, and how many C++ kernels were generated for it."""
    result, codes = run_and_get_code(compiled(function), *args)
    return result, sum(code.count("async_compile.cpp_pybinding") for code in codes)


def test_bias_activation_scale_and_residual_are_one_kernel():
    spec = Spec(32, 2, 8)
    weight, packed = operands(spec, 100, 200, torch.float32)
    bias, x, residual = torch.randn(100), torch.randn(2, 20, 200), torch.randn(2, 20, 100)

    layout = Layout(spec, 100, 200)

    def run(x, residual, *arrays):
        y = linear(x, arrays, layout)
        return nn.functional.gelu(y + bias) * 2 + residual

    result, count = kernels(run, x, residual, *packed)
    torch.testing.assert_close(result, nn.functional.gelu(x @ weight.T + bias) * 2 + residual, atol=1e-4, rtol=1e-4)
    assert count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_in_the_epilogue(dtype):
    spec = Spec(16, 2, 8)
    weight, packed = operands(spec, 48, 64, dtype)
    x = torch.randn(9, 64).to(dtype)

    layout = Layout(spec, 48, 64)

    def run(x, *arrays):
        return torch.relu(linear(x, arrays, layout)).float() + 1

    result, count = kernels(run, x, *packed)
    expected = torch.relu(x.double() @ weight.double().T) + 1
    torch.testing.assert_close(result.double(), expected, atol=0.1, rtol=0.02)
    assert count == 1


def test_the_bare_product_may_be_read_too():
    spec = Spec(16, 2, 8)
    weight, packed = operands(spec, 48, 64, torch.float32)
    x = torch.randn(9, 64)

    layout = Layout(spec, 48, 64)

    def run(x, *arrays):
        y = linear(x, arrays, layout)
        return y, nn.functional.silu(y)

    (bare, activated), _ = kernels(run, x, *packed)
    torch.testing.assert_close(bare, x @ weight.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(activated, nn.functional.silu(x @ weight.T), atol=1e-4, rtol=1e-4)


def test_infinite_activations_stay_where_they_are():
    """A token with an infinity must not reach another, nor a padded column read one that is not its own."""
    spec = Spec(16, 2, 5)
    _, packed = operands(spec, 40, 43, torch.float32)
    for tokens in (2, 9):
        x = torch.randn(tokens, 43)
        layout = Layout(Spec(16, 2, 5), 40, 43)
        expected = linear(x, packed, layout)
        x[1] = torch.inf
        result = compiled(lambda x, *a, layout=layout: linear(x, a, layout))(x, *packed)
        others = [i for i in range(tokens) if i != 1]
        torch.testing.assert_close(result[others], expected[others], atol=1e-5, rtol=1e-5)


def test_results_repeat_bit_for_bit():
    spec = Spec(64, 2, 8)
    _, packed = operands(spec, 256, 256, torch.float32)
    layout = Layout(Spec(64, 2, 8), 256, 256)
    run = compiled(lambda x, *a: linear(x, a, layout))
    for tokens in (1, 40):
        x = torch.randn(tokens, 256)
        first = run(x, *packed)
        assert all(torch.equal(run(x, *packed), first) for _ in range(20))


def test_layers_of_models_fuse():
    """A BERT layer's FFN-in is one kernel (linear, bias, GELU); a gated MLP is two."""

    class FeedForward(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

        def forward(self, x):
            return x + self.down(nn.functional.gelu(self.up(x)))

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down = (nn.Linear(*size, bias=False) for size in ((64, 96), (64, 96), (96, 64)))

        def forward(self, x):
            return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    for kind in (FeedForward, Gated):
        model, x = make_sparse_(kind(), "16:2:8").eval(), torch.randn(2, 11, 64)
        with torch.no_grad():
            compiled = torch.compile(model, backend="vnm", options={"vnm.policy": "memory"})
            result, codes = run_and_get_code(compiled, x)
        torch.testing.assert_close(result, model(x), atol=1e-5, rtol=1e-5)
        assert sum(code.count("async_compile.cpp_pybinding") for code in codes) == 2, kind
