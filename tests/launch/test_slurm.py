"""launch/slurm.sh under a `srun` and a `scontrol` of ours, which start real Ray on two machines within this one."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from checkpoints import POCKET, load_checkpoint
from machines import NAMES, connected, processes_in

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "slurm.sh"
STUBS = Path(__file__).with_name("slurm")
CORES = len(os.sched_getaffinity(0))
# Python on a node: Ray is told of as many GPUs as it would find; what the command ends with may be another status.
PYTHON = """#!/bin/bash
case "$2 $3" in
  "ray.scripts.scripts start") exec {python} "$@" --num-gpus="${{STEP_GPUS:-0}}" ;;
  rvdist.launch*) {python} "$@" && exit "${{ENDS:-0}}" ;;
  *) exec {python} "$@" ;;
esac
"""
_jobs = itertools.count(os.getpid() * 10)


@dataclass
class Job:
    """A job of this cluster while it runs: its process, the networks it has, and what was seen of it from outside.
    The workers of its merge stand still until there are as many as are `together`."""

    number: int
    place: Path
    process: subprocess.Popen[str]
    networks: set[str]
    together: int
    workers: dict[int, str] = field(default_factory=dict)
    modes: set[int] = field(default_factory=set)

    @property
    def port(self) -> str:
        """What Ray's head listens on."""
        return str(20000 + self.number % 12000)

    def watch(self) -> None:
        """Notes in which networks the merge has workers, and the modes of the token's file."""
        while self.process.poll() is None:
            for network in self.networks:
                for pid in set(processes_in(network)) - self.workers.keys():
                    with suppress(OSError):
                        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::WorkerActor"):
                            self.workers[pid] = network
                            self._hold(pid)
            for path in self.place.glob(f".rvdist-{self.number}-*/token"):
                self.modes |= {stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)}
            time.sleep(0.05)

    def _hold(self, pid: int) -> None:
        if len(self.workers) < self.together:
            os.kill(pid, signal.SIGSTOP)
        else:
            for worker in self.workers:
                os.kill(worker, signal.SIGCONT)

    def end(self, timeout: float = 300) -> tuple[int, str]:
        """Exit status and everything it printed; nothing of it is left running or lying about."""
        watcher = threading.Thread(target=self.watch)
        watcher.start()
        shown, _ = self.process.communicate(timeout=timeout)
        watcher.join()
        assert not list(self.place.glob(".rvdist-*")), "the token is still there"
        assert not Path(f"/tmp/rvdist-{self.number}").exists(), "Ray's files are still there"
        return self.process.returncode, shown


class Allocation:
    """Two nodes; where namespaces are not permitted both are this machine itself."""

    def __init__(self, place: Path) -> None:
        self.machines = connected(place)
        self.nodes = place / "nodes"
        self.nodes.mkdir()
        for name in NAMES:
            (self.nodes / name).touch()
        for machine in self.machines:
            (self.nodes / machine.name).write_text(str(machine.pid))
        self.python = place / "python"
        self.python.write_text(PYTHON.format(python=sys.executable))
        self.python.chmod(0o755)

    def sbatch(self, place: Path, *arguments: str, together: int = 0, **more: str) -> Job:
        """Runs a copy of the script on the first node, as slurmd does, with `more` in its environment."""
        number = next(_jobs)
        spooled = self.nodes / f"job{number}" / "slurm_script"
        spooled.parent.mkdir()
        shutil.copy(SCRIPT, spooled)
        environment = os.environ | {
            "SLURM_JOB_ID": str(number),
            "SLURM_JOB_NODELIST": ",".join(NAMES),
            "SLURM_JOB_NUM_NODES": str(len(NAMES)),
            "SLURM_JOB_CPUS_PER_NODE": f"{CORES}(x{len(NAMES)})",
            "NODES": str(self.nodes),
            "PATH": f"{STUBS}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            **more,
        }
        command = ["bash", str(spooled), *arguments]
        if self.machines:
            command = self.machines[0].enter(*command, wd=place)
        else:
            environment["HEAD_ADDRESS"] = "127.0.0.1"
        process = subprocess.Popen(
            command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        return Job(number, place, process, {machine.network for machine in self.machines}, together)

    def left(self) -> list[str]:
        """What still runs on its nodes."""
        here = {machine.pid for machine in self.machines}
        found = {pid for machine in self.machines for pid in processes_in(machine.network)} - here
        return [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in found]


@pytest.fixture(scope="module")
def allocation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Allocation]:
    made = Allocation(tmp_path_factory.mktemp("allocation"))
    yield made
    for machine in made.machines:
        machine.end()


def merge(*more: str, workers: str = "2") -> tuple[str, ...]:
    donors = (f"vector.plus={POCKET / 'grpo'}", f"vector.minus={POCKET / 'sft'}")
    return (f"target={POCKET / 'target'}", *donors, "max_shard_size=200KB", f"merge.workers={workers}", *more)


def test_a_merge_on_two_nodes(allocation: Allocation, tmp_path: Path) -> None:
    """That have GPUs, one of them more than the other: steps get them, and none of what would contradict that."""
    cards = {"GRES": "nvme:1,gpu:a100:2(IDX:0,5)", "LAST_GRES": "gpu:1g.10gb:3(IDX:0-2),gpu:t4:1(IDX:3)"}
    asked = {"SLURM_GPUS_PER_NODE": "2", "SLURM_MEM_PER_CPU": "4096"}
    steps = allocation.nodes / "steps"
    steps.write_text("")
    job = allocation.sbatch(
        tmp_path,
        *merge("alpha=0.5", "output=out", "hydra.run.dir=run"),
        together=2,
        PYTHON=str(allocation.python),
        **cards,
        **asked,
    )
    status, shown = job.end()
    assert status == 0, shown
    assert [line.split()[:2] for line in steps.read_text().splitlines() if " bash " in line] == [
        ["rv1", "2"],
        ["rv2", "4"],
    ]
    assert not list(tmp_path.glob("*-logs"))
    assert "not seen" not in shown
    target, plus, minus = (load_checkpoint(POCKET / name) for name in ("target", "grpo", "sft"))
    merged = load_checkpoint(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    for name, tensor in target.items():
        vector = plus[name].float() - minus[name].float()
        assert torch.equal(merged[name], (tensor.float() + 0.5 * vector).to(tensor.dtype)), name
    assert job.modes == {0o600, 0o700}
    assert allocation.left() == []
    assert set(job.workers.values()) == job.networks


@pytest.mark.slow
def test_what_is_refused_and_what_is_told(allocation: Allocation, tmp_path: Path) -> None:
    """The command's exit status is the job's; a directory that one node alone has may hold the run."""
    if not allocation.machines:
        pytest.skip("mount namespaces are not permitted here")
    (tmp_path / "private").mkdir()
    allocation.machines[1].do(f"mount -t tmpfs none {tmp_path}/private")
    status, shown = allocation.sbatch(tmp_path, *merge("output=out", "alhpa=1", "hydra.run.dir=run")).end()
    assert status == 2 and "rvdist: alhpa: no such key; did you mean alpha?" in shown, shown
    job = allocation.sbatch(tmp_path, *merge("output=out", "hydra.run.dir=run"), LAST_GRES="gpu:8(IDX:0-7)")
    status, shown = job.end()
    assert status == 2 and "rvdist: rv2: the job was given 8 GPUs there and Ray sees 0; see what nvidia-smi" in shown
    cores = {"SLURM_JOB_CPUS_PER_NODE": f"{CORES * 64},{CORES}"}
    status, shown = allocation.sbatch(tmp_path, *merge("output=out", "hydra.run.dir=run"), **cores).end()
    assert status == 2 and f"rv1: the job was given {CORES * 64} cores there and Ray sees {CORES};" in shown, shown
    assert not list(tmp_path.glob("*-logs"))
    status, shown = allocation.sbatch(tmp_path, *merge("output=out", "hydra.run.dir=private/run")).end()
    assert status == 0, shown
    where = tmp_path / "private/run"
    assert f"note: {where}: the run directory is written here and not seen on other nodes (rv2 (" in shown
    assert (where / "timing.json").exists() and (tmp_path / "out/model.safetensors.index.json").exists()
    assert allocation.left() == []


@pytest.mark.slow
def test_the_logs_of_a_job_that_fails(allocation: Allocation, tmp_path: Path) -> None:
    keys = merge("output=out", "hydra.run.dir=run")
    job = allocation.sbatch(tmp_path, *keys, PYTHON=str(allocation.python), ENDS="1")
    (tmp_path / f".rvdist-{job.number}-left").mkdir()  # by the same job on a node that failed
    status, shown = job.end()
    kept = tmp_path / f"rvdist-{job.number}-logs"
    assert status == 1 and shown.splitlines()[-1] == f"rvdist: what Ray and its workers wrote is in {kept}"
    assert sorted(path.name for path in kept.iterdir()) == list(NAMES)
    names = {path.name for path in kept.glob("*/*")}  # of one here, since their disks are one
    assert {"raylet.out", "gcs_server.out"} < names and any(name.startswith("worker-") for name in names)


@pytest.mark.slow
def test_a_sweep_on_all_cores(allocation: Allocation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says of threads, each node has a worker for each of its cores, if so many are wanted."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    workers = min(4, len(NAMES) * CORES)
    everyone = merge("alpha=0.5,1", "output=out/{alpha}", "hydra.sweep.dir=sweep", workers=str(workers))
    job = allocation.sbatch(tmp_path, "-m", *everyone, together=workers)
    status, shown = job.end()
    assert status == 0, shown
    assert (tmp_path / "out/0.5/rvdist.json").exists() and (tmp_path / "out/1/rvdist.json").exists()
    assert len(job.workers) >= workers or not job.networks


@pytest.mark.slow
def test_a_job_that_is_cancelled_while_a_node_is_missing(allocation: Allocation, tmp_path: Path) -> None:
    job = allocation.sbatch(tmp_path, *merge("output=out", "hydra.run.dir=run", "cluster.nodes=3"))
    steps = allocation.nodes / "steps"
    deadline = time.monotonic() + 120
    while not (steps.exists() and len([line for line in steps.read_text().splitlines() if job.port in line]) == 2):
        assert job.process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(10)  # by then it waits for nodes
    job.process.terminate()
    status, shown = job.end()
    assert status == 130, shown
    assert not (tmp_path / "out").exists()
    assert allocation.left() == []
