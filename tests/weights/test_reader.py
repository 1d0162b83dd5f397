from contextlib import closing
from pathlib import Path

import pytest
import torch
from checkpoints import load_checkpoint, write_checkpoint
from points import read_point

from rvdist.core.errors import BadInput
from rvdist.core.point import Mask, Term, Vector, WeightPoint
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.reader import CHUNK, PointReader, open_point


def test_a_point_streams_as_whole_tensors_would_be_computed(family):
    paths = family()
    vector = Vector(str(paths["plus"]), str(paths["minus"]))
    mask = Mask(layers=((0, 1),))
    point = WeightPoint(str(paths["target"]), (Term(1.5, vector), Term(-0.5, vector, mask)))
    target, plus, minus = (load_checkpoint(paths[k]) for k in ("target", "plus", "minus"))
    found = dict(read_point(point))
    assert found.keys() == target.keys()
    for name, tensor in found.items():
        difference = plus[name].double() - minus[name].double()
        exact = target[name].double() + 1.5 * difference - 0.5 * mask.coefficient(name, 3) * difference
        assert tensor.shape == target[name].shape and torch.equal(tensor, exact.bfloat16()), name


def test_points_that_share_a_base_share_every_byte_read(family):
    paths = {k: str(v) for k, v in family().items()}
    vector = Vector(paths["plus"], paths["minus"])
    sources = {path: open_source(path) for path in paths.values()}
    name, numel = "model.embed_tokens.weight", 301 * 48

    def read(alphas):
        reader = PointReader([WeightPoint(paths["target"], (Term(a, vector),)) for a in alphas], sources)
        results = [[t.clone() for t in tensors] for _, tensors in reader.chunks(name, 0, numel)]
        return reader.bytes_read, results

    assert numel < CHUNK
    one_bytes, one = read([0.5])
    many_bytes, many = read([0.5, 1.0, -2.0])
    assert one_bytes == many_bytes == 3 * numel * 2
    assert torch.equal(one[0][0], many[0][0]) and not torch.equal(many[0][0], many[0][1])


def test_alpha_zero_reads_the_base_alone_and_equals_it(family):
    paths = {k: str(v) for k, v in family().items()}
    point = WeightPoint(paths["target"], (Term(0.0, Vector(paths["plus"], paths["minus"])),))
    reader = PointReader([point], {path: open_source(path) for path in paths.values()})
    ((_, (chunk,)),) = reader.chunks("model.norm.weight", 0, 48)
    assert torch.equal(chunk, load_checkpoint(Path(paths["target"]))["model.norm.weight"])
    assert reader.bytes_read == 48 * 2


NUMEL = 3 * (2 * CHUNK // 3 + 4115)


def sum_of_every_bit_pattern(place: Path, donors: int, rows: int = 0) -> WeightPoint:
    """Of vectors that share a donor, each with another number at a place; the last donor may have fewer rows."""
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    paths = []
    for k in range(donors + 1):
        shuffled = torch.cat([patterns[torch.randperm(1 << 16, generator=torch.Generator().manual_seed(k))]] * 9)
        tensor = shuffled[:NUMEL].view(-1, 3)
        tensor = tensor[:rows].clone() if rows and k == donors else tensor
        paths.append(str(write_checkpoint(place / str(k), {"one.weight": tensor, "same.weight": tensor[:5].clone()})))
    target, first, *others = paths
    return WeightPoint(target, tuple(Term(0.3 * (k + 1), Vector(first, one)) for k, one in enumerate(others)))


def sum_of_whole_tensors(point: WeightPoint, name: str) -> torch.Tensor:
    """torch's own operations, which round each time; one NaN for all."""
    total = load_checkpoint(Path(point.base))[name].float()
    for term in point.terms:
        plus, minus = (load_checkpoint(Path(source))[name].float() for source in term.vector.sources())
        rows = min(len(plus), len(minus))
        total[:rows] += term.alpha * (plus[:rows] - minus[:rows])
    result = total.bfloat16().view(-1)
    result[result.isnan()] = float("nan")
    return result


@pytest.mark.parametrize(("donors", "rows"), [(2, 0), (4, 0), (2, 70_001)], ids=["one", "several", "fewer rows"])
def test_what_is_summed_as_it_is_read_is_what_chunks_are(tmp_path, donors, rows):
    point = sum_of_every_bit_pattern(tmp_path, donors, rows)
    name, numel = "one.weight", NUMEL
    whole = sum_of_whole_tensors(point, name)
    with closing(open_point(point)) as reader, closing(open_point(point)) as other:
        for start, stop in ((0, numel), (7, numel - 1), (CHUNK, CHUNK + 1), (5, 5)):
            found, wanted = torch.zeros(stop - start).bfloat16(), torch.zeros(stop - start).bfloat16()
            reader.fill(name, start, found)
            for begin, (chunk,) in other.chunks(name, start, stop):
                wanted[begin - start : begin - start + len(chunk)] = chunk
            assert torch.equal(found.view(torch.int16), whole[start:stop].view(torch.int16))
            assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))
            assert reader.nonfinite == other.nonfinite and reader.bytes_read == other.bytes_read
            at_once = stop - start if not rows or stop <= 3 * rows else 0
            for one in (reader, other):
                assert one._bytes_read >= (donors + 1) * 2 * at_once, "a compiled loop read it"
        assert reader.nonfinite[0] > 0 and name in reader.spoiled


def test_a_file_that_ends_too_early_while_it_is_summed_is_named(tmp_path):
    point = sum_of_every_bit_pattern(tmp_path, 2)
    with closing(open_point(point)) as reader:
        file = Path(point.terms[0].vector.plus) / "model.safetensors"
        with open(file, "r+b") as stream:
            stream.truncate(file.stat().st_size // 2)
        with pytest.raises(BadInput, match=rf"{file}: ends inside tensor one.weight"):
            reader.fill("one.weight", 0, torch.empty(2 * CHUNK).bfloat16())
