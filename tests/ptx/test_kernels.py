"""The generated kernels, executed as PTX: every case for one target here, for all by `python -m tests.ptx`."""

from __future__ import annotations

import pytest
import triton

from tests.ptx.asynchronous import COPY_HAZARD, INPUT_HAZARD
from tests.ptx.cases import BY_NAME, CASES, TARGETS, build
from tests.ptx.run import run
from tests.support import with_slow

EACH = [f"{case.name} on {case.targets[i % len(case.targets)]}" for i, case in enumerate(CASES)]
QUICK = {
    "tails on sm_80",
    "wide columns on sm_90",
    "one token, tails on sm_86",
    "gated, one token on sm_80",
    "block on sm_89",
    "sparse cores, odd groups on sm_89",
    "sparse cores, wide columns on sm_86",
    "sparse cores, block on sm_89",
}


@pytest.mark.parametrize("which", with_slow(EACH, QUICK))
def test_right_and_without_a_fault(which):
    """Asynchronous work as early as it may be, and as late."""
    name, target = which.split(" on ")
    case = BY_NAME[name]
    built = build(case, target)
    for late in (False, True):
        done = run(built.generated.wrapper, built.inputs, target, late)
        built.check(done.outputs)
        assert done.hazards <= known_hazards(target)


def known_hazards(target: str) -> set[str]:
    """What Triton is known to do on Hopper, in some versions."""
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if target != "sm_90" or version >= (3, 9):
        return set()
    return {INPUT_HAZARD} if version >= (3, 7) else {INPUT_HAZARD, COPY_HAZARD}


@pytest.mark.parametrize(
    "which",
    with_slow(
        ["odd groups on sm_80", "one token, tails on sm_120", "many tokens on sm_90", "int4, fp16, tails on sm_80"],
        {"one token, tails on sm_120"},
    ),
)
def test_rows_have_nothing_to_do_with_each_other(which):
    """What a load brings of the next row is masked, or multiplied by nothing: infinities would show."""
    name, target = which.split(" on ")
    built = build(BY_NAME[name], target)
    built.spoil()
    built.check(run(built.generated.wrapper, built.inputs, target).outputs, step=2)


def test_registers_that_products_read_are_overwritten():
    """In Triton to 3.7 (triton-lang/triton, issue 9433): the next round of the loop expands into the registers that the
    second product of this round may still be reading. From 3.9 on they are copied first."""
    built = build(BY_NAME["many tokens"], "sm_90")
    done = run(built.generated.wrapper, built.inputs, "sm_90")
    built.check(done.outputs)
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    assert version == (3, 8) or (INPUT_HAZARD in done.hazards) == (version < (3, 8))


def multiplies(name: str, target: str) -> str:
    """What multiplies in the sparse kernel of a case, as its PTX says it."""
    built = build(BY_NAME[name], target)
    done = run(built.generated.wrapper, built.inputs, target)
    built.check(done.outputs)
    (launch,) = (each for each in done.launches if each.kernel.template)
    opcodes = {each.opcode for each in launch.kernel.program.instructions}
    return next(kind for kind in ("wgmma.mma_async", "mma.sync", "fma.rn") if any(kind in each for each in opcodes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target", "kind"),
    [
        ("many tokens", "sm_120", "mma.sync"),
        ("many tokens", "sm_90", "wgmma.mma_async"),
        ("tf32", "sm_90", "wgmma.mma_async"),
    ],
)
def test_what_multiplies(name, target, kind):
    assert multiplies(name, target) == kind


def test_every_target_and_case_is_here():
    assert {each.split(" on ")[1] for each in EACH} == set(TARGETS)
    assert set(EACH) >= QUICK
