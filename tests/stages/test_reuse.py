"""What an evaluation of all documents left in the cache serves for some of them: a batch whole, or not at all."""

from dataclasses import replace
from types import SimpleNamespace

from rvdist.core.point import WeightPoint
from rvdist.evaluate.answers import Answering, answers_of, from_whole
from rvdist.evaluate.asking import Asking
from rvdist.evaluate.cache import SampleCache, slice_keys
from rvdist.evaluate.fleet.schedule import cut
from rvdist.evaluate.request import Answered, Completion, Generate

POINT, OTHER = WeightPoint("base"), WeightPoint("other")
DIGESTS = {POINT: "p", OTHER: "o"}
SIZE = 4


def reused(tmp_path, wanted, *, cached=(0, 1, 2), truncated=0, point=POINT, served_by="s"):
    """The answers to `wanted` requests, where so many slices of all of them are in the cache."""
    suite = SimpleNamespace(versions={"t": "1"})
    asked = {"t": [Generate(f"q{k // 2}", 8, temperature=1.0, repeat=k % 2) for k in range(12)]}
    whole = Asking("serving", "tensors", suite, None, asked)
    cache = SampleCache(tmp_path)
    pieces = cut(POINT, asked, SIZE)
    keys = slice_keys(pieces, asked, DIGESTS, suite.versions, {"engine": "s"})
    for number, piece in enumerate(pieces):
        if number in cached:
            texts = [Completion(f"a{k}", "stop", 1, 1) for k in piece.parts[0].places]
            cache.write([(keys[piece], "p", "t", Answered(tuple(texts), truncated, 1.0))])
    part = {"t": wanted}
    found = from_whole(
        whole, cut(point, part, SIZE), part, DIGESTS, Answering(SIZE, None, identity={"engine": served_by}), cache
    )
    cache.close()
    return [[answer.text for answer in one.answers] for one in found.values()]


def request(number, repeat=0, **changes):
    return replace(Generate(f"q{number}", 8, temperature=1.0, repeat=repeat), **changes)


def test_answers_are_those_to_the_same_requests(tmp_path):
    wanted = [request(5), request(5, 1), request(1), request(1, 1), request(4, 1)]
    assert reused(tmp_path, wanted) == [["a10", "a11", "a2", "a3"], ["a9"]]


def test_a_batch_is_taken_whole_or_not_at_all(tmp_path):
    wanted = [request(0), request(1), request(2), request(5), request(0, 1)]
    assert reused(tmp_path, wanted, cached=(0, 1)) == [["a1"]], "of the first batch one is not there"


def test_what_may_be_another_answer_is_not_taken(tmp_path):
    assert reused(tmp_path / "asked", [request(0, max_tokens=9)]) == []
    assert reused(tmp_path / "cut", [request(0)], truncated=1) == []
    assert reused(tmp_path / "point", [request(0)], point=OTHER) == []
    assert reused(tmp_path / "engine", [request(0)], served_by="another") == []
    assert reused(tmp_path / "same", [request(0)]) == [["a0"]]


def test_answers_in_a_batch_of_several_tasks_are_found(tmp_path):
    """What is left of two tasks was one batch; each wanted one is found under its own task."""
    suite = SimpleNamespace(versions={"t": "1", "u": "1"})
    asked = {task: [Generate(f"{task}{k}", 8) for k in range(3)] for task in ("t", "u")}
    cache = SampleCache(tmp_path)
    (piece,) = cut(POINT, asked, 9)
    keys = slice_keys([piece], asked, DIGESTS, suite.versions, {})
    texts = [Completion(one.prompt.upper(), "stop", 1, 1) for one in piece.take(asked)]
    cache.write([(keys[piece], "p", piece.kind, Answered(tuple(texts), 0, 1.0))])
    part = {"t": asked["t"][1:2], "u": asked["u"][2:]}
    whole = Asking("serving", "tensors", suite, None, asked)
    found = from_whole(whole, cut(POINT, part, 9), part, DIGESTS, Answering(9, None), cache)
    cache.close()
    answers, _ = answers_of(POINT, part, 9, found)
    assert {task: [answer.text for answer in own] for task, own in answers.items()} == {"t": ["T1"], "u": ["U2"]}
