"""The kernels that are executed as PTX: every template, dtype, kind of pattern and fused epilogue, for every target."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional as F

from tests.codegen.triton.cases import CPU, dense_layer, exact_weight, traced
from tests.support import assert_as_accurate_as_dense
from vnm_compile.activations import ACTIVATIONS
from vnm_compile.codegen.generate import Generated, generate
from vnm_compile.codegen.random_arrays import random_packed
from vnm_compile.codegen.triton import lowering, sparse_cores
from vnm_compile.codegen.triton.configs import Config
from vnm_compile.codegen.triton.prepack import AlignedRows
from vnm_compile.codegen.triton.sparse_configs import SparseConfig
from vnm_compile.format import Packed, unpack
from vnm_compile.layout import Layout
from vnm_compile.ops import gated_linear, linear, sections
from vnm_compile.quantization import Quantization
from vnm_compile.spec import Spec

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")


@dataclass(frozen=True)
class Case:
    """One graph around a product by a sparse weight.

    Attributes:
        name: unique.
        spec: the pattern.
        tokens, out_features, in_features: sizes.
        dtype: of everything.
        kind: "linear", "block" (what surrounds a linear in a transformer), "joined" (three of one input), or an
            activation: a gated pair.
        config: in place of the one that would be chosen.
        hint: tokens that code with a symbolic number of them is generated for.
        tf32: whether torch allows TF32.
        stored: how values are quantised, if they are.
        targets: that it is generated for.
        sparse: whether sparse tensor cores multiply.
        apart: whether the arrays of each weight of a joined or gated case are handed over on their own.
    """

    name: str
    spec: str
    tokens: int
    out_features: int
    in_features: int
    dtype: torch.dtype
    kind: str = "linear"
    config: Config | None = None
    hint: int | None = None
    tf32: bool = False
    stored: str | None = None
    targets: tuple[str, ...] = ("sm_80", "sm_90", "sm_120")
    sparse: bool = False
    apart: bool = False


@dataclass
class Built:
    """A case's code for a target, its inputs, and what has to come out.

    Attributes:
        generated: the code.
        inputs: of the graph.
        dense: what dense layers make of them in the same dtype.
        exact: what they make of them in double precision.
    """

    generated: Generated
    inputs: list[Any]
    dense: list[Tensor]
    exact: list[Tensor]

    def check(self, outputs: Sequence[Tensor], step: int = 1) -> None:
        """Outputs are as near to the exact ones as the dense ones are; only every `step`-th feature is looked at."""
        for each in zip(outputs, self.dense, self.exact, strict=True):
            assert_as_accurate_as_dense(*(tensor[..., ::step] for tensor in each))

    def spoil(self) -> None:
        """Make every second row of the weight, or of its scales, infinite: the others have nothing to do with it."""
        values_or_scales = next(each for each in self.inputs[1:] if each.is_floating_point())
        values_or_scales[1::2] = float("inf")


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_SPLITS = (256, 96, 96)  # rows of joined linears, each a multiple of V


def _sparse(
    name: str, spec: str, tokens: int, out_features: int, in_features: int, dtype: torch.dtype,
    config: Sequence[int] = (), targets: tuple[str, ...] = ("sm_80", "sm_120"), **others: Any,
) -> Case:  # fmt: skip
    """A case for sparse tensor cores; `config` as rows, tokens, groups, warps, stages, splits, warps along rows."""
    others |= {"config": SparseConfig(*config) if config else None, "targets": targets, "sparse": True}
    return Case(f"sparse cores, {name}", spec, tokens, out_features, in_features, dtype, **others)


SPARSE = (
    _sparse("tails", "64:2:8", 40, 200, 100, _BF16, targets=("sm_80", "sm_86", "sm_89", "sm_120")),
    _sparse("odd groups", "32:2:5", 33, 100, 333, _FP16, targets=("sm_80", "sm_86", "sm_89", "sm_120")),
    _sparse("small groups", "16:2:4", 17, 80, 136, _BF16),
    _sparse("wide columns", "16:2:300", 5, 40, 1500, _FP16, targets=("sm_86", "sm_89")),
    _sparse("many tokens", "128:2:16", 130, 128, 512, _FP16),
    _sparse("wgmma left alone", "64:2:8", 100, 128, 520, _BF16, (64, 64, 16, 4, 4, 1, 2), ("sm_90",)),
    _sparse("large tile", "128:2:16", 150, 256, 1100, _BF16, (128, 128, 16, 8, 3, 1, 2), ("sm_80", "sm_89")),
    _sparse("two groups a product", "64:2:8", 50, 100, 1100, _FP16, (64, 64, 32, 4, 3, 1, 4)),
    _sparse("ring of two", "32:2:8", 50, 96, 1024, _BF16, (32, 64, 16, 2, 2, 1, 1)),
    _sparse("ring of five", "16:2:8", 20, 48, 1200, _FP16, (16, 32, 16, 4, 5, 1, 1)),
    _sparse("warps along tokens", "16:2:8", 200, 48, 300, _FP16, (16, 128, 16, 4, 3, 1, 1)),
    _sparse("one round", "64:2:8", 9, 64, 128, _BF16, (32, 16, 16, 2, 3, 1, 2)),
    _sparse("split", "64:2:8", 3, 128, 4400, _BF16, (64, 16, 32, 4, 3, 4, 4)),
    _sparse("split block", "64:2:8", 2, 96, 4100, _FP16, (32, 16, 16, 2, 4, 2, 2), kind="block"),
    _sparse("block", "64:2:8", 70, 96, 126, _BF16, kind="block", targets=("sm_80", "sm_89")),
    _sparse("one value", "64:1:8", 70, 100, 200, _FP16, targets=("sm_80", "sm_89")),
    _sparse("one value, large tile", "64:1:8", 130, 128, 1024, _BF16, (64, 128, 32, 8, 3, 1, 2)),
    _sparse("one value, odd groups", "32:1:5", 33, 100, 333, _BF16, (32, 32, 16, 4, 3, 1, 2)),
    _sparse("one value, wide columns", "16:1:300", 5, 40, 1500, _FP16),
    _sparse("gated", "64:2:8", 300, 128, 256, _BF16, (64, 64, 16, 2, 3, 1, 1), kind="silu"),
    _sparse("joined", "32:2:8", 21, sum(_SPLITS), 136, _BF16, kind="joined"),
    _sparse("any number, few", "64:2:8", 17, 96, 136, _BF16, hint=4),
    _sparse("any number, many", "64:2:8", 101, 96, 136, _FP16, hint=70),
)
"""On sparse tensor cores."""

CASES = (
    # Tails of rows, columns and tokens, and of the groups of a quad.
    Case("tails", "64:2:8", 40, 200, 100, _BF16, targets=TARGETS),
    Case("odd groups", "32:2:5", 33, 100, 333, _FP16, targets=TARGETS),
    Case("small groups", "16:2:4", 17, 80, 136, _BF16),
    Case("one value", "64:1:8", 5, 96, 200, _FP16),
    Case("wide columns", "16:2:300", 5, 40, 1500, _FP16),
    Case("many tokens", "128:2:16", 130, 128, 512, _FP16, targets=TARGETS),
    Case("fp32", "32:2:8", 9, 64, 200, _FP32, targets=TARGETS),
    Case("fp32, one value, one round", "16:1:16", 20, 64, 256, _FP32),
    Case("fp32, tails", "64:2:5", 12, 70, 397, _FP32),
    Case("tf32", "64:2:8", 24, 64, 512, _FP32, tf32=True, targets=TARGETS),
    Case("tf32, tails", "32:1:5", 19, 50, 333, _FP32, tf32=True),
    # Larger tiles than such small problems are given.
    Case("tile of prefill", "64:2:8", 150, 128, 520, _BF16, config=Config(64, 128, 16, 4, 3), targets=TARGETS),
    Case("tile of Hopper", "128:2:16", 260, 128, 1040, _BF16, config=Config(128, 256, 16, 8, 5), targets=("sm_90",)),
    Case("three buffers", "64:2:8", 50, 100, 1100, _FP16, config=Config(64, 64, 16, 4, 7)),
    Case("warps along tokens", "16:2:8", 200, 48, 300, _FP16, config=Config(16, 128, 16, 2, 3)),
    # One token.
    Case("one token", "64:2:8", 1, 128, 512, _BF16, targets=TARGETS),
    Case("one token, tails", "16:2:5", 1, 100, 77, _FP16, targets=TARGETS),
    Case("one token, odd V", "48:2:32", 1, 130, 1100, _BF16),
    Case("one token, wide columns", "16:2:300", 1, 40, 1500, _FP16),
    *(
        Case(f"one token, {size[0]} rows a tile", "64:2:8", 1, 100, 4200, _FP16, config=Config(*size, stages=1))
        for size in ((4, 1, 128, 1), (16, 1, 256, 2), (32, 1, 256, 4))
    ),
    # Partial sums, added up by a second kernel.
    Case("split", "64:2:8", 3, 128, 4400, _BF16, targets=TARGETS),
    Case("split, fp32", "64:2:8", 3, 64, 2304, _FP32),
    Case("split block", "64:2:8", 2, 96, 4100, _FP16, kind="block"),
    # Gated pairs.
    Case("gated", "32:2:8", 2, 72, 132, _BF16, kind="silu", targets=TARGETS),
    Case("gated, many tokens", "64:2:8", 48, 128, 256, _BF16, kind="gelu", targets=TARGETS),
    Case("gated, fp32", "16:1:16", 20, 48, 256, _FP32, kind="relu"),
    Case("gated, one value", "64:1:4", 70, 100, 200, _FP16, kind="silu"),
    Case("gated, split", "64:2:8", 2, 100, 4096, _FP16, kind="silu"),
    Case("gated, one token", "32:2:8", 1, 72, 132, _BF16, kind="silu", targets=TARGETS),
    Case("gated, one token, tails", "64:2:5", 1, 100, 1003, _FP16, kind="gelu"),
    # What Inductor fuses, and what it joins.
    Case("block", "64:2:8", 70, 96, 126, _BF16, kind="block", targets=TARGETS),
    Case("block, fp32", "16:1:4", 3, 96, 126, _FP32, kind="block"),
    Case("block, one token", "64:2:8", 1, 96, 304, _FP16, kind="block"),
    Case("joined", "32:2:8", 21, sum(_SPLITS), 136, _BF16, kind="joined"),
    Case("joined, one token", "32:2:8", 1, sum(_SPLITS), 136, _FP16, kind="joined"),
    # One kernel for any number of tokens.
    Case("any number, few", "64:2:8", 17, 96, 136, _BF16, hint=4),
    Case("any number, many", "64:2:8", 101, 96, 136, _FP16, hint=70),
    # Quantised values: both numbers of bits, every dtype, scales of parts of a tile's rows, of more, and of whole rows.
    Case("int8", "64:2:8", 40, 200, 100, _BF16, stored="int8/64"),
    Case("int8, fp16, tails", "32:2:5", 33, 100, 333, _FP16, stored="int8/32"),
    Case("int4", "64:2:8", 40, 200, 100, _BF16, stored="int4/32"),
    Case("int4, fp16, tails", "16:2:5", 17, 80, 405, _FP16, stored="int4/64"),
    Case("int4, a scale a row", "64:2:8", 20, 100, 520, _BF16, stored="int4/row"),
    Case("int8, a scale a row", "16:2:16", 9, 80, 1100, _FP16, stored="int8/row"),
    Case("int4, one value", "64:1:8", 5, 96, 200, _FP16, stored="int4/32"),
    Case("int8, one value", "32:1:8", 21, 96, 600, _BF16, stored="int8/128"),
    Case("int4, fp32", "32:2:8", 9, 64, 200, _FP32, stored="int4/32"),
    Case("int8, tf32", "64:1:8", 24, 64, 512, _FP32, tf32=True, stored="int8/32"),
    Case("int4, tile of prefill", "64:2:8", 150, 128, 520, _BF16, config=Config(64, 128, 16, 4, 3), stored="int4/64"),
    Case("int8, wide steps", "64:2:8", 20, 128, 1040, _FP16, config=Config(64, 32, 64, 4, 5), stored="int8/64"),
    Case("int8, one token", "64:2:8", 1, 128, 512, _BF16, stored="int8/64"),
    Case("int4, one token, tails", "16:2:5", 1, 100, 405, _FP16, stored="int4/32"),
    Case("int4, one token, a scale a row", "48:2:32", 1, 130, 1100, _BF16, stored="int4/row"),
    Case("int4, split", "64:2:8", 3, 128, 4400, _BF16, stored="int4/128"),
    Case("int4, gated", "32:2:8", 3, 72, 132, _BF16, kind="silu", stored="int4/32"),
    Case("int8, gated, a scale a row", "64:2:8", 48, 128, 256, _FP16, kind="gelu", stored="int8/row"),
    Case("int4, gated, one token", "64:2:5", 1, 100, 1003, _BF16, kind="silu", stored="int4/64"),
    Case("int8, block", "64:2:8", 70, 96, 126, _BF16, kind="block", stored="int8/32"),
    Case("int4, joined", "32:2:8", 21, sum(_SPLITS), 136, _BF16, kind="joined", stored="int4/32"),
    Case("int8, any number", "64:2:8", 17, 96, 136, _BF16, hint=4, stored="int8/64"),
    *SPARSE,
    # Weights that lie apart.
    Case("joined, apart", "32:2:8", 21, sum(_SPLITS), 136, _BF16, kind="joined", apart=True, targets=TARGETS),
    Case("joined, apart, int4", "32:2:8", 1, sum(_SPLITS), 136, _BF16, "joined", stored="int4/32", apart=True),
    Case("gated, apart, int8", "64:2:8", 48, 128, 256, _BF16, kind="silu", stored="int8/64", apart=True),
    Case("gated, apart, one token", "64:2:5", 1, 100, 1003, _FP16, kind="gelu", apart=True),
    Case("gated, apart, split", "64:2:8", 2, 100, 4096, _FP16, kind="silu", apart=True),
    # Long rounds of one token.
    Case("one token, 512 groups", "64:2:8", 1, 100, 4200, _BF16, config=Config(8, 1, 512, 4, 1), targets=TARGETS),
    Case("int4, 1024 groups", "64:2:8", 1, 100, 9000, _BF16, config=Config(16, 1, 1024, 8, 1), stored="int4/64"),
)  # fmt: skip
HUNTED = (
    "small groups",
    "many tokens",
    "tf32",
    "one token, tails",
    "gated",
    "gated, one token",
    "block",
    "sparse cores, odd groups",
    "sparse cores, two groups a product",
)
"""Cases that mutants are planted in, for the targets that differ most."""
BY_NAME = {case.name: case for case in CASES}


def build(case: Case, target: str) -> Built:
    """Random inputs for a case, its code, and the expected outputs. Inputs do not depend on the target."""
    torch.manual_seed(0)
    stored = Quantization.parse(case.stored) if case.stored else None
    layout = Layout(Spec.parse(case.spec), case.out_features, case.in_features, stored)
    gated = case.kind in ACTIVATIONS
    parts = [random_packed(layout, case.dtype, CPU, seed) for seed in range(1 + gated)]
    weights = [unpack(part, layout) for part in parts]
    exact_weights = [exact_weight(part, layout) for part in parts]
    packed = [torch.cat(pair) for pair in zip(*parts, strict=True)]
    if case.apart:
        apart = parts if gated else _cut(packed, layout)
        packed = [array for part in apart for array in AlignedRows().prepare(part)]
    elif case.sparse:
        packed = list(AlignedRows().prepare(Packed(*packed)))
    extra = []
    if case.kind == "block":
        extra = [torch.randn(case.out_features), torch.randn(1, case.tokens, case.out_features)]
    x, *extra = (each.to(case.dtype) for each in (torch.randn(1, case.tokens, case.in_features), *extra))
    inputs = [x, *packed, *extra]
    sample = list(inputs)
    if case.hint:
        sample[0] = x.new_zeros(1, case.hint, case.in_features)
    with ExitStack() as stack:
        stack.enter_context(patch.object(sparse_cores, "may_multiply", lambda *_: case.sparse))
        if case.sparse and case.kind in ACTIVATIONS:
            stack.enter_context(patch.object(lowering, "two_passes", lambda *_: True))
        if case.config:
            names = ("of_both_kinds",) if case.sparse else ("configurations", "vector_configurations")
            for name in names:
                stack.enter_context(patch.object(lowering, name, lambda *_: [case.config]))
        stack.enter_context(_tf32(case.tf32))
        dynamic = {0: [1]} if case.hint else None
        static = range(1, len(inputs) - (case.kind == "block"))
        generated = generate(_graph(case, layout, len(packed)), sample, target, static=tuple(static), dynamic=dynamic)
    templates = [each.schedule.template for each in generated.kernels if each.schedule.template]
    assert [each.startswith("vnm_sparse_cores") for each in templates] == [case.sparse]
    seen = [_as_tf32(each) if case.tf32 else each for each in (x, *weights, *extra)]
    dense = _compute(case, *seen)
    exact = _compute(case, x.double(), *exact_weights, *(each.double() for each in extra))
    return Built(generated, inputs, dense, exact)


def _cut(packed: Sequence[Tensor], layout: Layout) -> list[Packed]:
    """The arrays of a joined weight, those of each of its weights on their own."""
    v = layout.spec.v
    heights = {name: [split // v if name == "columns" else split for split in _SPLITS] for name in layout.names}
    pieces = [array.split(heights[name]) for name, array in zip(layout.names, packed, strict=True)]
    return [Packed(*(piece.clone() for piece in part)) for part in zip(*pieces, strict=True)]


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _graph(case: Case, layout: Layout, arrays: int) -> GraphModule:
    def product(x: Any, *packed: Any) -> Any:
        if case.kind in ACTIVATIONS:
            return gated_linear(x, packed, layout, case.kind)
        return linear(x, packed, layout)

    def block(x: Any, packed: Any, bias: Any, residual: Any) -> Any:
        return (_around(lambda y: product(y, *packed), x, bias, residual),)

    def joined(x: Any, packed: Any) -> Any:
        pieces = sections(product(x, *packed), [*_SPLITS[:2], _SPLITS[2] - 3], _SPLITS)
        return tuple(pieces[i] for i in range(len(_SPLITS)))

    def plain(x: Any, packed: Any) -> Any:
        return (product(x, *packed),)

    function = {"block": block, "joined": joined}.get(case.kind, plain)

    def graph(x: Any, *rest: Any) -> Any:
        return function(x, rest[:arrays], *rest[arrays:])

    return traced(graph, 1 + arrays + (2 if case.kind == "block" else 0))


def _around(multiply: Callable[[Any], Any], x: Any, bias: Any, residual: Any) -> Any:
    return F.gelu(multiply(F.silu(x)) + bias) * 0.5 + residual


def _compute(case: Case, x: Tensor, *others: Tensor) -> list[Tensor]:
    """The outputs from dense weights."""
    if case.kind == "block":
        weight, bias, residual = others
        return [_around(lambda y: _dense(y, weight, case.tf32), x, bias, residual)]
    if case.kind == "joined":
        pieces = _dense(x, others[0], case.tf32).split(_SPLITS, -1)
        return [*pieces[:2], pieces[2][..., :-3]]
    if case.kind == "linear":
        return [_dense(x, others[0], case.tf32)]
    gate, up = (_dense(x, each, case.tf32) for each in others)
    return [ACTIVATIONS[case.kind].eager(gate) * up]


def _dense(x: Tensor, weight: Tensor, tf32: bool) -> Tensor:
    return F.linear(x, weight) if tf32 else dense_layer(x, weight)


def _as_tf32(tensor: Tensor) -> Tensor:
    """What tensor cores read of an fp32 number."""
    return (tensor.view(torch.int32) & -(1 << 13)).view(torch.float32)


def pairs(names: Sequence[str] | None = None, targets: Sequence[str] = TARGETS) -> Iterator[tuple[Case, str]]:
    """Cases and targets that they are for, in their order."""
    for case in CASES:
        for target in case.targets:
            if target in targets and (names is None or case.name in names):
                yield replace(case), target
