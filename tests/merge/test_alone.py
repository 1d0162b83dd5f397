"""Merges by threads of this process: no Ray, and the same bytes, journal and refusals."""

from __future__ import annotations

import gc
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from checkpoints import launch, load_checkpoint, near, tensors, write_checkpoint

from rvdist.core.config import ClusterConfig, Config, MergeConfig, merges_alone
from rvdist.core.errors import BadInput, Failed
from rvdist.core.method import MethodSpec
from rvdist.core.point import Term, Vector, WeightPoint
from rvdist.merge import accounts, worker
from rvdist.merge import plan as planning
from rvdist.merge.actor import WorkerSettings
from rvdist.merge.driver import merge
from rvdist.merge.plan import Plan, build_plan
from rvdist.merge.worker import MergeWorker
from rvdist.weights.arithmetic import fused, method
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.checkpoint.staging import Staging

FAMILY = ("target=family/target", "vector.plus=family/grpo", "vector.minus=family/sft")


def run(paths: dict[str, Path], outputs: dict[float, Path], workers: int = 1, **options: object) -> Plan:
    vector = Vector(str(paths["plus"]), str(paths["minus"]))
    points = {output: WeightPoint(str(paths["target"]), (Term(alpha, vector),)) for alpha, output in outputs.items()}
    sources = {name: open_source(name) for point in points.values() for name in point.sources()}
    plan = build_plan(points, sources)
    merge(plan, sources, defaultdict(lambda: "card\n"), WorkerSettings(workers, alone=True), **options)
    return plan


def digests(path: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(path.iterdir())}


def test_an_output_that_another_makes_meanwhile(family, tmp_path, monkeypatch):
    """It stays, and so does what is done: with the other out of the way the same call computes nothing again."""
    journal, paths, out = Staging.journal, family(), tmp_path / "out"

    def make(staging, written):
        journal(staging, written)
        out.mkdir()
        (out / "notes").write_text("theirs")

    monkeypatch.setattr(Staging, "journal", make)
    with pytest.raises(Failed, match="out: already exists; .*; it came while this run wrote .* what is done is kept"):
        run(paths, {0.5: out})
    assert (out / "notes").read_text() == "theirs"
    out.rename(tmp_path / "theirs")
    monkeypatch.setattr(Staging, "journal", journal)
    monkeypatch.setattr(MergeWorker, "_compute", None)
    run(paths, {0.5: out})
    monkeypatch.undo()
    run(paths, {0.5: tmp_path / "right"})
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "right/model.safetensors").read_bytes()


def test_little_is_merged_without_the_compiled_loops_to_the_same_bytes(family, tmp_path, monkeypatch):
    imported = "import sys, rvdist.merge.worker; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", imported]).returncode == 0
    monkeypatch.setattr(method, "_loops", None)
    monkeypatch.setattr(worker, "warm_up", method.warm_up.__wrapped__)  # as where nothing has loaded them before
    sizes: list[int] = []
    linear = fused.linear
    monkeypatch.setattr(fused, "linear", lambda base, *rest: (sizes.append(base.numel()), linear(base, *rest))[1])
    paths = family(shards=3)
    operands = sum(open_source(str(path)).nbytes for path in paths.values())
    for much, by in ((2 * operands + 1, "torch"), (operands, "loops")):
        monkeypatch.setattr(worker, "_MUCH", much)
        run(paths, {0.3: tmp_path / by / "one"})
        run(paths, {0.5: tmp_path / by / "two", -1.0: tmp_path / by / "three"})
        assert any(size > 1 for size in sizes) == (by == "loops")
    for out in ("one", "two", "three"):
        assert digests(tmp_path / "torch" / out) == digests(tmp_path / "loops" / out)


@pytest.mark.parametrize(("name", "loads"), [("linear", True), ("ties", False), ("tsv_m", False)])
def test_only_sums_load_the_compiled_loops(name, loads, family, monkeypatch):
    loaded: list[bool] = []
    monkeypatch.setattr(worker, "_MUCH", 1)
    monkeypatch.setattr(worker, "warm_up", lambda: loaded.append(True))
    paths = {part: str(path) for part, path in family(shards=1).items()}
    spec = MethodSpec(name, density=0.5) if name == "ties" else MethodSpec(name)
    point = WeightPoint(paths["target"], (Term(0.5, Vector(paths["plus"], paths["minus"])),), spec)
    outputs = [planning.Output((point,), (Path("out"),))]
    MergeWorker(outputs, {source: open_source(source) for source in point.sources()}, None).close()
    assert loaded == [True] * loads


def test_threads_write_what_one_does_which_is_the_arithmetic(family, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "UNIT_BYTES", 1000)
    monkeypatch.setattr(accounts, "SYNC_BYTES", 5000)
    paths = family(shards=3)
    torch.set_num_threads(2)
    gc.collect()  # files that earlier tests left open do not close in between
    threads, held = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    run(paths, {0.5: tmp_path / "a", -1.0: tmp_path / "b"})
    assert len(run(paths, {0.5: tmp_path / "c", -1.0: tmp_path / "d"}, workers=4).units) > 40
    assert set(threading.enumerate()) <= threads and len(os.listdir("/proc/self/fd")) <= held
    assert torch.get_num_threads() == 2
    assert digests(tmp_path / "a") == digests(tmp_path / "c") and digests(tmp_path / "b") == digests(tmp_path / "d")
    target, plus, minus = (load_checkpoint(paths[name]) for name in ("target", "plus", "minus"))
    for name, tensor in load_checkpoint(tmp_path / "c").items():
        exact = target[name].double() + 0.5 * (plus[name].double() - minus[name].double())
        assert torch.equal(tensor, exact.bfloat16()), name


def test_a_thread_that_fails_ends_all_and_what_is_journalled_is_gone_on_from(family, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "UNIT_BYTES", 1000)
    monkeypatch.setattr(accounts, "SYNC_BYTES", 1)  # every unit
    paths, done, key = family(), [], b"key"
    run(paths, {0.5: tmp_path / "right"})
    threads = set(threading.enumerate())  # a bar of an earlier test has one
    real = MergeWorker.run

    def until_full(self, unit, claims):
        if len(done) == 20:
            raise Failed(f"{unit.file}: cannot be written (No space left on device)")
        done.append(unit)
        return real(self, unit, claims)

    monkeypatch.setattr(MergeWorker, "run", until_full)
    with pytest.raises(Failed, match="No space left"):
        run(paths, {0.5: tmp_path / "out"}, workers=3, key=key)
    assert not (tmp_path / "out").exists() and set(threading.enumerate()) <= threads
    journalled = len((tmp_path / "out.partial/journal.jsonl").read_text().splitlines())
    assert 10 < journalled <= 21

    again = []
    monkeypatch.setattr(MergeWorker, "run", lambda *given: again.append(real(*given)) or again[-1])
    run(paths, {0.5: tmp_path / "out"}, workers=3, key=key)
    assert sum(not one.bytes_written for one in again) == journalled - 1
    weights = [name for name in digests(tmp_path / "out") if name != "rvdist.json"]
    assert all(digests(tmp_path / "out")[name] == digests(tmp_path / "right")[name] for name in weights)


def test_little_is_made_durable_too_when_the_last_was_long_ago(family, tmp_path):
    target = str(family()["target"])
    plan = build_plan({tmp_path / "out": WeightPoint(target)}, {target: open_source(target)})
    wrote, now = [(plan.units[0], ("digest",))], time.monotonic()
    assert accounts.is_due(wrote, now - 31) and not accounts.is_due(wrote, now) and not accounts.is_due([], now - 31)


def test_what_is_not_finite_is_refused_and_nothing_is_left(family, tmp_path):
    paths = family(torch.float16)
    huge = {name: tensor * 60_000 for name, tensor in tensors(3, torch.float16, 1.0).items()}
    paths["plus"] = write_checkpoint(tmp_path / "huge", near(huge, 1))
    with pytest.raises(BadInput, match="infinite"):
        run(paths, {3.0: tmp_path / "out"}, workers=2)
    assert not list(tmp_path.glob("out*"))


def test_when_a_merge_is_done_without_ray():
    alone, small, large = Config(), 64 << 30, (64 << 30) + 1
    assert merges_alone(alone, small) and not merges_alone(alone, large)
    for asked in (
        Config(merge=MergeConfig(workers=1)),
        Config(device="cuda"),
        Config(cluster=ClusterConfig("auto")),
        Config(cluster=ClusterConfig("127.0.0.1:6379")),
        Config(cluster=ClusterConfig(nodes=2)),
    ):
        assert not merges_alone(asked, small)


def test_the_command_needs_no_ray_for_little(place):
    """In this part of the tests there is none to import."""
    done = launch(*FAMILY, "alpha=[0.5,1]", "output=out-{alpha}", "hydra.run.dir=run", "cache.dir=cache", cwd=place)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and f"wrote {place}/out-1" in done.stdout
    again = launch(*FAMILY, "alpha=1", "output=out-1", "hydra.run.dir=run", "cache.dir=cache", cwd=place)
    assert again.returncode == 0 and "out-1: already complete" in again.stdout
    target, plus, minus = (load_checkpoint(place / "family" / name) for name in ("target", "grpo", "sft"))
    for name, tensor in load_checkpoint(place / "out-0.5").items():
        exact = target[name].double() + 0.5 * (plus[name].double() - minus[name].double())
        assert torch.equal(tensor, exact.bfloat16()), name


def test_without_ray_what_needs_it_fails_in_one_sentence(place):
    absent = os.pathsep.join([str(Path(__file__).parents[1] / "without"), os.environ.get("PYTHONPATH", "")])
    done = launch(*FAMILY, "merge.workers=1", "output=out", "hydra.run.dir=r", cwd=place, PYTHONPATH=absent)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("rvdist: Ray cannot be imported (") and not (place / "out").exists()


HELD = """
import itertools, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where a shell began this in the background
from rvdist.merge.alone import Alone
from rvdist.merge.worker import MergeWorker
real, work, begun, merges = MergeWorker.run, Alone._work, itertools.count(), []
def run(self, *given):
    if next(begun) >= 2:
        print("held of", merges[0]._count, file=sys.stderr, flush=True)
        while not merges[0]._over:
            time.sleep(0.01)
    return real(self, *given)
def begin(self, worker):
    merges.append(self)
    work(self, worker)
MergeWorker.run, Alone._work = run, begin
from rvdist.merge import plan
plan.UNIT_BYTES = 64 << 10
from rvdist.launch import main
main()
"""


@pytest.mark.parametrize(("number", "status", "said"), [(signal.SIGINT, 130, "interrupted"), (15, 143, "terminated")])
def test_a_signal_ends_it_with_our_sentence_and_the_same_command_goes_on(place, number, status, said):
    arguments = [*FAMILY, "output=out", "hydra.run.dir=run", "cache.dir=cache"]
    command = [sys.executable, "-c", HELD, *arguments]
    with subprocess.Popen(command, cwd=place, stdout=-1, stderr=-1, text=True) as running:
        held = running.stderr.readline()
        for _ in range(int(held.removeprefix("held of ")) - 1):
            assert running.stderr.readline() == held
        running.send_signal(number)
        _, errors = running.communicate(timeout=60)
    assert running.returncode == status
    assert errors.startswith(f"rvdist: {said}") and "Traceback" not in errors
    kept = (place / "out.partial/journal.jsonl").read_text().count("model")
    assert kept >= 2 and not (place / "out").exists()
    again = launch(*arguments, cwd=place)
    assert again.returncode == 0 and (place / "out/model.safetensors").exists(), again.stderr
