"""Merges by processes that are kept ready: the bytes, journal and refusals of threads, and nothing is left of them."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from checkpoints import near, tensors, write_checkpoint
from test_alone import digests

from rvdist.core.errors import BadInput, Failed
from rvdist.core.point import WeightPoint
from rvdist.merge import accounts
from rvdist.merge import plan as planning
from rvdist.merge import ready as processes
from rvdist.merge.plan import Output
from rvdist.merge.ready import ReadyWorker
from rvdist.weights.checkpoint.source import open_source


@contextmanager
def kept(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The process that `rvdist up` has beside its Ray."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        command = [sys.executable, "-m", "rvdist.merge.ready", str(listening.fileno())]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[listening.fileno()])
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    path = tmp_path_factory.mktemp("ready") / "socket"
    with kept(path) as process:
        yield str(path), process.pid


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    """`test_alone.run`, with workers behind a socket."""
    import test_alone

    settings = test_alone.WorkerSettings
    monkeypatch.setattr(planning, "UNIT_BYTES", 1000)

    def merge(paths, outputs, workers=1, path="", **options):
        monkeypatch.setattr(test_alone, "WorkerSettings", lambda count, alone: settings(count, alone=True, ready=path))
        return test_alone.run(paths, outputs, workers, **options)

    return merge


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_processes_write_what_threads_do(family, one, run, tmp_path, monkeypatch):
    paths, path = family(shards=3), one[0]
    run(paths, {0.5: tmp_path / "a", -1.0: tmp_path / "b"})
    monkeypatch.setattr("rvdist.merge.worker.MergeWorker.__init__", None)  # none in this process
    monkeypatch.chdir(tmp_path)
    assert len(run(paths, {0.5: Path("c"), -1.0: Path("d")}, 3, path).units) > 40
    assert digests(tmp_path / "a") == digests(tmp_path / "c") and digests(tmp_path / "b") == digests(tmp_path / "d")


def test_what_is_refused_there_is_refused_here(family, one, run, tmp_path):
    paths = family(torch.float16)
    huge = {name: tensor * 60_000 for name, tensor in tensors(3, torch.float16, 1.0).items()}
    paths["plus"] = write_checkpoint(tmp_path / "huge", near(huge, 1))
    with pytest.raises(BadInput, match="infinite"):
        run(paths, {3.0: tmp_path / "out"}, 2, one[0])
    assert not list(tmp_path.glob("out*"))


def test_one_that_is_killed_ends_the_merge_which_goes_on(family, one, run, tmp_path, monkeypatch):
    monkeypatch.setattr(accounts, "SYNC_BYTES", 1)  # every unit
    (path, pid), paths, told = one, family(), []
    run(paths, {0.5: tmp_path / "right"})

    def kill(nbytes: int) -> None:
        told.append(nbytes)
        if len(told) == 20:
            for child in children(pid):
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)

    with pytest.raises(Failed, match="process ended before its time"):
        run(paths, {0.5: tmp_path / "out"}, 1, path, key=b"key", progress=kill)
    assert not (tmp_path / "out").exists()
    assert len((tmp_path / "out.partial/journal.jsonl").read_text().splitlines()) > 10
    run(paths, {0.5: tmp_path / "out"}, 1, path, key=b"key")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "right/model.safetensors").read_bytes()


def test_one_that_is_stopped_is_ended_and_the_merge_goes_on(family, one, run, tmp_path, monkeypatch):
    monkeypatch.setattr(accounts, "SYNC_BYTES", 1)  # every unit
    (path, pid), paths, told, stopped, made = one, family(), [], [], []
    begin = ReadyWorker.__init__
    monkeypatch.setattr(ReadyWorker, "__init__", lambda self, *given, **more: made.append(self) or begin(self, *given))
    run(paths, {0.5: tmp_path / "right"})

    def stop(nbytes: int) -> None:
        told.append(nbytes)
        if len(told) == 20:
            for child in children(pid):
                stopped.append(os.pidfd_open(child))
                os.kill(child, signal.SIGSTOP)
            for worker in made:
                worker._silence = 1.0

    with pytest.raises(Failed, match="did not answer for 1 s"):
        run(paths, {0.5: tmp_path / "out"}, 1, path, key=b"key", progress=stop)
    for descriptor in stopped:  # it will not write when it goes on
        assert select.select([descriptor], [], [], 60)[0]
        os.close(descriptor)
    assert stopped
    run(paths, {0.5: tmp_path / "out"}, 1, path, key=b"key")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "right/model.safetensors").read_bytes()


def test_where_none_is_threads_merge(family, run, tmp_path, monkeypatch):
    paths, path = family(), tmp_path / "socket"
    run(paths, {0.5: tmp_path / "right"})
    run(paths, {0.5: tmp_path / "a"}, 2, str(path))  # no socket
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()  # and never answers, as one that is stopped
        monkeypatch.setattr(processes, "_PATIENCE", 0.0)
        run(paths, {0.5: tmp_path / "b"}, 2, str(path))
    run(paths, {0.5: tmp_path / "c"}, 2, str(path))  # nobody listens any more
    assert digests(tmp_path / "right") == digests(tmp_path / "a") == digests(tmp_path / "b") == digests(tmp_path / "c")


def test_one_that_is_stopped_is_waited_for_once(family, run, tmp_path, monkeypatch):
    paths, path, began = family(), tmp_path / "socket", []
    monkeypatch.setattr(processes, "_PATIENCE", 0.1)
    real = ReadyWorker.__init__
    monkeypatch.setattr(ReadyWorker, "__init__", lambda self, *given, **more: began.append(1) or real(self, *given))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(0)  # room for one
        run(paths, {0.5: tmp_path / "a"}, 3, str(path))
        run(paths, {0.5: tmp_path / "b"}, 3, str(path))  # so many wait that nobody can connect
    assert len(began) == 2 and digests(tmp_path / "a") == digests(tmp_path / "b")


def test_they_end_with_whoever_keeps_them(family, tmp_path):
    path = tmp_path / "socket"
    with kept(path) as process:
        source = open_source(str(family()["target"]))
        made_of = ([Output((WeightPoint("base"),), (tmp_path,))], {"base": source}, None)
        worker, other = (ReadyWorker(str(path), *made_of) for _ in range(2))
        assert worker.can_read("base", "model.safetensors") and not worker.can_read("base", "none")
        below = [os.pidfd_open(child) for child in children(process.pid)]
        assert len(below) == 2
        worker.close()
        assert len(select.select(below, [], [], 60)[0]) == 1  # with its connection
        process.stdin.close()
        assert process.wait() == 0
        for descriptor in below:  # with what it was forked from
            assert select.select([descriptor], [], [], 60)[0]
            os.close(descriptor)
        with pytest.raises(Failed, match="before its time"):
            other.sync()
        other.close()
