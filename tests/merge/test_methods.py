"""Every method through the reader and through a real merge: to the bit what whole tensors give, however it is cut."""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch
import whole_tensors
from checkpoints import load_checkpoint, near, write_checkpoint
from points import read_point

from rvdist.core.method import MethodSpec
from rvdist.core.point import Mask, Term, Vector, WeightPoint
from rvdist.merge import plan as planning
from rvdist.merge.actor import WorkerSettings
from rvdist.merge.driver import merge
from rvdist.merge.plan import build_plan
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.lanes import HostLane
from rvdist.weights.reader import PointReader

METHODS = [MethodSpec("linear"), MethodSpec("ties", 0.3), MethodSpec("dare", 0.3, 5)]


@pytest.fixture
def point(family, tmp_path):
    """`point(dtype)`: three vectors; one ends at layer 1 and is 0 on the scalar, one fades over depth."""

    def make(dtype=torch.bfloat16):
        paths = {name: str(path) for name, path in family(dtype, shards=2).items()}
        base = load_checkpoint(tmp_path / "target")
        others = [str(write_checkpoint(tmp_path / f"other{k}", near(base, 10 + k), 1 + k)) for k in range(2)]
        return WeightPoint(
            paths["target"],
            (
                Term(0.75, Vector(paths["plus"], paths["minus"]), Mask(exclude=("scalar",), layers=((0, 1),))),
                Term(-0.5, Vector(others[0], paths["minus"]), Mask(depth=(1.0, 0.25))),
                Term(1.3, Vector(others[1], paths["minus"])),
            ),
        )

    return make


def expected(point):
    """Every tensor of the point, each computed whole."""
    weights = {source: load_checkpoint(open_source(source).path) for source in point.sources()}
    for name, base in weights[point.base].items():
        terms = [
            (term.alpha * term.mask.coefficient(name, 3), *(weights[s][name].view(-1) for s in term.vector.sources()))
            for term in point.terms
        ]
        terms = [term for term in terms if term[0] != 0]
        method, flat = point.method, base.view(-1)
        if method.name == "ties":
            flat = whole_tensors.ties(flat, terms, method.density)
        else:
            flat = whole_tensors.dare(flat, terms, method.density, method.seed, name)  # density 1: linear
        yield name, flat.view(base.shape)


def read_by(chunk, point):
    reader = PointReader([point], {s: open_source(s) for s in point.sources()}, lanes=[HostLane(chunk)])
    for name, spec in reader.base.tensors.items():
        parts = [tensor.clone() for _, (tensor,) in reader.chunks(name, 0, spec.numel)]
        yield name, torch.cat(parts).view(spec.shape)


def assert_same(found, wanted):
    found, wanted = dict(found), dict(wanted)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_read_whole_and_by_chunks(point, method, dtype):
    asked = replace(point(dtype), method=method)
    wanted = dict(expected(asked))
    assert_same(read_point(asked), wanted)
    assert_same(read_by(997, asked), wanted)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_merges_do_not_depend_on_workers_or_units(point, method, tmp_path, monkeypatch):
    asked = replace(point(), method=method)
    wanted = dict(expected(asked))
    for workers, unit_bytes in ((1, 32 << 20), (1, 1000), (2, 1000), (2, 7000)):
        monkeypatch.setattr(planning, "UNIT_BYTES", unit_bytes)
        out = tmp_path / f"out-{workers}-{unit_bytes}"
        sources = {source: open_source(source) for source in asked.sources()}
        merge(build_plan({out: asked}, sources), sources, defaultdict(str), WorkerSettings(workers))
        assert_same(load_checkpoint(out), wanted)


@pytest.mark.usefixtures("ray_local")
def test_points_of_several_methods_in_one_merge(point, tmp_path):
    one = point()
    asked = {tmp_path / f"out-{method.name}": replace(one, method=method) for method in METHODS}
    sources = {source: open_source(source) for source in one.sources()}
    merge(build_plan(asked, sources), sources, defaultdict(str), WorkerSettings(1))
    for directory, single in asked.items():
        assert_same(load_checkpoint(directory), expected(single))


def test_rows_that_a_wider_vector_lacks(tmp_path):
    """A base with extra rows, and a first vector of fp32 that ends before them: the precision of the survey and the
    number of the second vector stay what they are on the other rows."""
    generator = torch.Generator().manual_seed(0)
    long, short = (torch.randn(rows, 16, generator=generator).bfloat16() for rows in (40, 32))
    weights = {
        "base": long, "plus": short.float() * 1.01, "minus": short.float(),
        "more": long + 0.01 * torch.randn(40, 16, generator=generator).bfloat16(), "less": long * 0.98,
    }  # fmt: skip
    paths = {name: str(write_checkpoint(tmp_path / name, {"w": tensor})) for name, tensor in weights.items()}
    terms = (Term(0.5, Vector(paths["plus"], paths["minus"])), Term(0.7, Vector(paths["more"], paths["less"])))
    padded = [torch.cat([weights[name], torch.zeros(8, 16)]).view(-1) for name in ("plus", "minus")]
    others = [weights[name].double().view(-1) for name in ("more", "less")]
    differences = [(0.5, *(tensor.double() for tensor in padded)), (0.7, *others)]
    for method in METHODS[1:]:
        flat = long.double().view(-1)
        if method.name == "ties":
            exact = whole_tensors.ties(flat, differences, method.density)
        else:
            exact = whole_tensors.dare(flat, differences, method.density, method.seed)
        asked = WeightPoint(paths["base"], terms, method)
        assert_same(read_point(asked), {"w": exact.bfloat16().view(40, 16)})
        assert_same(read_by(100, asked), {"w": exact.bfloat16().view(40, 16)})
