"""Engines that raise, hang and do not start: every request is answered as if nothing had happened."""

import contextlib
import gc
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from rvdist.core.errors import BadInput, Failed
from rvdist.core.point import Term, Vector, WeightPoint
from rvdist.evaluate.fleet.arguments import EngineSettings, versions
from rvdist.evaluate.fleet.failures import Failures, Starts
from rvdist.evaluate.fleet.fleet import Fleet
from rvdist.evaluate.fleet.schedule import cut
from rvdist.evaluate.request import Answered, Completion, Generate, Unusable

BASE = WeightPoint("base")
OTHER = WeightPoint("base", (Term(1.0, Vector("plus", "minus")),))
REQUESTS = {"t": [Generate(f"{k}", 8) for k in range(40)]}
SLICES = [piece for point in (BASE, OTHER) for piece in cut(point, REQUESTS, 4)]
TRIES = 20  # files that say how often something was done


@pytest.fixture(autouse=True)
def by_value(request):
    """Workers cannot import a test."""
    if "ray_local" in request.fixturenames:
        from ray import cloudpickle

        cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Fake:
    """Answers at once, but for what `faults` say of a point, of a slice's begin (at any point, or at that of so many
    terms) or of a start: what happens there, and how many times. What happened is counted in files of the directory
    `seen`, which all engines share."""

    def __init__(self, base, settings):
        self.seen, self.faults = settings
        self.told = self.faults.get("info", [{}])
        Path(self.seen, f"pid-{os.getpid()}").touch()

    def _happen(self, where):
        kind, times = self.faults.get(where, ("", 0))
        for k in range(times):
            with contextlib.suppress(FileExistsError):
                os.close(os.open(f"{self.seen}/{where}-{k}", os.O_CREAT | os.O_EXCL))
                break
        else:
            return
        if kind == "raise":
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if kind == "hang":
            time.sleep(600)
        if kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "bad":
            raise BadInput("a prompt does not fit")
        if kind == "unusable":
            raise Unusable("the probe failed: this vLLM keeps old weights")

    def info(self):
        self._happen("start")
        for number, told in enumerate(self.told):
            with contextlib.suppress(FileExistsError):
                os.close(os.open(f"{self.seen}/info-{number}", os.O_CREAT | os.O_EXCL))
                self.told = [told]
                break
        return versions() | self.told[-1]

    def answer(self, piece, requests):
        if piece.point == OTHER:
            self._happen("swap")
        self._happen(f"at{piece.parts[0].begin}")
        self._happen(f"at{piece.parts[0].begin}-of-{len(piece.point.terms)}")
        text = f"{len(piece.point.terms)} "
        return Answered(tuple(Completion(text + one.prompt, "stop", 3, 2) for one in requests), 0, 0.01), 0.0


UNDISTURBED = {
    piece: tuple(Completion(f"{len(piece.point.terms)} {k}", "stop", 3, 2) for k in piece.parts[0].places)
    for piece in SLICES
}


def run(tmp_path, faults, count=2, **limits):
    """What a fleet of fakes answers, and the fleet."""
    limits = {"timeout": 60.0, "start_timeout": 60.0, "pauses": (0.1, 0.1)} | limits
    fleet = Fleet("base", (str(tmp_path), faults), count, cpus=0.0, actor=Fake, **limits)
    try:
        return {piece: found.answers for piece, found in fleet.answer(SLICES, REQUESTS).items()}, fleet
    finally:
        fleet.stop()


def alive(tmp_path):
    """The engines whose processes are there still, after a moment for them to go."""
    deadline = time.monotonic() + 20
    while True:
        pids = [int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*")]
        there = [pid for pid in pids if Path(f"/proc/{pid}/cmdline").exists()]
        if not there or time.monotonic() > deadline:
            return there
        time.sleep(0.1)


def test_requests_are_sent_once_for_all_points_and_not_kept(ray_local, tmp_path, monkeypatch):
    import ray

    sent, put = [], ray.put
    monkeypatch.setattr(ray, "put", lambda asked: sent.append(asked) or put(asked))
    answered, fleet = run(tmp_path, {})
    assert answered == UNDISTURBED
    assert sorted(sent, key=lambda asked: REQUESTS["t"].index(asked[0])) == [
        tuple(piece.take(REQUESTS)) for piece in SLICES[:10]
    ]
    assert fleet._asked == {}


@pytest.mark.parametrize(
    ("where", "kind"),
    [(where, kind) for where in ("at8", "start") for kind in ("raise", "hang", "stop", "die")]
    + [("swap", "raise"), ("swap", "hang")],
)
def test_every_request_is_answered_whatever_an_engine_does(kind, where, ray_local, tmp_path):
    patience = {"start_timeout" if where == "start" else "timeout": 4.0} if kind in ("hang", "stop") else {}
    answered, fleet = run(tmp_path, {where: (kind, 1)}, count=1 if where == "start" else 2, **patience)
    assert answered == UNDISTURBED
    (told,) = fleet._failures.told
    at = " as it started" if where == "start" else f" at t {8 if where == 'at8' else ''}"
    said = {"raise": "CUDA out of memory", "hang": "raise engine.", "stop": "raise engine.", "die": "died"}[kind]
    assert at in told and said in told
    assert fleet.stats.deaths == (where != "start")
    assert not alive(tmp_path), "an engine that is replaced is ended, a stopped one too"


def test_a_fleet_that_is_stopped_holds_nothing_of_rays(ray_local, tmp_path):
    """Ray ends a process in which an actor's handle is freed while another thread leaves the cluster."""
    import ray

    _, fleet = run(tmp_path, {"at8": ("die", 1)})
    gc.collect()
    handles = [held for held in gc.get_objects() if isinstance(held, ray.actor.ActorHandle)]
    assert fleet.seats.started and not [held for held in handles if "Fake" in repr(held)]
    assert not fleet.seats.pending


def test_a_slice_on_which_two_engines_raise_is_named_after_all_else_is_answered(ray_local, tmp_path):
    fleet, kept = Fleet("base", (str(tmp_path), {"at8-of-0": ("raise", 2)}), 2, cpus=0.0, actor=Fake), {}
    with pytest.raises(Failed, match=r"2 engines failed on each .*: t 8 to 11; the last of t 8: .*out of memory"):
        fleet.answer(
            SLICES, REQUESTS, lambda came: kept.update({piece: found.answers for piece, found in came.items()})
        )
    fleet.stop()
    assert len(kept) == len(SLICES) - 1 and all(UNDISTURBED[piece] == found for piece, found in kept.items())


@pytest.mark.parametrize("count", [1, 6])
def test_what_is_everybodys_ends_the_run_at_the_second_engine(count, ray_local, tmp_path):
    with pytest.raises(Failed, match="^the probe failed: this vLLM keeps old weights$"):
        run(tmp_path, {"swap": ("unusable", TRIES)}, count)
    assert len(list(tmp_path.glob("swap-*"))) <= 2 * max(2, count), "engines at work then, and what they held"


def test_what_is_bad_input_ends_the_run_at_once(ray_local, tmp_path):
    with pytest.raises(BadInput, match="^a prompt does not fit$"):
        run(tmp_path, {"at8": ("bad", TRIES)}, count=1)
    assert len(list(tmp_path.glob("at8-*"))) == 1, (
        "no engine tries it again; a second one might be there at the other point"
    )


def test_a_start_that_is_bad_input_is_not_tried_again(ray_local, tmp_path):
    with pytest.raises(BadInput, match="^a prompt does not fit$"):
        run(tmp_path, {"start": ("bad", TRIES)}, count=3)
    assert len(list(tmp_path.glob("start-*"))) <= 3


def test_a_start_that_fails_is_tried_again_and_then_given_up(ray_local, tmp_path):
    with pytest.raises(Failed, match="^no engine could start: RuntimeError: CUDA out of memory"):
        run(tmp_path, {"start": ("raise", TRIES)}, count=2)
    assert len(list(tmp_path.glob("start-*"))) == 6


def test_what_an_engine_fails_of_is_said_with_the_end_of_its_log(ray_local, tmp_path):
    """By a real engine actor, whose start fails within."""
    from rvdist.evaluate.fleet.actor import EngineActor

    class Failing(EngineActor):
        def __init__(self, base, settings):
            import rvdist.evaluate.fleet.actor as module

            super().__init__(base, settings)

            def start(*made_of):
                os.write(2, b"first line\nNCCL WARN card 3 fell off the bus\n")
                raise RuntimeError("NCCL error")

            module.Engine = start

    fleet = Fleet("base", EngineSettings(), 1, cpus=0.0, actor=Failing, pauses=())
    with pytest.raises(Failed, match=r"RuntimeError: NCCL error; its log ends: .*card 3 fell off the bus \(/.*\.err"):
        fleet.answer(SLICES, REQUESTS)
    fleet.stop()


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ([{"device": "cuda"}], "an engine on .* computes on cuda and not on cpu; mend the GPU's driver there"),
        (
            [{"kind": "A100"}, {"kind": "H100"}],
            "engines run on .100 and, on box, on .100, .*; set engine.accelerator_type",
        ),
        ([{"environment": {"VLLM_USE_X": "1"}}], "VLLM_USE_X is 1 on box and not set here, .*; set it alike"),
        (
            [{"resolved": {"runner": "a", "max_num_seqs": one}} for one in ("256", "512")],
            "vLLM chose max_num_seqs ... on box, and for answers on box ..., .*; set it alike",
        ),
        ([{"vllm": "0.0.1"}], "an engine runs vllm 0.0.1 and this process .*; make them one"),
    ],
)
def test_an_engine_whose_answers_may_be_others_is_refused(told, reason, ray_local, tmp_path):
    with pytest.raises(Failed, match=reason):
        run(tmp_path, {"info": [{"host": "box"} | one for one in told], "at8": ("hang", TRIES)}, count=len(told))


def test_an_engine_of_other_choices_than_those_of_the_cache_is_refused(ray_local, tmp_path):
    chosen = {"info": [{"host": "box", "resolved": {"attention_backend": "FLASHINFER", "runner": "a"}}]}
    before = {"attention_backend": "FLASH_ATTN", "of another version": "x"}
    with pytest.raises(Failed, match="chose attention_backend FLASHINFER on box, .* in the sample cache FLASH_ATTN"):
        run(tmp_path, chosen, count=1, resolved=before)
    assert run(tmp_path, chosen, count=1, resolved={"runner": "a"})[0] == UNDISTURBED


def test_one_engine_that_cannot_serve_may_be_the_only_one():
    failures = Failures()
    failures.require_usable("the probe failed")
    with pytest.raises(Failed, match="^the probe failed$"):
        failures.require_usable("the probe failed")


def test_a_start_is_final_for_the_run_only_where_no_engine_is_up():
    starts = Starts((1.0,))
    assert starts.fail(0, "slow", None, 0) == 1.0 and starts.fail(0, "slow", None, 0) is None
    bad = BadInput("no such file")
    assert starts.fail(1, "no such file", bad, 3) is None and starts.fail(2, "no such file", bad, 3) is None
    with pytest.raises(BadInput):
        starts.fail(3, "no such file", bad, 0)
    assert set(starts.empty) == {0, 1, 2, 3}
    starts.succeed(0)
    assert starts.fail(0, "slow", None, 0) == 1.0


def test_a_run_without_any_engine_says_how_to_go_on():
    starts = Starts(())
    assert starts.fail(0, "it was killed", None, 0) is None
    said = str(starts.explain())
    assert said == "no engine could start: it was killed; mend the cause, and the same command goes on from there"


@pytest.mark.parametrize("kind", ["raise", "die", "none"])
def test_engines_that_hold_their_next_slice_lose_nothing(ray_local, tmp_path, kind):
    """While one answers it has its next slice already; should it fail, both go back, and one is to blame."""
    requests = {"t": [Generate(f"{k}", 8) for k in range(80)]}
    slices, fleet = cut(BASE, requests, 2), None
    fleet = Fleet("base", (str(tmp_path), {"at40": (kind, 1)}), 2, cpus=0.0, actor=Fake, pauses=(0.1,))
    ahead = []
    try:
        found = fleet.answer(
            slices, requests, watch=lambda status: ahead.append(sum(seat.ahead is not None for seat in fleet.seats))
        )
    finally:
        fleet.stop()
    assert {piece: [one.text for one in given.answers] for piece, given in found.items()} == {
        piece: [f"0 {k}" for k in piece.parts[0].places] for piece in slices
    }
    assert max(ahead) > 0 and ahead[-1] == 0 and fleet.stats.deaths == (kind != "none")
