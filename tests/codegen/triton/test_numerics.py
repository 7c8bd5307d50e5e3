"""The generated, fused kernels compute the right thing: interpreted, against float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.codegen.triton.cases import arrays, case, dense_layer, expect, plain
from vnm_compile.activations import ACTIVATIONS
from vnm_compile.codegen.generate import generate
from vnm_compile.codegen.triton.prepack import AlignedRows
from vnm_compile.format import unpack
from vnm_compile.layout import Layout
from vnm_compile.ops import gated_linear

SHAPES = [  # tokens, out_features, in_features: tails everywhere
    (1, 128, 128),
    (5, 96, 200),
    (40, 200, 100),
    (130, 64, 77),
]


SPECS = ["16:2:4", "32:1:8", "64:2:5", "64:2:8", "128:2:16", "64:1:16", "16:2:300"]


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        # Each pattern in one dtype, and each dtype with three patterns.
        pytest.param(spec, dtype, marks=[] if (i - j) % 3 == 0 else pytest.mark.slow)
        for i, spec in enumerate(SPECS)
        for j, dtype in enumerate((torch.float16, torch.bfloat16, torch.float32))
    ],
    ids=str,
)
def test_every_pattern_dtype_and_tail(interpreter, spec, dtype):
    for tokens, out_features, in_features in SHAPES:
        pattern, x, packed, weight = case(spec, tokens, out_features, in_features, dtype)
        generated = generate(plain(pattern, out_features, in_features), [x, *packed], "sm_90", static=(1, 2, 3))
        assert not [name for name, _ in generated.library_calls if "vnm" in name], "a kernel, and not the reference"
        exact = F.linear(x.double(), weight.double())
        expect(interpreter, generated, [x, *packed], dense_layer(x, weight), exact)


ANY = {
    "v": st.sampled_from([16, 32, 48, 64]),
    "n": st.sampled_from([1, 2]),
    "m": st.integers(4, 40),
    "tokens": st.integers(1, 40),
    "out_features": st.integers(1, 100),
    "in_features": st.integers(1, 200),
    "dtype": st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    "target": st.sampled_from(["sm_80", "sm_90", "gfx942"]),
}
SHARED = [HealthCheck.function_scoped_fixture]


@settings(max_examples=12, deadline=None, suppress_health_check=SHARED)
@given(**ANY)
@example(v=16, n=2, m=8, tokens=1, out_features=1, in_features=64, dtype=torch.float16, target="sm_80")
def test_any_pattern_and_size(interpreter, v, n, m, tokens, out_features, in_features, dtype, target):
    any_pattern_and_size(interpreter, v, n, m, tokens, out_features, in_features, dtype, target)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=SHARED)
@given(**ANY)
def test_very_many_patterns_and_sizes(interpreter, v, n, m, tokens, out_features, in_features, dtype, target):
    any_pattern_and_size(interpreter, v, n, m, tokens, out_features, in_features, dtype, target)


def any_pattern_and_size(interpreter, v, n, m, tokens, out_features, in_features, dtype, target):
    pattern, x, packed, weight = case(f"{v}:{n}:{m}", tokens, out_features, in_features, dtype)
    generated = generate(plain(pattern, out_features, in_features), [x, *packed], target, static=(1, 2, 3))
    exact = F.linear(x.double(), weight.double())
    expect(interpreter, generated, [x, *packed], dense_layer(x, weight), exact)


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_other_targets(interpreter, target):
    """AMD has no byte permutation, so its kernels shift."""
    pattern, x, packed, weight = case("64:2:8", 33, 128, 144, torch.bfloat16)
    generated = generate(plain(pattern, 128, 144), [x, *packed], target, static=(1, 2, 3))
    (kernel,) = (each for each in generated.kernels if each.schedule.template)
    assert ("prmt" in kernel.source) == target.startswith("sm")
    expect(interpreter, generated, [x, *packed], F.linear(x, weight), F.linear(x.double(), weight.double()))


def test_both_ways_to_expand_agree_to_the_last_bit(interpreter):
    pattern, x, packed, _ = case("64:2:8", 20, 64, 128, torch.float16)
    permuted, shifted = (
        interpreter.run(generate(plain(pattern, 64, 128), [x, *packed], target, static=(1, 2, 3)).wrapper, [x, *packed])
        for target in ("sm_90", "gfx942")
    )
    assert torch.equal(permuted[0], shifted[0])


def block(bias: Any, residual: Any) -> Callable[[Callable[..., Any], Any], Any]:
    """What surrounds a linear in a transformer: a pointwise producer, bias, activation, scaling, residual."""

    def surround(multiply: Callable[..., Any], x: Any) -> Any:
        return F.gelu(multiply(F.silu(x)) + bias) * 0.5 + residual

    return surround


@pytest.mark.parametrize(("spec", "tokens"), [("64:2:8", 70), ("32:2:16", 9), ("16:1:4", 3)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_prologue_and_epilogue_are_fused_and_right(interpreter, spec, tokens, dtype):
    pattern, x, packed, weight = case(spec, tokens, 96, 126, dtype)
    bias, residual = torch.randn(96).to(dtype), torch.randn(1, tokens, 96).to(dtype)
    multiply = plain(pattern, 96, 126)

    def graph(x: Any, values: Any, metadata: Any, columns: Any, bias: Any, residual: Any) -> Any:
        return block(bias, residual)(lambda y: multiply(y, values, metadata, columns), x)

    inputs = [x, *packed, bias, residual]
    generated = generate(graph, inputs, "sm_90", static=(1, 2, 3, 4))
    # silu is computed where the activations are brought into order; everything else in the kernel that multiplies.
    assert len(generated.kernels) == 2
    dense = block(bias, residual)(lambda y: F.linear(y, weight), x)
    exact = block(bias.double(), residual.double())(lambda y: F.linear(y, weight.double()), x.double())
    expect(interpreter, generated, inputs, dense, exact)


@pytest.mark.parametrize("tokens", [2, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated(interpreter, activation, tokens):
    pattern, x, gate, gate_weight = case("32:2:8", tokens, 72, 132, torch.bfloat16)
    up = arrays(72, 132, pattern, torch.bfloat16, seed=1)
    up_weight = unpack(up, Layout(pattern, 72, 132))
    both = [torch.cat(pair) for pair in zip(gate, up, strict=True)]

    def graph(x: Any, values: Any, metadata: Any, columns: Any) -> Any:
        return gated_linear(x, (values, metadata, columns), Layout(pattern, 72, 132), activation)

    generated = generate(graph, [x, *both], "sm_90", static=(1, 2, 3))
    act = ACTIVATIONS[activation].eager
    dense = act(F.linear(x, gate_weight)) * F.linear(x, up_weight)
    exact = act(F.linear(x.double(), gate_weight.double())) * F.linear(x.double(), up_weight.double())
    expect(interpreter, generated, [x, *both], dense, exact)


def test_split_sums(interpreter):
    """Few tiles and a long K: partial sums, and one kernel that adds them up and applies the epilogue."""
    pattern, x, packed, weight = case("64:2:8", 3, 128, 4400, torch.bfloat16)
    bias = torch.randn(128).to(torch.bfloat16)
    multiply = plain(pattern, 128, 4400)

    def graph(x: Any, values: Any, metadata: Any, columns: Any, bias: Any) -> Any:
        return torch.relu(multiply(x, values, metadata, columns) + bias)

    generated = generate(graph, [x, *packed, bias], "sm_90", static=(1, 2, 3, 4))
    (kernel,) = (each for each in generated.kernels if each.schedule.template)
    assert re.search("SPLITS : tl.constexpr = [248]", kernel.source)
    dense = torch.relu(F.linear(x, weight) + bias)
    exact = torch.relu(F.linear(x.double(), weight.double()) + bias.double())
    expect(interpreter, generated, [x, *packed, bias], dense, exact)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_split_sums_of_a_gated_pair(interpreter, activation):
    """A second kernel adds the sums up and applies the activation, lowered from its eager function."""
    pattern, x, gate, gate_weight = case("64:2:8", 2, 100, 4096, torch.float16)
    up = arrays(100, 4096, pattern, torch.float16, seed=1)
    both = [torch.cat(pair) for pair in zip(gate, up, strict=True)]

    def graph(x: Any, values: Any, metadata: Any, columns: Any) -> Any:
        return gated_linear(x, (values, metadata, columns), Layout(pattern, 100, 4096), activation)

    generated = generate(graph, [x, *both], "sm_90", static=(1, 2, 3))
    assert any(re.search("SPLITS : tl.constexpr = [248]", kernel.source) for kernel in generated.kernels)
    weights = gate_weight, unpack(up, Layout(pattern, 100, 4096))
    dense, exact = (
        ACTIVATIONS[activation].eager(F.linear(x.to(kind), weights[0].to(kind)))
        * F.linear(x.to(kind), weights[1].to(kind))
        for kind in (torch.float16, torch.float64)
    )
    expect(interpreter, generated, [x, *both], dense, exact)


@pytest.mark.parametrize("hint", [4, 70])
def test_one_dynamic_kernel_serves_any_number_of_tokens(interpreter, hint):
    pattern, x, packed, weight = case("64:2:8", hint, 96, 128, torch.bfloat16)
    generated = generate(plain(pattern, 96, 128), [x, *packed], "sm_90", static=(1, 2, 3), dynamic={0: [1]})
    for tokens in (2, 17, 64, 101):
        x = torch.randn(1, tokens, 128).to(torch.bfloat16)
        expect(interpreter, generated, [x, *packed], F.linear(x, weight), F.linear(x.double(), weight.double()))


def test_arrays_whose_rows_are_not_aligned(interpreter):
    """Two bytes of metadata are read at once, so rows of an odd number of bytes are moved apart first."""
    pattern, x, packed, weight = case("64:2:4", 8, 64, 104, torch.float16)
    assert packed.metadata.stride(0) % 2
    generated = generate(plain(pattern, 64, 104), [x, *packed], "sm_90", static=(1, 2, 3))
    assert len(generated.kernels) == 3
    expect(interpreter, generated, [x, *packed], F.linear(x, weight), F.linear(x.double(), weight.double()))


def test_blocks_of_few_rows_run_the_reference(interpreter):
    pattern, x, packed, _ = case("8:2:8", 8, 64, 64, torch.float16)
    generated = generate(plain(pattern, 64, 64), [x, *packed], "sm_90", static=(1, 2, 3))
    assert not any(kernel.schedule.template for kernel in generated.kernels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("spec", ["32:2:5", "32:1:5"])
def test_zeros_between_aligned_rows_are_read(interpreter, spec, dtype):
    """The last load of a row is whole: what it brings too much is the zeros that `AlignedRows` put there."""
    pattern, x, packed, weight = case(spec, 9, 64, 165, dtype)  # 33 groups
    packed = AlignedRows().prepare(packed)
    assert packed.metadata.stride(0) % 16 == 0
    generated = generate(plain(pattern, 64, 165), [x, *packed], "sm_90", static=(1, 2, 3))
    expect(interpreter, generated, [x, *packed], F.linear(x, weight), F.linear(x.double(), weight.double()))
