"""The layers, as the import contracts say them, and the promise of core and model: they decide, they never do."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "graincopy"
PURE = sorted((PACKAGE / "core").rglob("*.py")) + sorted((PACKAGE / "model").rglob("*.py"))
ALLOWED = {
    "__future__", "collections", "dataclasses", "datetime", "enum", "hashlib", "math", "re", "typing",
    "msgspec", "numpy", "pyroaring", "graincopy",
}  # fmt: skip
DOING = {"open", "print", "input", "exec", "eval", "__import__", "breakpoint"}


def imported(source: str) -> Iterator[str]:
    """Every module that ``source`` imports, at any depth of the code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def called(source: str) -> set[str]:
    """Bare names that ``source`` calls, and whether it asks the calendar for the time of day."""
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    names = {func.id for func in calls if isinstance(func, ast.Name)}
    return names | {func.attr for func in calls if isinstance(func, ast.Attribute) and func.attr in CLOCKS}


CLOCKS = {"now", "utcnow", "today", "default_rng"}


def test_import_contracts_are_kept() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def _room(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0]


@pytest.mark.parametrize("module", PURE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_core_and_model_do_nothing(module: Path) -> None:
    source = module.read_text()
    assert {name.split(".")[0] for name in imported(source)} <= ALLOWED
    floors = ("graincopy.core", "graincopy.model") if _room(module) == "model" else ("graincopy.core",)
    assert all(name.startswith(floors) for name in imported(source) if name.startswith("graincopy"))
    assert not called(source) & (DOING | CLOCKS)


def test_the_check_itself_can_fail() -> None:
    assert set(imported("def f():\n    import os.path\n    from time import time")) == {"os.path", "time"}
    assert called("open('a'); datetime.now(); np.random.default_rng()") == {"open", "now", "default_rng"}


@pytest.mark.parametrize("package", sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")))
def test_every_room_says_where_in_the_flow_it_stands(package: str) -> None:
    docstring = ast.get_docstring(ast.parse((PACKAGE / package / "__init__.py").read_text()))
    assert docstring


def test_core_and_model_can_be_loaded_without_anything_that_does() -> None:
    """What they load themselves: none of the modules that reach outside the process, beyond numpy's own."""
    modules = [
        ".".join(("graincopy", *path.relative_to(PACKAGE).with_suffix("").parts))
        for path in PURE
        if path.stem != "__init__"
    ]
    code = f"import importlib, sys; import numpy, msgspec, pyroaring; before = set(sys.modules)\n" \
           f"for name in {modules!r}: importlib.import_module(name)\n" \
           f"print(*sorted(set(sys.modules) - before))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not set(done.stdout.split()) & {"socket", "subprocess", "sqlite3", "asyncio", "ssl", "multiprocessing"}
