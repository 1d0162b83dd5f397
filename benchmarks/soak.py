"""Random ends: merges and sweeps of the pocket family, of which processes are ended or stopped at random moments, and
the same command again, which meets such ends in turn; after at most CHAIN of them a command is left alone.
`python benchmarks/soak.py N [--seed S] [--only merge|sweep] [--log FILE]` prints a line a kill, and what was wrong;
exit status 1 where anything was not as it must be. With a log N counts the kills that are in it: several such commands,
one after the other or at once, come to N together, and the last says what all of them found.

    a run that was disturbed goes on to status 0, or ends within a minute with one sentence of ours (lines of the log of
    Ray's core may stand beside it) and its status
    the first run that ends with status 0 has the outputs' digests and `summary.json` of an undisturbed one
    within a minute of each end none of its processes is left, and nothing in /dev/shm or beside the output; in the
    temporary directory nothing but what a driver leaves that is killed, and the next command that starts later removes

Commands have a /dev/shm of their own, where the system permits that; elsewhere it is not looked at.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import getpass
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
POCKET = ROOT / "rvdist" / "pocket"
FAMILY = [f"target={POCKET / 'target'}", f"vector.plus={POCKET / 'grpo'}", f"vector.minus={POCKET / 'sft'}"]
COMMANDS = {
    "merge": ["output=out", "merge.workers=2", "max_shard_size=200KB"],
    "sweep": ["benchmarks=pocket", "benchmarks.limit=24", "sweep.alphas=[0.5,1]", "engine.count=1"],
}
COMMON = ["cache.dir=cache", "hydra.run.dir=run"]
VICTIMS = {
    "merge": ["driver", "worker", "worker", "raylet", "gcs_server"],
    "sweep": ["driver", "engine", "engine", "raylet", "gcs_server"],
}
SIGNALS = {
    "driver": [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP],
    "worker": [signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP],
    "engine": [signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP],
    "raylet": [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP],
    "gcs_server": [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP],
}
OURS = re.compile(
    r"rvdist: .*(the same command goes on from there|run the same command again when less else runs here)"
)
OF_RAY = re.compile(r"\[\d{4}-\d\d-\d\d [\d:,]+ [EIWC] \d+ \d+\] ")  # lines of its core, which nothing of ours writes
STATUS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
PATIENCE = 60.0  # seconds for a run that was disturbed to end, and for its processes to be gone
PAUSE = 3.0  # seconds that a stopped process stands still
UNDISTURBED = 300.0
CHAIN = 8  # kills before a command is left alone
GAP = 5.0  # seconds, at most, from one to the next of the same command
LATER = 61.0  # seconds after which a command removes what a killed one has left of Ray's


@dataclass
class Run:
    """A command under way, with a mark in the environment of all its processes and a temporary directory of its own."""

    place: Path
    kind: str
    mark: str = ""
    process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        self.mark = f"soak-{os.getpid()}-{time.monotonic_ns()}"
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*within(shared(self.place)), sys.executable, "-c", _COMMAND, *FAMILY, *COMMANDS[self.kind], *COMMON],
            cwd=self.place,
            env={**os.environ, "SOAK": self.mark, "TMPDIR": str(self.place.parent / "t"), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
            text=True,
            start_new_session=True,
        )

    def wait(self, seconds: float) -> int | None:
        """Its status; None where it had to be killed."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None

    @property
    def said(self) -> str:
        self.errors.seek(0)
        return self.errors.read().strip()

    def processes(self) -> Iterator[tuple[int, str]]:
        """Those that carry its mark, and what they are."""
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if f"SOAK={self.mark}".encode() in Path(f"/proc/{name}/environ").read_bytes():
                    line = Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                    yield int(name), line

    def victim(self, what: str) -> int | None:
        """A process of that kind, None where there is none yet."""
        if what == "driver":
            return self.process.pid
        title = {"worker": "ray::WorkerActor", "engine": "ray::EngineActor"}.get(what, what)
        found = [pid for pid, line in self.processes() if title in line.split(" ", 1)[0] or line.startswith(title)]
        return random.choice(found) if found else None

    def leftovers(self) -> list[str]:
        """Its processes that are there after a minute: killed then."""
        deadline = time.monotonic() + PATIENCE
        while (left := list(self.processes())) and time.monotonic() < deadline:
            time.sleep(0.2)
        for pid, _ in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        return [line[:80] or "?" for _, line in left]


# A directory in the place of /dev/shm, then a command.
_OWN = ["unshare", "--mount", "--user", "--map-current-user", "--keep-caps", "sh", "-c"]
_OWN += ['mount --bind "$0" /dev/shm && exec "$@"']


# In small units, so that there is much to interrupt; SIGINT as in a terminal, whoever started this script.
_COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from rvdist.launch import main
from rvdist.merge import accounts, plan
plan.UNIT_BYTES, accounts.SYNC_BYTES = 16 << 10, 64 << 10
main()
"""


def outcome(place: Path, kind: str) -> dict[str, str]:
    """What must be equal: digests of the output, `summary.json`."""
    if kind == "sweep":
        return {"summary.json": (place / "run/summary.json").read_text()}
    found = {}
    for path in sorted((place / "out").iterdir()):
        content = path.read_bytes()
        if path.name == "rvdist.json":  # the seal is of who has the key in this cache.dir
            content = json.dumps(json.loads(content) | {"seal": ""}).encode()
        found[path.name] = hashlib.sha256(content).hexdigest()
    return found


def shared(place: Path) -> Path:
    """What stands in the place of /dev/shm."""
    return place.parent / "shm"


@functools.cache
def within(shm: Path) -> tuple[str, ...]:
    """What a command begins with, so that `shm` is its /dev/shm; nothing where the system does not permit it."""
    words = (*_OWN, str(shm))
    return words if subprocess.run([*words, "true"], capture_output=True).returncode == 0 else ()


def files_left(place: Path) -> list[str]:
    """What lies where nothing may."""
    left = [name for name in os.listdir(place) if name not in {"out", "cache", "run"}]
    return left + [f"/dev/shm/{name}" for name in os.listdir(shared(place))]


@dataclass(frozen=True)
class Kill:
    """A line of the log: what was killed, how its run ended after how many seconds (both None where it went on until
    another kill), and what was not as it must be. `commit`: of this script and all else; the load of the machine."""

    commit: str
    load: float
    kind: str
    what: str
    status: int | None
    seconds: float | None
    wrong: list[str]

    def __str__(self) -> str:
        went = "went on until" if self.seconds is None else f"status {self.status} {self.seconds:.1f} s later"
        return f"{self.kind} {self.what:18} {went}; {'; '.join(self.wrong) or 'right'}"


def disturb(run: Run, seconds: float, most: int) -> list[tuple[str, signal.Signals]]:
    """Up to so many kills of one run, until it has ended: what was sent to whom."""
    sent: list[tuple[str, signal.Signals]] = []
    pid: int | None = None
    while len(sent) < most:
        at = time.monotonic() + (random.uniform(0.1, GAP) if sent else random.uniform(0.5, seconds))
        what = random.choice(VICTIMS[run.kind])
        number = random.choice(SIGNALS[what])
        while run.process.poll() is None and time.monotonic() < at:
            time.sleep(0.01)
        while run.process.poll() is None and (pid := run.victim(what)) is None:
            time.sleep(0.05)
        if run.process.poll() is not None or pid is None:
            break
        with contextlib.suppress(OSError):
            os.kill(pid, number)
            sent.append((what, number))
            if number == signal.SIGSTOP:
                time.sleep(PAUSE)
                os.kill(pid, signal.SIGCONT)
    return sent


def judge(sent: list[tuple[str, signal.Signals]], status: int | None, seconds: float, said: str) -> list[str]:
    """What was wrong with the end of a run, so long after its last kill."""
    wanted = {0, 1} | {STATUS.get(number) for what, number in sent if what == "driver"}
    ours = [line for line in said.splitlines() if OURS.match(line)]
    if status not in wanted or (status and seconds > PATIENCE):
        return [f"ended with {status} after {seconds:.0f} s: {said[-300:]}"]
    if status in (0, -9) or (len(ours) == 1 and all(OURS.match(a) or OF_RAY.match(a) for a in said.splitlines())):
        return []
    return [f"said: {said[:500]} … {said[-500:]}"]


def soak(kind: str, place: Path, right: dict[str, str], seconds: float) -> list[Kill]:
    """The kills of commands one after the other, until one ends with status 0; none where that was the first."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    found: list[Kill] = []
    while True:
        run = Run(place, kind)
        sent = disturb(run, seconds, CHAIN - len(found))
        began = time.monotonic()
        status = run.wait(UNDISTURBED)
        ended, said = round(time.monotonic() - began, 1), run.said
        load = round(os.getloadavg()[0], 1)
        found += [Kill(commit(), load, kind, f"{what} {number.name}", None, None, []) for what, number in sent]
        wrong = judge(sent, status, ended, said) if sent else [f"again: {status}: {said[-300:]}"] if status else []
        wrong += [f"left running: {line}" for line in run.leftovers()]
        if status == 0:
            wrong += ["another outcome"] if outcome(place, kind) != right else []
            wrong += [f"left: {path}" for path in files_left(place)]
        if wrong and not found:
            sys.exit(f"an undisturbed {kind}: {'; '.join(wrong)}")
        if sent:
            found[-1] = replace(found[-1], status=status, seconds=ended)
        if found:
            found[-1].wrong.extend(wrong)
        if status == 0 or not sent:
            return found


@functools.cache
def commit() -> str:
    """The last one of the tree, with a + where files of it have changed since."""
    line = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(line, capture_output=True, text=True).stdout.strip()


def kills(log: Path) -> list[Kill]:
    """What a log has so far."""
    return [Kill(**json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []


def summary(found: list[Kill]) -> str:
    """How many of what ended how, and what was wrong."""
    ended = Counter(f"{kill.kind}, {kill.what}: {'wrong' if kill.wrong else 'right'}" for kill in found)
    commits = ", ".join(sorted({kill.commit for kill in found}))
    loads = sorted(kill.load for kill in found)
    lines = [f"{len(found)} kills at commit {commits}, at loads of {loads[0]} to {loads[-1]}"]
    lines += [f"  {what} {count}" for what, count in sorted(ended.items())]
    return "\n".join(lines + [f"  {kill}" for kill in found if kill.wrong])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(COMMANDS))
    parser.add_argument("--log", type=Path, help="keeps a line of JSON a kill, and goes on from those that it has")
    parser.add_argument("--later", type=float, default=LATER, help="0: do not look at the temporary directory")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    kinds = [arguments.only] if arguments.only else ["merge", "merge", "sweep"]
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        place, temporary = Path(scratch) / "place", Path(scratch) / "t"
        log = arguments.log or Path(scratch) / "log.jsonl"
        temporary.mkdir()
        shared(place).mkdir()
        right, seconds = {}, {}
        for kind in dict.fromkeys(kinds):
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            started = time.monotonic()
            run = Run(place, kind)
            if undisturbed := run.wait(UNDISTURBED):
                sys.exit(f"an undisturbed {kind} ended with {undisturbed}: {run.said[-500:]}")
            right[kind], seconds[kind] = outcome(place, kind), time.monotonic() - started
        while len(kills(log)) < arguments.kills:
            kind = random.choice(kinds)
            for kill in soak(kind, place, right[kind], seconds[kind]):
                with open(log, "a") as file:
                    file.write(json.dumps(asdict(kill)) + "\n")
                print(f"{len(kills(log)):4} {kill}", flush=True)
        time.sleep(arguments.later)
        wrong = []
        if arguments.later and (last := Run(place, kinds[0]).wait(UNDISTURBED)):
            wrong.append(f"the last run ended with {last}")
        ours = {f"rvdist-engines-{os.getuid()}", f"torchinductor_{getpass.getuser()}"}  # of this user, for all runs
        wrong += [f"left: {name}" for name in set(os.listdir(temporary)) - ours if arguments.later]
        found = kills(log)
    print(summary(found))
    for one in wrong:
        print(f"  {one}")
    sys.exit(bool(wrong) or any(kill.wrong for kill in found))


if __name__ == "__main__":
    main()
