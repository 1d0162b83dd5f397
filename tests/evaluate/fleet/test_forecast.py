"""The time left, against engines that are simulated: at a steady pace it falls, and it comes true."""

import random

import pytest

from rvdist.core.point import WeightPoint
from rvdist.evaluate.fleet.forecast import Forecast
from rvdist.evaluate.fleet.schedule import cut
from rvdist.evaluate.request import Answered, Choice, Completion, Generate, Loglikelihood, Progress

POINT = WeightPoint("base")


def simulate(slices, requests, lengths, *, prefill, decode, step, engines=1, per_token=4, heard=True):
    """What is left every second, as was said and as it came; engines take the slices in order. Seconds: `prefill` a
    prompt token, `decode` a token made, `step` a step of all that are being answered."""
    forecast, said, waiting = Forecast(slices, requests), [], list(slices)
    now, running = 0.0, {}
    while waiting or running:
        while waiting and len(running) < engines:
            piece = waiting.pop(0)
            forecast.begin(piece, now)
            own = piece.take(lengths)
            running[piece] = (now, own, _ends(piece, own, requests, prefill, decode, step, per_token))
        now += 1.0
        for piece, (begun, own, (read_until, prompts, curve)) in list(running.items()):
            at = now - begun
            if at >= curve[-1]:
                del running[piece]
                if isinstance(requests[piece.parts[0].task][0], Generate):
                    answers = tuple(Completion("", "stop", prompts // len(own), length) for length in own)
                else:
                    answers = tuple(Loglikelihood(0.0, True, 3) for _ in own)
                forecast.finish(piece, Answered(answers, 0, curve[-1]), now)
            elif heard:
                steps = sum(end <= at for end in curve)
                done = [min(length, steps) for length in own]
                read = int(prompts * min(1.0, at / read_until))
                answered = sum(length <= steps for length in own)
                forecast.hear(piece, Progress(answered, prompts, read, sum(done), steps), now)
        said.append((now, forecast.seconds_left(now, engines)))
    return [(left, now - at) for at, left in said if left is not None]


def _ends(piece, own, requests, prefill, decode, step, per_token):
    """Until when its prompts are read, how many tokens they have, and when each step ends."""
    asked = piece.take(requests)
    prompts = sum(len(one.prompt if isinstance(one, Generate) else one.context) for one in asked) // per_token
    at = read_until = prompts * prefill
    curve = []
    for k in range(max(own)):
        at += step + decode * sum(length > k for length in own)
        curve.append(at)
    return max(read_until, 1e-9), prompts, curve


def generation(count, seed=0, longest=256, mean=60):
    drawn = random.Random(seed)
    requests = {"t": [Generate("x" * drawn.randint(200, 400), longest) for _ in range(count)]}
    return requests, {"t": [min(longest, 1 + int(drawn.expovariate(1 / mean))) for _ in range(count)]}


PACES = {
    "a card": {"prefill": 2e-4, "decode": 5e-4, "step": 0.05},
    "a slow core": {"prefill": 3e-3, "decode": 2e-2, "step": 0.02},
    "long prompts": {"prefill": 2e-2, "decode": 1e-3, "step": 0.05},
}


@pytest.mark.parametrize("engines", [1, 2])
@pytest.mark.parametrize(
    ("pace", "size"), [(pace, size) for pace in PACES for size in (16, 64)] + [("a slow core", 400)]
)
def test_at_a_steady_pace_it_falls_and_comes_true(pace, size, engines):
    requests, lengths = generation(240)
    slices = cut(POINT, requests, size)
    found = simulate(slices, requests, lengths, engines=engines, **PACES[pace])
    total = found[0][1]
    assert len(found) > 5 and found[-1][0] == 0
    said = [left for left, truth in found if truth < 0.8 * total]
    grown = max(later - min(said[: k + 1]) for k, later in enumerate(said))
    assert grown < 0.15 * total
    late = [(left, truth) for left, truth in found if truth < 0.5 * total]
    assert all(abs(left - truth) < 0.25 * total for left, truth in late)


def test_scored_prompts_need_no_lengths():
    requests = {"t": [Choice("x" * 400, "yes") for _ in range(300)]}
    lengths = {"t": [1] * 300}
    found = simulate(cut(POINT, requests, 50), requests, lengths, prefill=1e-3, decode=1e-3, step=0.01)
    assert all(abs(left - truth) < 0.1 * found[0][1] + 1 for left, truth in found)


def test_nothing_is_said_before_some_answers_are_finished():
    requests = {"t": [Generate("x" * 40, 100) for _ in range(8)]}
    (piece,) = cut(POINT, requests, 8)
    forecast = Forecast([piece], requests)
    assert forecast.seconds_left(0.0, 1) is None
    forecast.begin(piece, 0.0)
    for second in range(1, 21):
        forecast.hear(piece, Progress(0, 80, 80, 8 * second, second), float(second))
        assert forecast.seconds_left(float(second), 1) is None
    forecast.hear(piece, Progress(4, 80, 80, 164, 21), 21.0)
    assert 10 < forecast.seconds_left(21.0, 1) < 60


def test_an_engine_that_tells_nothing_is_foretold_by_its_slices():
    requests, lengths = generation(240)
    found = simulate(cut(POINT, requests, 40), requests, lengths, heard=False, **PACES["a card"])
    total = found[0][1]
    assert all(abs(left - truth) < 0.35 * total for left, truth in found)


def test_a_slice_of_an_engine_that_died_waits_again():
    requests, _ = generation(20)
    first, second = cut(POINT, requests, 10)
    forecast = Forecast([first, second], requests)
    forecast.begin(first, 0.0)
    forecast.finish(first, Answered(tuple(Completion("", "stop", 75, 50) for _ in range(10)), 0, 5.0), 5.0)
    before = forecast.seconds_left(5.0, 1)
    forecast.begin(second, 5.0)
    forecast.drop(second)
    assert forecast.seconds_left(6.0, 1) == pytest.approx(before) and before == pytest.approx(5.0, rel=0.2)
