"""Planted faults are caught: a few here, hundreds by `python -m tests.ptx`."""

from __future__ import annotations

import pytest

from tests.ptx.cases import BY_NAME, build
from tests.ptx.hunt import hunt
from tests.ptx.launch import Ran
from tests.ptx.mutants import Mutant, Watched, candidates, plant, separating
from tests.ptx.parse import instruction, parse
from tests.ptx.run import run
from tests.support import with_slow

FEWEST = 0.75
"""Of so few mutants; of all of them 91 of 100 are caught."""


@pytest.mark.parametrize(
    "which",
    with_slow(
        ["small groups on sm_80", "many tokens on sm_90", "one token, tails on sm_120"], {"small groups on sm_80"}
    ),
)
def test_planted_faults_are_caught(which):
    name, target = which.split(" on ")
    built = build(BY_NAME[name], target)
    done = run(built.generated.wrapper, built.inputs, target)
    found = hunt(built, done, 1)
    assert found.planted.total() >= 6
    assert found.caught.total() >= FEWEST * found.planted.total(), found.missed


PROGRAM = parse("""
    .visible .entry k(.param .u64 k_param_0) .reqntid 32
    {
        .reg .pred %p<3>; .reg .b32 %r<9>; .reg .b64 %rd<3>;
        bar.sync 0;
        @%p1 ld.global.v2.b32 {%r1, %r2}, [%rd1+8];
        setp.lt.s32 %p2, %r1, 5;
        cp.async.wait_group 1;
        mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1, %r2}, {%r3, %r4}, {%r5, %r5}, {%r1, %r2};
        mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32
            {%r1, %r2, %r3, %r4}, {%r5, %r6, %r7, %r8}, {%r1, %r2, %r3, %r4}, {%r5, %r6, %r7, %r8}, %r5, 0x1;
        @%p2 st.global.b32 [%rd1], %r1;
        ret;
    }""")


def test_what_is_planted():
    found = {(each.kind, each.place): each.text for each in candidates(PROGRAM, {0, 1, 2, 3, 4, 5})}
    assert found["barrier dropped", 0] == "nop"
    assert found["mask dropped", 1] == "ld.global.v2.b32 {%r1, %r2}, [%rd1+8]"
    assert found["offset wrong", 1] == "@%p1 ld.global.v2.b32 {%r1, %r2}, [%rd1+16]"
    assert found["fragment order", 1] == "@%p1 ld.global.v2.b32 {%r2, %r1}, [%rd1+8]"
    assert found["bound off by one", 2] == "setp.lt.s32 %p2, %r1, 4"
    assert found["wait weakened", 3] == "cp.async.wait_group 2"
    assert "{%r5, %r5}" in found["fragment order", 4]
    assert found["wrong lane", 5].endswith("%r5, 0")
    for text in found.values():
        instruction(text)
    assert not list(candidates(PROGRAM, set()))


def test_what_makes_no_difference_is_not_planted():
    watched = Watched(Mutant("bound off by one", 2, "setp.lt.s32 %p2, %r1, 4"))
    ran = Ran(set(), set(), 0, [], set(), [])
    assert plant(PROGRAM, {2: [watched]}, ran, 3) == []
    watched.differs = True
    assert plant(PROGRAM, {2: [watched]}, ran, 3) == [watched.mutant]


def test_barriers_that_separate_nothing():
    """Passed after no access since the last, or before none until the next."""
    assert separating(PROGRAM, [(0, 0), (0, 4)]) == {0}
