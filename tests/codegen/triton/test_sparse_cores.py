"""Sparse tensor cores: chosen where there are some, whatever is fused into them, and only where they are right."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vnm_compile as vnm
from tests.codegen.triton.cases import CPU, arrays, case, plain
from tests.support import make_sparse_, with_slow
from vnm_compile.codegen.generate import GeneratedKernel, generate
from vnm_compile.codegen.random_arrays import random_packed
from vnm_compile.codegen.triton import lowering, self_check
from vnm_compile.codegen.triton.configs import Shape
from vnm_compile.codegen.triton.operands import Operands
from vnm_compile.codegen.triton.prepack import AlignedRows
from vnm_compile.codegen.triton.sparse_configs import SparseConfig, sparse_configurations
from vnm_compile.codegen.virtual_device import virtual_device
from vnm_compile.format import Packed, unpack
from vnm_compile.hardware import TARGETS, find_target
from vnm_compile.inspection.machine_code import MachineCode, compile_kernel
from vnm_compile.layout import Layout
from vnm_compile.ops import linear
from vnm_compile.spec import Spec

HAVE = ("sm_80", "sm_86", "sm_89", "sm_120")
SPECS = ["64:2:8", "64:1:8", "128:2:16", "32:2:5", "16:2:4"]
LAYOUT = Layout(Spec(64, 2, 8), 64, 256)


class Layer(nn.Module):
    """A linear with what is fused into it."""

    def __init__(self, width: int, spec: str, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.linear = make_sparse_(nn.Linear(width, width), spec).to(dtype)

    def forward(self, x: Any, residual: Any) -> Any:
        return F.gelu(self.linear(x)) + residual


def inspected(spec: str, tokens: int, target: str, dtype: torch.dtype = torch.bfloat16, width: int = 1024) -> Any:
    x = torch.randn(tokens, width, dtype=dtype)
    report = vnm.inspect(Layer(width, spec, dtype).eval(), x, x, target=target)
    return next((kernel for kernel in report.sparse if kernel.template), None)


@pytest.mark.parametrize("target", with_slow(HAVE, quick=("sm_86",)))
@pytest.mark.parametrize("tokens", [256, 2048])
@pytest.mark.parametrize("spec", with_slow(SPECS, quick=SPECS[:2]))
def test_chosen_without_spills(spec, tokens, target):
    """Where work is enough: of fewer tokens, or half the width, a kernel on dense tensor cores may be as good."""
    kernel = inspected(spec, tokens, target, width=2048)
    assert kernel.template == "vnm_sparse_cores"
    assert kernel.fused_ops == ("vnm.linear", "aten.add", "aten.gelu", "aten.add")
    assert kernel.spills == 0
    assert kernel.loop.sparse == kernel.loop.tensor_core > 0
    assert any(name.startswith("HMMA.SP") for name in kernel.loop.names)
    assert min(kernel.loop.loads) >= (4 if spec != "64:1:8" else 2)  # where N = 1, two kept columns at a time
    assert kernel.shared_bytes <= TARGETS[target].shared_bytes
    assert kernel.to_dict()["hot_loop"]["sparse"] == kernel.loop.sparse


def test_roofline_is_that_of_sparse_tensor_cores():
    target = TARGETS["sm_80"]
    sparse, dense = inspected("64:2:8", 2048, "sm_80"), inspected("64:2:8", 2048, "sm_90")
    assert (sparse.peak_flops, dense.peak_flops) == (624e12, 989e12)
    assert sparse.flops == dense.flops, "zeros are counted, as their rate counts them"
    moved = sparse.at_tokens(sparse.bytes_moved) / target.bandwidth
    assert sparse.roofline_seconds == pytest.approx(max(moved, sparse.at_tokens(sparse.flops) / 624e12))


@pytest.mark.parametrize(
    ("spec", "tokens", "target", "dtype"),
    [
        ("64:2:8", 64, "sm_90", torch.bfloat16),  # wgmma is faster there
        ("8:2:8", 64, "sm_80", torch.bfloat16),  # no 16 rows share columns
        ("64:2:8", 64, "sm_80", torch.float32),
        ("64:2:8", 1, "sm_80", torch.bfloat16),  # read as it lies
    ],
)
def test_not_chosen(spec, tokens, target, dtype):
    kernel = inspected(spec, tokens, target, dtype)
    assert kernel is None or kernel.template != "vnm_sparse_cores"


def generated_with(fused: Any, *extra: Any, target: str = "sm_80") -> GeneratedKernel:
    """The kernel of a product of bf16 and what follows it."""
    packed = AlignedRows().prepare(arrays(64, 256, LAYOUT.spec, torch.bfloat16))

    def graph(x: Any, values: Any, metadata: Any, columns: Any, *rest: Any) -> Any:
        return (fused(linear(x, [values, metadata, columns], LAYOUT), *rest),)

    def one(x: Any, values: Any, metadata: Any, columns: Any, other: Any) -> Any:
        return graph(x, values, metadata, columns, other)

    def none(x: Any, values: Any, metadata: Any, columns: Any) -> Any:
        return graph(x, values, metadata, columns)

    x = torch.randn(32, 256, dtype=torch.bfloat16)
    made = generate(one if extra else none, [x, *packed, *extra], target, static=(1, 2, 3))
    (kernel,) = (each for each in made.kernels if each.schedule.template)
    return kernel


def compiled(kernel: GeneratedKernel, target: str = "sm_80") -> MachineCode:
    with virtual_device(target):
        return compile_kernel(kernel.source, kernel.name, find_target(target))


FUSED: dict[str, Any] = {
    "relu": torch.relu,
    "clamp": lambda y: y.clamp(-1, 1),
    "hardswish": F.hardswish,
    "gelu with tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
    "softplus": F.softplus,
    "power": lambda y: y**3,
    "integers": lambda y: (y * 16).round().clamp(-128, 127).to(torch.int8),
    "fp32": lambda y: y.float() * 0.1,
    "constant": lambda y: torch.where(y > 0, y, -1.0),
    "negative zero": lambda y: y + -0.0,
    "positions": lambda y: y * torch.arange(64, device=y.device),
    "division of integers": lambda y: y.int() // 3,
    "dropout": lambda y: F.dropout(y, 0.3, training=True),
}
MATRIX, SCALAR, ROW = torch.randn(32, 64).bfloat16(), torch.tensor(0.5).bfloat16(), torch.randn(64).bfloat16()
FUSED_WITH: dict[str, tuple[Any, torch.Tensor]] = {
    "residual": (torch.add, MATRIX),
    "scale in memory": (torch.mul, SCALAR),
    "bias": (torch.add, ROW),
    "column": (torch.mul, torch.randn(32, 1).bfloat16()),
    "maximum": (torch.maximum, MATRIX),
    "minimum of a scalar": (torch.minimum, SCALAR),
    "mask": (lambda y, mask: y.masked_fill(mask, -float("inf")), MATRIX > 0),
    "embedding": (lambda y, table: y + table[:, :1].long().clamp(0, 3), MATRIX),
}


QUICK = ["clamp", "constant", "scale in memory", "mask"]


@pytest.mark.parametrize("name", with_slow([*FUSED, *FUSED_WITH], QUICK))
def test_what_is_fused_compiles(name):
    """Inductor writes Triton around a template; what Gluon takes otherwise is said in its words."""
    fused, *extra = FUSED_WITH[name] if name in FUSED_WITH else (FUSED[name],)
    kernel = generated_with(fused, *extra)
    assert kernel.schedule.template == "vnm_sparse_cores"
    assert len(kernel.schedule.fused_ops) > 1, kernel.schedule.fused_ops
    assert "HMMA.SP" in compiled(kernel).assembly


def test_what_gluon_does_not_compile_is_not_fused_into_it():
    edges = torch.linspace(-1, 1, 9).bfloat16()
    kernel = generated_with(torch.bucketize, edges)
    assert kernel.schedule.template == "vnm_linear"
    compiled(kernel)


def test_a_kernel_needs_nothing_of_this_package():
    """Its file is compiled by worker processes, and by whoever saves it (`report.save`)."""
    kernel = generated_with(torch.relu)
    assert "vnm_compile" not in kernel.source
    assert "@triton.jit" not in kernel.source


def test_arrays_that_are_not_prepared_go_to_other_tensor_cores():
    """Rows of 25 groups begin where no whole load does."""
    pattern, x, packed, _ = case("64:2:8", 40, 64, 200, torch.bfloat16)
    made = generate(plain(pattern, 64, 200), [x, *packed], "sm_80", static=(1, 2, 3))
    assert {each.schedule.template for each in made.kernels} == {"vnm_linear", None}


@pytest.mark.parametrize("target", HAVE)
def test_every_problem_has_a_configuration(target):
    for spec in ("16:2:8", "48:2:5", "64:2:8", "128:2:32", "16:1:8"):
        for tokens in (2, 16, 100, 4096):
            for groups in (1, 16, 24, 512):
                problem = Shape(tokens, 1024, groups, Spec.parse(spec), torch.bfloat16)
                found = sparse_configurations(problem, find_target(target))
                assert found, problem
                assert len({config.splits for config in found}) == 1
                assert all(problem.spec.v % config.block_o == 0 for config in found)


@pytest.mark.slow
@pytest.mark.parametrize("target", HAVE)
def test_estimates_of_resources_hold(target):
    """Shared memory to the byte but for what the accumulators pass through; registers from above, nearly."""
    seen = 0
    for tokens in (256, 500, 2048):
        for spec in ("64:2:8", "128:2:16", "16:2:8"):
            kernel = inspected(spec, tokens, target, width=2048)
            if kernel.template != "vnm_sparse_cores":
                continue  # a kernel on dense tensor cores is as good there
            seen += 1
            c = kernel.config
            warps, stages = int(c["num_warps"]), int(c["STAGES"])
            tile = [int(c[name]) for name in ("BLOCK_O", "BLOCK_T", "BLOCK_G")]
            config = SparseConfig(*tile, warps, stages, warps_o=int(c["WARPS_O"]))
            problem = Shape(tokens, 2048, 256, Spec.parse(spec), torch.bfloat16)
            assert kernel.shared_bytes <= 1.1 * config.shared_bytes(problem)
            assert kernel.registers <= 1.6 * config.registers(problem)
    assert seen >= 6


def run_of(result: Any) -> Any:
    """What the self-check is given: activations, arrays, and what a kernel made of them."""

    def make() -> Any:
        packed = arrays(64, 256, LAYOUT.spec, torch.bfloat16)
        x = torch.randn(8, 256).bfloat16()
        return x, packed, result(F.linear(x, unpack(packed, LAYOUT)))

    return make


def failing() -> Any:
    raise RuntimeError("no such instruction\nmore")


def test_self_check_passes_once():
    calls: list[int] = []

    def right(y: Any) -> Any:
        calls.append(1)
        return y

    for _ in range(2):
        assert self_check.passes("bf16 on a card", LAYOUT, run_of(right))
    assert calls == [1]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (run_of(lambda y: y.roll(1, -1)), "relative error is 1.4"),
        (run_of(lambda y: y * float("nan")), "relative error is nan"),
        (failing, "RuntimeError: no such instruction;"),
    ],
    ids=["another order", "not a number", "an error"],
)
def test_self_check_warns_once(make, said):
    with pytest.warns(UserWarning, match="sparse tensor cores are not used for a card") as seen:
        assert not self_check.passes(f"a card ({said})", LAYOUT, make)
    assert said in str(seen[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not self_check.passes(f"a card ({said})", LAYOUT, make)


@pytest.mark.parametrize("right", [True, False])
def test_a_device_is_checked_before_its_sparse_cores_are_used(right, monkeypatch):
    """As on a device: the smallest configuration runs on random activations and arrays of the problem's sizes."""
    asked: list[Any] = []
    stored = [lambda node, array=array: array for array in random_packed(LAYOUT, torch.bfloat16, CPU)]

    def run_choice(choice: Any, inputs: Any, out: Any) -> None:
        x, *given = inputs
        asked.append((tuple(x.shape), x.stride(), tuple(out.shape), "BLOCK_O=16" in choice.description))
        out.copy_(F.linear(x, unpack(Packed(*given), LAYOUT)) * (1 if right else 2))

    monkeypatch.setattr(self_check, "_known", {})
    monkeypatch.setattr(lowering, "active_target", lambda: None)
    monkeypatch.setattr(lowering, "run_choice", run_choice)
    monkeypatch.setattr(Operands, "random", lambda self, device: stored)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        kernel = generated_with(torch.relu)
    assert asked == [((32, 256), (1, 32), (32, 64), True)]
    assert kernel.schedule.template == ("vnm_sparse_cores" if right else "vnm_linear")
    warned = [str(each.message) for each in said if "sparse tensor cores are not used" in str(each.message)]
    assert len(warned) == (0 if right else 1)
