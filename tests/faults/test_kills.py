"""Killed at every operation on files, one after the other, and started again: the end is that of an undisturbed run."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest
from checkpoints import POCKET
from serving import Run
from shim import Fault

pytestmark = pytest.mark.heavy

FAMILY = [f"target={POCKET / 'target'}", f"vector.plus={POCKET / 'grpo'}", f"vector.minus={POCKET / 'sft'}"]


BOTH = ["cache.dir=cache", "hydra.run.dir=run"]
SCORED = ["benchmarks=pocket", "benchmarks.tasks=[pocket_sums]", "benchmarks.limit=8", "engine.count=1"]
COMMANDS = {
    "merge": [*FAMILY, *BOTH, "output=out-{alpha}", "alpha=[0.5,1]", "max_shard_size=400KB", "merge.workers=2"],
    "alone": [*FAMILY, *BOTH, "output=out-{alpha}", "alpha=[0.5,1]", "max_shard_size=400KB"],
    "sweep": [*FAMILY, *BOTH, *SCORED, "sweep.alphas=[0.5,1]", "stages=[evaluate]"],
    "vector": [*FAMILY[1:], *BOTH, "vector.save=v"],
    "union": [
        "target=MODELS/base", "vector.plus=MODELS/other", "vector.minus=MODELS/base", "tokenizer=union",
        "compat.force=true", *BOTH, "output=out-{alpha}", "alpha=[0.5,1]", "max_shard_size=400KB",
    ],
}  # fmt: skip


def outcome(work: Path) -> dict[str, str]:
    """What a run made, by path: digests of files, and modes of directories. A seal is of whoever has the key, and logs
    and timings are of one run."""
    found = {}
    for path in sorted(work.rglob("*")):
        name = str(path.relative_to(work))
        if (
            name.split("/")[0] == "cache"
            or path.name in ("log.jsonl", "timing.json", "report.html")
            or path.suffix == ".pdf"
        ):
            continue
        if path.is_dir():
            found[name] = oct(path.stat().st_mode & 0o755)  # killed at its very end, a commit leaves others no writing
            continue
        content = path.read_bytes()
        if path.name == "rvdist.json":
            content = json.dumps(json.loads(content) | {"seal": None}).encode()
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def require_clean(work: Path) -> None:
    """Nothing is left in `cache.dir` that nobody will read."""
    for path in (work / "cache").rglob("*"):
        name = path.name
        assert path.is_dir() or name in ("key-0", "rates.json", "samples.sqlite") or path.parent.name == "digests", path
        assert path.parent.name != "digests" or len(name) == 64, path
    if (work / "cache/samples.sqlite").exists():
        with sqlite3.connect(work / "cache/samples.sqlite") as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def afresh(start: Path, work: Path) -> None:
    """`work` is what `start` is, and nothing else."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(start, work)


def enumerate_kills(
    run: Run, place: Path, start: Path, arguments: tuple[str, ...], fault: Fault, only: tuple[str, ...] = ()
) -> int:
    """Kills the run at each of its operations, each time from what is in `start`, or at the middle one of each kind
    named; returns how many there were."""
    work = place / "work"
    afresh(start, work)
    status, errors = run(work, fault.at(-1), *arguments)
    assert status == 0, errors
    right, count, told = outcome(work), fault.count, fault.told
    require_clean(work)
    killed = 0
    for number in middles(told, only) if only else itertools.count():
        afresh(start, work)
        status, errors = run(work, fault.at(number), *arguments)
        if not fault.happened:
            break
        assert status == -9, (told[number], errors)
        before = (told[number] if number < len(told) else "?", sorted(map(str, work.rglob("*"))))
        status, errors = run(work, fault.at(-1), *arguments)
        assert status == 0, (before, errors)
        assert outcome(work) == right, before
        require_clean(work)
        killed += 1
    assert killed >= (len(only) or count * 0.9)
    return killed


def arguments_of(command: str, place: Path) -> tuple[str, ...]:
    """Those of a command that begins with nothing; two models with different tokenizers stand in `place`."""
    (place / "start").mkdir()
    for name in ("base", "other"):
        shutil.copytree(POCKET / "target", place / "models" / name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = place / "models/other" / name
        path.write_text(path.read_text().replace("<|im_end|>", "<|tool|>"))
    return tuple(argument.replace("MODELS", str(place / "models")) for argument in COMMANDS[command])


def middles(told: Sequence[str], kinds: Sequence[str]) -> list[int]:
    """Of the operations of each kind the one in their middle; a kind is a part of their lines."""
    found = [[number for number, line in enumerate(told) if kind in line] for kind in kinds]
    return [numbers[len(numbers) // 2] for numbers in found]


def foreign(start: Path) -> None:
    """A checkpoint that somebody else has made stands where the output will."""
    (start / "out").mkdir()
    for name in ("config.json", "model.safetensors", "notes.txt"):
        (start / "out" / name).write_text("theirs")


def unfinished(start: Path) -> None:
    """What a run of another plan has left, killed."""
    foreign(start)
    (start / "out/lock").write_text("")
    (start / "out/journal.jsonl").write_text("[]\n")
    (start / "out").rename(start / "out.partial")
    (start / "out.partial").chmod(0o700)


ENDS = [(action, umask) for action in ("kill", "torn") for umask in (0o022, 0o002)]
SMALL_RUNS = [
    ("output", None),
    ("overwrite", foreign),
    ("cache", None),
    ("output", unfinished),
    ("overwrite-in-steps", foreign),
    ("memory", None),
]
AT_ONCE = [(*SMALL_RUNS[k], "torn", 0o002) for k in range(3)]


@pytest.mark.parametrize(
    ("what", "before", "action", "umask"),
    AT_ONCE
    + [
        pytest.param(*run, *end, marks=pytest.mark.slow)
        for run in SMALL_RUNS
        for end in ENDS
        if (*run, *end) not in AT_ONCE
    ],
)
def test_a_kill_at_every_boundary(small, base, tmp_path, what, before, action, umask):
    """Of an output's staging, journal and commit, of the sample cache's transactions, and of all that is remembered. A
    torn write is half of one, and the end."""
    if before:
        before(base)
    fault = Fault(tmp_path, tmp_path / "work", action=action)
    count = enumerate_kills(small, tmp_path, base, (what, str(umask)), fault)
    assert count > 10


MIDDLES = {
    "merge": ("write {}/out-1.partial/journal.jsonl", "sync {}/out-0.5.partial/model", "rename {}/out-1"),
    "alone": ("write {}/out-1.partial/journal.jsonl", "sync {}/out-0.5.partial/model", "rename {}/out-1"),
    "sweep": ("write {}/cache/samples.sqlite",),
    "union": ("write {}/out-0.5.partial/model", "write {}/out-1.partial/tokenizer.json", "rename {}/out-1"),
}


@pytest.mark.parametrize("command", MIDDLES)
def test_a_command_killed_at_some_boundaries(whole, tmp_path, command):
    """The short form of what follows."""
    arguments = arguments_of(command, tmp_path)
    fault = Fault(tmp_path, tmp_path / "work", action="torn")
    only = tuple(kind.format(tmp_path / "work") for kind in MIDDLES[command])
    assert enumerate_kills(whole, tmp_path, tmp_path / "start", arguments, fault, only) == len(only)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_killed_at_every_boundary(whole, tmp_path, command):
    arguments = arguments_of(command, tmp_path)
    fault = Fault(tmp_path, tmp_path / "work", action="torn")
    assert enumerate_kills(whole, tmp_path, tmp_path / "start", arguments, fault) > 30
