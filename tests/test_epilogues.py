"""What follows a sparse linear: fused into its kernel where that is right, and right where it is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

from tests.codegen.cpp.programs import Program
from tests.support import assert_as_accurate_as_dense

OPTIONS = {"vnm.policy": "memory"}

# Each was wrong or did not compile: a result read by another in another order, written to in part, or seen as more,
# fewer or other dimensions than the kernel's two.
ORDERS = [
    ["linear", "multiply transposed"],
    ["linear", "relu", "multiply a slice in place"],
    ["other linear", "heads first", "heads"],
    ["siblings", "multiply transposed"],
    ["gated", "heads first copy", "flip tokens"],
]


class Several(nn.Module):
    def __init__(self, programs):
        super().__init__()
        self.programs = nn.ModuleList(programs)

    def forward(self, x):
        return [y for program in self.programs for y in program(x)]


def check(model, x, dtype, **kwargs):
    """Every returned value, against float64."""
    model, x = model.to(dtype), x.to(dtype)
    with torch.no_grad():
        actual, eager = torch.compile(model, backend="vnm", options=OPTIONS, **kwargs)(x), model(x)
        reference = model.double()(x.double())
    for ours, dense, exact in zip(actual, eager, reference, strict=True):
        assert (ours.dtype, ours.shape) == (dense.dtype, dense.shape)
        if dtype == torch.float32:
            assert_as_accurate_as_dense(ours, dense, exact, slack=2)
            continue
        # Of a chain of steps eager rounds each and a fused kernel some: one more rounding of the largest value is free.
        unit = torch.finfo(dtype).eps * exact.abs().max()
        assert (ours.double() - exact).abs().max() <= 1.3 * (dense.double() - exact).abs().max() + unit


def everything_returned(steps):
    program = Program(0, steps=steps)
    program.sources, program.others = list(range(len(steps))), [max(0, i - 1) for i in range(len(steps))]
    program.returned = list(range(1, len(steps) + 1))
    return program


@pytest.mark.parametrize(
    ("shape", "dtype", "dynamic"),
    [
        ((2, 5, 64), torch.float32, None),
        ((1, 1, 64), torch.bfloat16, None),
        pytest.param((2, 40, 64), torch.float32, True, marks=pytest.mark.slow),
    ],
    ids=["few tokens", "one token", "many tokens"],
)
def test_results_read_in_another_order(shape, dtype, dynamic):
    torch.manual_seed(1)
    model = Several(everything_returned(steps) for steps in ORDERS)
    check(model, torch.randn(shape) * 0.5, dtype, dynamic=dynamic)


@pytest.mark.parametrize("operation", ["y * x", "y * y"])
def test_a_transposed_product_of_a_biased_result(operation):
    program = Program(0)

    def forward(x):
        y = program.a(x)
        return y, (y * (x if operation == "y * x" else y)).t().contiguous()

    x = torch.randn(5, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(forward, backend="vnm", options=OPTIONS)(x), forward(x))


def test_inputs_written_to_after_the_linear_has_read_them():
    """The write must not be fused: other tiles have yet to read what it overwrites."""
    program = Program(0)

    def forward(x, z):
        x.add_(program.a(x))
        z[:, 1:].mul_(program.c(z)[:, 1:])
        return x.relu()

    inputs = torch.randn(70, 64), torch.randn(3, 64)
    expected = tuple(each.clone() for each in inputs)
    with torch.no_grad():
        y, exact = torch.compile(forward, backend="vnm", options=OPTIONS)(*inputs), forward(*expected)
    torch.testing.assert_close((y, *inputs), (exact, *expected))


def test_what_may_be_fused_is():
    program = Program(0)

    def forward(x, residual):
        y = torch.nn.functional.gelu(program.a(x)) + residual
        return y, (y * 2).unflatten(-1, (4, 16)).transpose(1, 2)

    x, residual = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    with torch.no_grad():
        run = torch.compile(forward, backend="vnm", options=OPTIONS)
        actual, (code,) = run_and_get_code(run, x, residual)
        torch.testing.assert_close(actual, forward(x, residual))
    assert code.count("async_compile.cpp") == 1


@pytest.mark.slow
def test_random_programs():
    torch.manual_seed(2)
    x = torch.randn(2, 5, 64) * 0.5
    programs = [program for program in map(Program, range(8, 20)) if program.takes(x)]
    check(Several(programs[:4]), x, torch.float32)


def test_two_kernels_in_one_translation_unit():
    """What cpp_wrapper makes of a graph: joined, gated and single layers together."""
    program, x = Program(0), torch.randn(6, 64)

    def forward(x):
        gated = torch.nn.functional.silu(program.f(x)) * program.g(x)
        return program.a(x[1:]).relu(), program.d(x) * program.e(x), gated

    with torch.no_grad():
        actual = torch.compile(forward, backend="vnm", options={**OPTIONS, "cpp_wrapper": True})(x)
        torch.testing.assert_close(actual, forward(x))
