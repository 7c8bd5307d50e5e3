"""The fingerprint of weights on a GPU: interpreted on CPU tensors, and compiled for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vnm_compile.native.gpu_check import compare_lines

INTERPRETED = """
    import torch
    from torch import nn
    from tests.support import make_sparse_
    from vnm_compile import contents, dispatch
    from vnm_compile.native.gpu_check import GpuCheck, record_lines

    # Lines of several lengths, at 4 and 2 byte elements; a change of one word is seen by the next look, as is a sign.
    matrix, half = torch.randn(64, 64), torch.randn(300).bfloat16()
    samples = [value for row in range(0, 64, 9) for value in (matrix[row].data_ptr() + 64, 64)]
    samples += [half.data_ptr() + 20, 36, half.data_ptr(), 4, half.data_ptr() + 100, 2]
    writes = [lambda: matrix[9, 31].add_(1e-5), lambda: half[27].mul_(2), lambda: half[50].mul_(2), matrix.neg_]
    for write in writes:
        lines = record_lines(samples, torch.device("cpu"))
        check = GpuCheck([lines])
        assert not check.moved() and not check.moved()
        write()
        assert not check.moved() and check.moved() and check.moved()
        check = GpuCheck([lines, lines])  # made after the write: what was recorded counts
        assert not check.moved() and check.moved()

    # All the way through: weights that the CPU is said not to read are looked at as on a GPU.
    contents.readable = dispatch.readable = lambda device: False
    model = make_sparse_(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), "16:2:8")
    model.eval().requires_grad_(False)
    run = torch.compile(model, backend="vnm", options={"vnm.policy": "memory"})
    x = torch.randn(4, 64)
    for _ in range(3):
        torch.testing.assert_close(run(x), model(x), atol=1e-4, rtol=1e-4)
        model[2].weight.data.mul_(2)
        run(x)  # one call late
    model[0].weight.mul_(3)  # counted: at once, and what is still to be heard of the other weight is not lost
    run(x)
    torch.testing.assert_close(run(x), model(x), atol=1e-3, rtol=1e-4)
    print("right")
"""


def test_what_it_sees_and_when():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(INTERPRETED)], capture_output=True, text=True, env=environment
    )
    assert result.stdout.strip() == "right", result.stderr


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize(
    "target", [GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)], ids=str
)
def test_it_compiles(target, record):
    types = dict.fromkeys(("addresses",), "*i64") | dict.fromkeys(("words", "expected", "flag"), "*i32")
    types |= {"count": "i32"} | dict.fromkeys(("RECORD", "BLOCK", "WORDS"), "constexpr")
    source = ASTSource(compare_lines, types, {"RECORD": record, "BLOCK": 64, "WORDS": 16})
    assembly = triton.compile(source, target=target).asm
    assert ("ptx" in assembly) or ("amdgcn" in assembly)
