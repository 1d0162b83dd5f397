"""Bounce buffers and several readers: what late copies and other threads get is what one reader reads."""

from contextlib import closing
from dataclasses import replace

import pytest
import torch
from checkpoints import near, tensors, write_checkpoint
from points import read_point

from rvdist.core.errors import BadInput
from rvdist.core.method import MethodSpec
from rvdist.core.point import Term, Vector, WeightPoint
from rvdist.evaluate.fleet import readers as several
from rvdist.evaluate.fleet.bounce import BounceBuffers, Straight
from rvdist.evaluate.fleet.deferred import defer_tensors
from rvdist.evaluate.fleet.readers import Readers
from rvdist.weights.reader import open_point

NAME = "model.embed_tokens.weight"
METHODS = [MethodSpec(), MethodSpec("ties", 0.3), MethodSpec("della_linear", 0.5, 3), MethodSpec("iso_c")]


class Card:
    """A stream that copies when it is waited for, and not before."""

    def __init__(self, waits=True):
        self.pending, self.waits = [], waits

    def memory(self, numel):
        card = self

        class Memory(torch.Tensor):
            def copy_(self, source, non_blocking=False):
                assert non_blocking
                card.pending.append((self.as_subclass(torch.Tensor), source))
                return self

        return torch.zeros(numel, dtype=torch.bfloat16).as_subclass(Memory)

    def event(self):
        card = self

        class Event:
            last = None

            def record(self):
                self.last = card.pending[-1]

            def synchronize(self):
                while card.waits and any(self.last is one for one in card.pending):
                    card.copy_next()

        return Event()

    def copy_next(self):
        target, source = self.pending.pop(0)
        target.copy_(source)


def send(card, numel, nbytes, row=1):
    """Numbers by the bounce buffers to the card, after what else there is; how much was under way at each filling."""
    bounce, under_way = BounceBuffers(False, nbytes, card.event), []

    def fill(start, out):
        under_way.append(len(card.pending))
        out.copy_(torch.arange(start, start + out.numel()) % 251)

    memory = card.memory(numel)
    for target in (memory[: numel // 3], memory[numel // 3 :]):
        bounce.copy(fill, target, row)
    bounce.wait()
    for _ in range(len(card.pending)):
        card.copy_next()
    first, rest = torch.arange(numel // 3) % 251, torch.arange(numel - numel // 3) % 251
    return torch.equal(memory.as_subclass(torch.Tensor), torch.cat([first, rest]).bfloat16()), under_way


@pytest.mark.parametrize(("numel", "nbytes", "row"), [(999, 64, 1), (999, 128, 9), (90, 8, 15), (6, 4096, 1)])
def test_no_buffer_is_filled_before_it_has_been_copied(numel, nbytes, row):
    right, under_way = send(Card(), numel, nbytes, row)
    assert right and max(under_way) == 1, "and one is filled while the other is copied"
    if len(under_way) > 2:
        assert not send(Card(waits=False), numel, nbytes, row)[0], "this test would notice"


@pytest.fixture
def point(tmp_path):
    base = tensors(0) | {"no_rows": torch.empty(0, 48).bfloat16(), "no_columns": torch.empty(5, 0).bfloat16()}
    weights = {"target": base, "plus": near(base, 1), "minus": near(base, 2)}
    paths = {name: str(write_checkpoint(tmp_path / name, own)) for name, own in weights.items()}
    return WeightPoint(paths["target"], (Term(0.5, Vector(paths["plus"], paths["minus"])),))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_how_many_read_and_by_what_buffers_changes_nothing(count, method, point, monkeypatch):
    """Of whole tensors, of rows, and of columns; the parts of a tensor are shared out, and each is read once."""
    asked = replace(point, method=method)
    whole = dict(read_point(asked))
    monkeypatch.setattr(several, "CHUNK", 1024)
    for nbytes in (None, 0, 100, 5000, 1 << 20):
        bounce, opened = BounceBuffers(False, nbytes) if nbytes else None if nbytes is None else Straight(), []
        monkeypatch.setattr(several, "open_point", lambda *given, to=opened: to.append(open_point(*given)) or to[-1])
        with closing(Readers(asked, count)) as reader:
            found = dict(defer_tensors(reader, bounce))
            for name, tensor in found.items():
                assert torch.equal(torch.empty_like(whole[name]).copy_(tensor), whole[name])
            if method.name == "linear":
                assert reader.bytes_read == 3 * sum(tensor.nbytes for tensor in whole.values())
            some, fused = torch.zeros(301, 20).bfloat16(), torch.zeros(300, 48).bfloat16()
            some.copy_(found[NAME].narrow(1, 7, 20))
            fused.narrow(0, 50, 200).copy_(found[NAME].narrow(0, 101, 200))
            assert torch.equal(some, whole[NAME][:, 7:27]) and torch.equal(fused[50:250], whole[NAME][101:])
            assert not fused[:50].any() and not fused[250:].any()
        alone = nbytes == 100 or method.facts.whole_tensors or method.facts.whole_matrices
        assert len(opened) == (1 if alone else min(count, 2) if nbytes == 5000 else count)


def test_what_is_not_finite_is_named_whoever_read_it(tmp_path, monkeypatch):
    monkeypatch.setattr(several, "CHUNK", 1024)
    base = tensors(0)
    base[NAME][300, 4], base["model.layers.2.mlp.up_proj.weight"][1, 1] = float("inf"), float("nan")
    asked = WeightPoint(str(write_checkpoint(tmp_path / "base", base)))
    with closing(Readers(asked, 4)) as reader:
        for name, tensor in defer_tensors(reader):
            torch.empty_like(base[name]).copy_(tensor)
        assert reader.spoiled == [name for name in reader.base.tensors if not base[name].isfinite().all()]
        assert len(reader.spoiled) == 2 and "get a sound copy" in reader.blame(reader.spoiled[0])


def test_what_one_of_them_cannot_read_is_said(point, monkeypatch):
    monkeypatch.setattr(several, "CHUNK", 1024)
    with closing(Readers(point, 4)) as reader:
        tensor, spec = dict(defer_tensors(reader))[NAME], reader.base.tensors[NAME]
        torch.zeros(301, 48).bfloat16().copy_(tensor)
        with open(f"{point.terms[0].vector.plus}/model.safetensors", "r+b") as file:
            file.truncate(spec.offset + spec.nbytes - 100)
        with pytest.raises(BadInput, match=NAME):
            torch.zeros(301, 48).bfloat16().copy_(tensor)
