"""The ways to compute a linear on a GPU that are compared: dense, torch's own 2:4, and ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_cases import Case
from vnm_compile.backend import vnm
from vnm_compile.codegen.random_arrays import random_packed
from vnm_compile.format import unpack
from vnm_compile.tensor import VNMTensor

SEMI_STRUCTURED = "2:4"


def random_weight(case: Case, device: torch.device, seed: int) -> Tensor:
    """A random dense weight that follows the case's pattern."""
    return unpack(random_packed(case.layout, case.dtype, device, seed), case.layout)


def linears(case: Case, device: torch.device, sets: int) -> list[nn.Linear]:
    """Layers with random weights of the case's pattern, compressed where their values are quantised."""
    made = []
    for seed in range(sets):
        layer = nn.Linear(case.in_features, case.out_features, bias=False, device="meta", dtype=case.dtype)
        if case.quantization is None:
            weight = random_weight(case, device, seed)
        else:
            weight = VNMTensor._wrap(random_packed(case.layout, case.dtype, device, seed), case.layout, False)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        made.append(layer)
    return made


def dense(case: Case, x: Tensor, device: torch.device, sets: int, tuned: bool) -> dict[str, list[Callable[[], Any]]]:
    """The dense contenders, one call a set of random weights: cuBLAS, and Inductor's own choice if `tuned`."""
    weights = [
        torch.randn(case.out_features, case.in_features, device=device).mul_(case.in_features**-0.5).to(case.dtype)
        for _ in range(sets)
    ]
    calls: dict[str, list[Callable[[], Any]]] = {
        "cuBLAS": [partial(torch.nn.functional.linear, x, weight) for weight in weights]
    }
    if tuned:

        def apply(x: Tensor, weight: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, weight)

        compiled = torch.compile(apply, mode="max-autotune-no-cudagraphs")
        calls["max-autotune"] = [partial(compiled, x, weight) for weight in weights]
    return calls


def ours(layers: Sequence[nn.Linear], x: Tensor) -> list[Callable[[], Any]]:
    """Calls of one compiled function, a layer each."""

    def apply(layer: nn.Linear, x: Tensor) -> Tensor:
        return layer(x)

    compiled = torch.compile(apply, backend=vnm, options={"vnm.policy": "memory"})
    return [partial(compiled, layer, x) for layer in layers]


def semi_structured(case: Case, x: Tensor, device: torch.device, sets: int) -> list[Callable[[], Any]] | str:
    """Calls of torch's 2:4 kernels on random 2:4 weights of the same size, or why there are none."""
    from torch.sparse import to_sparse_semi_structured

    keep = torch.tensor([1, 0, 0, 1], dtype=torch.bool, device=device).repeat(case.in_features // 4)
    try:
        calls = []
        for _ in range(sets):
            weight = torch.randn(case.out_features, case.in_features, device=device).to(case.dtype) * keep
            calls.append(partial(torch.nn.functional.linear, x, to_sparse_semi_structured(weight)))
        calls[0]()
        torch.cuda.synchronize()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return calls


def quantised(case: Case, x: Tensor, device: torch.device, sets: int, bits: int) -> dict[str, list[Callable[[], Any]]]:
    """torch's own kernels for dense weights of int8, or int4 in groups of 64: one call a set of random weights."""
    out_features, in_features = case.out_features, case.in_features
    if bits == 4:

        def product() -> Callable[[], Any]:
            packed = torch.randint(256, (out_features, in_features // 2), dtype=torch.uint8, device=device)
            packed = torch.ops.aten._convert_weight_to_int4pack(packed, 8)
            scales = torch.rand(in_features // 64, out_features, 2, device=device).to(case.dtype)
            return partial(torch.ops.aten._weight_int4pack_mm, x, packed, 64, scales)

        return {"int4": [product() for _ in range(sets)]}

    def apply(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weight.to(x.dtype)) * scale

    # For one token Inductor reads int8 in a kernel of its own, where it may tune; else the weight is written out first.
    compiled = torch.compile(apply, options={"coordinate_descent_tuning": True})
    weights = [
        torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8, device=device) for _ in range(sets)
    ]
    scale = torch.rand(out_features, device=device).to(case.dtype)
    ways: dict[str, Callable[..., Any]] = {"int8": torch.ops.aten._weight_int8pack_mm}
    if case.tokens == 1:
        ways["int8, compiled"] = compiled
    return {name: [partial(way, x, weight, scale) for weight in weights] for name, way in ways.items()}
