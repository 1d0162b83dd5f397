"""A little of benchmarks/load.py: it runs, and few open files are enough for many shards."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "load.py"


@pytest.mark.parametrize(("name", "n"), [("points", 40), ("shards", 150), ("tensors", 200), ("runs", 40)])
def test_many_of_everything(name: str, n: int) -> None:
    """From a soft limit of 256 open files, which a worker raises."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    line = [sys.executable, str(SCRIPT), "--one", name, str(n)]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    limit = f"import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (256, {most}))"
    start = [sys.executable, "-c", f"{limit}; os.execv(sys.executable, sys.argv[1:])", *line]
    done = subprocess.run(start, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seconds, cpu_seconds, nbytes = json.loads(done.stdout.splitlines()[-1])
    assert seconds > 0 and cpu_seconds > 0 and nbytes >= 0
