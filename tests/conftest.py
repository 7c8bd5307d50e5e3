"""Golden files, a limit on skipped tests, and a clean compiler for every test."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

if os.environ.get("PYTEST_XDIST_WORKER"):
    # What a test compiles must not depend on which tests the other workers have run before it.
    _cache = tempfile.mkdtemp(prefix="vnm-tests-")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _cache
    # Workers share the cores: threads that have nothing to do must not spin on them.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch._inductor.config

from tests.support import CHROMIUM

# Tests that may be skipped in CI: those that need a GPU. A job that skips more than these must not pass.
ALLOWED_SKIPS_IN_CI = 0

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
GOLDEN_TORCH = re.findall(r"^torch==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), flags=re.M)[0]
"""The version, CI's, whose Dynamo and Inductor wrote the golden files. With others the text is not compared."""

_used: set[str] = set()


def compares_golden() -> bool:
    """Whether the installed torch is the one that the golden files are from."""
    return torch.__version__.startswith(f"{GOLDEN_TORCH}.")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files (refused in CI)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--update-golden") and os.environ.get("CI"):
        raise pytest.UsageError("--update-golden is refused in CI: regenerate on your machine and review the diff.")
    if config.getoption("--update-golden") and not compares_golden():
        raise pytest.UsageError(f"golden files are torch {GOLDEN_TORCH}'s; this is {torch.__version__}.")


def pytest_report_header() -> str | None:
    if compares_golden():
        return None
    return f"golden files: not compared (torch {GOLDEN_TORCH} wrote them)"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave tests out whose GPU or browser is not there: deselected, so that a skip always means something."""
    here = {"gpu": torch.cuda.is_available(), "browser": CHROMIUM is not None}
    out = [item for item in items if any(not here[name] and item.get_closest_marker(name) for name in here)]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]


OPTIMISED = ("codegen/", "inspection/", "benchmarks/", "test_docs.py", "test_backend.py", "test_epilogues.py")
"""Where C++ is compiled as users' is. Elsewhere it is not optimised: g++ takes half the time, and what is asked is
whether the right code is generated, not what a compiler makes of it. Processes that tests start optimise everywhere."""


@pytest.fixture(autouse=True)
def _fresh(request: pytest.FixtureRequest):
    """No compiled code of one test answers in another, and its random numbers are its own."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    where = request.path.relative_to(Path(__file__).parent).as_posix()
    torch._inductor.config.aot_inductor.debug_compile = not where.startswith(OPTIMISED)


@pytest.fixture
def golden(request: pytest.FixtureRequest):
    """Compare text with tests/golden/NAME byte for byte; `--update-golden` rewrites the file and fails the test."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        _used.add(name)
        if not compares_golden():
            return
        if path.exists() and path.read_text() == text:
            return
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            pytest.fail(f"golden {name} rewritten: review the diff, then run again without --update-golden")
        assert path.exists(), f"golden {name} is missing; run pytest --update-golden"
        assert text == path.read_text(), f"golden {name} differs; run pytest --update-golden and review the diff"

    return compare


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    """Gather, where pytest-xdist runs the tests in several processes, the golden files that each of them has used."""
    _used.update(getattr(node, "workeroutput", {}).get("golden", ()))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["golden"] = sorted(_used)
        return
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or exitstatus != 0 or config.option.collectonly:
        return
    skipped = len(reporter.stats.get("skipped", []))
    if os.environ.get("CI") and skipped > ALLOWED_SKIPS_IN_CI:
        reporter.write_line(f"{skipped} tests skipped, {ALLOWED_SKIPS_IN_CI} allowed in CI", red=True)
        session.exitstatus = 1
    unused = _unused_golden_files() if _is_whole(config) else []
    if unused:
        reporter.write_line(f"golden files that no test uses: {', '.join(unused)}", red=True)
        session.exitstatus = 1


def _is_whole(config: pytest.Config) -> bool:
    """Whether nothing but long runs was left out, so that a golden file that was not used is used by no test."""
    option = config.option
    chosen = option.keyword or option.deselect or option.ignore or option.ignore_glob or getattr(option, "lf", False)
    return not chosen and option.markexpr in ("", "not slow") and config.args_source.name != "ARGS"


def _unused_golden_files() -> list[str]:
    present = {path.relative_to(GOLDEN).as_posix() for path in GOLDEN.rglob("*") if path.is_file()}
    return sorted(present - _used)
