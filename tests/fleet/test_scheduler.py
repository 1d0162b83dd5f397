"""The schedule, alone and with real engines as Ray actors."""

import contextlib
import os
import signal
import threading
import time
from collections import deque
from pathlib import Path

import pytest
from checkpoints import POCKET
from transformers import AutoTokenizer

from rvdist.errors import BadInput, Failed
from rvdist.fleet.engine import EngineSettings
from rvdist.fleet.harness import Suite
from rvdist.fleet.request import Choice, Generate
from rvdist.fleet.scheduler import Fleet, Slice, choose, cut
from rvdist.point import Term, Vector, WeightPoint

SETTINGS = EngineSettings(max_model_len=256, kv_cache_gib=0.0625)
VECTOR = Vector(str(POCKET / "grpo"), str(POCKET / "sft"))
TARGET = WeightPoint(str(POCKET / "target"))
POINTS = [TARGET, *(WeightPoint(TARGET.base, (Term(alpha, VECTOR),)) for alpha in (-1.0, 1.0))]


def test_slices_hold_one_kind_and_cover_everything_once():
    requests = [Generate("a", 1), Choice("b", "c"), Generate("d", 1), Generate("e", 1), Choice("f", "g")]
    slices = cut(TARGET, requests, 2)
    assert [s.indices for s in slices] == [(0, 2), (3,), (1, 4)]


def test_an_idle_engine_stays_then_spreads_then_helps():
    one, two, three = POINTS
    work = [Slice(one, (0,))]
    waiting = {one: deque(work), two: deque(work * 3), three: deque(work * 2)}
    assert choose(waiting, one, set()) == one, "no swap while there is work at hand"
    waiting[one].clear()
    assert choose(waiting, one, set()) == two, "the fullest point no engine is at"
    assert choose(waiting, one, {two}) == three
    assert choose(waiting, one, {two, three}) == two, "else it helps where most is left"
    assert choose({one: deque()}, one, set()) is None


@pytest.fixture(scope="module")
def requests():
    return Suite.load(["pocket_sums", "pocket_choice"], limit=40).requests(
        AutoTokenizer.from_pretrained(POCKET / "target")
    )


@pytest.fixture(scope="module")
def alone(ray_local, requests):
    """What one engine answers."""
    fleet = Fleet(TARGET.base, SETTINGS, count=1, on_gpus=False)
    answers = fleet.answer(POINTS, requests, slice_size=16)
    fleet.stop()
    return answers


def test_two_engines_share_the_work_and_change_nothing(alone, requests):
    fleet = Fleet(TARGET.base, SETTINGS, count=2, on_gpus=False)
    fleet.info()
    done = []
    assert fleet.answer(POINTS, requests, slice_size=16, progress=done.append) == alone
    assert sum(done) == 3 * len(requests) == fleet.stats.requests
    assert len(fleet.stats.by_engine) == 2 and min(fleet.stats.by_engine.values()) > 0
    fleet.stop()


def test_points_give_different_answers(alone):
    texts = [[a.text for a in alone[point] if hasattr(a, "text")] for point in POINTS]
    assert texts[0] != texts[1] != texts[2] != texts[0]


def test_a_dead_engine_gives_its_slice_back(alone, requests):
    fleet = Fleet(TARGET.base, SETTINGS, count=2, on_gpus=False)
    fleet.info()
    killed = []

    def kill_an_engine(_):
        if killed:
            return
        for process in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{process}/cmdline").read_text().startswith("ray::EngineActor"):
                    os.kill(int(process), signal.SIGKILL)
                    killed.append(process)
                    return

    assert fleet.answer(POINTS, requests, slice_size=8, progress=kill_an_engine) == alone
    assert killed
    fleet.stop()


def test_a_prompt_that_does_not_fit_is_bad_input(ray_local):
    fleet = Fleet(TARGET.base, SETTINGS, count=1, on_gpus=False)
    with pytest.raises(BadInput, match="max_model_len.*a prompt of 300 tokens and 8 to generate exceed"):
        fleet.answer([TARGET], [Generate("x" * 300, 8)], slice_size=4)
    fleet.stop()


def test_requests_that_kill_every_engine_are_reported(ray_local, requests):
    fleet = Fleet(TARGET.base, SETTINGS, count=1, on_gpus=False)
    fleet.info()
    over = threading.Event()

    def kill_all_engines():
        while not over.is_set():
            for process in filter(str.isdigit, os.listdir("/proc")):
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{process}/cmdline").read_text().startswith("ray::EngineActor"):
                        os.kill(int(process), signal.SIGKILL)
            time.sleep(0.05)

    killer = threading.Thread(target=kill_all_engines, daemon=True)
    killer.start()
    try:
        with pytest.raises(Failed, match="2 engines died while answering the same 40 requests"):
            fleet.answer([TARGET], requests[:40], slice_size=64)
    finally:
        over.set()
        killer.join()
        fleet.stop()
