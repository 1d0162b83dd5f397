"""A little of benchmarks/soak.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "soak.py"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["merge", "sweep"])
def test_a_killed_command_goes_on(kind: str) -> None:
    line = [sys.executable, str(SCRIPT), "2", "--only", kind, "--later", "0"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("; right") == 2
