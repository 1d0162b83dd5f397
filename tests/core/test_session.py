"""A Ray of our own keeps its files where nobody else reads or writes, and leaves none."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from rvdist.core import session
from rvdist.core.errors import BadInput
from rvdist.core.session import SessionDirectory


@pytest.fixture
def short(monkeypatch):
    """A directory with a name that has room for sockets' names."""
    import shutil
    import tempfile

    place = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    monkeypatch.setenv("RAY_TMPDIR", str(place))
    yield place
    shutil.rmtree(place, ignore_errors=True)


def test_ray_has_room_for_its_sockets(monkeypatch, tmp_path):
    long = str(tmp_path / ("a" * 60))
    monkeypatch.setenv("TMPDIR", long)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    passed_over = SessionDirectory()
    assert Path(passed_over.path).parent.parent == Path("/tmp")
    passed_over.remove()
    monkeypatch.setenv("RAY_TMPDIR", long)
    with pytest.raises(BadInput, match=f"RAY_TMPDIR={long}: is too long .* set RAY_TMPDIR to a shorter directory"):
        SessionDirectory()
    monkeypatch.setenv("RAY_TMPDIR", "/proc/none")
    with pytest.raises(BadInput, match="/proc/none: cannot hold Ray's files"):
        SessionDirectory()


def test_a_directory_that_is_full_is_told_before_ray_starts(mount, monkeypatch, tmp_path):
    """Its GCS would end after a minute, and nobody could say of what."""
    monkeypatch.setenv("RAY_TMPDIR", str(mount(tmp_path / "full", "-t", "tmpfs", "-o", "size=64k", "tmpfs")))
    monkeypatch.setattr(session, "_LONGEST", 200)
    with pytest.raises(
        BadInput, match=rf"^{tmp_path}/full: has 0.1 MiB left, and Ray's files .*; make room there, or set"
    ):
        SessionDirectory()
    assert not list((tmp_path / "full").iterdir())


def test_what_a_killed_command_left_is_removed_by_the_next(short, monkeypatch):
    names = {}
    for name, mode in (("left", 0o700), ("young", 0o700), ("held", 0o700), ("open", 0o755)):
        made = SessionDirectory()
        made._lock.close()
        names[name] = made._path
        os.mkdir(made.path)
        made._path.chmod(mode)
    for name in ("left", "held", "open"):
        os.utime(names[name], (0, 0))
    (short / "ray_not_ours").mkdir()
    os.symlink("/", short / "ray12345678")
    with open(names["held"] / "lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        one = SessionDirectory()
    assert {name for name, path in names.items() if path.exists()} == {"young", "held", "open"}
    assert (short / "ray_not_ours").exists() and (short / "ray12345678").exists()
    assert one._path.stat().st_mode & 0o777 == 0o700
    one.remove()
    assert not one._path.exists()
    assert session._LONGEST > 25


COMMAND = """
import json, os, sys
os.umask(0)
from rvdist.core import cluster, session
session.last_word = "killed; go on"
cluster.connect("local")
import ray
assert session.MARK not in os.environ
ray.get(ray.remote(lambda: 7).remote())
print(json.dumps([oct(os.stat(e.path).st_mode) for e in os.scandir(os.environ["RAY_TMPDIR"])]), flush=True)
if sys.argv[1] == "kill":
    os.kill(os.getpid(), 9)
if sys.argv[1] == "leave":
    cluster.disconnect()
"""


@pytest.mark.heavy
@pytest.mark.parametrize("how", ["leave", *(pytest.param(how, marks=pytest.mark.slow) for how in ("end", "kill"))])
def test_no_command_leaves_files_of_ray_s(how, short):
    run = [sys.executable, "-c", COMMAND]
    done = subprocess.run([*run, how], capture_output=True, text=True, timeout=180)
    assert json.loads(done.stdout.splitlines()[-1]) == ["0o40700"], done.stderr
    assert done.returncode == (-signal.SIGKILL if how == "kill" else 0)
    left = list(short.iterdir())
    assert left == [] or how == "kill"
    deadline = time.monotonic() + 30
    while list(short.iterdir()) or marked(short):
        assert time.monotonic() < deadline, (list(short.iterdir()), marked(short))
        time.sleep(0.1)
    assert done.stderr == ("killed; go on\n" if how == "kill" else "")


TOLD = """
import os, sys
from rvdist.core import cluster, session
session.last_word = "killed"
cluster._session = session.SessionDirectory()
with cluster._session.kept():
    pass
if sys.argv[1:]:
    print("lost", file=sys.stderr, flush=True)
    cluster.said()
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("word", ["lost", "killed"])
def test_why_a_command_ends_is_said_once(short, word):
    """Ray's core may end a process that has said why it ends and is about to."""
    done = subprocess.run([sys.executable, "-c", TOLD, *["x"][: word == "lost"]], capture_output=True, timeout=60)
    assert done.stderr.decode() == f"{word}\n"


KILLED = """
import os, subprocess
from rvdist.core.session import MARK, SessionDirectory
one = SessionDirectory()
with one.kept():
    begins = f'sleep 0.3; exec env {MARK}={one._path} sleep 600'
    subprocess.Popen(["sh", "-c", begins], env={"RAY_TMPDIR": os.environ["RAY_TMPDIR"]}, start_new_session=True)
os.kill(os.getpid(), 9)
"""


def test_what_begins_as_its_command_is_killed_ends_too(short):
    """In the midst of its `exec`, which takes a while where much else runs, a process shows no mark."""
    subprocess.run([sys.executable, "-c", KILLED], timeout=60)
    deadline = time.monotonic() + 60
    while list(short.iterdir()) or marked(short):
        assert time.monotonic() < deadline, (list(short.iterdir()), marked(short))
        time.sleep(0.1)


def marked(short):
    """Processes of a Ray that has its files there, its keeper too."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"RAY_TMPDIR={short}\0".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ")[:99])
    return found
