"""What compilers make of the kernels for quantised values: spills, loads, tensor cores, shared memory."""

from __future__ import annotations

import re

import pytest
import torch

from tests.codegen.triton.cases import traced
from tests.support import with_slow
from vnm_compile.codegen.generate import GeneratedKernel, generate
from vnm_compile.codegen.triton.configs import Config, Shape, configurations, seconds
from vnm_compile.codegen.virtual_device import virtual_device
from vnm_compile.hardware import TARGETS, find_target
from vnm_compile.inspection.assembly import count_instructions
from vnm_compile.inspection.machine_code import MachineCode, compile_kernel
from vnm_compile.layout import Layout
from vnm_compile.ops import linear
from vnm_compile.quantization import Quantization
from vnm_compile.spec import Spec


def compiled(layout: Layout, tokens: int, dtype: torch.dtype, target: str) -> tuple[GeneratedKernel, MachineCode]:
    """The kernel of a product, and its machine code."""
    kinds = zip(layout.shapes, layout.dtypes(dtype), strict=True)
    packed = [torch.empty(shape, dtype=kind, device="meta") for shape, kind in kinds]
    x = torch.empty(tokens, layout.in_features, dtype=dtype, device="meta")
    graph = traced(lambda x, *packed: linear(x, packed, layout), 5)
    generated = generate(graph, [x, *packed], target, static=range(1, 5))
    (kernel,) = (each for each in generated.kernels if each.schedule.template)
    with virtual_device(target):
        return kernel, compile_kernel(kernel.source, kernel.name, find_target(target))


def config_of(kernel: GeneratedKernel, code: MachineCode) -> Config:
    sizes = [int(re.findall(rf"{name} : tl.constexpr = (\d+)", kernel.source)[0]) for name in
             ("BLOCK_O", "BLOCK_T", "BLOCK_G", "SPLITS")]  # fmt: skip
    return Config(*sizes[:3], code.config["num_warps"], code.config["num_stages"], sizes[3])


PATTERN = Spec(64, 2, 8)
CASES = [(target, stored, 256) for target in TARGETS for stored in ("int8/64", "int4/32", "int4/row")]
CASES += [("sm_90", stored, tokens) for stored in ("int8/32", "int4/64") for tokens in (1, 16, 64)]
CASES = [" ".join(map(str, case)) for case in CASES]
QUICK = {f"{target} int4/32 256" for target in ("sm_80", "sm_100", "gfx942", "gfx1100")}
QUICK |= {"sm_90 int8/64 256", "sm_90 int8/32 1", "sm_90 int4/64 16"}


@pytest.mark.parametrize("case", with_slow(CASES, QUICK))
def test_machine_code(case):
    """Nothing spills in a loop, tensor cores multiply, no load there is narrower than an asynchronous copy, and
    shared memory is what the configuration was chosen for."""
    target, stored, tokens = case.split()
    layout = Layout(Spec(64, 2, 8), 512, 4096, Quantization.parse(stored))
    kernel, code = compiled(layout, int(tokens), torch.bfloat16, target)
    assert code.spills <= 64  # before and after the loop
    loop = count_instructions(code.assembly, loop_only=True)
    assert not [name for name in loop.names if name.startswith(("LDL", "STL", "scratch_"))]
    if tokens == "1":
        assert min(loop.loads) == 2, "activations are gathered, and scales read, one by one"
        assert loop.loads.get(8 if "int8" in stored else 4)
        return
    assert loop.tensor_core
    assert min(loop.loads) >= 4, loop.loads
    assert loop.loads.get(16)
    shape = Shape(int(tokens), layout.rows, layout.groups, layout.spec, torch.bfloat16, False, layout.quantization)
    assert code.shared_bytes <= config_of(kernel, code).shared_bytes(shape) <= find_target(target).shared_bytes


@pytest.mark.parametrize("target", with_slow(["sm_80", "sm_90"], ["sm_90"]))
def test_levels_are_not_converted(target):
    """No instruction makes a float of an integer: those that do run at a quarter of the others' rate."""
    for stored in ("int8/64", "int4/32"):
        _, code = compiled(Layout(Spec(64, 2, 8), 64, 1024, Quantization.parse(stored)), 40, torch.float16, target)
        names = count_instructions(code.assembly, loop_only=True).names
        assert not [name for name in names if name.startswith("I2F")], names


def shape_of(stored: str | None, tokens: int, spec: Spec = PATTERN) -> tuple[Layout, Shape]:
    layout = Layout(spec, 14336, 4096, Quantization.parse(stored) if stored else None)
    shape = Shape(tokens, layout.rows, layout.groups, spec, torch.bfloat16, False, layout.quantization)
    return layout, shape


@pytest.mark.parametrize("stored", [None, "int8/64", "int4/32", "int4/row"])
@pytest.mark.parametrize("spec", [Spec(64, 2, 8), Spec(128, 1, 16)], ids=str)
def test_the_model_knows_what_is_stored(stored, spec):
    layout, shape = shape_of(stored, 16, spec)
    modelled = layout.rows * layout.groups * (shape.group_bytes + 4 / spec.v)
    assert modelled == pytest.approx(layout.nbytes(torch.bfloat16), rel=1e-3)


def test_fewer_bytes_take_less_time_where_reading_is_what_takes_long():
    """By the model, on a card whose memory is slow beside its arithmetic."""
    target = find_target("sm_89")
    few, many = ([shape_of(stored, tokens)[1] for stored in (None, "int8/64", "int4/64")] for tokens in (8, 2048))
    sixteen, eight, four = (seconds(configurations(shape, target)[0], shape, target) for shape in few)
    assert four < 0.7 * eight < 0.5 * sixteen
    sixteen, eight, four = (seconds(configurations(shape, target)[0], shape, target) for shape in many)
    assert sixteen < eight == four < 1.1 * sixteen, "arithmetic takes as long, and dequantising is on top"
