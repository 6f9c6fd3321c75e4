"""The house of the design: who may import whom, how long files and functions may be, what an import loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "src" / "groundstate"
FILES = sorted(ROOT.rglob("*.py"))

# A module imports from its own floor or a lower one. The shipped contract suite stands on floor 1: it knows energies
# and norms, but nothing of models, drivers or training.
FLOORS: dict[str, float] = {
    "errors": -1,
    "norms": 0,
    "energies": 1, "jacobian": 1, "blocks": 1, "layers": 1, "layers_conv": 1, "idle": 1, "testing": 1,
    "regularizer": 2, "couplings": 2, "amortized": 2, "flat_state": 2, "schedules": 2, "measure": 2, "compress": 2,
    "compressed_folder": 2, "compress_energy": 2,
    "compress_factors": 2, "compress_output": 2, "attack": 2, "scores": 2, "outliers": 2, "measure_function": 2,
    "measure_data": 2, "measure_table": 2, "tensors": 2, "safetensors_file": 2, "optim": 2, "memories": 2,
    "training": 3, "compress_tune": 3, "estimators": 3, "inversion": 3, "adapters": 3,
    "report": 4,
    "cli": 5, "__main__": 5,
}  # fmt: skip
HEAVY = ("scipy", "sklearn", "matplotlib", "jinja2", "rich", "typer", "pooch", "safetensors")
LONGEST_FILE, LONGEST_FUNCTION = 420, 65


def name_of(path: Path) -> str:
    parts = ("groundstate", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path) for path in FILES}


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Every module of groundstate that a file imports, in functions and under TYPE_CHECKING too, with its line."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "groundstate")


def floor(module: str) -> float:
    place = module.split(".")[1]
    assert place in FLOORS, f"{module} has no floor: give {place!r} one in FLOORS, where DESIGN.md puts it"
    return FLOORS[place]


@pytest.mark.parametrize("path", [p for p in FILES if p != ROOT / "__init__.py"], ids=name_of)
def test_imports_go_down(path: Path) -> None:
    module = name_of(path)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    upward = [
        f"{path.name}:{line} imports {imported}"
        for line, imported in imports(tree, module, path.name == "__init__.py")
        if imported != "groundstate" and floor(imported) > floor(module)
    ]
    assert not upward, f"{module} stands on floor {floor(module):g}: {'; '.join(upward)}"


def test_the_reader_of_imports_sees_every_form() -> None:
    source = """
import groundstate.measure
from groundstate import blocks
from ..training import loop
def late():
    from groundstate.report.load import Study
"""
    found = [name for _, name in imports(ast.parse(source), "groundstate.energies.x", is_package=False)]
    assert found == [
        "groundstate.measure",
        "groundstate.blocks",
        "groundstate.training.loop",
        "groundstate.report.load",
    ]


def test_modules_do_not_import_one_another_in_a_circle() -> None:
    """At import time; an import inside a function may close a circle."""
    graph: dict[str, set[str]] = {}
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        found = {name for _, name in imports(tree, name_of(path), path.name == "__init__.py")}
        graph[name_of(path)] = {name for name in found if name in MODULES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"imports in a circle: {' -> '.join((*trail, module))}"
        if module not in done:
            for imported in graph[module]:
                visit(imported, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    assert lines <= LONGEST_FILE, f"{path.name} has {lines} lines, {LONGEST_FILE} are allowed: it hides a second idea"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            # Docstring and body; the options of a command are its signature, one or two lines each.
            length = (node.end_lineno or node.lineno) - node.body[0].lineno + 1
            assert length <= LONGEST_FUNCTION, f"{path.name}: {node.name} has {length} lines, limit {LONGEST_FUNCTION}"


def test_every_module_says_what_it_is() -> None:
    silent = [name_of(p) for p in FILES if not ast.get_docstring(ast.parse(p.read_text(encoding="utf-8")))]
    assert not silent, f"modules without a docstring: {silent}"


def test_import_is_light() -> None:
    code = (
        "import sys, groundstate, groundstate.energies, groundstate.testing\n"
        "groundstate.energies.registered(), groundstate.Regularizer, groundstate.measure\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], 'pytest' in sys.modules)\n"
        "print(sorted(m for m in sys.modules if m.startswith('groundstate.training')))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[] False", "[]"]
