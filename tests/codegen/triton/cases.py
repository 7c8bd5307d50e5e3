"""Random multiplications by a packed weight, and how far the interpreted kernels may be off."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

import vnm_compile.codegen.kernels  # noqa: F401 (says which kernels there are)
from tests.codegen.triton.interpreter import Interpreter
from tests.ptx.run import run
from tests.support import assert_as_accurate_as_dense
from vnm_compile.codegen.generate import Generated
from vnm_compile.codegen.random_arrays import random_packed
from vnm_compile.format import Packed, unpack
from vnm_compile.layout import Layout
from vnm_compile.ops import linear
from vnm_compile.quantization import Quantization
from vnm_compile.spec import Spec

CPU = torch.device("cpu")


def arrays(
    out_features: int,
    in_features: int,
    spec: Spec,
    dtype: torch.dtype,
    seed: int = 0,
    stored: Quantization | None = None,
) -> Packed:
    return random_packed(Layout(spec, out_features, in_features, stored), dtype, CPU, seed)


def exact_weight(packed: Packed, layout: Layout) -> Tensor:
    """The weight in float64: of quantised values levels times scales, not rounded."""
    if layout.quantization is None:
        return unpack(packed, layout).double()
    return unpack(packed.replaced(layout.names.index("scales"), packed.scales.double()), layout)


def dense_layer(x: Tensor, weight: Tensor) -> Tensor:
    """A dense layer on a GPU. In fp32 without tensor cores it adds one product after another, which is less exact than
    what CPUs do."""
    if x.dtype != torch.float32:
        return F.linear(x, weight)
    total = torch.zeros(*x.shape[:-1], weight.shape[0], dtype=torch.float32)
    for k in range(x.shape[-1]):
        total = (total.double() + x[..., k, None].double() * weight[:, k].double()).float()
    return total


def expect(interpreter: Interpreter, generated: Generated, inputs: list[Any], dense: Tensor, exact: Tensor) -> None:
    """The wrapper's output is as near to float64 as the dense layers are in the same dtype.

    Gluon has no interpreter: of its kernels the PTX is executed.
    """
    if "@gluon.jit" in generated.wrapper:
        (capability,) = set(re.findall(r"\bcc=(\d+)", generated.wrapper))
        (output,) = run(generated.wrapper, inputs, f"sm_{capability}").outputs
    else:
        (output,) = interpreter.run(generated.wrapper, inputs)
    assert output.dtype == dense.dtype
    assert output.shape == dense.shape
    assert_as_accurate_as_dense(output, dense, exact)


def case(
    spec: str, tokens: int, out_features: int, in_features: int, dtype: torch.dtype
) -> tuple[Spec, Tensor, Packed, Tensor]:
    pattern = Spec.parse(spec)
    packed = arrays(out_features, in_features, pattern, dtype)
    x = torch.randn(1, tokens, in_features).to(dtype)
    return pattern, x, packed, unpack(packed, Layout(pattern, out_features, in_features))


def plain(spec: Spec, out_features: int, in_features: int) -> Callable[..., Any]:
    def graph(x: Any, values: Any, metadata: Any, columns: Any) -> Any:
        return linear(x, (values, metadata, columns), Layout(spec, out_features, in_features))

    return graph


def traced(function: Callable[..., Any], inputs: int) -> fx.GraphModule:
    """The graph of a function that takes so many inputs, one by one or as `*args`."""
    tracer = fx.Tracer()
    tracer.root, tracer.graph = torch.nn.Module(), fx.Graph()
    given = [tracer.create_proxy("placeholder", f"arg{i}", (), {}) for i in range(inputs)]
    tracer.create_node("output", "output", (tracer.create_arg(function(*given)),), {})
    return fx.GraphModule(tracer.root, tracer.graph)
