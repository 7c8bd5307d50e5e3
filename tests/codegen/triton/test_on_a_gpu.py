"""What only a GPU shows: the kernels right where they run, and timed on the device that they are for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vnm_compile as vnm
from benchmarks import gpu_cases, gpu_check
from tests.support import assert_as_accurate_as_dense, make_sparse_
from vnm_compile.codegen.measure import measure
from vnm_compile.layout import Layout
from vnm_compile.problem import Problem, Timing

pytestmark = pytest.mark.gpu
MEMORY = {"vnm.policy": "memory"}


def test_every_case_of_the_benchmark_is_right():
    lines = list(gpu_check.check(gpu_cases.correctness(), torch.device("cuda", 0)))
    assert lines
    assert not [line for line in lines if line[-1]]


def test_activations_beyond_32_bits():
    layer = make_sparse_(nn.Linear(512, 64, bias=False), "64:2:8").to("cuda", torch.float16).eval()
    x = torch.randn(1 << 23, 512, device="cuda", dtype=torch.float16)  # 2^32 elements
    with torch.no_grad():
        y = torch.compile(layer, backend="vnm", options=MEMORY)(x)
        for part in (slice(0, 100), slice(-100, None)):
            exact = x[part].double() @ layer.weight.double().T
            assert_as_accurate_as_dense(y[part], layer(x[part]), exact)


@pytest.mark.parametrize("index", range(max(1, torch.cuda.device_count())))
def test_measured_on_the_device_of_the_problem(index):
    device = torch.device("cuda", index)
    with torch.cuda.device(0):
        (timing,) = measure([Problem(16, Layout(vnm.Spec(64, 2, 8), 1024, 1024), torch.float16, device)])
        assert torch.cuda.current_device() == 0
    assert isinstance(timing, Timing)
