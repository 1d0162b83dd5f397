"""What vLLM chose where cached answers were made."""

import json
import sqlite3
import sys
from contextlib import closing
from functools import partial
from types import SimpleNamespace

import pytest

from rvdist.core.errors import Failed
from rvdist.core.log import Log
from rvdist.core.point import WeightPoint
from rvdist.core.timing import Timing
from rvdist.evaluate.answers import Answering, Asked, answer
from rvdist.evaluate.asking import Asking
from rvdist.evaluate.cache import SampleCache
from rvdist.evaluate.request import Answered, Completion, Generate
from rvdist.evaluate.resolved import name_of, recall, remember

ENGINE = {"engine": 1}
CHOSEN = {"max_num_seqs": "256", "attention_backend": "FLASH_ATTN"}


def test_what_was_chosen_first_is_kept(tmp_path):
    one, other = name_of({"device": "H100"}, "[]"), name_of({"device": "A100"}, "[]")
    assert one != other and recall(tmp_path, one) == {}
    remember(tmp_path, one, CHOSEN)
    remember(tmp_path, one, {"max_num_seqs": "1024"})
    remember(tmp_path, other, {"max_num_seqs": "1024"})
    assert recall(tmp_path, one) == CHOSEN and recall(tmp_path, other) == {"max_num_seqs": "1024"}


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": []}', "[" * 100_000])
def test_a_damaged_file_says_nothing_and_is_replaced(tmp_path, content):
    (tmp_path / "engines.json").write_text(content)  # as versions before kept those of all
    assert recall(tmp_path, "x") == {}
    remember(tmp_path, "y", CHOSEN)
    assert recall(tmp_path, "y") == CHOSEN
    (tmp_path / "engines/y.json").write_text(content.replace("[]", "{"))
    assert recall(tmp_path, "y") == {}
    remember(tmp_path, "y", CHOSEN)
    assert recall(tmp_path, "y") == CHOSEN
    (tmp_path / "engines.json").write_text(json.dumps({"z": CHOSEN}))
    assert recall(tmp_path, "z") == CHOSEN


def test_what_one_command_keeps_another_does_not_lose(tmp_path):
    """One that is killed in the middle, and one that reads in the middle of it: a file of all was written anew."""
    remember(tmp_path, "one", CHOSEN)
    kept = {path: path.stat() for path in tmp_path.rglob("*.json")}
    remember(tmp_path, "other", CHOSEN)
    assert kept and all(path.stat() == status for path, status in kept.items())


def test_what_an_engine_chose_is_durable_before_the_first_answer(disk):
    """Without it the answers, which are durable, were not found again after a power cut."""
    cache = disk.place / "cache"
    assert answered(cache, CHOSEN)[0] == [0, 1]
    disk.stop()
    disk.begin_again()
    assert answered(cache, CHOSEN)[0] == []


def test_answers_that_would_not_be_found_again_are_not_kept(tmp_path):
    (tmp_path / "engines").write_text("in the way")
    with pytest.raises(Failed, match=r"engines/\w+.json: cannot be written .*answers in the sample cache are not"):
        answered(tmp_path, CHOSEN)
    assert not keys_of(tmp_path)


class Engines:
    """A fleet that chose something, and answers each slice with its number among all that it was asked."""

    def __init__(self, chosen):
        self.seats = SimpleNamespace(resolved=chosen, first_up=0.0)
        self.asked = []

    def answer(self, slices, requests, keep, watch):
        for piece in slices:
            self.asked.append(piece.parts[0].begin)
            keep({piece: Answered((Completion("new", "stop", 1, 1),), 0, 1.0)})


def answered(directory, chosen, identity=ENGINE):
    """What is asked of engines that chose this, as a command asks: what the cache remembers is known before."""
    engines, name = Engines(chosen), name_of(identity, "[]")
    requests = {"t": [Generate("one", 8), Generate("two", 8)]}
    asking = Asking("serving", "[]", SimpleNamespace(versions={"t": "1"}), None, requests)
    answering = Answering(
        1, lambda: engines, directory, identity, recall(directory, name), partial(remember, directory, name)
    )
    found = answer(asking, {WeightPoint("p"): Asked("p", "p")}, answering, Timing(), Log())
    return engines.asked, [
        one.answers[0].text for _, one in sorted(found.answers.items(), key=lambda it: it[0].parts[0].begin)
    ]


def keys_of(directory):
    with closing(sqlite3.connect(directory / "samples.sqlite")) as database:
        return {key for (key,) in database.execute("SELECT key FROM slices")}


def test_what_was_chosen_is_part_of_the_key_and_what_an_older_version_kept_is_found(tmp_path):
    plain = tmp_path / "plain"
    assert answered(plain, {})[0] == [0, 1]  # a version that knew nothing of it wrote such keys
    assert answered(plain, CHOSEN) == ([], ["new", "new"])
    one, other = tmp_path / "one", tmp_path / "other"
    assert answered(one, CHOSEN)[0] == answered(other, CHOSEN | {"max_num_seqs": "512"})[0] == [0, 1]
    assert answered(one, CHOSEN)[0] == []
    assert recall(one, name_of(ENGINE, "[]")) == CHOSEN
    assert not keys_of(one) & keys_of(other) and not keys_of(one) & keys_of(plain)


def test_what_an_engine_chose_is_kept_before_the_first_answer(tmp_path, monkeypatch):
    """Else those that a killed command has kept are not found again."""
    monkeypatch.setattr(SampleCache, "write", lambda self, kept: sys.exit("killed"))
    with pytest.raises(SystemExit):
        answered(tmp_path, CHOSEN)
    assert recall(tmp_path, name_of(ENGINE, "[]")) == CHOSEN
