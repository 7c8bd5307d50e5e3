"""Golden files, a limit on skipped tests, and a clean compiler for every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Tests that may be skipped in CI: those that need a GPU. A job that skips more than these must not pass.
ALLOWED_SKIPS_IN_CI = 0

GOLDEN = Path(__file__).parent / "golden"
_used: set[Path] = set()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files (refused in CI)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--update-golden") and os.environ.get("CI"):
        raise pytest.UsageError("--update-golden is refused in CI: regenerate on your machine and review the diff.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the GPU tests out where there is no GPU: deselected, so that a skip always means something."""
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


@pytest.fixture(autouse=True)
def _fresh():
    """No compiled code of one test answers in another, and its random numbers are its own."""
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.fixture
def golden(request: pytest.FixtureRequest):
    """Compare text with tests/golden/NAME byte for byte; `--update-golden` rewrites the file and fails the test."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        _used.add(path)
        if path.exists() and path.read_text() == text:
            return
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            pytest.fail(f"golden {name} rewritten: review the diff, then run again without --update-golden")
        assert path.exists(), f"golden {name} is missing; run pytest --update-golden"
        assert text == path.read_text(), f"golden {name} differs; run pytest --update-golden and review the diff"

    return compare


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or exitstatus != 0:
        return
    skipped = len(reporter.stats.get("skipped", []))
    whole = not session.config.option.keyword and session.config.args_source.name != "ARGS"
    unused = sorted({p for p in GOLDEN.rglob("*") if p.is_file()} - _used) if whole else []
    if os.environ.get("CI") and skipped > ALLOWED_SKIPS_IN_CI:
        reporter.write_line(f"{skipped} tests skipped, {ALLOWED_SKIPS_IN_CI} allowed in CI", red=True)
        session.exitstatus = 1
    if unused:
        reporter.write_line(f"golden files that no test uses: {', '.join(map(str, unused))}", red=True)
        session.exitstatus = 1
