"""Benchmarks in a Python in which packages are absent."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
_ABSENT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def run_without(
    names: Collection[str], script: str, place: Path, *arguments: str, before: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs a script of benchmarks/ with `--work place`, after `before` if that is given."""
    (place / "sitecustomize.py").write_text(_ABSENT.format(names=tuple(names)) + before)
    return subprocess.run(
        [sys.executable, BENCHMARKS / script, "--work", place, *arguments],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
