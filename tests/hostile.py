"""Runs what reads a stranger's file in a process of its own, under the limits that are promised."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SECONDS, BYTES = 5.0, 512 << 20  # of processor time, of memory

_RUN = """
import json, resource, sys
sys.path[:0] = [sys.argv[1], *json.loads(sys.argv[5])]
from rvdist.core.errors import BadInput
import importlib
module, name = sys.argv[2].rsplit(".", 1)
read = getattr(importlib.import_module(module), name)
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[4]),) * 2)
def spent(): return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
began = spent()
from pathlib import Path
try:
    read(Path(sys.argv[3]))
    said = None
except BadInput as error:
    said = str(error)
print(json.dumps([said, spent() - began]))
"""


def refused(reader: str, path: Path) -> str:
    """The sentence with which `reader` (module.function, of a path) refuses `path`: in time, in memory, on one line.
    Fails where it says nothing, or anything else."""
    root = Path(__file__).parent.parent
    beside = json.dumps([entry for entry in sys.path if entry.startswith(str(root / "tests"))])
    command = [sys.executable, "-c", _RUN, str(root), reader, str(path), str(BYTES), beside]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": ""})
    assert ended.returncode == 0, ended.stderr[-2000:]
    said, seconds = json.loads(ended.stdout)
    assert said is not None, f"{path} is accepted"
    assert seconds < SECONDS, f"it took {seconds:.1f} s: {said[:200]}"
    assert "\n" not in said and len(said) < 6000, said[:200]
    return str(said)


def recipe(path: Path) -> object:
    """What a recipe asks for of a base with one tensor."""
    from rvdist.core.recipe import read_recipe

    return read_recipe(path, lambda source: ["a.weight"])
