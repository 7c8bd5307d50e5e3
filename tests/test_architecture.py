"""The rules of docs/architecture.md that a machine can check."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "vnm_compile"
FILES = sorted(PACKAGE.rglob("*.py"))
DOOR = "codegen/inductor/"

# What the files of a part (a folder or file, the longest that fits) must never import.
FORBIDDEN = {
    "errors.py": ["vnm_compile"],
    "spec.py": ["vnm_compile.format", "vnm_compile.passes", "vnm_compile.codegen"],
    "format.py": ["vnm_compile.passes", "vnm_compile.codegen", "vnm_compile.backend", "vnm_compile.tensor"],
    "ops.py": ["vnm_compile.passes", "vnm_compile.codegen", "vnm_compile.backend"],
    "tensor.py": ["vnm_compile.passes", "vnm_compile.codegen", "vnm_compile.backend"],
    "weights.py": ["vnm_compile.passes", "vnm_compile.codegen", "vnm_compile.backend"],
    "passes": ["vnm_compile.codegen", "vnm_compile.backend", "vnm_compile.report"],
    "codegen": [
        "vnm_compile.passes",
        "vnm_compile.backend",
        "vnm_compile.report",
        "vnm_compile.prune",
        "vnm_compile.inspection",
    ],
    "inspection": ["vnm_compile.prune", "vnm_compile.passes", "vnm_compile.cli"],
    "prune": ["vnm_compile.passes", "vnm_compile.codegen", "vnm_compile.backend", "vnm_compile.report"],
    "selection": ["vnm_compile.passes", "vnm_compile.codegen", "vnm_compile.backend"],
    "cli": ["vnm_compile.passes", "vnm_compile.codegen"],
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def inside(module: str, part: str) -> bool:
    return module == part or module.startswith(part + ".")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_import_directions(path):
    name = str(path.relative_to(PACKAGE))
    for part, forbidden in FORBIDDEN.items():
        if name == part or name.startswith(part + "/"):
            wrong = [module for module in imports(path) if any(inside(module, each) for each in forbidden)]
            assert not wrong, f"{name} imports {wrong}"
    if not name.startswith(DOOR):
        assert not [module for module in imports(path) if inside(module, "torch._inductor")], f"only {DOOR} may"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_small_and_say_what_they_are(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 600
    assert ast.get_docstring(ast.parse(text)), "a module starts with what it is"
    assert path.stem not in ("utils", "helpers", "misc", "common")


def test_examples_have_a_main():
    for path in (PACKAGE.parent / "examples").glob("*.py"):
        functions = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        assert "main" in functions, path.name
