"""Merges on a cluster of several nodes on this machine: who does what, and what happens when nodes are slow or go."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import ray_workers
from checkpoints import near, tensors, write_checkpoint

from rvdist.merge import driver
from rvdist.weights.checkpoint.source import open_source

DRIVER = Path(__file__).with_name("driver.py")
UNIT = 256 << 10
SHARDS = 9


class Nodes:
    """A head node without cores, where the drivers run, and three nodes of one core each."""

    def __init__(self):
        from ray.cluster_utils import Cluster

        ray_workers.fork()
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.address = self.cluster.address
        self.nodes = []
        self.complete()

    def complete(self):
        while len(self.nodes) < 3:
            self.nodes.append(self.cluster.add_node(num_cpus=1))

    def remove(self, node_id):
        """As when a machine loses power: its raylet and its workers are gone at once."""
        (node,) = (node for node in self.nodes if node.node_id == node_id)
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="module")
def nodes():
    started = Nodes()
    yield started
    started.cluster.shutdown()


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Siblings of nine files of about 1 MiB each, and as one file; and the right digests of what is made of them."""
    place = tmp_path_factory.mktemp("cluster")
    base = {f"layers.{k}.w": tensors(k)["model.embed_tokens.weight"].repeat(36, 1) for k in range(SHARDS)}
    made = {"target": base, "plus": near(base, 1), "minus": near(base, 2)}
    paths = {name: str(write_checkpoint(place / name, weights, SHARDS)) for name, weights in made.items()}
    paths["single"] = str(write_checkpoint(place / "single", base))
    return paths


@pytest.fixture(scope="module")
def right(family, tmp_path_factory):
    """The digests of a merge without Ray, whose settings in the environment would keep other nodes out, that nothing
    disturbed."""
    from rvdist.core.point import Term, Vector, WeightPoint
    from rvdist.merge.actor import WorkerSettings
    from rvdist.merge.plan import build_plan

    out = tmp_path_factory.mktemp("right")
    vector = Vector(family["plus"], family["minus"])
    points = {out / name: WeightPoint(family[name], (Term(1.0, vector),)) for name in ("target", "single")}
    sources = {source: open_source(source) for point in points.values() for source in point.sources()}
    driver.merge(build_plan(points, sources), sources, defaultdict(str), WorkerSettings(1, alone=True))
    return {path.name: digests(path) for path in points}


def digests(path):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(path).glob("*.safetensors*"))}


class Run:
    """A driver at work, and the record its workers keep."""

    def __init__(self, nodes, place, *jobs, pace=0.0, sync_bytes=1 << 20, hold=1 << 20):
        nodes.complete()
        self.log = place / "log"
        self.log.mkdir(exist_ok=True)
        options = {"address": nodes.address, "jobs": jobs, "log": str(self.log), "pace": pace}
        options |= {"unit_bytes": UNIT, "sync_bytes": sync_bytes, "hold": hold}
        self.process = subprocess.Popen(
            [sys.executable, str(DRIVER), json.dumps(options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(driver.__file__).parents[2])},
        )

    def units(self):
        """Every unit that was begun: (node, process, file, start)."""
        record = self.log / "units.jsonl"
        return [tuple(json.loads(line)) for line in record.read_text().splitlines()] if record.exists() else []

    def wait_for_units(self, count):
        deadline = time.monotonic() + 120
        while len(self.units()) < count:
            assert self.process.poll() is None and time.monotonic() < deadline, self.process.communicate()
            time.sleep(0.02)

    def go_on(self):
        """Lets the workers do more than the units they were to `hold` after."""
        (self.log / "go").touch()

    def results(self):
        shown, errors = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, errors
        return [json.loads(line) for line in shown.splitlines() if line.startswith("{")]


def wait_until_gone(processes):
    deadline = time.monotonic() + 120
    while any(Path(f"/proc/{process}").exists() for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def job(family, out, target="target", workers=3, **more):
    return {"target": family[target], "plus": family["plus"], "minus": family["minus"], "out": str(out)} | {
        "workers": workers,
        **more,
    }


def writers(units):
    """Which nodes began units of each file."""
    found = defaultdict(set)
    for node, _, file, _ in units:
        found[file].add(node)
    return found


def test_nodes_share_the_files_and_no_file_is_written_by_two(nodes, family, right, tmp_path):
    """Of four workers on three nodes of one core, two share a node: then each has half a core."""
    jobs = job(family, tmp_path / "many", workers=4, together=4), job(family, tmp_path / "one", "single")
    run = Run(nodes, tmp_path, *jobs, pace=0.02)
    many, one = run.results()
    assert digests(tmp_path / "many") == right["target"]
    assert len(many["nodes"]) == 3 and all(many["nodes"].values())
    by_file = writers(run.units())
    assert {len(who) for file, who in by_file.items()} == {1}, by_file
    assert len(by_file) == SHARDS + 1
    assert digests(tmp_path / "one") == right["single"]
    assert len(one["nodes"]) == 1, "the only file belongs to one node, whatever workers there are"


def test_a_worker_that_stands_still_leaves_the_rest_to_the_others(nodes, family, right, tmp_path):
    run = Run(nodes, tmp_path, job(family, tmp_path / "out", together=3), hold=4)
    run.wait_for_units(4)
    slow = run.units()[-1][1]
    os.kill(slow, signal.SIGSTOP)
    run.go_on()
    try:
        run.wait_for_units(4 * SHARDS - 8)  # of the file it holds and the last of the others' only
    finally:
        os.kill(slow, signal.SIGCONT)
    run.results()
    assert digests(tmp_path / "out") == right["target"]
    assert len({process for _, process, _, _ in run.units()}) == 3


def test_a_node_that_is_removed_leaves_its_files_to_the_others(nodes, family, right, tmp_path):
    run = Run(nodes, tmp_path, job(family, tmp_path / "out", together=3), hold=9)
    run.wait_for_units(9)
    ((gone, _),) = Counter(node for node, *_ in run.units()).most_common(1)
    lost = {process for node, process, *_ in run.units() if node == gone}
    nodes.remove(gone)
    wait_until_gone(lost)
    run.go_on()
    (result,) = run.results()
    assert digests(tmp_path / "out") == right["target"]
    assert gone in result["nodes"] and len(result["nodes"]) == 3
    assert any(f"node {gone[:8]} died" in sentence for sentence in result["said"])
    for file, who in writers(run.units()).items():
        assert len(who - {gone}) <= 1, file


@pytest.mark.slow
def test_what_a_node_does_not_see_is_done_by_others(nodes, family, right, tmp_path):
    """One more node, in a mount namespace of its own: there a shard of a donor is another file, and a directory is
    another disk."""
    hidden = f"model-00003-of-{SHARDS:05d}.safetensors"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "empty").touch()
    mounts = f"mount --bind {tmp_path / 'empty'} {family['plus']}/{hidden} && mount -t tmpfs x {tmp_path / 'elsewhere'}"
    start = f"-m ray.scripts.scripts start --address={nodes.address} --num-cpus=1 --block --disable-usage-stats"
    script = f"{mounts} || exit 77; exec {sys.executable} {start} --object-store-memory=100000000"
    known = {node["NodeID"] for node in nodes.cluster.global_state.node_table()}
    blind = subprocess.Popen(["unshare", "-m", "sh", "-c", script], start_new_session=True, stdout=subprocess.DEVNULL)
    shutil.copytree(family["plus"], tmp_path / "plus")
    lost = {"plus": str(tmp_path / "plus"), "lose": str(tmp_path / "plus" / hidden)}
    try:
        deadline = time.monotonic() + 60
        while not (joined := {node["NodeID"] for node in nodes.cluster.global_state.node_table()} - known):
            if blind.poll() is not None:
                pytest.skip("mount namespaces are not permitted here")
            assert time.monotonic() < deadline, "the node did not join"
            time.sleep(0.2)
        jobs = [
            job(family, tmp_path / "out", workers=4, together=4),
            job(family, tmp_path / "elsewhere" / "out", workers=4, together=4),
            job(family, tmp_path / "never", workers=4, together=99) | lost,  # ends before a unit is done, or never
        ]
        done, unseen, nowhere = Run(nodes, tmp_path, *jobs, pace=0.05).results()
    finally:
        os.killpg(blind.pid, signal.SIGTERM)
        blind.wait()
    assert digests(tmp_path / "out") == right["target"]
    assert joined < set(done["nodes"]) and len(done["nodes"]) == 4
    by_file = writers(tuple(json.loads(line)) for line in (tmp_path / "log/units.jsonl").read_text().splitlines())
    assert by_file[hidden].isdisjoint(joined)
    assert unseen["error"] == "BadInput"
    assert f"elsewhere/out.partial: is not visible on node {joined.pop()[:8]}" in unseen["sentence"]
    assert nowhere["error"] == "BadInput", nowhere
    assert f"plus/{hidden}: it changed or was truncated, or no node can see it" in nowhere["sentence"]
    assert not list(tmp_path.glob("**/*.partial")), "bad input leaves nothing"


@pytest.mark.slow
def test_all_nodes_are_lost_and_the_same_command_goes_on_when_there_are_others(nodes, family, right, tmp_path):
    run = Run(nodes, tmp_path, job(family, tmp_path / "out", timeout=20), hold=24)
    run.wait_for_units(24)
    lost = {process for _, process, *_ in run.units()}
    for node in list(nodes.nodes):
        nodes.remove(node.node_id)
    wait_until_gone(lost)
    run.go_on()
    (result,) = run.results()
    assert result["error"] == "Failed", result
    assert "every worker died" in result["sentence"] and "the same command goes on from there" in result["sentence"]
    (result,) = Run(nodes, tmp_path, job(family, tmp_path / "out")).results()
    assert 0 < result["written"] < open_source(family["target"]).nbytes, "a part was redone, not all"
    assert digests(tmp_path / "out") == right["target"]
