"""Engines of a cluster with several nodes: one over all of them, with GPUs that are numbers; and Hub repositories where
a node does not see the cache of the command's."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from checkpoints import POCKET, launch
from hub_server import HubServer

SCRIPT = """
import json, os, signal, sys
import ray
from ray.cluster_utils import Cluster
from rvdist.core.point import WeightPoint
from rvdist.evaluate.fleet.arguments import versions
from rvdist.evaluate.fleet.fleet import Fleet
from rvdist.evaluate.fleet.schedule import cut
from rvdist.evaluate.request import Answered, Completion, Generate

class Wide:
    # As vLLM finds its ranks' places: the placement group that the engine is in, of one GPU a bundle
    def __init__(self, base, settings):
        self.seen = settings

    def info(self):
        from ray.util.placement_group import PlacementGroup
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as Inside

        @ray.remote(num_gpus=1, num_cpus=0)
        class Rank:
            def where(self):
                return ray.get_runtime_context().get_node_id()

        group = ray.util.get_current_placement_group()
        bundles = group.bundle_specs
        self.ranks = [Rank.options(scheduling_strategy=Inside(group, k)).remote() for k in range(len(bundles))]
        nodes = ray.get([rank.where.remote() for rank in self.ranks])
        return versions() | {"device": "cuda", "bundles": bundles, "nodes": nodes, "own": ray.get_gpu_ids()}

    def answer(self, piece, requests):
        if piece.parts[0].begin == 2 and not os.path.exists(self.seen):
            open(self.seen, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return Answered(tuple(Completion(one.prompt, "stop", 1, 1) for one in requests), 0, 0.01), 0.0

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 2})
cluster.add_node(num_cpus=1, num_gpus=2)
ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
asked = {"t": [Generate(str(k), 4) for k in range(6)]}
fleet = Fleet("base", sys.argv[1], 1, cpus=0.0, gpus=4.0, actor=Wide, over_nodes=True, pauses=(0.1,))
answers = fleet.answer(cut(WeightPoint("base"), asked, 2), asked)
(info,) = fleet.info()
fleet.stop()
import time
deadline = time.monotonic() + 30
while ray.available_resources().get("GPU", 0) < 4 and time.monotonic() < deadline:
    time.sleep(0.2)
free = ray.available_resources().get("GPU", 0)
texts = sorted(one.text for found in answers.values() for one in found.answers)
print(json.dumps(info | {"texts": texts, "deaths": fleet.stats.deaths, "free": free}))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_ranks_find_their_gpus_on_all_nodes(tmp_path):
    script = tmp_path / "wide.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "died")], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["bundles"] == [{"GPU": 1.0}] * 4 and found["own"] == [], "the engine itself takes none"
    assert sorted(found["nodes"].count(node) for node in set(found["nodes"])) == [2, 2]
    assert found["texts"] == [str(k) for k in range(6)] and found["deaths"] == 1, "another one took its place"
    assert found["free"] == 4, "nothing is held when all is over"


@pytest.fixture
def blind(tmp_path):
    """The environment of commands on a cluster of two nodes: on one the command, on the other all cores, and an empty
    disk where the command has what it got from the Hub."""
    (home := tmp_path / "hub").mkdir()
    hidden = f"mount -t tmpfs none {home}"
    if subprocess.run(["unshare", "-m", "sh", "-c", hidden], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("mount namespaces are not permitted here")
    hub = HubServer()
    for name in ("target", "grpo", "sft"):
        hub.publish(f"pocket/{name}", POCKET / name)
    with tempfile.TemporaryDirectory(prefix="b", dir="/tmp") as short:
        told = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        told |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "RAY_TMPDIR": short}
        told |= {"HOME": str(tmp_path), "RAY_worker_niceness": "0", "RAY_raylet_start_wait_time_s": "120"}
        ray = f"{sys.executable} -m ray.scripts.scripts start --disable-usage-stats --block"
        head = f"exec {ray} --head --port=0 --num-cpus=0 --include-dashboard=false"
        noted, deadline = Path(short, "ray/ray_current_cluster"), time.monotonic() + 90
        started = [subprocess.Popen(["sh", "-c", head], env=told, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)]
        try:
            while not (noted.exists() and noted.read_text()):
                assert started[0].poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
            node = f"{hidden} && exec {ray} --address={noted.read_text()} --num-cpus=2"
            started.append(subprocess.Popen(["unshare", "-m", "sh", "-c", node], env=told, stdout=subprocess.DEVNULL))
            yield hub, told
        finally:
            for process in filter(str.isdigit, os.listdir("/proc")):
                with contextlib.suppress(OSError):
                    mine = int(process) in [one.pid for one in started]
                    if mine or short in Path(f"/proc/{process}/cmdline").read_text():
                        os.kill(int(process), signal.SIGKILL)
            for one in started:
                one.wait(30)
            hub.stop()


@pytest.mark.slow
def test_a_node_gets_from_the_hub_what_it_does_not_see(blind, tmp_path):
    hub, told = blind
    keys = ("benchmarks=pocket", "benchmarks.tasks=[pocket_sums]", "benchmarks.limit=16", "sweep.alphas=[1]")
    keys += ("engine.count=2", "cache.dir=cache", "engine.max_model_len=256", "engine.kv_cache_gib=0.0625")
    names = ("target=pocket/target", "vector.plus=pocket/grpo", "vector.minus=pocket/sft")
    joined = ("cluster=existing", "cluster.nodes=2", "hydra.run.dir=far")
    far = launch(*names, *keys, *joined, cwd=tmp_path, **told)
    assert far.returncode == 0, far.stderr
    assert "pocket/target@" in far.stdout and "its files are in HF_HOME here, which" in far.stdout
    assert not list((tmp_path / "hub").rglob("model.safetensors")), "the command itself needs no weights"
    whole = [
        one for one in hub.requests if one.method == "GET" and one.file.endswith("model.safetensors") if one.nbytes
    ]
    assert sorted(one.nbytes for one in whole if not one.range) == sorted(
        (POCKET / name / "model.safetensors").stat().st_size for name in ("target", "grpo", "sft")
    ), "once for both engines of the node"
    paths = {"target": "target", "vector.plus": "grpo", "vector.minus": "sft"}
    own = (f"{key}={POCKET / name}" for key, name in paths.items())
    near = launch(*own, *keys, "hydra.run.dir=near", "cache.samples=false", cwd=tmp_path)
    assert near.returncode == 0, near.stderr
    samples = [sorted((tmp_path / where / "samples").iterdir()) for where in ("far", "near")]
    assert (
        [path.name for path in samples[0]] == ["alpha=1.jsonl", "baseline.jsonl"] == [path.name for path in samples[1]]
    )
    for here, there in zip(*samples, strict=True):
        answers = [[json.loads(line)["response"] for line in path.read_text().splitlines()] for path in (here, there)]
        assert answers[0] == answers[1] and len(answers[0]) == 16
