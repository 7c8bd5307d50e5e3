"""Every case that the fuzzer found and that was mended, as it wrote and shrank it: eager's answer, now and later.

A new one is a file that `python -m tests.fuzz --out DIRECTORY` wrote, moved here under a name that says what was wrong.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tests.fuzz.run import replay

CASES = sorted(path for path in Path(__file__).parent.glob("*.py") if path.stem.startswith("case_"))


def case(path: Path):
    return pytest.param(path, id=path.stem.removeprefix("case_"))


@pytest.mark.parametrize("path", [case(path) for path in CASES])
def test_case(path, capsys):
    outcome = replay(runpy.run_path(str(path)))
    assert outcome.status == "right", capsys.readouterr().out
