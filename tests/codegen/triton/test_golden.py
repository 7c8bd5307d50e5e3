"""Generated kernels as golden text: a change of a template is a diff to review. Each is compiled and interpreted too.

The text begins at the kernel: what Inductor writes above it holds hashes of the torch build.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.codegen.triton.cases import CPU, arrays, case, exact_weight, expect, traced
from vnm_compile.codegen.generate import generate
from vnm_compile.codegen.random_arrays import random_packed
from vnm_compile.codegen.triton.prepack import AlignedRows
from vnm_compile.codegen.virtual_device import virtual_device
from vnm_compile.format import unpack
from vnm_compile.hardware import find_target
from vnm_compile.inspection.assembly import count_instructions
from vnm_compile.inspection.machine_code import compile_kernel
from vnm_compile.layout import Layout
from vnm_compile.ops import weight_args
from vnm_compile.quantization import Quantization
from vnm_compile.spec import Spec


class Golden(NamedTuple):
    name: str
    target: str
    spec: str
    tokens: int
    out_features: int
    in_features: int
    dtype: torch.dtype
    epilogue: Callable[[Tensor, Tensor, Tensor], Tensor]
    stored: str | None = None

    @property
    def layout(self) -> Layout:
        quantization = Quantization.parse(self.stored) if self.stored else None
        return Layout(Spec.parse(self.spec), self.out_features, self.in_features, quantization)


def gelu(y: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return F.gelu(y + bias)


def add_residual(y: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return y + bias + residual


def scale(y: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return y * 0.125


GOLDEN = [
    Golden("decode_add", "sm_90", "64:2:8", 1, 128, 2048, torch.bfloat16, add_residual),
    Golden("few_tokens_add", "sm_90", "64:2:8", 5, 128, 512, torch.bfloat16, add_residual),
    Golden("prefill_gelu", "sm_90", "128:2:16", 300, 256, 512, torch.bfloat16, gelu),
    Golden("tails_gelu", "sm_80", "32:2:5", 33, 100, 333, torch.float16, gelu),
    Golden("sparse_cores_gelu", "sm_80", "64:2:8", 200, 128, 1000, torch.bfloat16, gelu),
    Golden("one_kept_scale", "sm_89", "64:1:8", 20, 64, 256, torch.float32, scale),
    Golden("shifted_add", "gfx942", "64:2:8", 40, 128, 256, torch.float16, add_residual),
    Golden("int8_decode_add", "sm_90", "64:2:8", 1, 128, 2048, torch.bfloat16, add_residual, "int8/64"),
    Golden("int4_prefill_gelu", "sm_90", "128:2:16", 300, 256, 512, torch.bfloat16, gelu, "int4/32"),
]

MULTIPLIES = {
    "decode_add": "FFMA",  # one token has no use for tensor cores
    "few_tokens_add": "HGMMA",
    "prefill_gelu": "HGMMA",
    "gated_silu": "HGMMA",
    "tails_gelu": "HMMA",
    "sparse_cores_gelu": "HMMA.SP",
    "one_kept_scale": "FFMA",  # fp32 without TF32, torch's default, has no tensor core
    "shifted_add": "v_mfma",
    "int8_decode_add": "FFMA",
    "int4_prefill_gelu": "HGMMA",
}
"""What multiplies in the hot loop of each."""


def kernel_text(source: str) -> str:
    """From the kernel on; of one in Gluon the helpers before it, too."""
    return source[source.index("@gluon.jit" if "@gluon.jit" in source else "@triton.jit") :].strip() + "\n"


def multiply(name: str, layout: Layout) -> Callable[..., Any]:
    op = getattr(torch.ops.vnm, name)
    rest = ("silu",) if name == "gated_linear" else ()

    def call(x: Any, packed: Any) -> Any:
        return op(x, *weight_args(packed, layout), *rest)

    return call


@pytest.mark.parametrize("each", GOLDEN, ids=lambda each: each.name)
def test_linear(golden, interpreter, each):
    layout, arrays = each.layout, len(each.layout.names)
    packed = random_packed(layout, each.dtype, CPU)
    x = torch.randn(1, each.tokens, each.in_features).to(each.dtype)
    bias = torch.randn(each.out_features).to(each.dtype)
    residual = torch.randn(1, each.tokens, each.out_features).to(each.dtype)
    linear = multiply("linear", layout)

    def graph(x: Any, *rest: Any) -> Any:
        return each.epilogue(linear(x, rest[:arrays]), *rest[arrays:])

    if MULTIPLIES[each.name] == "HMMA.SP":
        packed = AlignedRows().prepare(packed)
    inputs = [x, *packed, bias, residual]
    generated = generate(traced(graph, len(inputs)), inputs, each.target, static=range(1, arrays + 2))
    check(golden, each.name, each.target, generated)
    exact = each.epilogue(F.linear(x.double(), exact_weight(packed, layout)), bias.double(), residual.double())
    expect(interpreter, generated, inputs, each.epilogue(F.linear(x, unpack(packed, layout)), bias, residual), exact)


def test_gated(golden, interpreter):
    spec, x, gate, gate_weight = case("64:2:8", 48, 128, 256, torch.bfloat16)
    up = arrays(128, 256, spec, torch.bfloat16, seed=1)
    weights = gate_weight, unpack(up, Layout(spec, 128, 256))
    both = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
    gated = multiply("gated_linear", Layout(spec, 128, 256))

    def graph(x: Any, values: Any, metadata: Any, columns: Any) -> Any:
        return gated(x, (values, metadata, columns))

    generated = generate(graph, [x, *both], "sm_90", static=(1, 2, 3))
    check(golden, "gated_silu", "sm_90", generated)
    dense, exact = (
        F.silu(F.linear(x.to(kind), weights[0].to(kind))) * F.linear(x.to(kind), weights[1].to(kind))
        for kind in (torch.bfloat16, torch.float64)
    )
    expect(interpreter, generated, [x, *both], dense, exact)


def check(golden: Any, name: str, target: str, generated: Any) -> None:
    """The one sparse kernel among those generated is the golden one, and compiles without spills."""
    (kernel,) = (each for each in generated.kernels if each.schedule.template)
    golden(f"kernels/{name}.py", kernel_text(kernel.source))
    with virtual_device(target):
        code = compile_kernel(kernel.source, kernel.name, find_target(target))
    assert code.spills == 0
    # A loop of one round is none.
    hot = count_instructions(code.assembly, loop_only=name != "shifted_add")
    assert any(each.startswith(MULTIPLIES[name]) for each in hot.names), hot.names
    assert bool(hot.tensor_core) == (MULTIPLIES[name] != "FFMA")
