"""What strangers write in place of values; and what reads their files, in a process of its own under the limits that
are promised."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def rows(path: Path) -> object:
    """The rows of a benchmark in a file."""
    from rvdist.evaluate.tasks.local import read

    return read(path, ["a"])


def recipe(path: Path) -> object:
    """What a recipe asks for of a base with one tensor."""
    from rvdist.core.recipe import read_recipe

    return read_recipe(path, lambda source: ["a.weight"])


NESTED: Any = []
for _ in range(90):
    NESTED = [NESTED]
VALUES: list[Any] = [
    None, True, 0, -1, 1.5, 2**64, 10**400, float("nan"), float("inf"), -0.0, "", "\0", "\ud800", "x" * 5000, "../x",
    "a\nb\x1b[2J", [], {}, [[]], {"": {}}, NESTED, [1, 2, 3, 4, 5], {"a": 1, "\0": 2}, [None], "\u202e",
]  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a document: at most two of each mapping or list."""
    yield at
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        for key in keys if at == () else keys[:2]:
            yield from places(value[key], (*at, key))


def mutants(document: Any) -> Iterator[Any]:
    for at in places(document):
        for value in VALUES:
            if not at:
                yield value
                continue
            other = copy.deepcopy(document)
            inner = other
            for key in at[:-1]:
                inner = inner[key]
            inner[at[-1]] = value
            yield other
            if isinstance(inner, dict) and isinstance(value, str):
                inner[value] = inner.pop(at[-1])
                yield other
