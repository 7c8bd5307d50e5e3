"""Random multiplications by a packed weight, and how far the interpreted kernels may be off."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import vnm_compile.codegen.kernels  # noqa: F401 (says which kernels there are)
from tests.codegen.triton.interpreter import Interpreter
from tests.ptx.run import run
from tests.support import assert_as_accurate_as_dense
from vnm_compile.codegen.generate import Generated
from vnm_compile.codegen.random_arrays import random_packed
from vnm_compile.format import Packed, unpack
from vnm_compile.layout import Layout
from vnm_compile.ops import linear
from vnm_compile.spec import Spec

CPU = torch.device("cpu")


def arrays(out_features: int, in_features: int, spec: Spec, dtype: torch.dtype, seed: int = 0) -> Packed:
    return random_packed(Layout(spec, out_features, in_features), dtype, CPU, seed)


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
