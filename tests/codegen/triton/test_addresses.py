"""Where the kernels read: any layout of the activations, packed arrays anywhere, and indices beyond 32 bits."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.codegen.triton.cases import arrays, case, dense_layer, exact_weight, expect, plain, traced
from tests.support import assert_as_accurate_as_dense, with_slow
from vnm_compile.codegen.generate import Generated, GeneratedKernel, generate
from vnm_compile.codegen.triton.prepack import AlignedRows
from vnm_compile.codegen.virtual_device import virtual_device
from vnm_compile.format import Packed, unpack
from vnm_compile.hardware import find_target
from vnm_compile.inspection.machine_code import MachineCode, compile_kernel
from vnm_compile.layout import Layout
from vnm_compile.ops import linear
from vnm_compile.quantization import Quantization
from vnm_compile.spec import Spec

SPEC = Spec(16, 2, 8)


def sparse_kernel(generated: Generated) -> GeneratedKernel:
    (kernel,) = (each for each in generated.kernels if each.schedule.template)
    return kernel


def compiled(kernel: GeneratedKernel, target: str) -> MachineCode:
    with virtual_device(target):
        return compile_kernel(kernel.source, kernel.name, find_target(target))


LAYOUTS = {
    # Views [.., 64] of [8, 128].
    "offset": lambda x: x[1:6, :64],
    "chunk": lambda x: x.chunk(2, -1)[1],
    "narrow": lambda x: x.narrow(0, 3, 4).narrow(1, 7, 64),
    "every second": lambda x: x[::2, ::2],
    "transposed": lambda x: x[:, :4].reshape(-1, 8, 4).expand(64, 8, 4)[:, 2].t(),
    "last row": lambda x: x[-1, 64:],
    "expanded": lambda x: x[2:3, :64].expand(5, 64),
    "zero stride within": lambda x: x[:, 3:4].expand(-1, 64),
    "flipped": lambda x: x.flip(0)[1:, 64:],
    "computed": lambda x: (x + 1)[2:, 64:],
    "unbound": lambda x: x.unbind(0)[3][64:],
}


@pytest.mark.slow
def test_activations_of_any_layout(interpreter):
    """Views made in the graph, of an input that is itself a view."""
    pattern, _, packed, weight = case(str(SPEC), 1, 48, 64, torch.float16)
    x = torch.randn(9, 128).to(torch.float16)[1:]
    multiply = plain(pattern, 48, 64)

    def graph(x: Any, values: Any, metadata: Any, columns: Any) -> Any:
        return tuple(multiply(view(x), values, metadata, columns) for view in LAYOUTS.values())

    generated = generate(graph, [x, *packed], "sm_90", static=(1, 2, 3))
    assert sum(kernel.launches for kernel in generated.kernels if kernel.schedule.template) == len(LAYOUTS)
    for output, view in zip(interpreter.run(generated.wrapper, [x, *packed]), LAYOUTS.values(), strict=True):
        seen = view(x)
        assert_as_accurate_as_dense(output, F.linear(seen, weight), F.linear(seen.double(), weight.double()))


@pytest.mark.parametrize(
    "layout",
    [lambda x: x[1:], lambda x: x[:, 1:65], lambda x: x[:1, :64].expand(7, 64), lambda x: x[:, ::2], lambda x: x[:0]],
    ids=["rows", "columns", "expanded", "every second", "no tokens"],
)
def test_inputs_of_any_layout(interpreter, layout):
    """The input of the graph is the view: its address may be unaligned, its strides anything."""
    pattern, _, packed, weight = case(str(SPEC), 1, 48, 64, torch.bfloat16)
    whole = torch.randn(7, 128).to(torch.bfloat16)
    x = layout(whole)
    if x.shape[-1] != 64:
        x = x[:, 3:67]
    generated = generate(plain(pattern, 48, 64), [x, *packed], "sm_90", static=(1, 2, 3))
    (output,) = interpreter.run(generated.wrapper, [x, *packed])
    assert output.shape == (x.shape[0], 48)
    if x.numel():
        assert_as_accurate_as_dense(output, F.linear(x, weight), F.linear(x.double(), weight.double()))


def views_of_one_buffer(packed: Packed, before: int) -> Packed:
    """The arrays as they lie in a flat buffer of each dtype, `before` elements from its beginning."""

    def moved(array: torch.Tensor) -> torch.Tensor:
        buffer = torch.full((before + array.numel() + 8,), 77).to(array.dtype)
        return buffer[before : before + array.numel()].view(array.shape).copy_(array)

    return Packed(*map(moved, packed))


def slices_of_wider_arrays(packed: Packed) -> Packed:
    """Rows with something else between them, at distances that no word divides."""

    def moved(array: torch.Tensor) -> torch.Tensor:
        wider = torch.full((array.shape[0], array.shape[1] + 3, *array.shape[2:]), 77).to(array.dtype)
        if array.is_floating_point():
            wider.fill_(float("nan"))
        wider[:, : array.shape[1]] = array
        return wider[:, : array.shape[1]]

    return Packed(*map(moved, packed))


@pytest.mark.parametrize("spec", ["16:2:8", "16:1:8", "16:2:300"])
@pytest.mark.parametrize(
    "move", [lambda p: views_of_one_buffer(p, 1), slices_of_wider_arrays], ids=["offset", "slices"]
)
def test_packed_arrays_that_are_views(interpreter, spec, move):
    """Words are read where elements lie, so what is not aligned is moved first, and no pointer claims to be."""
    pattern, x, packed, weight = case(spec, 5, 40, 600, torch.float16)
    views = move(packed)
    generated = generate(plain(pattern, 40, 600), [x, *views], "sm_90", static=(1, 2, 3))
    assert len(generated.kernels) > 2, "the arrays are copied"
    (output,) = interpreter.run(generated.wrapper, [x, *views])
    assert_as_accurate_as_dense(output, F.linear(x, weight), F.linear(x.double(), weight.double()))
    aligned = AlignedRows().prepare(views)
    assert all(array.storage_offset() == 0 for array in aligned)
    assert len(generate(plain(pattern, 40, 600), [x, *aligned], "sm_90", static=(1, 2, 3)).kernels) == 2


def test_only_aligned_pointers_are_called_so():
    """`tt.divisibility` lets the compiler load 16 bytes at once."""
    pattern, x, packed, _ = case("64:2:8", 64, 64, 512, torch.float16)
    x = torch.cat([x, x])[:1]
    bias = torch.zeros(65, dtype=torch.float16)

    def graph(x: Any, values: Any, metadata: Any, columns: Any, bias: Any) -> Any:
        return plain(pattern, 64, 512)(x, values, metadata, columns) + bias

    def claims(bias: torch.Tensor) -> tuple[int, int]:
        kernel = sparse_kernel(generate(graph, [x, *packed, bias], "sm_90", static=(1, 2, 3)))
        (found,) = re.findall(r"'configs': \[(\{.*?\})\]", kernel.source)
        pointers = compiled(kernel, "sm_90").ttir.partition("attributes")[0].count("tt.ptr")
        return found.count("tt.divisibility"), pointers

    aligned, pointers = claims(bias[:64])
    assert aligned == pointers == 6
    assert claims(bias[1:]) == (5, 6)


LARGE = 1 << 25  # tokens: 128 features times as many are 2^32 elements


def large(tokens: int) -> GeneratedKernel:
    pattern, _, packed, _ = case("64:2:8", 1, 64, 128, torch.float16)
    x = torch.empty(tokens, 128, dtype=torch.float16, device="meta")
    return sparse_kernel(generate(plain(pattern, 64, 128), [x, *packed], "sm_90", static=(1, 2, 3)))


def stride_products(code: MachineCode, stride: int) -> list[str]:
    """Types of the products with `stride` in Triton's code."""
    names = re.findall(rf"(%\w+) = arith\.constant (?:dense<)?{stride}>? : ", code.ttir)
    products = re.findall(r"arith\.muli (%\w+), (%\w+) : (\S+)", code.ttir)
    return [kind for a, b, kind in products if a in names or b in names]


def test_products_of_sizes_are_as_wide_as_the_index():
    """A feature times the length of a row of tokens, beyond 32 bits where neither factor is."""
    code = compiled(large(LARGE), "sm_90")
    wide = stride_products(code, LARGE)
    assert wide
    assert all("i64" in kind for kind in wide), wide
    narrow = compiled(large(1 << 12), "sm_90")
    kinds = stride_products(narrow, 1 << 12)
    assert kinds
    assert all("i32" in kind for kind in kinds), kinds
    assert "i64" not in narrow.ttir.partition("tt.load")[0], "32 bits suffice"


def test_the_right_activations_are_read_beyond_32_bits(interpreter):
    _, x, packed, weight = case("64:2:8", 9, 64, 128, torch.float16)
    kernel = large(LARGE)
    (output,) = interpreter.first_tile(kernel.name, kernel.source, x[0], packed, LARGE, 64)
    assert_as_accurate_as_dense(output, F.linear(x[0], weight), F.linear(x[0].double(), weight.double()))


def test_what_a_whole_load_touches_counts():
    """The last token has a 32-bit index; the padding after it, which a load of 16 bytes brings, has not."""
    most = (1 << 24) - 8  # rows of so many, 128 of them, and all indices fit
    assert "WIDE : tl.constexpr = False" in large(most).source
    fewer = (1 << 24) - 6  # padded to 2^24: the last of 2^31 elements is beyond
    source = large(fewer).source
    assert "INDEX_DTYPE : tl.constexpr = tl.int32" in source, "by Inductor's own account"
    assert "WIDE : tl.constexpr = True" in source


@pytest.mark.parametrize("splits", [1, 4])
def test_no_product_of_sizes_is_narrower_than_the_index(splits):
    """Rows, tokens, blocks and parts, each with its stride: with 64-bit indices only the columns of a group, and what
    tiles are counted by, are multiplied in 32 bits."""
    in_features = 2200 if splits > 1 else 200
    pattern, _, packed, _ = case("64:2:8", 1, 128, in_features, torch.float16)
    x = torch.empty(3, in_features, dtype=torch.float16, device="meta")
    kernel = sparse_kernel(generate(plain(pattern, 128, in_features), [x, *packed], "sm_90", static=(1, 2, 3)))
    assert f"SPLITS : tl.constexpr = {splits}" in kernel.source
    index = "INDEX_DTYPE : tl.constexpr = "
    wide = replace(kernel, source=kernel.source.replace(f"{index}tl.int32", f"{index}tl.int64"))
    assert wide.source != kernel.source
    ttir = compiled(wide, "sm_90").ttir
    constants = dict(re.findall(r"(%\w+) = arith\.constant (?:dense<)?(-?\d+)>? : ", ttir))
    narrow = [
        next((constants[each] for each in (a, b) if each in constants), f"{a} * {b}")
        for a, b, kind in re.findall(r"arith\.muli (%\w+), (%\w+)(?: overflow<\w+>)? : (\S+)", ttir)
        if "i32" in kind
    ]
    assert set(narrow) <= {"8", "4", "2", "16"}, narrow


@pytest.mark.parametrize("tokens", with_slow([1, 3], [3]))
@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("stored", with_slow([None, "int8/64", "int4/row"], [None, "int4/row"]))
def test_long_rows_that_are_computed_in_the_graph(interpreter, stored, cast, tokens):
    """Padded to whole loads, or cast from another dtype: Inductor gives rows of 1024 elements and more other strides
    than they have when a kernel is told of them, unless it is kept from it."""
    layout = Layout(Spec(16, 2, 5), 32, 10247, Quantization.parse(stored) if stored else None)
    packed = arrays(32, 10247, layout.spec, torch.bfloat16, stored=layout.quantization)
    x = torch.randn(1, tokens, 10247).bfloat16()
    typed = layout.names.index(layout.typed)
    given = packed.replaced(typed, packed[typed].float()) if cast else packed

    def graph(x: Any, *given: Any) -> Any:
        return linear(x, [each.to(torch.bfloat16) if i == typed else each for i, each in enumerate(given)], layout)

    generated = generate(traced(graph, 1 + len(given)), [x, *given], "sm_90", static=tuple(range(1, 1 + len(given))))
    exact, dense = exact_weight(packed, layout), unpack(packed, layout)
    expect(interpreter, generated, [x, *given], dense_layer(x, dense), x.double() @ exact.T)
