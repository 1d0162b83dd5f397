"""Fixtures that every room's tests share."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["RVDIST_UP"] = f"/tmp/rvdist-tests-{os.getpid()}"  # nobody's: commands join no Ray that a developer has up
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait for work leave the cores to other processes

import forked
import ray_workers
from checkpoints import POCKET, write_family
from guarantees import COLLECTED, cases, claims

_SHARES = {"heavy": 2, "fast": 3}  # of which `make test` runs some beside each other
_STATUS = pytest.StashKey[int]()
_WITHOUT = Path(__file__).with_name("without")
_SHARED = {"ray_local", "families", "nodes"}  # a Ray or engines in the process of the tests
_HEAVY = _SHARED | {"resumed", "examples", "allocation", "told"}  # and what starts commands


def pytest_addoption(parser: pytest.Parser) -> None:
    shares = [f"{name}-{k}" for name, count in _SHARES.items() for k in range(1, count + 1)]
    choices = ["fast", "shared", "heavy", *shares]
    parser.addoption("--part", choices=choices, help="one of the parts of `make test`, or a share of it")


def part(item: pytest.Item) -> str:
    """What a test needs decides: little, a Ray or engines that others share, or much of its own."""
    if _SHARED & set(getattr(item, "fixturenames", ())):
        return "shared"
    return "heavy" if item.get_closest_marker("heavy") else "fast"


def pytest_configure(config: pytest.Config) -> None:
    """What is fast needs neither Ray nor vLLM: there, and in the processes it starts, importing them fails. What is
    started in the background or by nohup ignores signals, which its own commands must not inherit."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)
    if (config.getoption("part") or "").startswith("fast"):
        sys.path.insert(0, str(_WITHOUT))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_WITHOUT), os.environ.get("PYTHONPATH")]))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[COLLECTED] = cases(items)
    for item in items:
        if _HEAVY & set(getattr(item, "fixturenames", ())):
            item.add_marker("heavy")
    items.sort(key=lambda item: part(item) == "shared")  # last: commands after them would find their Ray's environment
    if wanted := config.getoption("part"):
        wanted, _, share = wanted.partition("-")
        mine = [item for item in items if part(item) == wanted]
        if share:  # of the files: some of their tests share what takes time
            files = [path for path, _ in Counter(item.path for item in mine).most_common()]  # dealt, the longest first
            mine = [item for item in mine if files.index(item.path) % _SHARES[wanted] + 1 == int(share)]
        kept = set(mine)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = mine


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Commands of heavy tests share a Ray; those of slow ones start one each, as commands do."""
    forked.settings()  # before any test has its own
    forked.is_ray_shared = part(item) == "heavy" and not item.get_closest_marker("slow")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """What vLLM sets where a heavy test imports it, no command of a later test has: it would share nothing."""
    before = dict(os.environ)
    try:
        return (yield)
    finally:
        if part(item) == "heavy":
            for key in os.environ.keys() - before.keys():
                del os.environ[key]
            os.environ.update(before)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported by now stays: statsmodels has all garbage looked for at every correction of p-values."""
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which claims of docs/guarantees.md were not tested here, for lack of what they need."""
    named = {test for _, tests in claims() for test in tests}
    skipped = {report.nodeid.partition("[")[0] for report in terminalreporter.stats.get("skipped", [])}
    for test in sorted(named & skipped):
        terminalreporter.write_line(f"a guarantee was not tested here in full: {test}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Python needs most of a minute to take down a process in which vLLM engines lived, and tests nothing with it."""
    if "vllm" in sys.modules and _STATUS in config.stash:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[_STATUS])


Family = Callable[..., dict[str, Path]]


@pytest.fixture
def family(tmp_path: Path) -> Family:
    """`family(dtype, shards)` writes target, plus and minus, siblings of one initialisation."""

    return partial(write_family, tmp_path)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with a copy of the pocket family in it."""
    for member in ("target", "sft", "grpo"):
        shutil.copytree(POCKET / member, tmp_path / "family" / member)
    return tmp_path


@pytest.fixture(scope="session")
def ray_local():
    """One Ray for all tests that need no more."""
    from rvdist.core import cluster

    ray_workers.fork()
    cluster.connect("local", namespace="rvdist-tests")
    yield
    cluster.disconnect()


@pytest.fixture
def mount() -> Generator[Callable[..., Path]]:
    """`mount(place, *options)`; skips the test where that is not permitted."""
    mounted = []

    def mount_it(place: Path, *options: str) -> Path:
        place.mkdir(exist_ok=True)
        done = subprocess.run(["mount", *options, str(place)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount_it
    for place in mounted:
        subprocess.run(["umount", "-q", "-l", str(place)], check=False)


@dataclass(frozen=True)
class Disk:
    """A small ext4 that can break down."""

    place: Path
    image: Path

    def stop(self) -> None:
        """It takes nothing any more, as after errors: what was not synced is lost."""
        subprocess.run(["mount", "-o", "remount,abort", str(self.place)], check=True)

    def begin_again(self) -> None:
        """After a stop."""
        subprocess.run(["umount", str(self.place)], check=True)
        subprocess.run(["mount", "-o", "loop", str(self.image), str(self.place)], check=True)


@pytest.fixture
def disk(mount: Callable[..., Path], tmp_path: Path) -> Disk:
    """Skips the test where there can be none."""
    image = tmp_path / "image"
    image.write_bytes(bytes(4 << 20))
    if not shutil.which("mkfs.ext4") or subprocess.run(["mkfs.ext4", "-q", str(image)], check=False).returncode:
        pytest.skip("no ext4 can be made here")
    return Disk(mount(tmp_path / "disk", "-o", "loop", str(image)), image)
