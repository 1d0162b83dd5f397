"""The fleet with real engines as Ray actors: who answers, and what dies meanwhile, changes no answer."""

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
from checkpoints import POCKET
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from rvdist.core.errors import BadInput, Failed
from rvdist.core.point import Term, Vector, WeightPoint
from rvdist.evaluate.fleet.actor import EngineActor
from rvdist.evaluate.fleet.arguments import EngineSettings, versions
from rvdist.evaluate.fleet.fleet import Fleet
from rvdist.evaluate.fleet.schedule import cut
from rvdist.evaluate.request import Answered, Completion, Generate, Rolling
from rvdist.evaluate.suite import Suite
from rvdist.stages.warm import Warm

SETTINGS = EngineSettings(max_model_len=256, kv_cache_gib=0.0625)
VECTOR = Vector(str(POCKET / "grpo"), str(POCKET / "sft"))
TARGET = WeightPoint(str(POCKET / "target"))
POINTS = [TARGET, *(WeightPoint(TARGET.base, (Term(alpha, VECTOR),)) for alpha in (-1.0, 1.0))]


def all_slices(requests, slice_size):
    return [piece for point in POINTS for piece in cut(point, requests, slice_size)]


def texts(answered):
    return {piece: found.answers for piece, found in answered.items()}


def engine_processes():
    """Those of this test's Ray alone, whoever else has engines on this machine."""
    from ray._private.state import actors

    found = [actor for actor in actors().values() if actor["ActorClassName"] == EngineActor.__name__]
    return [actor["Pid"] for actor in found if actor["State"] == "ALIVE"]


def ranks(engine):
    """The processes below an engine that share memory with others."""
    below, new = [], [engine]
    while new:
        paths = [path for pid in new for path in Path(f"/proc/{pid}/task").glob("*/children")]
        below += (new := [int(child) for path in paths for child in path.read_text().split()])
    maps = {pid: Path(f"/proc/{pid}/maps").read_text() for pid in below}
    return {pid: text for pid, text in maps.items() if "-cpushm_" in text}


@pytest.fixture(scope="module")
def requests():
    tokenizer = AutoTokenizer.from_pretrained(POCKET / "target")
    texts = {"texts": [Rolling("12 + 34 = 46. " * k) for k in (1, 40)]}
    return Suite.load(["pocket_sums", "pocket_choice"], limit=40).requests(tokenizer) | texts


@pytest.fixture(scope="module")
def warm(ray_local):
    """Keeps the fleet of one engine up between tests; those that need the cores `cool` it."""
    with contextlib.closing(Warm()) as warm:
        yield warm
        warm.cool()


def fleet_of_one(warm):
    return warm.fleet("one", lambda: Fleet(TARGET.base, SETTINGS, count=1, cpus=0.5))


@pytest.fixture(scope="module")
def alone(warm, requests):
    """What one engine answers."""
    fleet = fleet_of_one(warm)
    answered = texts(fleet.answer(all_slices(requests, 16), requests))
    assert fleet.stats.swaps == 2 and fleet.stats.deaths == 0
    assert fleet.info()[0]["probe"] == "passed"
    return answered


def test_points_give_different_answers(alone):
    first = {piece.point: answers for piece, answers in alone.items() if piece.name.startswith("pocket_sums 0 ")}
    assert len(set(first.values())) == 3


def test_a_prompt_that_does_not_fit_is_bad_input(warm):
    requests = {"t": [Generate("x" * 300, 8)]}
    with pytest.raises(BadInput, match="a prompt of 300 tokens and 8 to generate exceed .*engine.max_model_len"):
        fleet_of_one(warm).answer(cut(TARGET, requests, 4), requests)


@pytest.mark.parametrize(
    ("allowed", "reason"),
    [
        (False, r"tensor .*k_proj\.weight would be infinite or not a number: .*spoiled"),
        pytest.param(True, "distributions .* are not a number", marks=pytest.mark.slow),
    ],
)
def test_a_point_without_numbers_has_no_answers_and_leaves_all_others_theirs(
    allowed, reason, warm, alone, requests, tmp_path
):
    """NaN weights are refused before anything is asked; where they are let through, and where finite ones are too
    large, the answers are."""
    spoiled = shutil.copytree(POCKET / "grpo", tmp_path / "spoiled")
    tensors = load_file(spoiled / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.weight"][0, 0] = float("nan")
    save_file(tensors, spoiled / "model.safetensors", {"format": "pt"})
    refused = WeightPoint(TARGET.base, (Term(1.0, Vector(str(spoiled), VECTOR.minus)),))
    large = WeightPoint(TARGET.base, (Term(1e20, VECTOR),))
    slices = [piece for point in (refused, large) for piece in cut(point, requests, 16)]
    good = {piece: found for piece, found in alone.items() if piece.parts[0].task == "pocket_sums"}
    settings = dataclasses.replace(SETTINGS, allow_nonfinite=True)
    fleet = Fleet(TARGET.base, settings, count=1, cpus=0.5) if allowed else fleet_of_one(warm)
    kept = {}
    answered = fleet.answer([*slices, *good], requests, kept.update)
    assert texts(answered) == good and texts(kept) == good
    assert fleet.refused.keys() == {refused, large} and fleet.stats.deaths == 0
    assert re.search(reason, fleet.refused[refused]) and "are not a number" in fleet.refused[large]
    if allowed:
        fleet.stop()


def test_an_engine_that_dies_and_one_that_cannot_be_had_change_nothing(warm, alone, requests):
    """Two engines share the work; one is killed and replaced; there never is room for a third."""
    import ray

    warm.cool()
    fleet = Fleet(TARGET.base, SETTINGS, count=3, cpus=1.0)
    while fleet.seats.started < 2:
        ready, _ = ray.wait(fleet.seats.pending, num_returns=1, timeout=300)
        assert ready, "no room for the second engine"
        fleet.seats.hear(ready[0])
    kept, seen, killed = {}, [], []

    def keep(came):
        assert not kept.keys() & came.keys()
        kept.update(came)

    def watch(status):
        seen.append(status)
        busy = [engine for engine in status.engines if engine.point is not None]
        if not killed and len(busy) == 2:
            killed.append(engine_processes()[0])
            os.kill(killed[0], signal.SIGKILL)

    assert texts(fleet.answer(all_slices(requests, 4), requests, keep, watch)) == texts(kept)
    whole = {(piece.point, piece.parts[0]): piece for piece in alone}
    assert fleet.seats.started >= 1 and fleet.stats.deaths == 1 and killed
    assert fleet.stats.requests == seen[-1].requests == sum(map(len, requests.values())) * 3
    assert 0 < fleet.stats.utilisation <= 1
    again = fleet.answer(all_slices(requests, 16), requests)
    assert texts(again) == alone and again.keys() == set(whole.values()), "a warm fleet, after a death"
    assert fleet.seats.started < 3
    fleet.stop()


def test_what_is_done_within_a_slice_is_shown(ray_local):
    """A slice that takes seconds is told of while it is answered; numbers never fall, and end at what was done."""
    fleet = Fleet(TARGET.base, SETTINGS, count=1, cpus=0.5)
    requests = {"t": [Generate(f"Q: {k} + {k + 1} =", 20 + 40 * (k % 6)) for k in range(384)]}
    slices, seen = cut(TARGET, requests, 384), []
    answered = fleet.answer(slices, requests, watch=seen.append)
    fleet.info()
    weights = (POCKET / "target" / "model.safetensors").stat().st_size
    assert fleet.stats.cpu_seconds > 1 and fleet.stats.bytes_read >= 0.9 * weights
    used = fleet.stats.cpu_seconds
    fleet.info()
    assert fleet.stats.cpu_seconds < used + 0.5, "counted once"
    fleet.stop()
    within = [status for status in seen if status.in_flight and status.tokens]
    assert within and all(status.in_flight == 384 for status in within)
    numbers = [(status.requests, status.tokens, status.prompt_tokens) for status in seen]
    assert all(one <= other for k in range(3) for one, other in pairwise(number[k] for number in numbers))
    answers = answered[slices[0]].answers
    assert numbers[-1] == (384, sum(one.tokens for one in answers), sum(one.prompt_tokens for one in answers))
    assert seen[-1].in_flight == 0 and within[-1].engines[0].rate > 0


def test_an_engine_need_not_tell(ray_local):
    class Silent:
        """Answers whole slices, as an engine that cannot tell how far it is."""

        def __init__(self, base, settings):
            pass

        def info(self):
            return versions()

        def answer(self, piece, requests):
            return Answered(tuple(Completion("x", "stop", 3, 2) for _ in requests), 0, 0.1), 0.0

    fleet = Fleet("base", None, count=2, cpus=0.0, actor=Silent)
    requests, seen = {"t": [Generate("abc", 8)] * 40}, []
    assert len(fleet.answer(cut(WeightPoint("base"), requests, 4), requests, watch=seen.append)) == 10
    fleet.stop()
    assert (seen[-1].requests, seen[-1].tokens, seen[-1].prompt_tokens) == (40, 80, 120)


def test_engines_that_cannot_be_had_or_start_are_reported(ray_local):
    requests = {"t": [Generate("x", 8)]}
    fleet = Fleet(TARGET.base, SETTINGS, count=2, cpus=1000.0, patience=0.5)
    with pytest.raises(Failed, match=r"no engine could start in \d+ s: none of the cluster's nodes has 1000 CPUs"):
        fleet.answer(cut(TARGET, requests, 4), requests)
    fleet.stop()
    fleet = Fleet("/nowhere", SETTINGS, count=2, cpus=0.5)
    with pytest.raises(BadInput, match="^/nowhere"):
        fleet.answer(cut(TARGET, requests, 4), requests)
    fleet.stop()


@pytest.mark.slow
def test_an_engine_of_two_ranks(ray_local, requests):
    """On cores of one NUMA node, too, which vLLM by itself does not share out. The memory that they share has no name
    any more, which would stay in /dev/shm for ever where they are killed."""
    before = set(engine_processes())  # of a test before, which end
    fleet = Fleet(TARGET.base, dataclasses.replace(SETTINGS, tensor_parallel_size=2), count=1, cpus=1.0)
    answered = fleet.answer([piece for point in POINTS[:2] for piece in cut(point, requests, 40)], requests)
    assert fleet.info()[0]["probe"] == "passed" and fleet.stats.deaths == 0
    assert len(set(texts(answered).values())) == len(answered)
    (engine,) = set(engine_processes()) - before
    sharing = ranks(engine)
    assert len(sharing) == 2
    for maps in sharing.values():
        shared = set(re.findall(r"/dev/shm/.*", maps))
        assert len(shared) > 2 and all(name.endswith(" (deleted)") for name in shared), shared
    own = re.compile(rf"sem\.\w+-({'|'.join(map(str, sharing))})-\w+")  # as Python calls those of a process
    assert not [name for name in os.listdir("/dev/shm") if own.fullmatch(name)]
    fleet.stop()


RANKS = f"""
if __name__ == "__main__":
    from rvdist.evaluate.fleet.arguments import EngineSettings
    from rvdist.evaluate.fleet.engine import Engine

    how = dict(enforce_eager=True, max_model_len=128, kv_cache_gib=0.25, cpu_threads=1, tensor_parallel_size=2)
    Engine({TARGET.base!r}, EngineSettings(**how))._llm.llm_engine.model_executor.shutdown()
"""


@pytest.mark.slow
def test_ranks_that_end_by_themselves_complain_of_no_name(tmp_path):
    """Neither they nor what watches over their memory: it would stand at the end of an engine's log, which is shown."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert not re.findall(r".*(?:leaked|No such file|Exception ignored).*", ended.stderr), ended.stderr


@pytest.mark.slow
def test_requests_that_kill_every_engine_are_reported_after_all_else_is_answered(ray_local, requests):
    """Whatever engine works at one of the points dies; the others' answers are kept."""
    fleet = Fleet(TARGET.base, SETTINGS, count=1, cpus=0.5)
    slices = [piece for point in POINTS[:2] for piece in cut(point, {"pocket_sums": requests["pocket_sums"]}, 40)]
    poisoned, kept, over = slices[1], {}, threading.Event()
    at = []

    def kill():
        while not over.wait(0.002):
            if at == [poisoned.point]:
                for process in engine_processes():
                    os.kill(process, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()

    def watch(status):
        at[:] = [engine.point for engine in status.engines if engine.point is not None]

    try:
        with pytest.raises(Failed, match="2 engines failed on each of these slices of requests: pocket_sums 0 to 39"):
            fleet.answer(slices, requests, kept.update, watch)
        assert kept.keys() == {slices[0]} and fleet.stats.deaths == 2
    finally:
        over.set()
        killer.join()
        fleet.stop()


@pytest.mark.slow
def test_an_engine_joins_when_the_cluster_grows(requests):
    """The second engine waits for a node that comes while the first one works."""
    import ray
    from ray.cluster_utils import Cluster

    from rvdist.core import cluster

    shared = ray.is_initialized()
    cluster.disconnect()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.connect(nodes.address)
        fleet = Fleet(TARGET.base, SETTINGS, count=2, cpus=1.0)
        grown, worked = [], set()

        def watch(status):
            worked.update(engine.number for engine in status.engines if engine.point is not None)
            if worked and not grown:
                grown.append(nodes.add_node(num_cpus=1))

        deadline = time.monotonic() + 120
        while len(worked) < 2 and time.monotonic() < deadline:
            fleet.answer(all_slices(requests, 4), requests, watch=watch)
        assert worked == {0, 1} and fleet.seats.started == 2
        fleet.stop()
    finally:
        ray.shutdown()
        nodes.shutdown()
        if shared:  # other tests' ray_local
            cluster.connect("local")
