"""Where donors agree nothing is stored: it takes less, and what is read is the difference to the bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from points import read_point
from safetensors.torch import load_file, save_file

from rvdist.core.config import Storage
from rvdist.core.errors import BadInput
from rvdist.core.point import Mask, Term, Vector, WeightPoint
from rvdist.weights import packed
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.operand import open_operand
from rvdist.weights.store import save

SHAPES = {"a.weight": (301, 257), "b.weight": (5, 4096), "c.bias": (7,), "d.weight": (64, 64)}
SIZES = {0.7: 0.70, 0.9: 0.28, 0.99: 0.035}  # of one bf16 checkpoint, by the share of equal elements

HARMS = ["a place more", "a value less", "descending", "negative", "beyond the end", "of a block"]


def donors(place, share, dtype=torch.bfloat16, shapes=SHAPES):
    """Target, plus and minus; of plus and minus such a share of elements is equal."""
    generator = torch.Generator().manual_seed(0)
    target = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    minus = {name: (x + 0.1 * torch.randn(x.shape, generator=generator)).to(dtype) for name, x in target.items()}
    moved = {name: torch.rand(x.shape, generator=generator) >= share for name, x in minus.items()}
    plus = {name: torch.where(moved[name], (x + 1).to(dtype), x) for name, x in minus.items()}
    parts = {"target": target, "plus": plus, "minus": minus}
    return {name: write_checkpoint(place / name, tensors) for name, tensors in parts.items()}


def store(paths, output, storage=None):
    vector = Vector(str(paths["plus"]), str(paths["minus"]))
    sources = {source: open_source(source) for source in vector.sources()}
    save(vector, sources, output, storage or Storage(), say=lambda text: None)
    return json.loads((output / "vector.json").read_text())


def point(paths, vector):
    return WeightPoint(str(paths["target"]), (Term(0.7, vector, Mask()),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.7, 0.9, 0.99, 1.0])
def test_what_is_read_is_the_difference_to_the_bit(share, dtype, tmp_path):
    paths = donors(tmp_path, share, dtype)
    said = store(paths, tmp_path / "v")
    forms = {entry["form"] for name, entry in said["tensors"].items() if name != "c.bias"}
    assert forms == ({"packed"} if share > 0.2 else {"dense"}) and said["version"] == (2 if share > 0.2 else 1)
    assert said["exact"]
    direct = dict(read_point(point(paths, Vector(str(paths["plus"]), str(paths["minus"])))))
    stored = dict(read_point(point(paths, Vector(str(tmp_path / "v")))))
    assert all(torch.equal(direct[name].view(torch.uint8), stored[name].view(torch.uint8)) for name in direct)


@pytest.mark.parametrize("share", SIZES)
def test_the_file_is_as_small_as_promised(share, tmp_path):
    paths = donors(tmp_path, share, shapes={"a": (1024, 1024), "b": (3000, 1000)})
    said = store(paths, tmp_path / "v")
    assert said["bytes"] <= SIZES[share] * (paths["plus"] / "model.safetensors").stat().st_size


@pytest.mark.parametrize("share", SIZES)
def test_no_more_is_read_than_promised(share, tmp_path):
    paths = donors(tmp_path, share, shapes={"a": (1024, 1024), "b": (3000, 1000)})
    store(paths, tmp_path / "v")
    operand = open_operand(open_source(str(tmp_path / "v")))
    for name, spec in operand.checkpoint.tensors.items():
        for begin in range(1000, spec.numel, 1 << 17):  # cut anywhere
            end = min(begin + (1 << 17), spec.numel)
            operand.read(name, begin, end, torch.empty(8 * (end - begin), dtype=torch.uint8))
    checkpoint = (paths["plus"] / "model.safetensors").stat().st_size
    assert (checkpoint + operand.bytes_read) / (3 * checkpoint) <= {0.7: 0.57, 0.9: 0.43, 0.99: 0.35}[share]


def test_minus_zero_is_a_value(tmp_path):
    """−0 − 0 is −0, and −0 added to −0 is not what 0 added to it is."""
    zeros = torch.zeros(10_000)
    paths = {
        "target": write_checkpoint(tmp_path / "t", {"x": -zeros}),
        "plus": write_checkpoint(tmp_path / "p", {"x": torch.cat([-zeros[:3], zeros[3:]])}),
        "minus": write_checkpoint(tmp_path / "m", {"x": zeros}),
    }
    assert store(paths, tmp_path / "v")["tensors"]["x"]["form"] == "packed"
    ((_, found),) = read_point(point(paths, Vector(str(tmp_path / "v"))))
    assert found[:3].signbit().all() and not found[3:].signbit().any()


@pytest.mark.parametrize("share", [0.7, 0.99])
@pytest.mark.parametrize("begin", [0, 1, 4095, 4096, 4097, 12_345, 77_356])
def test_any_range_is_that_of_the_whole(share, begin, tmp_path):
    store(donors(tmp_path, share), tmp_path / "v", Storage("BF16"))
    operand = open_operand(open_source(str(tmp_path / "v")))
    numel = operand.checkpoint.tensors["a.weight"].numel
    whole = operand.read("a.weight", 0, numel, torch.empty(8 * numel, dtype=torch.uint8)).clone()
    assert 0 < whole.count_nonzero() < numel
    for size in (1, 5, 4096, 9_000):
        end = min(begin + size, numel)
        part = operand.read("a.weight", begin, end, torch.empty(8 * size, dtype=torch.uint8))
        assert torch.equal(part, whole[begin:end])


@pytest.mark.parametrize("share", [0.7, 0.99])
@pytest.mark.parametrize("harm", HARMS)
def test_places_that_do_not_fit_are_refused(harm, share, tmp_path):
    store(donors(tmp_path, share), tmp_path / "v")
    (file,) = (tmp_path / "v").glob("*.safetensors")
    tensors, name = load_file(file), "a.weight"
    starts, where = tensors[f"{name}.starts"], tensors[f"{name}.where"]
    places = where.dtype == torch.uint16
    if harm == "a place more":
        where[0] = where[1] if places else where[0] ^ 1
    elif harm == "a value less":
        starts[-1] -= 1
    elif harm == "descending":
        starts[3] = starts[5] + 1
    elif harm == "negative":
        starts[0] = -1
    elif harm == "beyond the end":
        where[-1] = 4095 if places else where[-1] ^ 0b11000000
        tensors[f"{name}.where"] = where
    else:
        starts[1:] += 5000
        starts[-1] = len(tensors[f"{name}.values"])
    save_file(tensors, file, {"rvdist": "vector"})
    operand = open_operand(open_source(str(tmp_path / "v")))
    numel = operand.checkpoint.tensors[name].numel
    with pytest.raises(BadInput, match=f"tensor {name} does not say where its values are; save the vector again"):
        operand.read(name, 0, numel, torch.empty(8 * numel, dtype=torch.uint8))


def test_random_arrays_come_back():
    generator = np.random.default_rng(0)
    for _ in range(60):
        numel, density = int(generator.integers(1, 20_000)), generator.random() ** 3
        elements = generator.integers(1, 2**32, numel, dtype=np.uint32) * (generator.random(numel) < density)
        elements = elements.astype(np.uint32)
        for places in (True, False):
            filled, where, counts = packed.locate(elements, places)
            first = int(generator.integers(0, min(numel, packed.BLOCK)))
            out = np.empty(numel - first, np.uint32)
            assert packed.spread(where, counts, elements[filled], first, numel, out)
            assert (out == elements[first:]).all()
