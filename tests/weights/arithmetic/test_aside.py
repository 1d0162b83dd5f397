"""Matrices that wait in files of the temporary directory, on a real file system that is full, too."""

import os
import subprocess
import sys
from collections import defaultdict
from contextlib import nullcontext

import pytest
import torch
from checkpoints import near, tensors, write_checkpoint
from peaks import peak_while

from rvdist.core.errors import Failed
from rvdist.core.method import MethodSpec
from rvdist.core.point import Term, Vector, WeightPoint
from rvdist.merge.actor import WorkerSettings
from rvdist.merge.driver import merge
from rvdist.merge.plan import build_plan
from rvdist.weights.arithmetic import aside
from rvdist.weights.arithmetic.aside import Aside
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.rows import matrix_room

ROWS = torch.arange(3000, dtype=torch.float64).view(30, 100).sqrt()


@pytest.fixture(params=[8 << 20, 0], ids=["in memory", "in a file"])
def large(request, monkeypatch, tmp_path):
    monkeypatch.setattr(aside, "_LARGE", request.param)
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.fixture
def full(tmp_path, monkeypatch, mount):
    """A temporary directory of 64 KiB, and every matrix is large."""
    place = mount(tmp_path / "full", "-t", "tmpfs", "-o", "size=64k", "tmpfs")
    monkeypatch.setattr(aside, "_LARGE", 0)
    monkeypatch.setenv("TMPDIR", str(place))
    return place


def test_it_comes_back_as_it_was(large, tmp_path):
    """Also after more was put below it, of columns as they lie in memory, and of none."""
    matrix = Aside(60, 100)
    assert matrix.read().shape == (0, 100)
    for rows in (ROWS[:7], ROWS[:0], ROWS[7:]):
        matrix.append(rows)
    assert torch.equal(matrix.read(), ROWS)
    matrix.append(ROWS.T.contiguous().T)
    assert matrix.rows == 60 and torch.equal(matrix.read(), ROWS.repeat(2, 1))
    assert not list(tmp_path.iterdir())


def test_one_that_waits_takes_no_memory():
    parts = [torch.randn(1000, 1000, dtype=torch.float64) for _ in range(2)]
    kept = Aside(8000, 1000)

    def work():
        for k in range(8):
            kept.append(parts[k % 2])

    assert peak_while(work) < 4 << 20
    assert torch.equal(kept.read()[7000:], parts[1])


def test_nothing_is_left_of_a_process_that_is_killed(tmp_path):
    script = (
        "import sys, time, torch; from rvdist.weights.arithmetic.aside import Aside\n"
        "matrix = Aside(2000, 1000); matrix.append(torch.ones(2000, 1000, dtype=torch.float64))\n"
        "print(matrix._file.fileno(), flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], env=os.environ | {"TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, text=True
    )
    try:
        number = int(child.stdout.readline())
        lies = os.readlink(f"/proc/{child.pid}/fd/{number}")
        assert lies.startswith(str(tmp_path)) and lies.endswith(" (deleted)")
        assert not list(tmp_path.iterdir()), "it has no name meanwhile"
    finally:
        child.kill()
        child.communicate()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lose", [lambda file: os.pwrite(file, bytes(4096), 8192), lambda file: os.ftruncate(file, 99)])
def test_what_a_disk_has_lost_is_noticed(lose, monkeypatch, tmp_path):
    monkeypatch.setattr(aside, "_LARGE", 0)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    matrix = Aside(30, 100)
    matrix.append(ROWS)
    lose(matrix._file.fileno())
    with pytest.raises(Failed, match=rf"^{tmp_path}: gave back other bytes than were written; .*set TMPDIR"):
        matrix.read()


def test_a_directory_that_takes_no_file(monkeypatch, tmp_path):
    """No other one is taken in its place."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    said = r"takes no file \(No such file or directory\); up to 30.5 MiB of matrices are to wait there"
    with pytest.raises(Failed, match=rf"^{tmp_path}/none: {said} .*set TMPDIR"):
        Aside(2000, 1000)


def test_a_directory_without_room_ends_a_merge_in_one_sentence(full, tmp_path, monkeypatch):
    """And the same one goes on where there is some."""
    base = tensors(0)
    target, minus, plus, other = (
        str(write_checkpoint(tmp_path / f"checkpoint{k}", near(base, k) if k else base)) for k in range(4)
    )
    terms = tuple(Term(0.5, Vector(donor, minus)) for donor in (plus, other))
    point = WeightPoint(target, terms, MethodSpec("tsv_m"))
    sources = {source: open_source(source) for source in point.sources()}

    def run(name):
        plan = build_plan({tmp_path / name: point}, sources)
        merge(plan, sources, defaultdict(str), WorkerSettings(1, alone=True))
        return {file.name: file.read_bytes() for file in (tmp_path / name).glob("*.safetensors")}

    (full / "other").write_bytes(bytes(64 << 10))
    with pytest.raises(Failed, match=rf"^{full}: has no room \(No space left on device\); up to 0.0 MiB .*set TMPDIR"):
        run("out")
    assert not (tmp_path / "out").exists()
    assert [file.name for file in full.iterdir()] == ["other"]
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    found = run("out")
    aside._LARGE = 8 << 20
    assert found == run("in memory") and found


def test_what_a_plan_foretells_of_the_temporary_directory(mount, tmp_path, monkeypatch):
    """A worker takes that much of it, and no more."""
    base = tensors(0)
    target, minus, *donors = (
        str(write_checkpoint(tmp_path / f"checkpoint{k}", near(base, k) if k else base)) for k in range(4)
    )
    point = WeightPoint(target, tuple(Term(0.5, Vector(donor, minus)) for donor in donors), MethodSpec("tsv_m"))
    sources = {source: open_source(source) for source in point.sources()}
    assert matrix_room(point, sources) == 0, "memory is spared for these"
    monkeypatch.setattr(aside, "_LARGE", 0)
    foretold = matrix_room(point, sources)
    assert foretold == 16 * 48 * 48
    pages = 2 * -(-foretold // 2 // os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PAGE_SIZE")  # of two files
    for size, ends in ((pages, nullcontext()), (pages // 2, pytest.raises(Failed, match="has no room"))):
        place = mount(tmp_path / f"of {size}", "-t", "tmpfs", "-o", f"size={size}", "tmpfs")
        monkeypatch.setenv("TMPDIR", str(place))
        with ends:
            plan = build_plan({tmp_path / f"out{size}": point}, sources)
            merge(plan, sources, defaultdict(str), WorkerSettings(1, alone=True))
