"""A sum over a packed vector, read as it is summed, has the bytes that whole tensors have: whatever their bits are."""

import json
from contextlib import closing

import numba
import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file

from rvdist.core.errors import BadInput
from rvdist.core.point import Mask, Term, Vector, WeightPoint
from rvdist.weights import packed
from rvdist.weights.arithmetic import packed_sum
from rvdist.weights.reader import open_point

EVERY = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)  # every bf16 there is
NUMEL = (1 << 16) * 9 + 4096 * 3 + 1235  # more than a chunk, and the end of it in the middle of a block and of a byte
RANGES = [(0, NUMEL), (1, NUMEL), (4095, 4097), (5000, 5001), (8192, 12_288), (77_777, 300_000), (9, 9), (0, 0)]
VALUES = (-0.0, 1e-45, -1e-40, 3.4e38, float("inf"), float("-inf"))


def base_and_vector(density: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Every bf16, and in the first half many −0; fp32 of any bits (NaNs of any payload, too), 0 but for such a share.
    Some blocks have no value, some are full of them."""
    generator = torch.Generator().manual_seed(0)
    base = torch.cat([EVERY[torch.randperm(1 << 16, generator=generator)] for _ in range(10)])[:NUMEL].clone()
    base[: NUMEL // 2][torch.rand(NUMEL // 2, generator=generator) < 0.1] = -0.0
    bits = torch.randint(-(2**31), 2**31, (NUMEL,), generator=generator, dtype=torch.int32)
    bits[::5] |= 0x7FC00000  # NaNs, of which rounding overflows some
    vector = bits.view(torch.float32)
    for k, value in enumerate(VALUES):
        vector[k + 1 :: 17] = value
    vector[torch.rand(NUMEL, generator=generator) >= density] = 0
    if 0 < density < 1:
        vector[8192:16_384] = 0
        vector[40_960:45_056] = 1.5
    return base, vector


def write_vector(place, vector: torch.Tensor, in_places: bool) -> str:
    elements = packed.bits(vector)
    filled, where, counts = packed.locate(elements, in_places)
    parts = {
        "x.starts": torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)),
        "x.where": torch.from_numpy(where),
        "x.values": torch.from_numpy(elements[filled]).view(torch.float32),
    }
    place.mkdir()
    save_file(parts, place / "model.safetensors", {"format": "pt", "rvdist": "vector"})
    said = {"version": 2, "tensors": {"x": {"form": "packed", "shape": [vector.numel()]}}}
    (place / "vector.json").write_text(json.dumps(said))
    return str(place)


def whole_tensors(base: torch.Tensor, vector: torch.Tensor, alpha: float) -> torch.Tensor:
    """torch's own operations, which round each time; one NaN for all."""
    result = (base.float() + alpha * vector).bfloat16()
    result[result.isnan()] = float("nan")
    return result


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.equal(found.view(torch.int16), wanted.view(torch.int16))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # 1e39 in fp32
@pytest.mark.parametrize("alpha", [1.0, 0.3, -1.7, 1e30, -1e-42, 1e39])
@pytest.mark.parametrize(
    ("density", "in_places"),
    [(0.0, True), (0.01, True), (0.01, False), (0.06, True), (0.1, False), (0.3, True), (0.3, False), (1.0, False)],
)
def test_every_bit_pattern_and_any_range_is_that_of_whole_tensors(density, in_places, alpha, tmp_path):
    base, vector = base_and_vector(density)
    target = str(write_checkpoint(tmp_path / "t", {"x": base}))
    point = WeightPoint(target, (Term(alpha, Vector(write_vector(tmp_path / "v", vector, in_places)), Mask()),))
    wanted = whole_tensors(base, vector, alpha)
    with closing(open_point(point)) as reader, closing(open_point(point)) as other:
        for start, stop in RANGES:
            odd = int((~wanted[start:stop].isfinite()).sum())
            room = torch.empty(stop - start + 1, dtype=torch.bfloat16)
            for out in (room[:-1], room[1:]):  # on both halves of 32 bits
                before = reader.nonfinite[0]
                reader.fill("x", start, out)
                assert same(out, wanted[start:stop]) and reader.nonfinite[0] - before == odd
            before = other.nonfinite[0]
            for begin, (chunk,) in other.chunks("x", start, stop):
                assert same(chunk, wanted[begin : begin + len(chunk)])
            assert other.nonfinite[0] - before == odd
        compiled = alpha < 3.5e38  # 0 times what fp32 has for more is not 0
        assert (reader._bytes_read > 0) == (other._bytes_read > 0) == compiled


def test_an_output_of_which_elements_are_not_reached_is_the_target_but_for_minus_zero(tmp_path):
    base = torch.tensor([-0.0, 0.0, 1e-40, -3.5]).bfloat16().repeat(5000)
    vector = torch.zeros(20_000)
    vector[19_999] = 1.0
    target, stored = str(write_checkpoint(tmp_path / "t", {"x": base})), write_vector(tmp_path / "v", vector, True)
    for alpha in (0.5, -0.5):
        with closing(open_point(WeightPoint(target, (Term(alpha, Vector(stored), Mask()),)))) as reader:
            out = torch.empty(20_000, dtype=torch.bfloat16)
            reader.fill("x", 0, out)
        assert same(out[1:4], base[1:4]) and same(out, whole_tensors(base, vector, alpha))
        assert bool(out[0].signbit()) == (alpha < 0)  # −0 + 0 is 0, −0 + −0 is −0


@pytest.mark.parametrize("density", [0.01, 0.3])
def test_a_vector_that_ends_too_early_is_named(density, tmp_path):
    base, vector = base_and_vector(density)
    target = str(write_checkpoint(tmp_path / "t", {"x": base}))
    stored = write_vector(tmp_path / "v", vector, density < 0.05)
    with closing(open_point(WeightPoint(target, (Term(0.5, Vector(stored), Mask()),)))) as reader:
        file = tmp_path / "v" / "model.safetensors"
        with open(file, "r+b") as stream:
            stream.truncate(file.stat().st_size // 2)
        with pytest.raises(BadInput, match=rf"{file}: ends inside tensor x\."):
            reader.fill("x", 0, torch.empty(NUMEL, dtype=torch.bfloat16))


HARMS = ["a place more", "one beyond", "a count less", "descending", "negative", "far"]


@pytest.mark.parametrize("in_places", [True, False])
@pytest.mark.parametrize("harm", HARMS)
def test_parts_that_do_not_fit_are_refused_by_a_sum(harm, in_places, tmp_path):
    base, vector = base_and_vector(0.05)
    vector[-100:] = 1.0
    target, stored = str(write_checkpoint(tmp_path / "t", {"x": base})), write_vector(tmp_path / "v", vector, in_places)
    file = tmp_path / "v" / "model.safetensors"
    parts = load_file(file)
    starts, where = parts["x.starts"], parts["x.where"].numpy()
    if harm == "a place more":
        where[7] = where[6] if in_places else where[7] ^ 1
    elif harm == "one beyond":
        where[-1] = NUMEL % 4096 if in_places else where[-1] | 0b10000000
        where[-2] ^= 0 if in_places else 1  # as many as before
    elif harm == "a count less":
        starts[3:-1] -= 1
    elif harm == "descending":
        starts[5] = starts[4] - 1
    elif harm == "negative":
        starts[0] = -1
    else:
        starts[4:] += 1 << 40
    save_file(parts, file, {"rvdist": "vector"})
    point = WeightPoint(target, (Term(0.5, Vector(stored), Mask()),))
    said = "tensor x does not say where its values are; save the vector again"
    with closing(open_point(point)) as reader, pytest.raises(BadInput, match=said):
        reader.fill("x", 0, torch.empty(NUMEL, dtype=torch.bfloat16))
    with closing(open_point(point)) as reader, pytest.raises(BadInput, match=said):
        for _ in reader.chunks("x", 0, NUMEL):
            pass


@numba.njit
def expand_16(word, values, begin, out, place):
    packed_sum._expand_16(word, values, begin, out, place)


def test_both_ways_to_expand_64_elements_are_one():
    generator = np.random.default_rng(0)
    values = generator.integers(1, 2**32, 100, dtype=np.uint32).view(np.float32)
    for word in (0, 1, 1 << 63, 2**64 - 1, *generator.integers(0, 2**64, 50, dtype=np.uint64)):
        mask = (int(word) >> np.arange(64, dtype=object)) & 1 == 1
        found = []
        for expand in (expand_16, packed_sum._expand_1):
            out = np.full(192, 7, np.float32)
            expand(np.uint64(word), values, 9, out, 64)
            found.append(out.view(np.uint32))
        wanted = np.full(192, 7, np.float32).view(np.uint32)
        wanted[64:128] = 0
        wanted[64:128][mask] = values.view(np.uint32)[9 : 9 + mask.sum()]
        assert all((out == wanted).all() for out in found)
