"""A short seeded run of the fuzzer that uses every kind of step and of write, and the fuzzer's own parts."""

from __future__ import annotations

import ast
import runpy
from dataclasses import replace

import pytest
import torch

from tests.fuzz.compare import difference
from tests.fuzz.generate import generate
from tests.fuzz.mutants import mutated
from tests.fuzz.mutations import MUTANTS
from tests.fuzz.program import Program, Settings, settings_from
from tests.fuzz.run import Outcome, execute, judge
from tests.fuzz.shrink import shrink
from tests.fuzz.steps import KINDS
from tests.fuzz.writes import COMPRESSED_WRITES, DENSE_WRITES

SEEDS = (714, 3088, 305, 3699, 2232, 687, 1519, 1506, 718, 1592, 237, 836)
"""Programs that together hold every kind of step and write; found by a greedy search over the first 4,000 seeds."""


@pytest.fixture(autouse=True)
def _recompile_as_the_fuzzer_does():
    with torch._dynamo.config.patch(recompile_limit=32):
        yield


def program(seed: int) -> Program:
    return generate(seed, kernels=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_seed(seed):
    given = program(seed)
    outcome = judge(given.source(), given.weights, given.settings)
    assert outcome.status == "right", f"{outcome.differences}\n{outcome.error}\n{given.script()}"
    assert outcome.calls >= 2


def test_the_seeds_use_everything():
    programs = [program(seed) for seed in SEEDS]
    assert {step.kind for each in programs for step in each.steps} == set(KINDS)
    written = {write for each in programs for write in each.settings.writes}
    assert written >= {*DENSE_WRITES, *COMPRESSED_WRITES}
    settings = [each.settings for each in programs]
    for name in ("mode", "storage", "annotated", "frozen", "input"):
        assert len({getattr(each, name) for each in settings}) >= 2, name


def test_a_program_is_its_seed():
    assert generate(7).source() == generate(7).source()
    assert Program.from_json(generate(7).to_json()) == generate(7)
    assert {generate(seed).settings.through for seed in range(60)} == {"fx", "aot", "inductor"}
    for seed in range(200):
        ast.parse(generate(seed).script("a note\nof two lines"))


def test_a_script_holds_the_program(tmp_path):
    given = program(SEEDS[0])
    path = tmp_path / "case.py"
    path.write_text(given.script("what went wrong"))
    script = runpy.run_path(str(path))
    assert settings_from(script["SETTINGS"]) == given.settings
    assert script["Model"]() is not None


def test_shrinking_keeps_what_fails():
    steps = [s for seed in range(40) for s in program(seed).steps]
    culprit = next(step for step in steps if step.kind == "rows")
    others = tuple(step for step in steps if step.kind != "rows")[:4]
    big = Program(
        (*others, culprit), Settings(calls=((2, 3),) * 4, writes=("sgd", "data_mul", "none"), dtype="bfloat16")
    )

    def run(each: Program) -> Outcome:
        failing = "data_mul" in each.settings.writes and any(step.kind == "rows" for step in each.steps)
        return Outcome("raises" if failing else "right", error="E: x")

    small = shrink(big, run(big), run)
    assert [step.kind for step in small.steps] == ["rows"]
    assert set(small.settings.writes) == {"data_mul"}
    assert small.settings.dtype == "float32"


def test_a_wrong_answer_is_told_apart_from_rounding():
    reference = torch.randn(8, 8, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        dense = reference.to(dtype)
        assert difference("y", dense.clone(), dense, reference) is None
        wrong = dense.clone()
        wrong[3, 4] += 1
        assert difference("y", wrong, dense, reference).what == "value"
        assert difference("y", dense.t(), dense, reference).what in ("value", "strides")
    dense = reference.float()
    assert difference("y", dense.double(), dense, reference).what == "dtype"
    assert difference("y", dense[:4], dense, reference).what == "shape"
    assert difference("y", torch.zeros(99, 8)[:8].copy_(dense), dense, reference).what == "storage"
    assert difference("y", None, dense, reference).what == "missing"
    assert difference("y", torch.full_like(dense, torch.nan), dense, reference).what == "value"


def test_wrong_answers_are_found(monkeypatch):
    """A kernel that is wrong does not pass."""
    import vnm_compile.ops as ops

    right = ops.unpack
    monkeypatch.setattr(ops, "unpack", lambda *args: right(*args) * 1.25)
    for seed in SEEDS:
        given = replace(program(seed), settings=replace(program(seed).settings, writes=()))
        outcome = execute(given.source(), given.weights, given.settings)
        if outcome.units:
            assert outcome.status == "wrong"
            return
    pytest.fail("no seed runs anything sparse")


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_mutants_apply(mutant, tmp_path):
    """Each still finds the lines that it is about; `python -m tests.fuzz.mutants` hunts them."""
    for file, _, _ in mutant.edits:
        ast.parse((mutated(mutant, tmp_path) / file).read_text()) if file.endswith(".py") else None
        break
