"""What strangers write in place of values; and what reads their files, in a process of its own under the limits that
are promised."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
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


_RUN_ALL = """
import importlib, json, os, resource, sys
sys.path[:0] = [sys.argv[1], *json.loads(sys.argv[4])]
from pathlib import Path
from rvdist.core.errors import BadInput, Failed
module, name = sys.argv[2].rsplit(".", 1)
read = getattr(importlib.import_module(module), name)
def spent(): return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
first, *others = map(Path, json.load(sys.stdin))
read(first)  # what it imports counts for nothing
held = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (held + int(sys.argv[3]), -1))
for path in others:
    began = spent()
    try:
        read(path)
        said = None
    except (BadInput, Failed) as error:
        said = str(error)
    except BaseException as error:
        said = f"NOT OURS: {type(error).__name__}: {error}"[:500]
    print(json.dumps([said, spent() - began]), flush=True)
"""


def outcomes(reader: str, sound: Path, others: list[Path]) -> list[tuple[str | None, float]]:
    """What `reader`, which reads `sound` without a word, says of each of the others (None: nothing), and the seconds
    it takes, in one process under the limits."""
    root = Path(__file__).parent.parent
    beside = json.dumps([entry for entry in sys.path if entry.startswith(str(root / "tests"))])
    command = [sys.executable, "-c", _RUN_ALL, str(root), reader, str(BYTES), beside]
    asked = json.dumps([str(path) for path in (sound, *others)])
    environment = os.environ | {"PYTHONPATH": "", "RUST_BACKTRACE": "0"}
    ended = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=240, env=environment)
    found = [json.loads(line) for line in ended.stdout.splitlines()]
    assert ended.returncode == 0 and len(found) == len(others), f"{len(found)} were read; {ended.stderr[-2000:]}"
    return [(said, seconds) for said, seconds in found]


def rows(path: Path) -> object:
    """The rows of a benchmark in a file."""
    from rvdist.evaluate.tasks.local import read

    return read(path, ["a"])


def config(path: Path) -> object:
    from rvdist.weights.checkpoint.source import open_source

    return open_source(str(path)).config


def manifest(path: Path) -> object:
    from rvdist.verify import verify

    return verify(path)


def seen(path: Path) -> object:
    from rvdist.inspect import inspect, tree

    return tree(inspect(str(path)))


def records(path: Path) -> object:
    from rvdist.api import load_records

    return load_records(path)


def recording(path: Path) -> object:
    from rvdist.evaluate.replay import Recording

    return Recording(path)


def bits(path: Path) -> object:
    from rvdist.stages.connectivity import _score

    return _score(path, "text:x")


def tokens(path: Path) -> object:
    from rvdist.evaluate.tokenizer import load_tokenizer

    return load_tokenizer(path, True)


def vocabularies(path: Path) -> object:
    from rvdist.weights.architecture import compare_tokenizers

    return compare_tokenizers(path, path)


def text(path: Path) -> object:
    from rvdist.evaluate.tasks import local

    return local.paragraphs(str(path))


def licence(path: Path) -> object:
    from rvdist.report.card.metadata import licence_of

    return licence_of(path)


def speeds(cache: Path) -> object:
    from rvdist.evaluate.foresight import Memory

    return Memory.read(cache)


def chosen(cache: Path) -> object:
    from rvdist.evaluate.resolved import recall

    return recall(cache, "a")


def rate(path: Path) -> object:
    from rvdist.merge.placement import remembered_rate

    return remembered_rate(path, "cpu")


def key(path: Path) -> object:
    from rvdist.weights.checkpoint.key import owner_key

    return owner_key(path)


def journal(path: Path) -> object:
    from rvdist.weights.checkpoint.journal import read_journal

    return list(read_journal(path, "plan", b"k" * 32))


def cache(path: Path) -> object:
    from rvdist.evaluate.cache import SampleCache

    return SampleCache(path)


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


def damage(raw: bytes, chance: random.Random, ends: tuple[int, int]) -> bytes:
    """One to three bytes changed, among as many at the two ends."""
    damaged = bytearray(raw)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(min(len(raw), sum(ends)))
        damaged[at if at < ends[0] else (at - sum(ends)) % len(raw)] = chance.randrange(256)
    return bytes(damaged)


def numbers(path: Path) -> object:
    """All of a checkpoint, or of a stored vector that is added to nothing, as numbers."""
    import torch

    from rvdist.core.point import WeightPoint
    from rvdist.weights.checkpoint.difference import Difference
    from rvdist.weights.checkpoint.source import open_source
    from rvdist.weights.operand import open_operand
    from rvdist.weights.reader import PointReader

    opened = open_source(str(path))
    if isinstance(opened, Difference):
        return open_operand(opened)
    with contextlib.closing(PointReader([WeightPoint("a")], {"a": opened}, torch.bfloat16)) as reader:
        return [list(reader.chunks(name, 0, spec.numel)) for name, spec in opened.tensors.items()]
