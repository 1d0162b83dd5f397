"""Of all benchmarks: what they import of ours is there. Few of them are run by a test."""

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

BENCHMARKS = sorted((Path(__file__).parent.parent / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("file", BENCHMARKS, ids=lambda file: file.stem)
def test_what_it_imports_of_ours_is_there(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "rvdist":
            module = import_module(str(node.module))
            names = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert [name for name in names if not find_spec(f"{node.module}.{name}")] == [], node.module
