"""Code for GPUs that are not there, and a process that is as before afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._inductor.utils import get_gpu_type
from torch.utils._triton import has_triton

from vnm_compile import VNMError
from vnm_compile.codegen.generate import generate
from vnm_compile.codegen.relocate import fake_inputs, relocate
from vnm_compile.codegen.virtual_device import active_target, device_target, virtual_device
from vnm_compile.hardware import TARGETS, find_target

TRITON_MM = {"max_autotune_gemm": True, "max_autotune_gemm_backends": "TRITON"}


def feed_forward(x, weight, bias, residual):
    return nn.functional.gelu(nn.functional.linear(x, weight, bias)) + residual


def operands(tokens=256, out_features=1024, in_features=512, dtype=torch.float16):
    shapes = (tokens, in_features), (out_features, in_features), (out_features,), (tokens, out_features)
    return [torch.zeros(shape, dtype=dtype) for shape in shapes]


def answers():
    return (
        torch.cuda.is_available(),
        torch.cuda.device_count(),
        torch.cuda.get_device_properties,
        torch.version.hip,
        has_triton(),
        get_gpu_type(),
    )


@pytest.mark.parametrize("target", TARGETS)
def test_inductors_own_matmul_is_generated_and_fused(target):
    generated = generate(feed_forward, operands(), target, static=(1, 2), options=TRITON_MM)
    (kernel,) = generated.kernels
    assert kernel.schedule.template == "mm"
    assert kernel.schedule.fused_ops == ("aten.addmm", "aten.gelu", "aten.add")
    assert kernel.launches == 1
    assert f"multi_processor_count={TARGETS[target].multiprocessors}" in kernel.source
    cc = TARGETS[target].arch
    assert f"cc={cc!r}" in kernel.source
    assert f"type='{TARGETS[target].backend}'" in kernel.source
    assert not generated.library_calls


def test_bytes_and_flops_of_a_fused_kernel():
    (kernel,) = generate(feed_forward, operands(), "sm_90", static=(1, 2), options=TRITON_MM).kernels
    sizes = {access.buffer: (access.nbytes, access.activation) for access in kernel.schedule.reads}
    assert sizes == {
        "arg0_1": (256 * 512 * 2, True),
        "arg1_1": (1024 * 512 * 2, False),
        "arg2_1": (1024 * 2, False),
        "arg3_1": (256 * 1024 * 2, True),
    }
    assert [access.nbytes for access in kernel.schedule.writes] == [256 * 1024 * 2]
    assert kernel.schedule.flops == 2 * 256 * 1024 * 512


def test_without_templates_the_product_is_a_library_call():
    generated = generate(feed_forward, operands(), "sm_90", static=(1, 2))
    (call,) = generated.library_calls
    assert call[0].startswith("extern_kernels.")
    assert call[1].flops == 2 * 256 * 1024 * 512
    (kernel,) = generated.kernels
    assert kernel.schedule.template is None


def test_one_kernel_serves_every_token_count():
    (kernel,) = generate(
        feed_forward, operands(), "sm_90", static=(1, 2), options=TRITON_MM, dynamic={0: (0,), 3: (0,)}
    ).kernels
    assert "'ks0': 'i" in kernel.source or "ks0" in kernel.source.partition("@triton.jit")[2]


def test_everything_is_undone():
    before = answers()
    with virtual_device("sm_120") as target:
        assert active_target() is target is device_target()
        assert torch.cuda.get_device_capability() == (12, 0)
        assert has_triton()
        with virtual_device("gfx942"):
            assert torch.version.hip
            assert device_target().name == "gfx942"
        assert torch.cuda.get_device_capability() == (12, 0)
        assert torch.version.hip is None
    assert answers() == before
    assert active_target() is None
    with pytest.raises(ZeroDivisionError), virtual_device("sm_80"):
        raise ZeroDivisionError
    assert answers() == before
    assert active_target() is None


def test_the_cpu_compiles_as_before():
    args = operands(8, 64, 32, torch.float32)
    generate(feed_forward, args, "sm_90")
    args = [torch.randn_like(arg) for arg in args]
    torch.testing.assert_close(torch.compile(feed_forward)(*args), feed_forward(*args))


def test_slices_and_copies_on_the_device_are_traced():
    def windows(x):
        return x[:, :4].contiguous() + torch.arange(4, device="cpu")[None].to(x.dtype)

    assert len(generate(windows, [torch.zeros(3, 8)], "sm_90").kernels) == 1


def test_relocated_graphs_name_the_new_device_and_leave_the_old_graph():
    class Offset(nn.Module):
        def __init__(self):
            super().__init__()
            self.constant = torch.ones(4)

        def forward(self, x):
            return x.to("cpu") + x.to(torch.device("cpu")) + self.constant

    gm = torch.fx.symbolic_trace(Offset())
    before = gm.code
    moved, constants = relocate(gm, "cuda")
    assert gm.code == before
    assert "cpu" not in moved.code
    assert len(constants) == 1
    assert constants[0] is gm.constant
    assert len(generate(gm, [torch.zeros(2, 4)], "sm_90").kernels) == 1


def test_faked_inputs_hold_no_memory_and_keep_their_strides():
    x = torch.zeros(6, 4).t()
    fake, number = fake_inputs([x, 3], "cuda")
    assert number == 3
    assert fake.device.type == "cuda"
    assert fake.stride() == x.stride()
    assert isinstance(fake, torch._subclasses.FakeTensor)


def test_an_unknown_target_is_named():
    with pytest.raises(VNMError, match=r"sm_70.*sm_80"):
        find_target("sm_70")
