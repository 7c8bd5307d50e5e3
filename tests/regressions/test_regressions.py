"""Every case that the fuzzer found and that was mended, as it wrote and shrank it: eager's answer, now and later.

A new one is a file that `python -m tests.fuzz --out DIRECTORY` wrote, moved here under a name that says what was wrong.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tests.fuzz.run import replay

CASES = sorted(path for path in Path(__file__).parent.glob("*.py") if path.stem.startswith("case_"))


SLOW = ("siblings_saved_for_backward_in_dynamic_shapes", "to_after_dynamic_compiling_compressed")
"""Those that take tens of seconds."""


def case(path: Path):
    name = path.stem.removeprefix("case_")
    return pytest.param(path, id=name, marks=[pytest.mark.slow] if name in SLOW else [])


@pytest.mark.parametrize("path", [case(path) for path in CASES])
def test_case(path, capsys):
    outcome = replay(runpy.run_path(str(path)))
    assert outcome.status == "right", capsys.readouterr().out
