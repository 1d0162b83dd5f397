"""Run code that a model wrote against tests it must pass, where it can reach nothing of ours: docs/sandbox.md.

This is the caller's side: start a box for each program, hold the wall clock, believe only the checker in the box.
Knows nothing of lm-eval, models or Ray.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import rvdist
from rvdist.core.errors import BadInput, Failed

Mode = Literal["namespaces", "landlock"]
Outcome = Literal["passed", "failed", "timed out", "killed"]

_ROOT = str(Path(rvdist.__file__).resolve().parent.parent)
_START = """
import json, sys
sys.path.append(sys.argv[1])
from rvdist.evaluate.sandbox import box
sys.path.pop()
options = json.loads(sys.argv[2])
sys.path += options["packages"]
box.main(options)
"""
_GRACE_SECONDS = 2.0  # for the checker to say "timed out" itself


@dataclass(frozen=True)
class Program:
    """`prompt` + `completion` defines `entry_point`; `test` calls it and raises where it is wrong. `prompt` must
    stand by itself, but for the body of a last function: the tests may use what it defines."""

    prompt: str
    completion: str
    test: str
    entry_point: str


@dataclass(frozen=True)
class Limits:
    """What one program may use: processor and wall time, address space, one file, all of /scratch, one answer."""

    cpu_seconds: int = 5
    wall_seconds: float = 8.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 8 << 20
    scratch_bytes: int = 16 << 20
    answer_bytes: int = 16 << 20


@dataclass(frozen=True)
class Verdict:
    """How a program ended, why, and behind which walls."""

    outcome: Outcome
    reason: str
    mode: Mode

    @property
    def passed(self) -> bool:
        """Whether the program ended as its tests want it."""
        return self.outcome == "passed"

    def __str__(self) -> str:
        return f"{self.outcome} ({self.mode}): {self.reason}" if self.reason else f"{self.outcome} ({self.mode})"


def run(
    programs: Sequence[Program], limits: Limits = Limits(), workers: int | None = None, mode: Mode = "namespaces"
) -> list[Verdict]:
    """A verdict for each program, in order; `workers` programs run at a time (None: one for each core).
    Raises Failed where the kernel does not give `mode`."""
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda program: _run(program, limits, mode), programs))


def available_mode(degraded: bool) -> Mode:
    """The strongest walls that this kernel or container gives: namespaces, or Landlock if `degraded` walls will do.
    Raises BadInput with the reason where there are none."""
    why = _refusal("namespaces")
    if why is None:
        return "namespaces"
    if not degraded:
        raise BadInput(f"benchmarks.sandbox=strict: {why}; benchmarks.sandbox=degraded needs less (docs/sandbox.md)")
    why = _refusal("landlock")
    if why is None:
        return "landlock"
    raise BadInput(f"benchmarks.sandbox=degraded: {why}; run code tasks on another machine (docs/sandbox.md)")


@cache
def _refusal(mode: Mode) -> str | None:
    """Why there can be no sandbox of this mode here."""
    try:
        (verdict,) = run(
            [Program("", "import math, queue\ndef f():\n    return 1\n", "assert f() == 1", "f")], mode=mode
        )
    except Failed as error:
        return str(error)
    return None if verdict.passed else f"a trial in the sandbox {verdict}"


def _run(program: Program, limits: Limits, mode: Mode) -> Verdict:
    readable, packages = _visible()
    options = asdict(limits) | {"mode": mode, "readable": readable, "packages": packages}
    box = subprocess.Popen(
        [sys.executable, "-s", "-S", "-P", "-c", _START, _ROOT, json.dumps(options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        cwd="/",
        start_new_session=True,
    )
    try:
        said, _ = box.communicate(json.dumps(asdict(program)).encode(), limits.wall_seconds + _GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        return Verdict("timed out", f"more than {limits.wall_seconds:g} s", mode)
    finally:
        if box.poll() is None:  # the group cannot have been reused: its leader has not been waited for
            os.killpg(box.pid, signal.SIGKILL)
            box.communicate()
    match _parse(said):
        case {"outcome": "passed" | "failed" | "timed out" | "killed" as outcome, "reason": str(reason)}:
            return Verdict(outcome, reason, mode)
        case {"refused": str(what)}:
            raise Failed(f"this kernel or container refuses the sandbox ({mode}): {what}")
    return Verdict("killed", "the tests ended without a verdict", mode)


def _parse(said: bytes) -> object:
    try:
        return json.loads(said)
    except ValueError:
        return None


@cache
def _visible() -> tuple[list[str], list[str]]:
    """Directories a program may read (system libraries, Python's own, numpy), and what to add to its sys.path."""
    wanted = [Path(path) for path in ("/lib", "/lib64", "/usr/lib", "/usr/lib64")]
    wanted += [Path(sys.base_prefix) / name for name in ("lib", "lib64")]
    packages = []
    numpy = importlib.util.find_spec("numpy")
    if numpy and numpy.submodule_search_locations:
        package = Path(numpy.submodule_search_locations[0])
        wanted += [package, package.with_name("numpy.libs")]
        packages = [str(package.parent)]
    chosen: list[Path] = []
    for path in wanted:
        if path.is_dir() and not any(path.is_relative_to(above) for above in chosen):
            chosen.append(path)
    return [str(path) for path in chosen], packages
