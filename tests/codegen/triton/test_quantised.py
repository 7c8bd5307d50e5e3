"""Quantised values in the generated kernels: interpreted, against levels times scales in float64."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.codegen.triton.cases import arrays, dense_layer, exact_weight, expect, traced
from tests.codegen.triton.test_addresses import slices_of_wider_arrays, views_of_one_buffer
from tests.support import assert_as_accurate_as_dense, with_slow
from vnm_compile.activations import ACTIVATIONS
from vnm_compile.codegen.generate import Generated, generate
from vnm_compile.codegen.triton.prepack import AlignedRows
from vnm_compile.format import Packed, unpack
from vnm_compile.layout import Layout
from vnm_compile.ops import gated_linear, linear, sections
from vnm_compile.quantization import Quantization, store_levels
from vnm_compile.spec import Spec

KINDS = [f"{kind}/{group}" for kind in ("int8", "int4") for group in (32, 64, 128, "row")]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WEIGHTS = range(1, 5)


def layout_of(spec: str, out_features: int, in_features: int, stored: str) -> Layout:
    return Layout(Spec.parse(spec), out_features, in_features, Quantization.parse(stored))


def random_case(layout: Layout, tokens: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Packed]:
    packed = arrays(layout.out_features, layout.in_features, layout.spec, dtype, seed, layout.quantization)
    return torch.randn(1, tokens, layout.in_features).to(dtype), packed


def product(layout: Layout) -> Any:
    return traced(lambda x, *packed: linear(x, packed, layout), 5)


def generated_for(layout: Layout, inputs: list[Any], target: str, **options: Any) -> Generated:
    """The code of one product, which is by a kernel."""
    generated = generate(product(layout), inputs, target, static=WEIGHTS, **options)
    assert [kernel for kernel in generated.kernels if kernel.schedule.template], "the reference runs"
    return generated


def check(interpreter: Any, layout: Layout, tokens: int, dtype: torch.dtype, target: str) -> str:
    """One product is as accurate as a dense layer on the rounded weight; the template that computed it."""
    x, packed = random_case(layout, tokens, dtype)
    generated = generated_for(layout, [x, *packed], target)
    exact = x.double() @ exact_weight(packed, layout).T
    expect(interpreter, generated, [x, *packed], dense_layer(x, unpack(packed, layout)), exact)
    return next(kernel.schedule.template for kernel in generated.kernels if kernel.schedule.template)


@pytest.mark.parametrize("stored", with_slow(KINDS, {"int8/64", "int4/row"}))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_way_to_store_values(interpreter, stored, dtype):
    """One and two values a group, tails of rows, columns, scales and bytes, with and without tensor cores."""
    for n, tokens, out_features, in_features in ((2, 1, 70, 360), (2, 33, 96, 111), (1, 5, 70, 600), (1, 18, 40, 77)):
        layout = layout_of(f"16:{n}:8", out_features, in_features, stored)
        template = check(interpreter, layout, tokens, dtype, "sm_90")
        assert template == ("vnm_vector" if tokens == 1 and dtype.itemsize == 2 else "vnm_linear")


@pytest.mark.parametrize("stored", with_slow(["int8/32", "int8/row", "int4/64", "int4/row"], {"int8/row", "int4/64"}))
@pytest.mark.parametrize("target", with_slow(["sm_80", "gfx942", "gfx1100"], {"gfx1100"}))
def test_other_targets(interpreter, target, stored):
    for n, tokens, dtype in ((2, 1, torch.bfloat16), (2, 20, torch.float16), (1, 7, torch.bfloat16)):
        check(interpreter, layout_of(f"32:{n}:8", 100, 525, stored), tokens, dtype, target)


ANY = {
    "v": st.sampled_from([16, 32, 48, 64]),
    "n": st.sampled_from([1, 2]),
    "m": st.integers(4, 40),
    "tokens": st.integers(1, 40),
    "out_features": st.integers(2, 100),
    "in_features": st.integers(1, 700),
    "dtype": st.sampled_from(DTYPES),
    "stored": st.sampled_from(KINDS),
    "target": st.sampled_from(["sm_80", "sm_90", "gfx942"]),
}
SHARED = [HealthCheck.function_scoped_fixture]


@settings(max_examples=12, deadline=None, suppress_health_check=SHARED)
@given(**ANY)
def test_any_pattern_and_size(interpreter, v, n, m, tokens, out_features, in_features, dtype, stored, target):
    check(interpreter, layout_of(f"{v}:{n}:{m}", out_features, in_features, stored), tokens, dtype, target)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=SHARED)
@given(**ANY)
def test_very_many_patterns_and_sizes(interpreter, v, n, m, tokens, out_features, in_features, dtype, stored, target):
    check(interpreter, layout_of(f"{v}:{n}:{m}", out_features, in_features, stored), tokens, dtype, target)


@pytest.mark.parametrize("way", with_slow(["sm_90 2", "sm_90 1", "gfx942 2"], {"sm_90 2"}))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", with_slow(["int8/32", "int4/32", "int8/row", "int4/row"], {"int8/32", "int4/row"}))
def test_every_level_is_what_it_stands_for(interpreter, stored, dtype, way):
    """All levels there are, and scales of all bits: what a single feature of 1 brings out is their product, rounded
    once."""
    target, n = way.split()
    layout = layout_of(f"16:{n}:4", 16, 256, stored)
    packed, weight = all_levels(layout, dtype)
    x = torch.eye(256, dtype=dtype)[None, ::4].contiguous()
    generated = generated_for(layout, [x, *packed], target)
    (output,) = interpreter.run(generated.wrapper, [x, *packed])
    assert torch.equal(output[0], weight[:, ::4].T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", with_slow(["int8/32", "int4/32", "int8/row", "int4/row"], {"int8/32", "int4/row"}))
def test_every_level_with_one_token(interpreter, stored, dtype):
    layout = layout_of("16:2:4", 16, 256, stored)
    packed, weight = all_levels(layout, dtype)
    x = torch.zeros(1, 1, 256, dtype=dtype)
    generated = generated_for(layout, [x, *packed], "sm_90")
    for feature in (3, 77, 128):
        x.zero_()[..., feature] = 1
        (output,) = interpreter.run(generated.wrapper, [x, *packed])
        assert torch.equal(output[0, 0], weight[:, feature])


def all_levels(layout: Layout, dtype: torch.dtype) -> tuple[Packed, Tensor]:
    """Packed arrays with all levels in turn, and the weight that they are."""
    quantization = layout.quantization
    assert quantization is not None
    _, packed = random_case(layout, 1, dtype)
    every = torch.arange(quantization.lowest, quantization.highest + 1, dtype=torch.int8)
    levels = every.repeat(-(-layout.rows * layout.kept // len(every)))[: layout.rows * layout.kept]
    packed = packed.replaced(0, store_levels(levels.view(layout.rows, layout.kept), quantization))
    packed = packed.replaced(3, (torch.rand(packed.scales.shape) + 0.5).to(dtype))
    return packed, unpack(packed, layout)


@pytest.mark.parametrize("stored", ["int8/64", "int4/32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_both_ways_to_dequantise_agree_to_the_last_bit(interpreter, stored, dtype):
    """In pairs, by instructions of NVIDIA's, and one by one."""
    layout = layout_of("64:2:8", 64, 256, stored)
    x, packed = random_case(layout, 20, dtype)
    pairs, singly = (generated_for(layout, [x, *packed], target) for target in ("sm_90", "gfx942"))
    assert ("fma.rn" in pairs.wrapper, "fma.rn" in singly.wrapper) == (True, False)
    outputs = [interpreter.run(each.wrapper, [x, *packed])[0] for each in (pairs, singly)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("stored", with_slow(["int8/64", "int4/row", "int4/128"], {"int8/64"}))
def test_split_sums(interpreter, stored):
    layout = layout_of("64:2:8", 128, 4400, stored)
    x, packed = random_case(layout, 3, torch.bfloat16)
    generated = generated_for(layout, [x, *packed], "sm_90")
    assert re.search("SPLITS : tl.constexpr = [248]", generated.wrapper)
    exact = x.double() @ exact_weight(packed, layout).T
    expect(interpreter, generated, [x, *packed], F.linear(x, unpack(packed, layout)), exact)


@pytest.mark.parametrize("stored", with_slow(["int8/32", "int4/64", "int4/row"], {"int4/64"}))
@pytest.mark.parametrize("tokens", [1, 2, 50])
def test_gated(interpreter, tokens, stored):
    layout = layout_of("32:2:8", 72, 532, stored)
    x, gate = random_case(layout, tokens, torch.bfloat16)
    _, up = random_case(layout, tokens, torch.bfloat16, seed=1)
    both = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
    graph = traced(lambda x, *packed: gated_linear(x, packed, layout, "silu"), 5)
    generated = generate(graph, [x, *both], "sm_90", static=WEIGHTS)
    (kernel,) = (each for each in generated.kernels if each.schedule.template)
    assert kernel.schedule.template == ("vnm_gated_vector_silu" if tokens == 1 else "vnm_gated_silu")
    act = ACTIVATIONS["silu"].eager
    dense = act(F.linear(x, unpack(gate, layout))) * F.linear(x, unpack(up, layout))
    exact_gate, exact_up = (x.double() @ exact_weight(each, layout).T for each in (gate, up))
    expect(interpreter, generated, [x, *both], dense, act(exact_gate) * exact_up)


def test_joined(interpreter):
    """q, k and v one above the other, levels and scales as well."""
    rows = (64, 32, 32)
    layout = layout_of("32:2:8", sum(rows), 136, "int4/32")
    x, packed = random_case(layout, 9, torch.bfloat16)

    def graph(x: Any, *packed: Any) -> Any:
        pieces = sections(linear(x, packed, layout), list(rows), list(rows))
        return tuple(pieces[i] for i in range(3))

    generated = generate(traced(graph, 5), [x, *packed], "sm_90", static=WEIGHTS)
    outputs = interpreter.run(generated.wrapper, [x, *packed])
    dense = F.linear(x, unpack(packed, layout)).split(rows, -1)
    exact = (x.double() @ exact_weight(packed, layout).T).split(rows, -1)
    for each in zip(outputs, dense, exact, strict=True):
        assert_as_accurate_as_dense(*each)


def test_one_dynamic_kernel_serves_any_number_of_tokens(interpreter):
    layout = layout_of("64:2:8", 96, 128, "int8/32")
    x, packed = random_case(layout, 4, torch.bfloat16)
    generated = generated_for(layout, [x, *packed], "sm_90", dynamic={0: [1]})
    for tokens in (2, 17, 101):
        x, _ = random_case(layout, tokens, torch.bfloat16)
        exact = x.double() @ exact_weight(packed, layout).T
        expect(interpreter, generated, [x, *packed], F.linear(x, unpack(packed, layout)), exact)


@pytest.mark.parametrize(("spec", "stored"), [("16:2:8", "int8/64"), ("16:1:8", "int4/32"), ("16:2:300", "int4/row")])
@pytest.mark.parametrize(
    "move", [lambda p: views_of_one_buffer(p, 1), slices_of_wider_arrays], ids=["offset", "slices"]
)
def test_packed_arrays_that_are_views(interpreter, spec, stored, move):
    """What no word divides is moved first; `AlignedRows` has done so before, and then nothing is copied."""
    layout = layout_of(spec, 40, 888, stored)
    x, packed = random_case(layout, 5, torch.float16)
    views = move(packed)
    exact = x.double() @ exact_weight(packed, layout).T
    for moved, copied in ((views, True), (AlignedRows().prepare(views), False)):
        generated = generated_for(layout, [x, *moved], "sm_90")
        assert (len(generated.kernels) > 2) == copied
        expect(interpreter, generated, [x, *moved], F.linear(x, unpack(packed, layout)), exact)


@pytest.mark.parametrize("stored", ["int8/32", "int4/32"])
def test_levels_and_scales_that_end_within_a_word(interpreter, stored):
    """37 groups: an odd number of levels, and of bytes, and of scales; next to each row lies another one."""
    layout = layout_of("32:1:5", 64, 185, stored)
    x, packed = random_case(layout, 9, torch.float16)
    assert packed.scales.shape[1] == 2
    narrow = layout_of("32:1:5", 64, 500, stored)
    assert narrow.shapes[3][1] == 4
    exact = x.double() @ exact_weight(packed, layout).T
    for each in (packed, AlignedRows().prepare(packed)):
        generated = generated_for(layout, [x, *each], "sm_90")
        expect(interpreter, generated, [x, *each], F.linear(x, unpack(packed, layout)), exact)
