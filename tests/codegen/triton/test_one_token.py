"""One token: kernels without tensor cores, that read the activations as they lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.codegen.triton.cases import arrays, case, expect, plain
from tests.support import assert_as_accurate_as_dense
from vnm_compile.activations import ACTIVATIONS
from vnm_compile.codegen.generate import generate
from vnm_compile.codegen.triton import lowering
from vnm_compile.codegen.triton.configs import Config, Shape, two_passes
from vnm_compile.codegen.triton.vector_configs import vector_configurations
from vnm_compile.format import unpack
from vnm_compile.hardware import find_target
from vnm_compile.layout import Layout
from vnm_compile.ops import gated_linear
from vnm_compile.quantization import Quantization
from vnm_compile.spec import Spec


def templates(generated: Any) -> list[str]:
    return [kernel.schedule.template for kernel in generated.kernels if kernel.schedule.template]


@pytest.mark.parametrize("spec", ["64:2:8", "16:2:5", "48:2:32", "16:2:300", "128:2:4"])
@pytest.mark.parametrize("sizes", [(1, 64), (100, 77), (130, 1100)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_any_pattern_and_tail(interpreter, spec, sizes, dtype):
    pattern, x, packed, weight = case(spec, 1, *sizes, dtype)
    generated = generate(plain(pattern, *sizes), [x, *packed], "sm_90", static=(1, 2, 3))
    assert templates(generated) == (["vnm_vector"] if sizes[0] > 1 else [])
    expect(interpreter, generated, [x, *packed], F.linear(x, weight), F.linear(x.double(), weight.double()))


LONG = [Shape(1, 128, groups, Spec(64, 2, 8), torch.float16, False, Quantization(8, 64)) for groups in (500, 4096)]
CONFIGS = {config: None for shape in LONG for config in vector_configurations(shape)}


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_configuration(interpreter, monkeypatch, config):
    monkeypatch.setattr(lowering, "vector_configurations", lambda shape: [config])
    pattern, x, packed, weight = case("64:2:8", 1, 100, 4200, torch.float16)
    generated = generate(plain(pattern, 100, 4200), [x, *packed], "sm_80", static=(1, 2, 3))
    assert f"BLOCK_O : tl.constexpr = {config.block_o}" in generated.wrapper
    expect(interpreter, generated, [x, *packed], F.linear(x, weight), F.linear(x.double(), weight.double()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated(interpreter, activation):
    pattern, x, gate, gate_weight = case("32:2:8", 1, 72, 132, torch.bfloat16)
    up = arrays(72, 132, pattern, torch.bfloat16, seed=1)
    both = [torch.cat(pair) for pair in zip(gate, up, strict=True)]

    def graph(x: Any, values: Any, metadata: Any, columns: Any) -> Any:
        return gated_linear(x, (values, metadata, columns), Layout(pattern, 72, 132), activation)

    generated = generate(graph, [x, *both], "sm_90", static=(1, 2, 3))
    assert templates(generated) == [f"vnm_gated_vector_{activation}"]
    weights = gate_weight, unpack(up, Layout(pattern, 72, 132))
    dense, exact = (
        ACTIVATIONS[activation].eager(F.linear(x.to(kind), weights[0].to(kind)))
        * F.linear(x.to(kind), weights[1].to(kind))
        for kind in (torch.bfloat16, torch.float64)
    )
    expect(interpreter, generated, [x, *both], dense, exact)


def test_activations_that_are_written_to_between_two_products(interpreter):
    pattern, x, packed, weight = case("64:2:8", 1, 64, 304, torch.float16)
    multiply = plain(pattern, 64, 304)

    def graph(x: Any, values: Any, metadata: Any, columns: Any) -> Any:
        def product(x: Any) -> Any:
            return multiply(x, values, metadata, columns)

        x = x * 2
        before = product(x)
        x.add_(1)
        return before, product(x), product(x[..., :1].expand(-1, -1, 304))

    generated = generate(graph, [x, *packed], "sm_90", static=(1, 2, 3))
    assert set(templates(generated)) == {"vnm_vector"}
    outputs = interpreter.run(generated.wrapper, [x, *packed])
    each = x * 2, x * 2 + 1, (x * 2 + 1)[..., :1].expand(-1, -1, 304)
    for output, given in zip(outputs, each, strict=True):
        assert_as_accurate_as_dense(output, F.linear(given, weight), F.linear(given.double(), weight.double()))


def test_its_work_is_on_what_is_kept():
    pattern, x, packed, _ = case("64:2:8", 1, 64, 304, torch.float16)
    generated = generate(plain(pattern, 64, 304), [x, *packed], "sm_90", static=(1, 2, 3))
    (kernel,) = (each for each in generated.kernels if each.schedule.template)
    assert kernel.schedule.flops == 2 * 64 * 38 * 2


def test_infinite_activations_stay_where_they_are(interpreter):
    """What a kernel does not keep it does not multiply by zero."""
    pattern, x, packed, weight = case("64:2:8", 1, 64, 203, torch.float16)
    never = (weight == 0).all(0).nonzero()[:, 0]
    x[..., never] = float("inf")
    generated = generate(plain(pattern, 64, 203), [x, *packed], "sm_90", static=(1, 2, 3))
    finite = x.clone()
    finite[..., never] = 0
    exact = F.linear(finite.double(), weight.double())
    expect(interpreter, generated, [x, *packed], F.linear(finite, weight), exact)


@pytest.mark.parametrize(
    ("target", "spec", "dtype", "tokens"),
    [
        ("gfx942", "64:2:8", torch.float16, 1),  # no permutation of bytes
        ("sm_90", "64:2:8", torch.float32, 1),
        ("sm_90", "64:1:8", torch.float16, 1),
        ("sm_90", "64:2:8", torch.float16, 2),
    ],
)
def test_what_has_tensor_cores_still(interpreter, target, spec, dtype, tokens):
    pattern, x, packed, weight = case(spec, tokens, 64, 304, dtype)
    generated = generate(plain(pattern, 64, 304), [x, *packed], target, static=(1, 2, 3))
    assert templates(generated) == ["vnm_linear"]
    expect(interpreter, generated, [x, *packed], F.linear(x, weight), F.linear(x.double(), weight.double()))


def test_when_gate_and_up_take_two_passes():
    shapes = [Shape(tokens, 14336, 512, Spec(64, 2, 8), torch.bfloat16, gated=True) for tokens in (16, 64, 2048)]
    assert [two_passes(shape, find_target("sm_90")) for shape in shapes] == [False, False, True]


@pytest.mark.parametrize("parts", [1, 2])
def test_gate_and_up_in_two_passes(interpreter, monkeypatch, parts):
    """Many tokens: one product with both weights, in one part or several, and a kernel of what they make together."""

    def configurations(shape: Shape, target: Any) -> list[Config]:
        return [Config(64, 64, 16, 4, 3, 1 if shape.gated else parts)]

    monkeypatch.setattr(lowering, "two_passes", lambda shape, target: True)
    monkeypatch.setattr(lowering, "configurations", configurations)
    pattern, x, gate, gate_weight = case("64:2:8", 40, 100, 800, torch.bfloat16)
    up = arrays(100, 800, pattern, torch.bfloat16, seed=1)
    both = [torch.cat(pair) for pair in zip(gate, up, strict=True)]

    def graph(x: Any, values: Any, metadata: Any, columns: Any) -> Any:
        return gated_linear(x, (values, metadata, columns), Layout(pattern, 100, 800), "silu")

    generated = generate(graph, [x, *both], "sm_90", static=(1, 2, 3))
    assert templates(generated) == ["vnm_linear"]
    assert f"SPLITS : tl.constexpr = {parts}" in generated.wrapper
    weights = gate_weight, unpack(up, Layout(pattern, 100, 800))
    dense, exact = (
        F.silu(F.linear(x.to(kind), weights[0].to(kind))) * F.linear(x.to(kind), weights[1].to(kind))
        for kind in (torch.bfloat16, torch.float64)
    )
    expect(interpreter, generated, [x, *both], dense, exact)
