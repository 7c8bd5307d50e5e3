"""The rules of docs/architecture.md that a machine can check."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "vnm_compile"
FILES = sorted(PACKAGE.rglob("*.py"))
DOOR = "codegen/inductor/"

ABOVE_CALIBRATION = [
    "vnm_compile.prune.permutation",
    "vnm_compile.prune.methods",
    "vnm_compile.prune.sparsify",
    "vnm_compile.prune.outcome",
    "vnm_compile.prune.sparsify_report",
]

# What the files of a part (a folder or file, the longest that fits) must never import.
FORBIDDEN = {
    "errors.py": ["vnm_compile"],
    "_torch.py": ["vnm_compile"],
    "activations.py": ["vnm_compile"],
    "hardware.py": [
        "vnm_compile.codegen",
        "vnm_compile.cost",
        "vnm_compile.explanation",
        "vnm_compile.inspection",
        "vnm_compile.backend",
        "vnm_compile.passes",
    ],
    "spec.py": ["vnm_compile.format", "vnm_compile.passes", "vnm_compile.codegen"],
    "format.py": ["vnm_compile.passes", "vnm_compile.codegen", "vnm_compile.backend", "vnm_compile.tensor"],
    "ops.py": ["vnm_compile.passes", "vnm_compile.codegen", "vnm_compile.backend"],
    "tensor.py": ["vnm_compile.passes", "vnm_compile.codegen", "vnm_compile.backend"],
    "weights.py": ["vnm_compile.passes", "vnm_compile.codegen", "vnm_compile.backend"],
    "passes": ["vnm_compile.codegen", "vnm_compile.backend", "vnm_compile.explanation"],
    "codegen": [
        "vnm_compile.passes",
        "vnm_compile.backend",
        "vnm_compile.explanation",
        "vnm_compile.prune",
        "vnm_compile.inspection",
    ],
    "layers.py": ["vnm_compile.annotate", "vnm_compile.checks", "vnm_compile.tensor", "vnm_compile.passes"],
    "checks.py": ["vnm_compile.annotate", "vnm_compile.prune", "vnm_compile.passes"],
    "cost.py": ["vnm_compile.passes", "vnm_compile.backend", "vnm_compile.explanation"],
    "tracing.py": ["vnm_compile.explanation", "vnm_compile.inspection", "vnm_compile.prune", "vnm_compile.cli"],
    "explanation": ["vnm_compile.inspection", "vnm_compile.prune", "vnm_compile.selection", "vnm_compile.cli"],
    "inspection": [
        "vnm_compile.explanation.explain",
        "vnm_compile.prune",
        "vnm_compile.selection",
        "vnm_compile.passes",
        "vnm_compile.cli",
    ],
    "prune": [
        "vnm_compile.passes",
        "vnm_compile.codegen",
        "vnm_compile.backend",
        "vnm_compile.tracing",
        "vnm_compile.explanation",
        "vnm_compile.inspection",
        "vnm_compile.selection",
        "vnm_compile.cli",
    ],
    # What training, choosing patterns and further methods build on knows nothing of methods.
    "prune/columns.py": ["vnm_compile.prune"],
    "prune/project.py": [
        *ABOVE_CALIBRATION,
        *(f"vnm_compile.prune.{name}" for name in ("calibration", "masks", "pruned")),
    ],
    "prune/masks.py": ["vnm_compile.prune"],
    "prune/pruned.py": [*ABOVE_CALIBRATION, "vnm_compile.prune.project"],
    "prune/calibration": [*ABOVE_CALIBRATION, "vnm_compile.prune.pruned", "vnm_compile.prune.project"],
    "prune/permutation": [*ABOVE_CALIBRATION[1:], "vnm_compile.prune.pruned"],
    "prune/methods": [
        "vnm_compile.prune.sparsify",
        "vnm_compile.prune.permutation",
        "vnm_compile.prune.outcome",
        "vnm_compile.prune.sparsify_report",
    ],
    "quantizing": [
        "vnm_compile.passes",
        "vnm_compile.codegen",
        "vnm_compile.backend",
        "vnm_compile.explanation",
        "vnm_compile.prune.sparsify",
        "vnm_compile.train",
        "vnm_compile.cli",
    ],
    "quantization.py": ["vnm_compile.format", "vnm_compile.layout", "vnm_compile.quantizing"],
    "selection": ["vnm_compile.passes", "vnm_compile.backend", "vnm_compile.codegen.inductor"],
    "cli": ["vnm_compile.passes", "vnm_compile.codegen"],
    # Records know nothing of how they are shown.
    "explanation/layer.py": ["rich", "vnm_compile.printing", "vnm_compile.explanation"],
    "inspection/kernel.py": ["rich", "vnm_compile.printing", "vnm_compile.explanation", "vnm_compile.filenames"],
    "prune/outcome.py": ["rich", "matplotlib", "vnm_compile.printing", "vnm_compile.prune"],
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


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph() -> dict[str, set[str]]:
    """Which modules each module of the package imports: in functions and for types only, too."""
    modules = {module_name(path): path for path in FILES}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                # A name out of a package is a module of it, or stands in its __init__.
                full = [f"{node.module}.{alias.name}" for alias in node.names]
                graph[name] |= {each if each in modules else str(node.module) for each in full}
        graph[name] &= set(modules)
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules each of which leads to all others."""
    reached = {name: {name} for name in graph}
    changed = True
    while changed:
        changed = False
        for name, seen in reached.items():
            more = seen.union(*(reached[each] for each in graph[name]))
            changed |= len(more) > len(seen)
            reached[name] = more
    found = {frozenset(other for other in seen if name in reached[other]) for name, seen in reached.items()}
    return [set(each) for each in found if len(each) > 1]


def test_no_import_goes_round():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [{"b", "c"}]
    graph = import_graph()
    assert "vnm_compile.spec" in graph["vnm_compile.format"]
    assert circles(graph) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_import_directions(path):
    name = str(path.relative_to(PACKAGE))
    for part, forbidden in FORBIDDEN.items():
        if name == part or name.startswith(part + "/"):
            wrong = [module for module in imports(path) if any(inside(module, each) for each in forbidden)]
            wrong = [
                module for module in wrong if not inside(module, "vnm_compile._torch")
            ]  # it imports nothing of ours
            assert not wrong, f"{name} imports {wrong}"
    if not name.startswith(DOOR):
        assert not [module for module in imports(path) if inside(module, "torch._inductor")], f"only {DOOR} may"


def _private_names(path: Path) -> set[str]:
    """What a file takes from torch by a name that begins with an underscore: imports, and attributes of modules."""
    found = {name for name in imports(path) if inside(name, "torch") and _has_private_part(name)}
    for node in ast.walk(ast.parse(path.read_text())):
        text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if text.startswith("torch.") and _has_private_part(text):
            found.add(text)
    return {name for name in found if not name.startswith(PUBLIC_IN_ALL_BUT_NAME)}


def _has_private_part(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


# `torch._check` is documented; functions of `torch._C._nn` are what graphs are made of; a subclass is made by the rest.
PUBLIC_IN_ALL_BUT_NAME = ("torch._check", "torch._C._nn", "torch.Tensor._make_")
PRIVATES = ("_torch.py", DOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_doors_know_privates_of_torch(path):
    name = str(path.relative_to(PACKAGE))
    if not name.startswith(PRIVATES):
        private = _private_names(path) - {"torch._C"}
        assert not private, f"{name} uses {sorted(private)}; put it into _torch.py"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_small_and_say_what_they_are(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text)), "a module starts with what it is"
    assert path.stem not in ("utils", "helpers", "misc", "common")


def strings(path: Path) -> set[str]:
    """The texts of a file, docstrings aside."""
    tree = ast.parse(path.read_text())
    documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in documents]
    return {node.value for node in constants if isinstance(node.value, str)}


def test_activations_are_entries_of_one_table():
    from vnm_compile.activations import ACTIVATIONS

    table = PACKAGE / "activations.py"
    assert set(ACTIVATIONS) <= strings(table)
    for path in FILES:
        assert path == table or not set(ACTIVATIONS) & strings(path), f"{path.name} knows an activation by name"


def rates(path: Path) -> list[float]:
    """Numbers as large as bytes, operations or cycles a second are."""
    constants = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    return [node.value for node in constants if isinstance(node.value, float) and node.value >= 1e9]


def test_speeds_of_hardware_stand_in_one_table():
    table = PACKAGE / "hardware.py"
    assert len(rates(table)) > 50
    for path in FILES:
        assert path == table or not rates(path), f"{path.name} knows a speed: {rates(path)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_functions_are_short(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            docstring = (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(node) else 0
            length = (node.end_lineno or 0) - node.lineno + 1 - docstring
            assert length <= 60, f"{node.name} has {length} lines without its docstring"


def test_a_method_is_a_file_and_an_entry():
    """No method knows another: what several share has a file of its own."""
    table = PACKAGE / "prune/methods/registry.py"
    file = re.compile(r"vnm_compile\.prune\.methods\.(?!method$)[a-z_]+")
    methods = {name for name in imports(table) if file.fullmatch(name)}
    assert {"magnitude", "wanda", "second_order", "fisher"} <= {name.rpartition(".")[2] for name in methods}
    for path in (PACKAGE / "prune/methods").glob("*.py"):
        if path.stem not in ("__init__", "registry"):
            assert not imports(path) & methods - {module_name(path)}, path.name


def test_examples_have_a_main():
    for path in (PACKAGE.parent / "examples").glob("*.py"):
        functions = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        assert "main" in functions, path.name


def test_every_mistake_has_a_kind():
    """Nothing makes a bare VNMError: `errors.py` has a class for each kind of mistake."""
    bare = re.compile(r"(raise|return|=)\s+VNMError\(")
    assert not [str(path) for path in FILES if bare.search(path.read_text())]
