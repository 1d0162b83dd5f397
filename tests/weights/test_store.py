"""Stored vectors: applied, they equal the difference; what is said of them is true; nothing half-written is taken."""

import hashlib
import itertools
import json
import math
from collections import defaultdict

import pytest
import torch
from adapters import close, differences, factors, write_adapter
from checkpoints import load_checkpoint, write_checkpoint
from fp8 import dequantized, quantized, write_fp8
from peaks import peak_while
from points import read_point

from rvdist.core.errors import BadInput, Failed
from rvdist.core.method import MethodSpec
from rvdist.core.point import Term, Vector, WeightPoint
from rvdist.merge.actor import WorkerSettings
from rvdist.merge.driver import merge
from rvdist.merge.plan import build_plan
from rvdist.verify import verify
from rvdist.weights import measured, reduce
from rvdist.weights import store as storing
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.operand import open_operand
from rvdist.weights.store import Storage, save

BITS16 = "targets and outputs of 16 bits"
EVERYTHING = "every target and output"


def store(paths, output, storage=None, **options):
    """Saves plus − minus and returns what vector.json says of it."""
    vector = Vector(str(paths["plus"]), str(paths["minus"])) if "minus" in paths else Vector(str(paths["plus"]))
    sources = {source: open_source(source) for source in vector.sources()}
    save(vector, sources, output, storage or Storage(), say=lambda text: None, **options)
    return json.loads((output / "vector.json").read_text())


def load(path):
    """Every tensor of a stored vector, as it is read."""
    source = open_source(str(path))
    operand, found = open_operand(source), {}
    for name, spec in source.tensors.items():
        buffer = torch.empty(spec.nbytes, dtype=torch.uint8)
        found[name] = operand.read(name, 0, spec.numel, buffer).view(spec.shape)
    return found


def same(one, other):
    one, other = load(one), load(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def merged(points):
    """Writes every point to its directory, in one merge."""
    sources = {source: open_source(source) for point in points.values() for source in point.sources()}
    merge(build_plan(points, sources), sources, defaultdict(lambda: "card\n"), WorkerSettings(2))


def weights(path):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in path.glob("*.safetensors")}


def shifted(paths, vector, alpha):
    return WeightPoint(str(paths["target"]), (Term(alpha, vector),))


def wide(paths):
    """v in fp64 from whole tensors."""
    plus, minus = load_checkpoint(paths["plus"]), load_checkpoint(paths["minus"])
    return {name: plus[name].double() - minus[name].double() for name in plus}


def test_an_interrupt_keeps_what_is_done(family, tmp_path):
    paths, told = family(), []

    def interrupt(nbytes):
        told.append(nbytes)
        if len(told) == calls - 3:
            raise KeyboardInterrupt

    store(paths, tmp_path / "right", progress=told.append)
    calls = len(told)
    told.clear()
    with pytest.raises(KeyboardInterrupt):
        store(paths, tmp_path / "v", progress=interrupt)
    kept = (tmp_path / "v.partial/journal.jsonl").read_text().splitlines()
    assert len(kept) > calls // 4
    store(paths, tmp_path / "v")
    assert weights(tmp_path / "v") == weights(tmp_path / "right")


def test_what_stands_beside_the_first_donor_changes_in_the_middle(family, tmp_path):
    paths = family()
    template = paths["plus"] / "chat_template.jinja"
    template.write_text("one")
    with pytest.raises(BadInput, match="plus/chat_template.jinja: changed while it was being read"):
        store(paths, tmp_path / "v", progress=lambda nbytes: template.write_text("two"))
    assert not list(tmp_path.glob("v*"))
    store(paths, tmp_path / "v")
    assert (tmp_path / "v/chat_template.jinja").read_text() == "two"


def relative_error(found, exact):
    error = sum(float((found[name].double() - exact[name]).square().sum()) for name in exact)
    return math.sqrt(error / sum(float(tensor.square().sum()) for tensor in exact.values()))


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_stored_exactly_it_equals_the_difference_to_the_bit(family, tmp_path, dtype):
    paths = family(dtype, shards=2)
    said = store(paths, tmp_path / "v")
    assert said["exact"] and said["exact_for"] in (BITS16, EVERYTHING)
    stored = {spec.dtype for spec in open_source(str(tmp_path / "v")).tensors.values()}
    assert stored == {"F64" if dtype == torch.float32 else "F32"}
    vectors = {"donors": Vector(str(paths["plus"]), str(paths["minus"])), "stored": Vector(str(tmp_path / "v"))}
    asked = [(1.0, "linear"), (-0.7, "linear"), (0.7, "ties"), (0.7, "dare")]
    merged(
        {
            tmp_path / f"{of} {alpha} {name}": WeightPoint(
                str(paths["target"]), (Term(alpha, vector),), MethodSpec(name, 1.0 if name == "linear" else 0.4)
            )
            for of, vector in vectors.items()
            for alpha, name in asked
        }
    )
    found = [weights(tmp_path / f"donors {alpha} {name}") for alpha, name in asked]
    assert found == [weights(tmp_path / f"stored {alpha} {name}") for alpha, name in asked]
    assert all(one != other for one, other in itertools.combinations([*found, weights(paths["target"])], 2))


def test_exact_for_16_bits_is_not_exact_for_more(tmp_path):
    """1 − 2⁻³⁰ is no fp32 number: a merge in 16 bits takes it rounded to one, a merge in fp32 does not."""
    shape = (2, 3)
    paths = {
        "target": write_checkpoint(tmp_path / "t", {"x": torch.zeros(shape).bfloat16()}),
        "plus": write_checkpoint(tmp_path / "p", {"x": torch.ones(shape).bfloat16()}),
        "minus": write_checkpoint(tmp_path / "m", {"x": torch.full(shape, 2.0**-30).bfloat16()}),
    }
    said = store(paths, tmp_path / "v")
    assert said["exact"] and said["exact_for"] == BITS16 and said["max_error"] == 2.0**-30
    paths |= {
        name: write_checkpoint(
            tmp_path / f"{name} wide", {k: v.float() for k, v in load_checkpoint(paths[name]).items()}
        )
        for name in ("plus", "minus")
    }
    said = store(paths, tmp_path / "wide")
    assert said["exact_for"] == EVERYTHING and said["max_error"] == 0


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_a_rounded_vector_has_the_error_it_says(family, tmp_path, dtype):
    paths = family(torch.float32)
    said, exact = store(paths, tmp_path / "v", Storage(dtype)), wide(paths)
    rounded = {name: v.to(torch.bfloat16 if dtype == "BF16" else torch.float16) for name, v in exact.items()}
    found = load(tmp_path / "v")
    assert all(found[name].dtype == rounded[name].dtype for name in found)
    assert all(torch.equal(found[name], rounded[name]) for name in found)
    assert not said["exact"] and said["exact_for"] is None
    assert said["max_error"] == max(float((found[n].double() - exact[n]).abs().max()) for n in exact)
    assert said["relative_error"] == pytest.approx(relative_error(found, exact), rel=1e-9)
    assert said["relative_error"] < 2.0**-8


def test_a_truncated_svd_is_the_best_of_its_rank(family, tmp_path):
    paths = family()
    said, exact, found = store(paths, tmp_path / "v", Storage(rank=5)), wide(paths), load(tmp_path / "v")
    for name, v in exact.items():
        entry = said["tensors"][name]
        if v.dim() < 2:
            assert entry["form"] == "dense" and torch.equal(found[name].double(), v)
            continue
        values = torch.linalg.svdvals(v)
        best = float(values[5:].norm() / values.norm())
        assert entry["form"] == "low_rank" and entry["relative_error"] == pytest.approx(best, rel=1e-4)
        assert entry["relative_error"] == pytest.approx(relative_error({0: found[name]}, {0: v}), rel=1e-9)
    assert said["relative_error"] == pytest.approx(relative_error(found, exact), rel=1e-9)
    assert said["bytes"] == sum(p.stat().st_size for p in (tmp_path / "v").glob("*.safetensors"))


def test_full_rank_is_the_vector_but_for_rounding(family, tmp_path):
    said = store(family(), tmp_path / "v", Storage(rank=10_000))
    assert said["relative_error"] < 1e-5
    assert open_source(str(tmp_path / "v")).tensors["model.embed_tokens.weight"].shape == (301, 48)


def test_large_matrices_have_only_their_largest_singular_values_computed(monkeypatch):
    monkeypatch.setattr(reduce, "_SMALL_SVD", 16)
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(200, 6, generator=generator) @ torch.randn(6, 150, generator=generator)
    matrix += 0.01 * torch.randn(200, 150, generator=generator)
    one, other = reduce.factors(matrix, 6), reduce.factors(matrix, 6)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    best = torch.linalg.svdvals(matrix)[6:].norm()
    assert (matrix - one[0] @ one[1]).norm() == pytest.approx(float(best), rel=1e-3)


@pytest.mark.parametrize(("density", "chunk"), [(0.1, 1 << 17), (0.1, 1000), (1.0, 1 << 17)])
def test_a_sparse_vector_keeps_the_largest(family, tmp_path, monkeypatch, density, chunk):
    monkeypatch.setattr(measured, "AT_ONCE", chunk)
    paths = family()
    said, exact, found = store(paths, tmp_path / "v", Storage(density=density)), wide(paths), load(tmp_path / "v")
    for name, v in exact.items():
        kept = math.ceil(density * v.numel())
        order = torch.argsort(v.abs().view(-1), descending=True, stable=True)[:kept]
        reference = torch.zeros(v.numel(), dtype=torch.float64)
        reference[order] = v.view(-1)[order]
        assert torch.equal(found[name].double().view(-1), reference), name
    assert said["exact"] is (density == 1.0)
    assert said["relative_error"] == pytest.approx(relative_error(found, exact), rel=1e-9)


def test_of_a_stack_that_is_stored_sparse_little_is_held(tmp_path):
    """All of it has 64 MiB in working precision."""
    stack = torch.randn(16, 1024, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    paths = {
        name: write_checkpoint(tmp_path / name, {"experts": factor * stack}, config={"model_type": "tiny"})
        for name, factor in (("plus", 1.5), ("minus", 1.0))
    }
    assert peak_while(lambda: store(paths, tmp_path / "v", Storage(density=0.01))) < 40 << 20


@pytest.mark.usefixtures("ray_local")
def test_a_merge_applies_what_is_read(family, tmp_path):
    paths = family()
    target = load_checkpoint(paths["target"])
    storages = {"low rank": Storage(rank=3), "sparse": Storage(density=0.2), "rounded": Storage("BF16")}
    for name, storage in storages.items():
        store(paths, tmp_path / name, storage)
    merged({tmp_path / f"{name} out": shifted(paths, Vector(str(tmp_path / name)), 0.5) for name in storages})
    for name in storages:
        stored = load(tmp_path / name)
        out = load_checkpoint(tmp_path / f"{name} out")
        exact = {key: (target[key].double() + 0.5 * stored[key].double()).bfloat16() for key in target}
        off = sum(int((out[key] != exact[key]).sum()) for key in target)
        assert off <= sum(tensor.numel() for tensor in target.values()) / 10_000, name


def test_it_is_sharded_as_the_first_donor_is_or_by_size(family, tmp_path):
    siblings = family()
    paths = {"plus": siblings["minus"], "minus": siblings["plus"]}
    store(paths, tmp_path / "as donor")
    assert len(list((tmp_path / "as donor").glob("vector-*-of-00002.safetensors"))) == 2
    store(paths, tmp_path / "small", Storage(max_shard_size=40_000))
    sizes = [p.stat().st_size for p in (tmp_path / "small").glob("*.safetensors")]
    assert len(sizes) > 3 and sorted(sizes)[-2] < 45_000
    assert same(tmp_path / "as donor", tmp_path / "small")


def test_it_says_what_it_is_made_of(family, tmp_path):
    paths = family()
    said = store(paths, tmp_path / "v")
    assert said["formula"] == "v = plus − minus"
    assert {part: donor["name"] for part, donor in said["donors"].items()} == {"plus": "plus", "minus": "minus"}
    assert all(len(donor["digest"]) == 32 for donor in said["donors"].values())
    metadata = open_source(str(tmp_path / "v")).metadata["vector.safetensors"]
    assert metadata["rvdist"] == "vector" and json.loads(metadata["donors"]) == said["donors"]
    assert str(tmp_path) not in (tmp_path / "v" / "vector.json").read_text() + str(metadata)
    assert (tmp_path / "v" / "config.json").exists() and (tmp_path / "v" / "tokenizer.json").exists()
    assert verify(tmp_path / "v").problems == []


def test_integer_tensors_are_skipped_and_listed(tmp_path):
    for name in ("plus", "minus"):
        write_checkpoint(tmp_path / name, {"x": torch.randn(3), "steps": torch.tensor([1, 2])})
    paths = {name: tmp_path / name for name in ("plus", "minus")}
    said = store(paths, tmp_path / "v")
    assert said["skipped"] == {"steps": "is of dtype I64"} and said["tensors"].keys() == {"x"}


def test_donors_in_fp8_are_scaled_first(family, tmp_path):
    paths, block = family(), (32, 16)
    fp8 = {name: quantized(load_checkpoint(paths[name]), block) for name in ("plus", "minus")}
    paths = {name: write_fp8(tmp_path / f"{name} fp8", weights, block) for name, weights in fp8.items()}
    assert store(paths, tmp_path / "v")["exact"]
    plus, minus = (dequantized(fp8[name], block) for name in ("plus", "minus"))
    found = load(tmp_path / "v")
    assert found.keys() == plus.keys()
    assert all(torch.equal(found[name], plus[name].float() - minus[name].float()) for name in found)
    assert "quantization_config" not in (tmp_path / "v" / "config.json").read_text()


def test_an_interrupted_save_goes_on(family, tmp_path, monkeypatch):
    paths = family()
    store(paths, tmp_path / "whole", Storage(rank=4))
    written = []
    real = storing.Writer.write

    def failing(self, parts, chunks):
        if len(written) >= 8:
            raise Failed("the disk is full")
        written.extend(part.name for part in parts)
        real(self, parts, chunks)
        self.sync()

    monkeypatch.setattr(storing.Writer, "write", failing)
    with pytest.raises(Failed):
        store(paths, tmp_path / "v", Storage(rank=4))
    assert not (tmp_path / "v").exists() and (tmp_path / "v.partial").is_dir()
    first = list(written)
    written.clear()

    def counting(self, parts, chunks):
        written.extend(part.name for part in parts)
        real(self, parts, chunks)

    monkeypatch.setattr(storing.Writer, "write", counting)
    said = store(paths, tmp_path / "v", Storage(rank=4))
    assert not set(first) & set(written) and not (tmp_path / "v.partial").exists()
    assert said == json.loads((tmp_path / "whole" / "vector.json").read_text())
    assert same(tmp_path / "v", tmp_path / "whole")


def test_existing_outputs(family, tmp_path):
    paths = family()
    store(paths, tmp_path / "v")
    said = []
    vector = Vector(str(paths["plus"]), str(paths["minus"]))
    sources = {source: open_source(source) for source in vector.sources()}
    save(vector, sources, tmp_path / "v", Storage(), say=said.append)
    assert said == [f"{tmp_path / 'v'}: already complete"]
    with pytest.raises(BadInput, match="already exists; choose another output or set overwrite=true"):
        store(paths, tmp_path / "v", Storage("BF16"))
    assert store(paths, tmp_path / "v", Storage("BF16"), overwrite=True)["storage"]["dtype"] == "BF16"


@pytest.mark.parametrize("storage", [Storage(), Storage(rank=2), Storage(density=0.5)])
def test_what_is_not_a_number_is_not_stored(family, tmp_path, storage):
    paths = family()
    weights = load_checkpoint(paths["plus"])
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    paths["plus"] = write_checkpoint(tmp_path / "nan", weights)
    said = r"up_proj.weight of the vector would be .*nan/model.safetensors \(plus\) has 1 value.*; get a sound copy$"
    with pytest.raises(BadInput, match=said):
        store(paths, tmp_path / "v", storage)
    assert not (tmp_path / "v").exists() and not (tmp_path / "v.partial").exists()


def test_a_difference_for_which_its_dtype_has_no_room_is_not_stored(family, tmp_path):
    paths = family()
    weights = load_checkpoint(paths["plus"])
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e30
    paths["plus"] = write_checkpoint(tmp_path / "huge", weights)
    with pytest.raises(BadInput, match="the donors are finite, and their difference overflows; store it in a wider"):
        store(paths, tmp_path / "v", Storage("F16"))
    assert store(paths, tmp_path / "v", Storage("BF16"))["storage"]["dtype"] == "BF16"


def test_stored_vectors_and_adapters_can_be_stored_again(family, tmp_path):
    paths, lora = family(), factors()
    store(paths, tmp_path / "v")
    said = store({"plus": tmp_path / "v"}, tmp_path / "rounded", Storage("BF16"))
    assert said["formula"] == "v = difference" and said["donors"]["difference"]["name"] == "v"
    exact = load(tmp_path / "v")
    assert all(torch.equal(found, exact[name].bfloat16()) for name, found in load(tmp_path / "rounded").items())
    store({"plus": write_adapter(tmp_path / "a", lora)}, tmp_path / "dense")
    dense = load(tmp_path / "dense")
    assert all(close(dense[name], exact) for name, exact in differences(lora).items())
    assert not (tmp_path / "dense" / "adapter_config.json").exists()


@pytest.mark.usefixtures("ray_local")
def test_an_adapter_merges_as_its_whole_tensors_would(family, tmp_path):
    paths, lora = family(torch.float32), factors()
    paths["adapter"] = write_adapter(tmp_path / "a", lora)
    merged({tmp_path / "out": shifted(paths, Vector(str(paths["adapter"])), 1.0)})
    target, deltas = load_checkpoint(paths["target"]), differences(lora)
    for name, tensor in load_checkpoint(tmp_path / "out").items():
        exact = target[name].double() + (deltas[name].float().double() if name in deltas else 0)
        assert torch.allclose(tensor.double(), exact, rtol=2.0**-23, atol=1e-9), name


def test_the_difference_of_two_adapters(family, tmp_path):
    paths, one, other = family(torch.float32), factors(1), factors(2, rank=6)
    vector = Vector(str(write_adapter(tmp_path / "1", one)), str(write_adapter(tmp_path / "2", other, r=6)))
    found = dict(read_point(shifted(paths, vector, 1.0)))
    target, plus, minus = load_checkpoint(paths["target"]), differences(one), differences(other, 10 / 6)
    for name, tensor in found.items():
        exact = target[name].double() + (plus[name] - minus[name] if name in plus else 0)
        assert torch.allclose(tensor.double(), exact, rtol=1e-6, atol=1e-8), name
