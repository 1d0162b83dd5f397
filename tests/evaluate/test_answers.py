"""Answers that may be of other weights than those that were digested are neither kept nor given."""

import os
from contextlib import closing
from types import SimpleNamespace

import pytest
from checkpoints import POCKET, load_checkpoint, near, write_checkpoint

from rvdist.core.errors import BadInput, Failed
from rvdist.core.log import Log
from rvdist.core.point import Term, Vector, WeightPoint
from rvdist.core.timing import Timing
from rvdist.evaluate.answers import Answering, Asked, answer
from rvdist.evaluate.asking import Asking
from rvdist.evaluate.cache import SampleCache
from rvdist.evaluate.fleet.served import companions
from rvdist.evaluate.request import Answered, Completion, Generate
from rvdist.weights.checkpoint.digest import stamps_of
from rvdist.weights.checkpoint.source import open_source


class Engines:
    """A fleet that answers one slice after the other, and meets a `change` after the first."""

    def __init__(self, change):
        self.seats, self.change = SimpleNamespace(resolved={}, first_up=0.0), change

    def answer(self, slices, requests, keep, watch):
        for number, piece in enumerate(slices):
            if number == 1:
                self.change()
            keep({piece: Answered((Completion("text", "stop", 1, 1),), 0, 1.0)})


@pytest.fixture
def paths(tmp_path):
    weights = load_checkpoint(POCKET / "target")
    made = {"target": weights, "plus": near(weights, 1), "minus": near(weights, 2)}
    for name, tensors in made.items():
        write_checkpoint(tmp_path / name, tensors, 1)
    (tmp_path / "target/chat_template.jinja").write_text("one")
    (tmp_path / "link").symlink_to(tmp_path / "plus")
    return tmp_path


def replace(path):
    """Another file of the same name, size and time."""
    new, before = path.with_name("new"), path.stat()
    new.write_bytes(path.read_bytes()[:-2] + b"\0\0")
    new.rename(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def lead_elsewhere(link):
    link.unlink()
    link.symlink_to(link.with_name("minus"))


CHANGES = {
    "plus/model.safetensors": lambda path: replace(path / "plus/model.safetensors"),
    "target/model.safetensors": lambda path: (path / "target/model.safetensors").unlink(),
    "minus/model.safetensors": lambda path: (path / "minus/model.safetensors").open("r+b").truncate(1000),
    "link/model.safetensors": lambda path: lead_elsewhere(path / "link"),
    "target/chat_template.jinja": lambda path: (path / "target/chat_template.jinja").write_text("two"),
    "target/generation_config.json": lambda path: (path / "target/generation_config.json").write_text("{}"),
}


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("changed", CHANGES)
def test_a_source_that_changes_between_two_answers_ends_the_run_and_leaves_the_cache_true(paths, changed, cached):
    plus = str(paths / ("link" if changed.startswith("link") else "plus"))
    point = WeightPoint(str(paths / "target"), (Term(1.0, Vector(plus, str(paths / "minus"))),))
    sources = [open_source(name) for name in point.sources()]
    stamps, suite = stamps_of(companions(paths / "target")), SimpleNamespace(versions={"t": "1"})
    requests = {"t": [Generate("one", 8), Generate("two", 8)]}
    asking = Asking("serving", "[]", suite, None, requests, served=paths / "target", stamps=stamps)
    engines = Engines(lambda: CHANGES[changed](paths))
    answering = Answering(1, lambda: engines, paths / "cache" if cached else None, {"engine": "one"})
    with pytest.raises((BadInput, Failed), match=f"{changed}: (changed while it was being read|cannot be read)"):
        answer(asking, {point: Asked("digest", "p", sources)}, answering, Timing(), Log())
    if cached:
        with closing(SampleCache(paths / "cache")) as cache:
            assert cache._connection.execute("SELECT count(*) FROM slices").fetchone() == (1,)


@pytest.mark.parametrize("changed", [True, False])
def test_a_point_that_is_refused_for_what_stands_in_a_source_s_place_is_not_said_to_be_unsound(paths, changed):
    """Where the source is what it was, the point alone has no answers."""
    point = WeightPoint(str(paths / "target"), (Term(1.0, Vector(str(paths / "plus"), str(paths / "minus"))),))
    sources = [open_source(name) for name in point.sources()]
    asking = Asking("serving", "[]", SimpleNamespace(versions={"t": "1"}), None, {"t": [Generate("one", 8)]})
    engines = SimpleNamespace(seats=SimpleNamespace(resolved={}, first_up=0.0))
    engines.answer = lambda *given: replace(paths / "plus/model.safetensors") if changed else None
    answering, asked = Answering(1, lambda: engines), {point: Asked("digest", "p", sources)}
    if changed:
        with pytest.raises(BadInput, match="plus/model.safetensors: changed while it was being read"):
            answer(asking, asked, answering, Timing(), Log())
    else:
        assert answer(asking, asked, answering, Timing(), Log()).answers == {}
