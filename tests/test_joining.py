"""Joining a cluster that is there as Ray's documentation has it: `ray start --head`, then the command."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import forked
import pytest
from checkpoints import POCKET

from rvdist.core.session import is_ours

MERGE = ("target=family/target", "vector.plus=family/grpo", "vector.minus=family/sft", "cluster=existing")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with the family, in which commands are given."""
    place = tmp_path_factory.mktemp("joining")
    shutil.copytree(POCKET, place / "family", ignore=shutil.ignore_patterns("*.py", "data"))
    return place


def asked(place):
    """The environment of commands: a home without a token, a directory of Ray's that has no other cluster."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "HOME": str(place),
        "RAY_TMPDIR": os.environ["JOINING"],
    }


@pytest.fixture(scope="module")
def started(place):
    """A cluster by `ray start --head` in another directory, when there was no token yet."""
    with tempfile.TemporaryDirectory(prefix="j", dir="/tmp") as short, pytest.MonkeyPatch.context() as patch:
        patch.setenv("JOINING", short)
        words = "start --head --port=0 --num-cpus=1 --include-dashboard=false --disable-usage-stats --block"
        ray = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", *words.split()],
            env=asked(place),
            cwd="/",
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        noted, deadline = Path(short, "ray/ray_current_cluster"), time.monotonic() + 90
        while not (noted.exists() and noted.read_text()) and ray.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        yield noted
        for process in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if int(process) == ray.pid or short in Path(f"/proc/{process}/cmdline").read_text():
                    os.kill(int(process), signal.SIGKILL)
        ray.wait(30)


def command(place, *arguments):
    return forked.run("rvdist.launch", [*MERGE, "overwrite=true", *arguments], place, asked(place), timeout=240)


@pytest.mark.heavy
def test_a_cluster_that_takes_no_token_is_joined_by_who_has_one_and_paths_are_the_commands(place, started):
    (place / ".ray").mkdir()
    token = place / ".ray/auth_token"
    token.touch(mode=0o600)
    token.write_text("1f" * 32)
    address = started.read_text()
    for given in ((), (f"cluster.address={address}",)):
        done = command(place, "output=out", *given)
        assert done.returncode == 0, done.stdout + done.stderr
        assert (place / "out/model.safetensors").is_file() and not done.stderr


@pytest.mark.heavy
def test_where_there_is_no_cluster_it_is_said_at_once(place, started):
    noted = started.read_text()
    started.write_text("127.0.0.1:9")
    done = command(place, "output=none")
    assert done.returncode == 2 and "cluster.address=127.0.0.1:9: no Ray cluster can be reached" in done.stderr
    started.write_text(noted)


def test_a_cluster_that_a_command_has_for_itself_is_no_other_commands():
    assert is_ours("/tmp/rayab_d12x4/r/session_2026-01-01_00-00-00_000000_1")
    assert not is_ours("/tmp/ray/session_2026-01-01_00-00-00_000000_1") and not is_ours("")


LEAVING = """
import os, sys
import ray
from rvdist.core import cluster, private_ray

class Holder:
    def hold(self):
        pass

assert not private_ray.is_guest()
cluster.connect(sys.argv[1])
assert private_ray.is_guest()
holder = ray.remote(num_cpus=1)(Holder).remote()  # all that the cluster has
ray.get(holder.hold.remote(), timeout=60)
private_ray.leave_last()
private_ray.say_farewell()
os._exit(7)
"""


@pytest.mark.heavy
def test_who_leaves_last_of_all_leaves_nothing_behind(place, started):
    for _ in range(2):
        command = [sys.executable, "-c", LEAVING, started.read_text()]
        done = subprocess.run(command, cwd=place, env=asked(place), capture_output=True, text=True, timeout=240)
        assert (done.returncode, done.stderr) == (7, "")
