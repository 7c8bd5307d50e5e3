"""Where the time of a kernel goes: instructions by pipe, stall counts, traffic, and what bounds it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import vnm_compile as vnm
from tests.support import make_sparse_
from vnm_compile.hardware import TARGETS
from vnm_compile.inspection.pipes import instruction_seconds, pipes_of, products_of, stall_cycles

# Two instructions as nvdisasm -hex prints them: a wait of 5 cycles and one of 1, in bits 41 to 44 of the upper words.
ENCODED = f"""
.L_x_0:
        /*0000*/                   PRMT R1, R2, 0x5410, R3 ;          /* 0x0000541002017816 */
                                                                      /* 0x{5 << 41 | 7:016x} */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;   /* 0x0000000402048981 */
                                                                      /* 0x{1 << 41 | 15 << 45:016x} */
"""


def test_stall_counts():
    assert stall_cycles(ENCODED.splitlines()) == 6


def test_pipes():
    names = {"PRMT": 3, "FFMA": 2, "LDG.E.128": 1, "HMMA.SP.16832.F32.BF16": 4, "R2UR": 1, "BRA": 1, "MUFU.EX2": 1}
    assert pipes_of(names, nvidia=True) == {
        "tensor": 4, "integer": 3, "float": 2, "memory": 1, "uniform": 1, "control": 1, "special": 1
    }  # fmt: skip
    amd = {"v_mfma_f32_32x32x8_bf16": 2, "v_perm_b32": 3, "ds_read_b128": 1, "s_add_u32": 1}
    assert pipes_of(amd, nvidia=False) == {"vector": 3, "tensor": 2, "memory": 1, "scalar": 1}


@pytest.mark.parametrize(
    ("name", "products"),
    [
        ("HMMA.16816.F32.BF16", 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 2 * 16 * 8 * 8),
        ("HMMA.SP.16832.F32", 2 * 16 * 8 * 32),
        ("HGMMA.64x256x16.F32.BF16", 2 * 64 * 256 * 16 / 4),
        ("v_mfma_f32_32x32x8_bf16_1k", 2 * 32 * 32 * 8),
        ("v_wmma_f32_16x16x16_bf16", 2 * 16 * 16 * 16),
        ("UTCHMMA", 0),
        ("FFMA", 0),
    ],
)
def test_products(name, products):
    assert products_of({name: 3}) == 3 * products


def test_a_full_pipe_bounds():
    target = TARGETS["sm_90"]
    seconds = instruction_seconds({"integer": 10, "float": 2, "control": 0}, steps=1000, target=target)
    cycle = 1 / (target.multiprocessors * target.clock)
    assert seconds == pytest.approx({"issue": 12e3 / 4 * cycle, "integer": 10e3 / 2 * cycle, "float": 2e3 / 4 * cycle})


def account(tokens: int, target: str, spec: str = "64:2:8", out_features: int = 1024, in_features: int = 2048):
    layer = make_sparse_(nn.Linear(in_features, out_features, bias=False), spec).to(torch.bfloat16).eval()
    report = vnm.inspect(layer, torch.randn(tokens, in_features, dtype=torch.bfloat16), target=target)
    (kernel,) = (each for each in report.sparse if each.template)
    assert [each.account for each in report.kernels if not each.template] == [None] * (len(report.kernels) - 1)
    return kernel, kernel.account


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_of_a_kernel(target):
    kernel, found = account(512, target)
    config = kernel.config
    sizes = [config[name] for name in ("BLOCK_O", "BLOCK_T", "BLOCK_G")]
    assert found.tiles == 1024 // sizes[0] * (512 // sizes[1])
    assert found.steps == 256 // sizes[2]
    # Per group two values and half a byte of indices; 4 kept columns of all tokens of a tile. And the results.
    step = sizes[0] * sizes[2] * 4.5 + 4 * sizes[2] * sizes[1] * 2
    assert found.l2_bytes == found.tiles * found.steps * step + 512 * 1024 * 2
    assert found.dram_bytes == kernel.at_tokens(kernel.bytes_moved)
    assert found.seconds["tensor"] == pytest.approx(kernel.at_tokens(kernel.flops) / kernel.peak_flops)
    assert max(found.seconds["DRAM"], found.seconds["tensor"]) == pytest.approx(kernel.roofline_seconds)
    assert sum(found.pipes.values()) == kernel.loop.total
    assert found.pipes["tensor"] == kernel.loop.tensor_core
    assert found.seconds[found.bound] == max(found.seconds.values()) < found.estimate
    if target.startswith("sm_"):
        assert found.stall_cycles >= kernel.loop.total  # each takes a cycle at least
        assert found.seconds["issue"] < found.estimate
    else:
        assert found.stall_cycles is None
    assert "estimated" in str(found)


def test_one_token_and_no_loop():
    kernel, found = account(1, "sm_90", in_features=1024)
    assert kernel.template == "vnm_vector"
    assert kernel.loop.total == 0
    assert sum(found.pipes.values()) == kernel.instructions.total
    assert "tensor" not in found.seconds
    assert found.bound == "DRAM"


def test_reports_tell_it():
    layer = make_sparse_(nn.Linear(1024, 256), "64:2:8").to(torch.bfloat16).eval()
    x = torch.randn(300, 1024, dtype=torch.bfloat16)
    report = vnm.inspect(layer, x, target="sm_90")
    found = report.sparse[-1].account
    assert json.loads(json.dumps(report.to_dict()))["kernels"][-1]["account"]["bound"] == found.bound
    row = next(line for line in str(report).splitlines() if "triton_tem" in line)
    assert found.bound in row
    assert f"{1e6 * found.estimate:.1f}" in row
    here = vnm.inspect(layer, x, options={"vnm.policy": "memory"})
    assert [kernel.account for kernel in here.kernels] == [None] * len(here.kernels)


def test_a_loop_that_was_unrolled():
    """Four steps and no loop: each has its share of the kernel's instructions."""
    kernel, found = account(300, "gfx942", out_features=256, in_features=512)
    assert kernel.loop.total == 0
    assert found.steps > 1
    assert sum(found.pipes.values()) * found.steps == pytest.approx(kernel.instructions.total, rel=0.02)
