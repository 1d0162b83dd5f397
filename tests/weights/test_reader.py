from pathlib import Path

import torch
from checkpoints import load_checkpoint
from points import read_point

from rvdist.core.point import Mask, Term, Vector, WeightPoint
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.reader import CHUNK, PointReader


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
