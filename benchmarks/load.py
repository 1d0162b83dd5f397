"""Many of everything: seconds and memory for each item, of n of them and of a quarter. Flat where nothing grows faster
than what there is; the wall is others' too, processor time is not. `python benchmarks/load.py` writes the table of
benchmarks/README.md; `--only NAME` takes one line, `--one NAME N` measures in this process and prints JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tables import write_table

ROOT = Path(__file__).resolve().parent.parent
POCKET = ROOT / "rvdist" / "pocket"
FAMILY = [f"target={POCKET / 'target'}", f"vector.plus={POCKET / 'grpo'}", f"vector.minus={POCKET / 'sft'}"]
WIDTH = 64  # elements of a made-up tensor
ENGINES, RUNS = 8, 10
PATIENCE = 120.0  # seconds in which a cluster that starts does nothing at all


class Watch:
    """Wall seconds of what is measured, those of processors that this process and those it waited for took, and the
    anonymous memory that this process had more in it than before."""

    seconds = 0.0
    cpu_seconds = 0.0
    nbytes = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        before, began, used = _status("VmRSS"), time.perf_counter(), _cpu_seconds()
        yield
        self.seconds, self.cpu_seconds = time.perf_counter() - began, _cpu_seconds() - used
        self.nbytes = max(0, _status("VmHWM") - before)


def _cpu_seconds() -> float:
    return sum(os.times()[:4])


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


def command(*arguments: str, cwd: Path) -> None:
    """The whole command."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    line = [sys.executable, "-m", "rvdist.launch", *arguments, *FAMILY]
    done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])


def of_a_command(watch: Watch, n: int, take: Callable[[int], None]) -> None:
    """Seconds of `take(n)`, and what its process had more in memory than that of `take(1)`."""
    take(1)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    with watch():
        take(n)
    watch.nbytes = (resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss - before) << 10


def points(n: int, place: Path, watch: Watch) -> None:
    """Points of a sweep, two tasks of 512 requests at each: keys, cache, schedule on eight engines."""
    from schedule import simulate

    from rvdist.core.point import Term, Vector, WeightPoint
    from rvdist.evaluate.cache import SampleCache, slice_keys
    from rvdist.evaluate.fleet.schedule import cut
    from rvdist.evaluate.request import Generate

    requests = {task: [Generate(f"{task} {k}", 64) for k in range(512)] for task in ("a", "b")}
    vector = Vector("plus", "minus")
    with watch():
        known = {WeightPoint("base", (Term(k / n, vector),)): str(k) for k in range(n)}
        slices = [piece for point in known for piece in cut(point, requests, 256)]
        keys = slice_keys(slices, requests, known, dict.fromkeys(requests, "1"), {})
        SampleCache(place).read(list(keys.values()))
        simulate(dict.fromkeys(slices, 1.0), [0.0] * ENGINES, 0.1)


def plan(n: int, place: Path, watch: Watch) -> None:
    """Outputs of one command, planned as one pass."""

    def take(count: int) -> None:
        alphas = ",".join(str(k / count) for k in range(1, count + 1))
        command("stages=[plan]", f"alpha=[{alphas}]", "output=out-{alpha}", "hydra.run.dir=run", cwd=place)

    of_a_command(watch, n, take)


def jobs(n: int, place: Path, watch: Watch) -> None:
    """Jobs of `-m`, composed and planned."""

    def take(count: int) -> None:
        alphas = ",".join(str(k / count) for k in range(1, count + 1))
        command("-m", "stages=[plan]", f"alpha={alphas}", "output=out-{alpha}", "hydra.sweep.dir=run", cwd=place)

    of_a_command(watch, n, take)


def _checkpoints(place: Path, shards: int, tensors: int) -> dict[str, Path]:
    """Target, plus and minus of so many tensors in each of so many files."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(WIDTH, generator=generator)
    made = {}
    for name, scale in (("target", 0.0), ("plus", 0.01), ("minus", 0.02)):
        made[name] = place / name
        made[name].mkdir()
        weight_map = {}
        for k in range(shards):
            file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
            noise = scale * torch.randn(WIDTH, generator=generator)
            weights = {f"layers.{k}.{i}.w": (whole + noise).bfloat16() for i in range(tensors)}
            save_file(weights, made[name] / file, {"format": "pt"})
            weight_map |= dict.fromkeys(weights, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (made[name] / "model.safetensors.index.json").write_text(json.dumps(index))
        (made[name] / "config.json").write_text(json.dumps({"model_type": "made_up", "tie_word_embeddings": True}))
        (made[name] / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    return made


def _merge(place: Path, made: dict[str, Path], watch: Watch) -> None:
    """The whole merge but Ray: one worker, in this process."""
    from rvdist.core.point import Term, Vector, WeightPoint
    from rvdist.merge.plan import build_plan
    from rvdist.merge.roster import Roster
    from rvdist.merge.worker import MergeWorker
    from rvdist.weights import compat
    from rvdist.weights.checkpoint.beside import carry_over, write_index
    from rvdist.weights.checkpoint.journal import Written
    from rvdist.weights.checkpoint.source import open_source
    from rvdist.weights.checkpoint.staging import Staging

    point = WeightPoint(str(made["target"]), (Term(1.0, Vector(str(made["plus"]), str(made["minus"]))),))
    with watch():
        sources = {name: open_source(name) for name in point.sources()}
        compat.check(point, sources)
        built = build_plan({place / "out": point}, sources)
        layout = built.layouts[0]
        staging = Staging(place / "out", built.digests[0][0])
        for name, (header, size) in layout.files.items():
            staging.allocate(name, header, size)
        partial = [type(built.outputs[0])(built.outputs[0].points, (staging.partial,))]
        worker, roster = MergeWorker(partial, sources, None), Roster(built)
        roster.meet("here", frozenset())
        done = []
        while unit := roster.take("here", frozenset(), {}):
            (digest,) = worker.run(unit, (None,)).digests
            done.append(Written(unit.file, unit.start, unit.nbytes, digest))
        worker.sync()
        staging.journal(done)
        carry_over(sources[point.base], staging, None)
        write_index(staging, layout.tensors, list(layout.files))
        staging.commit()


def shards(n: int, place: Path, watch: Watch) -> None:
    """Files of a checkpoint, eight tensors each, merged but for Ray."""
    _merge(place, _checkpoints(place, n, 8), watch)


def tensors(n: int, place: Path, watch: Watch) -> None:
    """Tensors of a checkpoint of ten files, merged but for Ray."""
    _merge(place, _checkpoints(place, 10, n // 10), watch)


def records(n: int, place: Path, watch: Watch) -> None:
    """Records of a report of 20 arms and five tasks: read, compared, shown."""
    from significance import write_experiment

    from rvdist.core.point import Arm, WeightPoint
    from rvdist.core.record import TaskInfo, read_records
    from rvdist.report.findings import Findings, Making
    from rvdist.report.report import write_report
    from rvdist.report.statistics.compare import summarise

    write_experiment(place, 20, n // 100)
    said = json.loads((place / "tasks.json").read_text())
    infos = [TaskInfo(name, "1", (("score", "none"),), ("score", "none"), {"score": True}) for name in said["tasks"]]
    arms = [Arm(name, WeightPoint(name), "plain", None) for name in said["arms"]]
    with watch():
        found = list(read_records(place / "records.jsonl"))
        rows = summarise(arms, found, infos, arms[0].name)
        write_report(place, Findings(arms, rows, found, infos), Making("", "", {arm.name: arm.name for arm in arms}))


def runs(n: int, place: Path, watch: Watch) -> None:
    """Slices of 256 answers that ten runs write into one cache at once, eight of them together."""
    from rvdist.evaluate.cache import SampleCache

    SampleCache(place).close()
    with watch():
        processes = [multiprocessing.Process(target=_write, args=(place, run, n // RUNS)) for run in range(RUNS)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            if process.exitcode:
                sys.exit("a run failed")
    found = SampleCache(place).read([f"{run}-{k}" for run in range(RUNS) for k in range(n // RUNS)])
    assert len(found) == n // RUNS * RUNS


def together(n: int, place: Path, watch: Watch) -> None:
    """Runs at once on one Ray cluster and one cache: each merges, scores three arms from what is cached, reports."""
    shared = ["benchmarks=pocket", "benchmarks.limit=24", "sweep.alphas=[0.5,1]", f"cache.dir={place / 'cache'}"]
    command(*shared, "engine.count=1", "hydra.run.dir=first", cwd=place)
    right = (place / "first" / "summary.json").read_bytes()
    with _cluster(n) as (address, environment), watch():
        joined = ["cluster=existing", f"cluster.address={address}", "merge.workers=1"]
        line = [sys.executable, "-m", "rvdist.launch", *FAMILY, *shared, *joined]
        running = [
            subprocess.Popen(
                [*line, f"output=out-{k}", f"hydra.run.dir=run-{k}"],
                cwd=place,
                env=environment | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            for k in range(n)
        ]
        failed = [
            said.decode()[-2000:] for process in running if (said := process.communicate()[1]) or process.returncode
        ]
        if failed:
            sys.exit(f"{len(failed)} of {n} runs failed: " + "\n".join(failed))
    for k in range(n):
        assert (place / f"run-{k}" / "summary.json").read_bytes() == right
        assert not (place / f"out-{k}.partial").exists()
    weights = {hashlib.sha256((place / f"out-{k}" / "model.safetensors").read_bytes()).digest() for k in range(n)}
    assert len(weights) == 1


@contextmanager
def _cluster(cores: int) -> Iterator[tuple[str, dict[str, str]]]:
    """The address of a cluster that believes to have so many cores, and the environment of who joins it."""
    with tempfile.TemporaryDirectory(prefix="l", dir="/tmp", ignore_cleanup_errors=True) as short:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"HOME": short, "RAY_TMPDIR": short}
        words = f"start --head --port=0 --num-cpus={cores} --include-dashboard=false --disable-usage-stats --block"
        line = [sys.executable, "-m", "ray.scripts.scripts", *words.split(), "--node-ip-address=127.0.0.1"]
        ray = subprocess.Popen(
            line, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            noted, seen, quiet = Path(short, "ray/ray_current_cluster"), 0.0, time.monotonic()
            while not (noted.exists() and noted.read_text()):
                if (now := _spent_in(short)) > seen:
                    seen, quiet = now, time.monotonic()
                if ray.poll() is not None or time.monotonic() - quiet > PATIENCE:
                    sys.exit("no cluster")
                time.sleep(1)
            yield noted.read_text(), environment
        finally:
            for process in _processes_of(short):
                with suppress(OSError):
                    os.kill(process, signal.SIGKILL)
            ray.wait(60)


def _processes_of(short: str) -> Iterator[int]:
    """Those of a Ray that has its files there."""
    for process in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if f"RAY_TMPDIR={short}\0".encode() in Path(f"/proc/{process}/environ").read_bytes():
                yield int(process)


def _spent_in(short: str) -> float:
    """Ticks of processors that they have had: what grows as long as a start goes on, however slowly."""
    spent = 0.0
    for process in _processes_of(short):
        with suppress(OSError):
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            spent += int(fields[11]) + int(fields[12])
    return spent


def _write(place: Path, run: int, count: int) -> None:
    from rvdist.evaluate.cache import SampleCache
    from rvdist.evaluate.request import Answered, Completion

    cache = SampleCache(place)
    answers = Answered(tuple(Completion("An answer. " * 10, "stop", 100, 30) for _ in range(256)), 0, 1.0)
    for first in range(0, count, 8):
        cache.write((f"{run}-{k}", "point", "task", answers) for k in range(first, min(first + 8, count)))


LOADS: dict[str, tuple[int, Callable[[int, Path, Watch], None]]] = {
    "points": (1_000, points),
    "plan": (1_000, plan),
    "jobs": (10_000, jobs),
    "shards": (1_000, shards),
    "tensors": (50_000, tensors),
    "records": (100_000, records),
    "runs": (800, runs),
    "together": (10, together),
}


def one(name: str, n: int) -> None:
    watch = Watch()
    with tempfile.TemporaryDirectory() as place:
        LOADS[name][1](n, Path(place), watch)
    print(json.dumps([watch.seconds, watch.cpu_seconds, watch.nbytes]))


def measure(name: str, n: int) -> tuple[float, float, int]:
    line = [sys.executable, __file__, "--one", name, str(n)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    seconds, cpu_seconds, nbytes = json.loads(done.stdout.splitlines()[-1])
    return seconds, cpu_seconds, nbytes


def row(name: str, n: int) -> str:
    of, cells = LOADS[name][1].__doc__ or "", []
    taken = [measure(name, count) for count in (n // 4, n)]
    for count, (seconds, cpu_seconds, nbytes) in zip((n // 4, n), taken, strict=True):
        memory = "" if name in ("runs", "together") else f", {nbytes / count / 1024:.1f} KiB"
        each = f"{1000 * seconds / count:.2f} ms, {1000 * cpu_seconds / count:.2f} of processors"
        cells.append(f"{seconds:.1f} s: {each}{memory}")
    grows = (f"{many / few / 4:.2f}" for few, many in zip(taken[0][:2], taken[1][:2], strict=True))
    return f"| {n:,} | {of.partition(': ')[0].rstrip('.')} | {' | '.join([*cells, *grows])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(LOADS))
    parser.add_argument("--one", nargs=2, metavar=("NAME", "N"))
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments.one[0], int(arguments.one[1]))
        return
    lines = []
    for name in [arguments.only] if arguments.only else LOADS:
        lines.append(row(name, LOADS[name][0]))
        print(lines[-1], flush=True)
    head = [
        "| n | of | n / 4 of them, and one | n, and one | × a quarter's | of processors |",
        "|---|---|---|---|---|---|",
    ]
    if not arguments.only:
        write_table("load.py", [*head, *lines])


if __name__ == "__main__":
    main()
