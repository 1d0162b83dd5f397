"""The Ray that stays up between commands: who may join it, and that nothing is left of it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import forked
import pytest

from rvdist.core import standing
from rvdist.core.errors import BadInput
from rvdist.core.standing import Standing, find, hold, holder, tell


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this user's file would be."""
    monkeypatch.setenv("RVDIST_UP", str(tmp_path / "up"))
    return standing.file()


def test_what_is_held_is_found_by_who_is_alike(state, monkeypatch):
    assert find() == (None, "") and holder() is None
    held = hold()
    assert held is not None and state.stat().st_mode & 0o777 == 0o600 and state.parent.stat().st_mode & 0o777 == 0o700
    assert hold() is None, "one at a time"
    assert "not up yet" in find()[1] and holder() == os.getpid()
    here = Standing.here("127.0.0.1:1")
    tell(held, here)
    assert find() == (here, "") and holder() == os.getpid()
    monkeypatch.setenv("HARMLESS", "1")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert find() == (here, "")
    for name, value in (("HF_HOME", "/elsewhere"), ("VLLM_ATTENTION_BACKEND", "x"), ("PYTHONPATH", "/other")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            found, why = find()
            assert found is None and f"other settings than this command ({name}) and is not used" in why
    assert "elsewhere" not in state.read_text() and str(Path.home()) not in state.read_text().replace(
        sys.executable, ""
    )
    standing.forget(held)
    assert not state.exists() and find() == (None, "")


@pytest.mark.parametrize("change", [{"versions": {"ray": "2.59.0"}}, {"cores": [99]}])
def test_another_version_and_other_cores_are_not_joined(state, change):
    held = hold()
    here = Standing.here("127.0.0.1:1")
    tell(held, dataclasses.replace(here, **{k: here.versions | v if k == "versions" else v for k, v in change.items()}))
    found, why = find()
    assert found is None and ("(ray)" in why or "(the cores that may be used)" in why)
    held.close()


def test_code_that_changed_since_is_not_joined(state, tmp_path, monkeypatch):
    """Whoever is up has the old one: its bytes would go by the new one's name."""
    (module := tmp_path / "package/merge/alone.py").parent.mkdir(parents=True)
    module.write_text("a = 1")
    monkeypatch.setattr(standing, "__file__", str(tmp_path / "package/core/standing.py"))
    held, here = hold(), Standing.here("127.0.0.1:1")
    tell(held, here)
    assert find() == (here, "")
    module.write_text("a = 12")
    found, why = find()
    assert found is None and "(its code)" in why
    held.close()


def test_what_a_killed_one_left_is_said_once_and_removed(state):
    held = hold()
    tell(held, Standing.here("127.0.0.1:1"))
    held.close()  # as the kernel does where its process is killed
    found, why = find()
    assert found is None and "has ended" in why and not state.exists()
    assert find() == (None, "") and holder() is None


def foreign(state: Path) -> None:
    os.chown(state, 12345, -1)


def leads_out(state: Path) -> None:
    state.rename(state.with_name("real"))
    state.symlink_to("real")


def is_pipe(state: Path) -> None:
    state.unlink()
    os.mkfifo(state, 0o600)


@pytest.mark.parametrize("spoil", [foreign, leads_out, is_pipe, lambda state: state.chmod(0o644)])
def test_a_file_that_is_not_this_users_alone_is_not_believed(state, spoil: Callable[[Path], None]):
    if spoil is foreign and os.geteuid():
        pytest.skip("only root can give a file away")
    held = hold()
    tell(held, Standing.here("127.0.0.1:1"))
    spoil(state)
    found, why = find()
    assert found is None and why.startswith(f"{state}: ") and "not used; remove it" in why
    with pytest.raises(BadInput, match="remove it"):
        holder()
    held.close()


@pytest.mark.parametrize("content", [b"", b"{", b'{"pid": 1}', b"[" * 100_000, b'{"pid": "1", "address": 2}', b"\xff"])
def test_a_damaged_file_is_no_ray(state, content):
    held = hold()
    held.write(content)
    assert find()[0] is None and holder() == os.getpid()
    held.close()


def test_a_directory_in_which_others_write_is_refused(state):
    state.parent.mkdir()
    state.parent.chmod(0o777)
    with pytest.raises(BadInput, match="others can write there; set RVDIST_UP"):
        hold()


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for Ray's files and the state."""
    place = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    monkeypatch.setenv("RAY_TMPDIR", str(place))
    monkeypatch.setenv("RVDIST_UP", str(place / "up"))
    yield place
    rvdist("down")
    shutil.rmtree(place, ignore_errors=True)


def rvdist(*arguments: str, cwd: Path | None = None) -> tuple[int, str, str]:
    done = forked.run("rvdist.launch", arguments, cwd or Path.cwd(), os.environ, timeout=240)
    return done.returncode, done.stdout, done.stderr


def begin() -> str:
    """What `up` says when it is up: on a busy machine it may take what its sentence asks for."""
    for _ in range(3):
        status, said, errors = rvdist("up")
        if status == 0 or "run the same command again when less else runs here" not in errors:
            break
    assert status == 0, errors
    return said


def processes(place: Path) -> dict[int, str]:
    """Of all whose environment names the directory, their commands."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"RAY_TMPDIR={place}\0".encode() in (process / "environ").read_bytes():
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
    return {pid: command for pid, command in found.items() if pid != os.getpid()}


def abandoned(names: set[str]) -> set[str]:
    """Those of shared memory that are there and that no process has: others come and go meanwhile."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            mapped = (process / "maps").read_text()
            opened = {os.readlink(descriptor) for descriptor in (process / "fd").iterdir()}
            names = {name for name in names if f"/dev/shm/{name}" not in opened and f"/dev/shm/{name}\n" not in mapped}
    return {name for name in names if Path("/dev/shm", name).exists()}


def is_all_gone(place: Path) -> bool:
    return not processes(place) and not [path for path in place.iterdir() if path.name != "up"]


def wait_until_all_is_gone(place: Path) -> None:
    deadline = time.monotonic() + 30
    while not is_all_gone(place):
        assert time.monotonic() < deadline, (processes(place), list(place.iterdir()))
        time.sleep(0.1)


@pytest.mark.heavy
def test_a_ray_stays_up_between_commands_and_leaves_nothing(places, place):
    from test_listening import listening

    shared = set(os.listdir("/dev/shm"))
    said = begin()
    assert said.startswith("Ray is up, on ")
    (pid,) = (pid for pid, command in processes(places).items() if "rvdist.core.upkeep" in command)
    addresses = {address for address, _ in listening(pid)}
    assert addresses and addresses <= {"127.0.0.1", "::1"}
    assert [path.stat().st_mode & 0o777 for path in places.iterdir()] == [0o700, 0o700]
    status, said, _ = rvdist("up")
    assert status == 0 and said == f"Ray is up already (process {pid}); `rvdist down` ends it\n"

    raylets = [pid for pid, command in processes(places).items() if "raylet/raylet" in command]
    for alpha in ("0.5", "1"):
        merge = ("target=family/target", "vector.plus=family/grpo", "vector.minus=family/sft", "merge.workers=1")
        status, said, errors = rvdist(*merge, f"alpha={alpha}", "output=out-{alpha}", "hydra.run.dir=run", cwd=place)
        assert status == 0 and errors == "" and "note" not in said, (said, errors)
        phases = json.loads((place / "run/timing.json").read_text())["phases"]
        assert "ray_init" in phases and "worker_start" in phases
        assert [pid for pid, command in processes(places).items() if "raylet/raylet" in command] == raylets
    alone = [sys.executable, "-m", "rvdist.launch", *merge[:3], "alpha=1", "output=alone", "hydra.run.dir=run"]
    done = subprocess.run(alone, cwd=place, capture_output=True, text=True)
    timing = json.loads((place / "run/timing.json").read_text())
    assert (done.returncode, done.stderr) == (0, "") and "ray_init" not in timing["phases"]  # so little joins none
    memory = timing["peak_anonymous_bytes"]
    assert memory["driver"] < memory["worker"]  # a process that was ready has what the command has not imported
    assert (place / "alone/model.safetensors").read_bytes() == (place / "out-1/model.safetensors").read_bytes()

    assert rvdist("down") == (0, "Ray is down\n", "")
    assert is_all_gone(places) and not list((places / "up").iterdir())
    assert not abandoned(set(os.listdir("/dev/shm")) - shared)
    assert rvdist("down") == (0, "Ray is not up: nothing to end\n", "")


@pytest.mark.heavy
@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rvdist.core.upkeep", "gcs_server", "raylet/raylet"])
def test_a_ray_of_which_a_part_is_killed_is_gone(places, victim):
    begin()
    (pid,) = (pid for pid, command in processes(places).items() if victim in command.split(" --")[0])
    os.kill(pid, signal.SIGKILL)
    wait_until_all_is_gone(places)
    assert rvdist("down") == (0, "Ray is not up: nothing to end\n", "")
    assert rvdist("up")[0] == 0 and rvdist("down")[0] == 0
    wait_until_all_is_gone(places)
