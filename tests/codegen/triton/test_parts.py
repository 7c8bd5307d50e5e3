"""Several compressed weights that one kernel multiplies by, each where it lies: interpreted, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.codegen.triton.cases import CPU, dense_layer, exact_weight, expect, traced
from tests.support import with_slow
from vnm_compile.codegen.generate import Generated, generate
from vnm_compile.codegen.random_arrays import random_packed
from vnm_compile.codegen.triton.prepack import AlignedRows
from vnm_compile.codegen.virtual_device import virtual_device
from vnm_compile.format import Packed, unpack
from vnm_compile.hardware import find_target
from vnm_compile.inspection.machine_code import compile_kernel
from vnm_compile.layout import Layout
from vnm_compile.ops import gated_linear, linear
from vnm_compile.quantization import Quantization
from vnm_compile.spec import Spec

STORED = [None, "int8/64", "int4/row", "int8/row", "int4/32"]
TEMPLATES = {1: "vnm_vector", 3: "vnm_linear", 90: "vnm_linear"}


def layouts_of(spec: str, outs: tuple[int, ...], in_features: int, stored: str | None) -> list[Layout]:
    kind = Quantization.parse(stored) if stored else None
    return [Layout(Spec.parse(spec), out_features, in_features, kind) for out_features in outs]


def random_parts(layouts: list[Layout], dtype: torch.dtype, aligned: bool = True) -> list[Packed]:
    parts = [random_packed(layout, dtype, CPU, seed) for seed, layout in enumerate(layouts)]
    return [AlignedRows().prepare(part) for part in parts] if aligned else parts


def flat(parts: list[Packed]) -> list[Tensor]:
    return [array for part in parts for array in part]


def rows_of(parts: list[Packed], layouts: list[Layout], of: Any) -> Tensor:
    """The weights one above the other, the rows that are padding but for the last one's included."""
    matrices = [of(part, layout.with_rows(layout.rows)) for part, layout in zip(parts, layouts, strict=True)]
    return torch.cat(matrices)[: sum(layout.rows for layout in layouts[:-1]) + layouts[-1].out_features]


def whole_of(layouts: list[Layout]) -> Layout:
    return layouts[0].with_rows(sum(layout.rows for layout in layouts[:-1]) + layouts[-1].out_features)


def generated_for(layouts: list[Layout], inputs: list[Any], target: str) -> Generated:
    graph = traced(lambda x, *arrays: linear(x, arrays, whole_of(layouts)), len(inputs))
    generated = generate(graph, inputs, target, static=range(1, len(inputs)))
    assert [kernel for kernel in generated.kernels if kernel.schedule.template], "the reference runs"
    return generated


def check(interpreter: Any, layouts: list[Layout], parts: list[Packed], x: Tensor, target: str) -> Generated:
    inputs = [x, *flat(parts)]
    generated = generated_for(layouts, inputs, target)
    exact = x.double() @ rows_of(parts, layouts, exact_weight).T
    expect(interpreter, generated, inputs, dense_layer(x, rows_of(parts, layouts, unpack)), exact)
    return generated


@pytest.mark.parametrize("stored", with_slow(STORED, [None, "int4/32"]))
@pytest.mark.parametrize("tokens", with_slow(TEMPLATES, [1, 90]))
def test_siblings(interpreter, tokens, stored):
    layouts = layouts_of("32:2:8", (96, 40, 20), 296, stored)
    parts = random_parts(layouts, torch.bfloat16)
    x = torch.randn(1, tokens, 296).bfloat16()
    generated = check(interpreter, layouts, parts, x, "sm_90")
    (kernel,) = [kernel for kernel in generated.kernels if kernel.schedule.template]
    assert kernel.schedule.template == TEMPLATES[tokens]


@pytest.mark.parametrize("target", with_slow(["sm_80", "gfx942", "gfx1100"], ["gfx942"]))
@pytest.mark.parametrize("dtype", with_slow([torch.float16, torch.float32], [torch.float32]), ids=str)
def test_siblings_elsewhere(interpreter, target, dtype):
    for spec, tokens, stored in (("16:1:8", 40, None), ("48:2:5", 7, "int8/64"), ("64:2:300", 33, None)):
        layouts = layouts_of(spec, (64, 48), 333, stored)
        check(interpreter, layouts, random_parts(layouts, dtype), torch.randn(1, tokens, 333).to(dtype), target)


@pytest.mark.parametrize("stored", with_slow(STORED, ["int8/64"]))
@pytest.mark.parametrize("dtype", with_slow([torch.bfloat16, torch.float32], [torch.bfloat16]), ids=str)
def test_gated_pairs(interpreter, stored, dtype):
    """With one token, by one kernel, by two passes, with K in parts."""
    for tokens, out_features, in_features in ((1, 70, 360), (20, 70, 360), (40, 33, 1600), (400, 512, 128)):
        layouts = layouts_of("32:2:8", (out_features, out_features), in_features, stored)
        parts = random_parts(layouts, dtype)
        x = torch.randn(1, tokens, in_features).to(dtype)
        graph = traced(
            lambda x, *arrays, whole=layouts[0]: gated_linear(x, arrays, whole, "silu"), 1 + len(flat(parts))
        )
        generated = generate(graph, [x, *flat(parts)], "sm_90", static=range(1, 1 + len(flat(parts))))
        gate, up = (x.double() @ exact_weight(part, layouts[0]).T for part in parts)
        dense = [dense_layer(x, unpack(part, layouts[0])) for part in parts]
        expect(interpreter, generated, [x, *flat(parts)], F.silu(dense[0]) * dense[1], F.silu(gate) * up)


def test_siblings_on_sparse_tensor_cores(interpreter):
    layouts = layouts_of("64:2:8", (512, 448), 512, None)
    parts = random_parts(layouts, torch.bfloat16)
    generated = check(interpreter, layouts, parts, torch.randn(1, 300, 512).bfloat16(), "sm_86")
    assert [kernel.schedule.template for kernel in generated.kernels if kernel.schedule.template] == [
        "vnm_sparse_cores"
    ]


@pytest.mark.parametrize("tokens", [1, 20])
def test_weights_that_lie_differently(interpreter, tokens):
    """Rows at other distances, views of something larger, and one that has no aligned rows at all."""
    layouts = layouts_of("32:2:5", (64, 40, 33, 20), 205, "int4/32")
    first, second, third, fourth = random_parts(layouts, torch.bfloat16, aligned=False)
    second = AlignedRows().prepare(second)
    third = third.remade(torch.cat([array, array])[: len(array)] for array in third)
    fourth = fourth.remade(torch.cat([array, array])[len(array) :] for array in fourth)
    x = torch.randn(1, tokens, 205).bfloat16()
    parts = [first, second, third, fourth]
    for order in ((0, 1, 2, 3), (1, 0, 3, 2)):
        check(interpreter, [layouts[i] for i in order], [parts[i] for i in order], x, "sm_90")


@pytest.mark.parametrize("target", with_slow(["sm_80", "sm_90", "sm_120"], ["sm_90"]))
@pytest.mark.parametrize("tokens", with_slow([1, 16, 512], [16]))
def test_loads_are_as_wide_as_of_one_weight(tokens, target):
    """The choice of a weight costs a program a few instructions at its beginning, and no load its width."""
    found = []
    for outs in ((1024,), (512, 256, 256)):
        layouts = layouts_of("64:2:8", outs, 1024, "int8/64")
        inputs: list[Any] = [torch.randn(1, tokens, 1024).bfloat16(), *flat(random_parts(layouts, torch.bfloat16))]
        generated = generated_for(layouts, inputs, target)
        (kernel,) = [kernel for kernel in generated.kernels if kernel.schedule.template]
        with virtual_device(find_target(target)):
            code = compile_kernel(kernel.source, kernel.name, find_target(target))
        found.append((sorted(code.loop.loads), code.spills))
    assert found[0] == found[1]
