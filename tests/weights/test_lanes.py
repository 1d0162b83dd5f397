"""The lanes, and that chunks come out the same whichever there are. What needs a card runs on a stand-in for it too."""

from contextlib import closing, contextmanager

import pytest
import torch
from adapters import factors, write_adapter
from checkpoints import near, tensors, write_checkpoint
from points import read_point

from rvdist.core.errors import BadInput
from rvdist.core.method import FACTS, MethodSpec
from rvdist.core.point import Mask, Term, Vector, WeightPoint
from rvdist.weights import lanes as pipeline
from rvdist.weights.arithmetic import fused, method
from rvdist.weights.arithmetic.method import Scratch, count_nonfinite, tally_nonfinite, unify_nans
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.lanes import HostLane, card_chunk, open_lanes
from rvdist.weights.reader import PointReader, buffers_of, open_point


class LateLane(HostLane):
    """Computes as late as it may: whatever overwrites a chunk that is still to be computed, or orders them wrongly,
    changes the results."""

    def launch(self, *arguments):
        assert not self.busy, "filled again before it was waited for"
        self.busy, self._arguments = True, arguments

    def wait(self):
        assert self.busy
        self.busy = False
        super().launch(*self._arguments)
        return super().wait()

    def __init__(self, chunk):
        super().__init__(chunk)
        self.busy = False


class StandIn:
    """Streams and events that note who waits for whom; the memory of the card is the host's."""

    def __init__(self):
        self.log, self._current = [], None

    def __getattr__(self, name):
        return getattr(torch, name)

    @property
    def cuda(self):
        return self

    def is_available(self):
        return True

    def empty(self, *shape, dtype=None, device=None, pin_memory=False):
        return torch.full(shape, 77, dtype=dtype)

    @contextmanager
    def stream(self, stream):
        before, self._current = self._current, stream
        yield
        self._current = before

    def Stream(self):
        log = self.log

        class Stream:
            def wait_event(self, event):
                log.append((self, "waits for", event))

            def wait_stream(self, stream):
                log.append((self, "waits for what was begun by", stream))

        return Stream()

    def current_stream(self):
        return "the caller's"

    def Event(self, blocking=False):
        stand_in = self

        class Event:
            def record(self, stream):
                assert stream is stand_in._current
                stand_in.log.append((stream, "reaches", self))

            def synchronize(self):
                stand_in.log.append(("host", "waits for", self))

        return Event()


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=pytest.mark.gpu)])
def card(request, monkeypatch):
    """`device=cuda` in chunks of 1024 elements: a card where there is one, and a stand-in for it."""
    monkeypatch.setattr(pipeline, "CARD_CHUNK", 1024)
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        return None
    stand_in = StandIn()
    monkeypatch.setattr(pipeline, "torch", stand_in)
    monkeypatch.setattr(pipeline, "Scratch", lambda numel, device="cpu": Scratch(numel))
    return stand_in


@pytest.fixture
def eager(card, monkeypatch):
    """The arithmetic that a card does, also on its stand-in."""
    if card:
        monkeypatch.setattr(method, "_count", tally_nonfinite)
        monkeypatch.setattr(method, "_loops", None)


def everything(dtype):
    """A tensor of each kind: sizes that are no multiple of a chunk, one that is, an empty one, bits of every kind."""
    found = tensors(0, dtype) | {"exactly": torch.ones(2048).to(dtype), "empty": torch.empty(0, 3).to(dtype)}
    kinds = {"integers": torch.arange(3000), "truth": torch.arange(1500) % 3 == 0, "double": torch.randn(1100).double()}
    return found | kinds


def write_family(tmp_path, dtype, nonfinite=False):
    """Target, plus and minus; both donors have fewer rows of one tensor."""
    base = everything(dtype)
    paths = {}
    for seed, name in enumerate(("target", "plus", "minus")):
        still = {k: v for k, v in base.items() if not v.is_floating_point()}
        weights = (near(base, seed) | still) if seed else dict(base)
        if nonfinite:
            spoilt = weights["model.embed_tokens.weight"].view(-1)
            spoilt[seed * 100 : seed * 100 + 10] = torch.tensor([float("nan"), float("inf")] * 5)
        if seed:
            weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"][:100].clone()
        paths[name] = str(write_checkpoint(tmp_path / name, weights))
    return paths


def points_of(paths, method="linear"):
    vector = Vector(paths["plus"], paths["minus"])
    mask = Mask(exclude=("model[.]norm.*",), layers=((0, 1),), depth=(0.5, 1.5))
    several = (Term(1.5, vector), Term(-0.3, vector, mask))
    return [
        WeightPoint(paths["target"], terms, MethodSpec(method, 0.4 if method != "linear" else 1.0, 3))
        for terms in ((Term(1.0, vector),), several, (Term(0.0, vector),))
    ]


def read(points, paths, device="cpu", lanes=None, dtype=None):
    """Every tensor of every point as bytes, the non-finite counts, and the cuts."""
    sources = {path: open_source(path) for path in paths.values()}
    reader = PointReader(points, sources, dtype, device, lanes)
    found, cuts = {}, []
    for name, spec in reader.base.tensors.items():
        chunks = [[] for _ in points]
        for begin, results in reader.chunks(name, 0, spec.numel):
            cuts.append((name, begin))
            for pieces, result in zip(chunks, results, strict=True):
                assert begin == sum(piece.numel() for piece in pieces)
                pieces.append(result.clone())
        for k, pieces in enumerate(chunks):
            found[name, k] = torch.cat([piece.view(torch.uint8) for piece in pieces]) if pieces else None
    reader.close()
    return found, reader.nonfinite, cuts


def equal(one, other):
    assert one.keys() == other.keys()
    return [key for key in one if one[key] is not None and not torch.equal(one[key], other[key])] == []


@pytest.mark.parametrize("chunk", [1, 7, 1000, 1024, 1 << 20])
def test_lanes_ahead_of_the_reader_change_nothing(tmp_path, chunk):
    paths = write_family(tmp_path, torch.bfloat16)
    if chunk < 10:  # a chunk of one element is slow
        paths = {k: str(write_checkpoint(tmp_path / k / "few", {"w": torch.randn(23, 5).half()})) for k in paths}
    expected, _, _ = read(points_of(paths), paths)
    for lanes in ([HostLane(chunk)], [HostLane(chunk), HostLane(chunk)], [LateLane(chunk) for _ in range(3)]):
        found, nonfinite, _ = read(points_of(paths), paths, lanes=lanes)
        assert equal(found, expected) and nonfinite == [0, 0, 0]


def test_a_chunk_is_launched_before_the_one_before_it_is_given(tmp_path):
    paths = write_family(tmp_path, torch.bfloat16)
    lanes = [LateLane(100), LateLane(100)]
    reader = PointReader(points_of(paths), {path: open_source(path) for path in paths.values()}, lanes=lanes)
    busy = [[lane.busy for lane in lanes] for _ in reader.chunks("exactly", 0, 450)]
    assert busy == [[False, True], [True, False], [False, True], [True, False], [False, False]]
    assert [begin for begin, _ in reader.chunks("exactly", 250, 451)] == [250, 350, 450]


def test_closing_early_or_failing_leaves_nothing_under_way(tmp_path):
    paths = write_family(tmp_path, torch.bfloat16, nonfinite=True)
    points, name = points_of(paths), "model.embed_tokens.weight"
    sources = {path: open_source(path) for path in paths.values()}
    lanes = [LateLane(100), LateLane(100)]
    reader = PointReader(points, sources, lanes=lanes)
    chunks = reader.chunks(name, 0, 301 * 48)
    next(chunks)
    assert reader.nonfinite == [10, 10, 10], "only of what was given: the chunk ahead has 10 more"
    chunks.close()
    assert not any(lane.busy for lane in lanes) and reader.nonfinite == [10, 10, 10]

    first = reader.base.tensors[name].offset
    with open(f"{paths['plus']}/model.safetensors", "r+b") as file:
        file.truncate(first + 2 * 250)
    with pytest.raises(BadInput, match=name):
        list(reader.chunks(name, 0, 301 * 48))
    assert not any(lane.busy for lane in lanes)
    assert [begin for begin, _ in reader.chunks(name, 0, 150)] == [0, 100], "and it can go on"


@pytest.mark.parametrize("output", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_card_gives_the_bytes_of_the_cpu(tmp_path, card, eager, dtype, output):
    paths = write_family(tmp_path, dtype)
    with on_the_cpu():
        expected, counted, _ = read(points_of(paths), paths, dtype=output)
    found, nonfinite, cuts = read(points_of(paths), paths, "cuda", dtype=output)
    assert equal(found, expected) and nonfinite == counted == [0, 0, 0]
    assert ("exactly", 1024) in cuts and len(cuts) > 30


@pytest.mark.parametrize("name", ["ties", "dare"])
def test_a_card_gives_the_bytes_of_the_cpu_for_every_method(tmp_path, card, eager, name):
    paths = write_family(tmp_path, torch.bfloat16)
    with on_the_cpu():
        expected, _, _ = read(points_of(paths, name), paths)
    found, _, _ = read(points_of(paths, name), paths, "cuda")
    assert equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("facts", [one for one in FACTS if not one.low_rank], ids=lambda facts: facts.name)
def test_a_card_fills_memory_with_the_bytes_of_the_cpu(tmp_path, card, eager, dtype, facts, monkeypatch):
    """On the host or its own, whole or rows or columns, by every method; and names what is not finite."""
    paths, name = write_family(tmp_path, dtype, nonfinite=True), "model.embed_tokens.weight"
    vector = Vector(paths["plus"], paths["target"] if facts.one_vector else paths["minus"])
    method = MethodSpec(facts.name, 0.4 if "density" in facts.parameters else 1.0, 3).without_unused()
    if facts.whole_rows:
        monkeypatch.setattr(pipeline, "CARD_CHUNK", 4096)  # no row is longer
    asked = WeightPoint(paths["target"], (Term(0.7, vector),), method)
    with on_the_cpu(), closing(open_point(asked)) as reader:
        expected = {name: filled(reader, name, spec.shape) for name, spec in reader.base.tensors.items()}
        columns = filled(reader, name, (80, 20), range(11, 91), range(7, 27))
        spoiled = set(reader.spoiled)
    with closing(open_point(asked, device="cuda")) as reader:
        for own, bits in expected.items():
            assert torch.equal(filled(reader, own, reader.base.tensors[own].shape), bits), own
        assert set(reader.spoiled) == spoiled >= {name}
        assert torch.equal(filled(reader, name, (80, 20), range(11, 91), range(7, 27)), columns)
        there, size = torch.full((301 * 48,), 7, dtype=dtype, device="cpu" if card else "cuda"), dtype.itemsize
        for begin, (result,) in reader.chunks(name, 48, 300 * 48, there[48 : 300 * 48]):
            assert result.data_ptr() == there[begin:].data_ptr()
        bits = there[48 : 300 * 48].cpu().view(torch.uint8)
        assert torch.equal(bits, expected[name][48 * size : 300 * 48 * size])
        assert (there[:48] == 7).all() and (there[300 * 48 :] == 7).all()
    if card:
        assert any(what == "waits for what was begun by" and whom == "the caller's" for _, what, whom in card.log)


@pytest.mark.parametrize("name", ["linear", *(one.name for one in FACTS if one.whole_matrices)])
def test_a_card_merges_adapters_to_the_bytes_of_the_cpu(tmp_path, card, eager, name):
    """By methods that see matrices, which look at their factors on the CPU; whole, and the columns of an engine's
    rank."""
    target = str(write_checkpoint(tmp_path / "target", tensors(0)))
    adapters = [str(write_adapter(tmp_path / f"adapter{k}", factors(k))) for k in (1, 2)]
    asked = WeightPoint(target, tuple(Term(0.5, Vector(path)) for path in adapters), MethodSpec(name))
    embedding = "model.embed_tokens.weight"
    with on_the_cpu():
        expected = dict(read_point(asked))
    with closing(open_point(asked, device="cuda")) as reader:
        for own, tensor in expected.items():
            assert torch.equal(filled(reader, own, tensor.shape), tensor.contiguous().view(-1).view(torch.uint8)), own
        part = filled(reader, embedding, (80, 20), range(11, 91), range(7, 27)).view(torch.bfloat16)
    assert torch.equal(part.view(80, 20), expected[embedding][11:91, 7:27])
    assert not torch.equal(expected[embedding], tensors(0)[embedding])


def filled(reader, name, shape, rows=None, columns=None):
    dtype = reader.output_dtype(reader.base.tensors[name])
    out = torch.zeros(torch.Size(shape).numel(), dtype=dtype)
    if rows:
        reader.fill_columns(name, rows, columns, out)
    else:
        reader.fill(name, 0, out)
    return out.view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_card_counts_what_is_not_finite(tmp_path, card, eager, dtype):
    paths = write_family(tmp_path, dtype, nonfinite=True)
    with on_the_cpu():
        expected, counted, _ = read(points_of(paths), paths)
    found, nonfinite, _ = read(points_of(paths), paths, "cuda")
    assert equal(found, expected), "every NaN that was computed is the same one"
    assert nonfinite == counted and counted[2] == 10 and counted[0] >= 30 - 5


@contextmanager
def on_the_cpu():
    """The CPU's own arithmetic and lanes, inside a test that replaces them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "torch", torch)
        patch.setattr(method, "_loops", fused)
        patch.setattr(method, "_count", count_nonfinite)
        yield


def test_copies_and_arithmetic_wait_for_each_other(tmp_path, card):
    if card is None:
        pytest.skip("the stand-in notes what a card does not tell")
    paths = write_family(tmp_path, torch.bfloat16)
    read(points_of(paths)[:1], paths, "cuda")
    launches = [card.log[k : k + 5] for k, (_, what, _) in enumerate(card.log) if what == "reaches"][::3]
    for launch in launches:
        (inbound, _, arrived), (compute, _, a), (_, _, combined), (outbound, _, c), (_, _, left) = launch
        assert [what for _, what, _ in launch] == ["reaches", "waits for"] * 2 + ["reaches"]
        assert (a, c) == (arrived, combined) and len({inbound, compute, outbound}) == 3
        assert ("host", "waits for", left) in card.log
    lefts = [launch[-1][-1] for launch in launches]
    assert len(set(lefts)) == 2, "two lanes"
    assert sum(who == "host" for who, _, _ in card.log) == len(launches), "one wait a chunk"


def test_page_locked_memory_is_bounded():
    for buffers in (1, 4, 5, 8, 31, 32, 33, 1000):
        chunk = card_chunk(buffers)
        assert 2 * buffers * chunk * 8 <= 256 << 20 and chunk & (chunk - 1) == 0
    assert card_chunk(4) == 4 << 20


def test_memory_needed_is_counted(tmp_path):
    paths = {k: k for k in ("target", "plus", "minus")}
    assert buffers_of(points_of(paths)) == 3 + 3 and buffers_of([WeightPoint("target")]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_no_card_is_one_sentence():
    with pytest.raises(BadInput, match="device=cuda: torch finds no CUDA device here; .* set device=cpu"):
        open_lanes("cuda", 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_both_ways_of_counting_agree(dtype):
    tensor = torch.randn(5000).to(dtype)
    tensor[::7], tensor[1::35], tensor[3::500] = float("nan"), float("inf"), -float("inf")
    assert int(tally_nonfinite(tensor)) == count_nonfinite(tensor) == int((~tensor.isfinite()).sum())
    assert int(tally_nonfinite(torch.arange(9))) == 0


@pytest.mark.parametrize(
    ("dtype", "one"),
    [(torch.bfloat16, 0x7FC0), (torch.float16, 0x7E00), (torch.float8_e4m3fn, 0x7F), (torch.float8_e5m2, 0x7F)],
)
def test_unified_nans_are_one_and_nothing_else_changes(dtype, one):
    bits = {1: torch.uint8, 2: torch.uint16}[dtype.itemsize]
    every = torch.arange(1 << 8 * dtype.itemsize, dtype=torch.int32).to(bits).view(dtype)
    unified = every.clone()
    unify_nans(unified)
    assert set(unified[every.isnan()].view(bits).tolist()) == {one}
    assert torch.equal(unified.view(bits)[~every.isnan()], every.view(bits)[~every.isnan()])
