"""Every public definition says what it is, and which of our errors it raises."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ERRORS = {"UserError", "ValueError"}


def public_definitions(tree: ast.Module | ast.ClassDef) -> Iterator[tuple[str, ast.AST]]:
    """Classes, functions and methods without an underscore, with their names; of overloads only the definition."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            if "overload" not in map(ast.unparse, node.decorator_list):
                yield node.name, node
            if isinstance(node, ast.ClassDef):
                yield from ((f"{node.name}.{name}", method) for name, method in public_definitions(node))


def raised_errors(node: ast.AST) -> set[str]:
    """Names of `ERRORS` that a function raises in its own lines, not in those of a function inside it."""
    names = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Raise) and child.exc is not None:
            names.add(ast.unparse(child.exc.func if isinstance(child.exc, ast.Call) else child.exc))
        if not isinstance(child, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            names |= raised_errors(child)
    return names & ERRORS


def faults(source: str) -> list[str]:
    """What lacks a docstring, or a "Raises:" in it. The errors of a `main` are for whoever typed the command."""
    tree = ast.parse(source)
    lacking = [] if ast.get_docstring(tree) or not tree.body else ["the file"]
    for name, node in public_definitions(tree):
        text = ast.get_docstring(node)
        if not text:
            lacking.append(name)
        elif isinstance(node, ast.FunctionDef) and name != "main" and raised_errors(node) and "Raises:" not in text:
            lacking.append(f"{name}: Raises")
    return lacking


@pytest.mark.parametrize("folder", ["engine", "kernels", "benchmarks"])
def test_every_public_definition_has_a_docstring(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert {
        str(path.relative_to(ROOT)): lacking for path in files if (lacking := faults(path.read_text("utf-8")))
    } == {}


def test_what_lacks_is_seen():
    source = '"""A file."""\nclass Box:\n    """Holds things."""\n    def put(self): ...\n    def _grow(self): ...\n'
    assert faults(source) == ["Box.put"]
    raising = '"""A file."""\ndef half(x):\n    """Half of it."""\n    if x % 2:\n        raise ValueError(x)\n'
    assert faults(raising) == ["half: Raises"]
    assert (
        faults(raising.replace("Half of it.", "Half of it.\n\n    Raises:\n        ValueError: it is odd.\n    ")) == []
    )
