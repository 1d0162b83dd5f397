"""Of all benchmarks: they start, and what they import of ours is there. Few of them are run by a test."""

import ast
import os
import runpy
import sys
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import pytest

BENCHMARKS = sorted((Path(__file__).parent.parent / "benchmarks").glob("*.py"))
COMMANDS = [file for file in BENCHMARKS if "__main__" in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("file", BENCHMARKS, ids=lambda file: file.stem)
def test_what_it_imports_of_ours_is_there(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "rvdist":
            module = import_module(str(node.module))
            names = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert [name for name in names if not find_spec(f"{node.module}.{name}")] == [], node.module


@pytest.mark.parametrize("file", COMMANDS, ids=lambda file: file.stem)
def test_it_says_how_it_is_called(file, tmp_path):
    child = get_context("fork").Process(target=run, args=(file, ["--help"], tmp_path / "out"))
    child.start()
    child.join()
    said = (tmp_path / "out").read_text(encoding="utf-8")
    assert (child.exitcode, said[:6]) == (0, "usage:"), said


def test_checkpoints_of_holes_differ_from_their_beginning(tmp_path, monkeypatch):
    """Where two donors are equal, a command compares them to their end."""
    monkeypatch.syspath_prepend(str(BENCHMARKS[0].parent))
    shapes = import_module("shapes")
    sizes = {"a": (8192, 64), "b": (7,), "c": (8192, 64)}
    for seed in range(3):
        shapes.write_checkpoint(tmp_path / str(seed), sizes, 2, seed, {}, holes=True)
    for file in (tmp_path / "0").glob("*.safetensors"):
        alike = [tmp_path / str(seed) / file.name for seed in range(3)]
        assert len({place.read_bytes()[:1024] for place in alike}) == 3
        assert all(place.stat().st_blocks * 512 <= 16384 < place.stat().st_size for place in alike)


def run(file, arguments, out):
    """`python FILE ARGUMENTS…`, in a process that has imported much of what it imports."""
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8") for number in (1, 2))  # no longer pytest's
    sys.argv[:] = [str(file), *arguments]
    sys.path[0] = str(file.parent)
    runpy.run_path(str(file), run_name="__main__")
