"""What is measured chunk by chunk, against straightforward sums over whole tensors."""

import itertools
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from adapters import factors, write_adapter
from checkpoints import POCKET, load_checkpoint, near, tensors, write_checkpoint
from fp8 import quantized, write_fp8
from threadpoolctl import threadpool_limits

from rvdist.core.errors import BadInput
from rvdist.core.point import Vector, layer_of
from rvdist.weights import values
from rvdist.weights.anatomy import analyze as module
from rvdist.weights.anatomy.analyze import THRESHOLDS, analyze
from rvdist.weights.anatomy.kind import kind_of
from rvdist.weights.anatomy.sums import BLOCK
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.operand import open_operand
from rvdist.weights.store import Storage, save
from rvdist.weights.values import Values


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with threadpool_limits(1):
        yield


def measured(vectors, target, **options):
    paths = {str(target), *(s for vector in vectors.values() for s in vector.sources())}
    return analyze(vectors, str(target), {path: open_source(path) for path in paths}, **options)


def whole(path):
    """Every floating-point tensor of a source in fp64, as it is read."""
    source, found = open_source(str(path)), {}
    operand = open_operand(source)
    for name, spec in source.tensors.items():
        if spec.is_floating_point:
            read = operand.read(name, 0, spec.numel, torch.empty(8 * spec.numel, dtype=torch.uint8))
            found[name] = read.double().view(spec.shape)
    return found


def vector_of(paths):
    return Vector(str(paths["plus"]), str(paths["minus"]))


def flat(weights, names):
    return np.concatenate([weights[name].numpy().reshape(-1) for name in names] or [np.empty(0)])


def norm(values):
    return math.sqrt(math.fsum((values * values).tolist()))


def cosine(a, b):
    return math.fsum((a * b).tolist()) / norm(a) / norm(b) if a.any() and b.any() else None


def overlap(a, b):
    either = ((a != 0) | (b != 0)).sum()
    return ((a != 0) & (b != 0)).sum() / either if either else None


def agreement(a, b):
    both = (a != 0) & (b != 0)
    return ((a > 0) == (b > 0))[both].mean() if both.any() else None


def exactly(number):
    return None if number is None else pytest.approx(number, rel=1e-12, abs=1e-15)


def check_part(part, members, theta, vectors, origins):
    """A part of the findings against all elements of its tensors, side by side. `vectors` and `origins` are whole
    tensors by name; of a tensor that a vector lacks it has none."""
    at = flat(theta, members)
    assert part.elements == len(at) and part.norm == exactly(norm(at))
    zeros = {member: torch.zeros_like(theta[member]) for member in members}
    spread = {name: flat({m: v.get(m, zeros[m]) for m in members}, members) for name, v in vectors.items()}
    for name, v in vectors.items():
        own = [member for member in members if member in v]
        assert (name in part.vectors) == bool(own)
        if not own:
            continue
        found, values, here = part.vectors[name], flat(v, own), flat(theta, own)
        assert found.elements == len(values) and found.norm == exactly(norm(values))
        assert found.relative == exactly(norm(values) / norm(at))
        assert found.largest == np.abs(values).max() and found.zeros == np.mean(values == 0)
        assert found.below == tuple(np.mean(np.abs(values) <= t * np.abs(here)) for t in THRESHOLDS)
        origin = origins.get(name)
        assert (found.distance is None) == (origin is None)
        if origin is not None:
            apart = {member: theta[member] - origin[member] for member in members}
            assert found.distance == exactly(norm(flat(apart, members)) / norm(at))
            assert found.toward == exactly(cosine(flat(apart, members), spread[name]))
    assert part.cosines == tuple(tuple(exactly(cosine(a, b)) for b in spread.values()) for a in spread.values())
    assert part.overlaps == tuple(tuple(overlap(a, b) for b in spread.values()) for a in spread.values())
    assert part.agreements == tuple(tuple(agreement(a, b) for b in spread.values()) for a in spread.values())


def check(anatomy, theta, vectors, origins):
    assert anatomy.vectors == tuple(vectors)
    groups = {
        "layers": lambda part, name: layer_of(name) == part.layer,
        "kinds": lambda part, name: kind_of(name) == part.kind,
        "cells": lambda part, name: (layer_of(name), kind_of(name)) == (part.layer, part.kind),
        "tensors": lambda part, name: name == part.name,
    }
    check_part(anatomy.whole, list(theta), theta, vectors, origins)
    for group, belongs in groups.items():
        members = [[name for name in theta if belongs(part, name)] for part in getattr(anatomy, group)]
        for part, own in zip(getattr(anatomy, group), members, strict=True):
            check_part(part, own, theta, vectors, origins)
        within = [name for name in theta if group != "layers" or layer_of(name) is not None]
        assert sorted(itertools.chain(*members)) == sorted(within)
    for part in anatomy.tensors:
        for name, found in part.vectors.items():
            v = vectors[name][part.name]
            assert (found.spectrum is not None) == (v.dim() == 2 and bool(v.any()))
            if found.spectrum:
                values = torch.linalg.svdvals(v)
                off = (torch.tensor(found.spectrum.values, dtype=torch.float64).square() - values[:128].square()).abs()
                assert float(off.max()) <= found.spectrum.error * float(values[0]) ** 2


def difference(plus, minus):
    return {name: plus[name] - minus[name] for name in plus}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_donors_beside_their_target(family, dtype):
    paths = family(dtype, shards=2)
    target, plus, minus = (whole(paths[k]) for k in ("target", "plus", "minus"))
    vectors = {"one": vector_of(paths), "back": Vector(str(paths["minus"]), str(paths["plus"]))}
    vectors["chat"] = Vector(str(paths["target"]), str(paths["minus"]))
    exact = {"one": difference(plus, minus), "back": difference(minus, plus), "chat": difference(target, minus)}
    anatomy = measured(vectors, paths["target"])
    check(anatomy, target, exact, {"one": minus, "back": plus, "chat": minus})
    assert anatomy.whole.cosines[0][1] == -1 and anatomy.whole.vectors["chat"].toward == pytest.approx(1)
    assert [part.name for part in anatomy.layers] == ["layer 0", "layer 1", "layer 2"]
    assert [part.kind for part in anatomy.kinds] == ["embedding", "q_proj", "up_proj", "norm", "scalar"]
    assert [part.name for part in anatomy.cells][-4:] == ["layer 2 up_proj", "embedding", "norm", "scalar"]


def test_the_pocket_family():
    paths = {"target": POCKET / "target", "plus": POCKET / "grpo", "minus": POCKET / "sft"}
    target, plus, minus = (whole(path) for path in paths.values())
    anatomy = measured({"v": vector_of(paths)}, paths["target"])
    check(anatomy, target, {"v": difference(plus, minus)}, {"v": minus})
    assert anatomy.whole.norm == pytest.approx(47.09, abs=0.01)
    assert anatomy.whole.vectors["v"].norm == pytest.approx(0.806, abs=0.001)


def test_adapters_and_stored_vectors_are_measured_as_they_are_read(family, tmp_path):
    paths = family(shards=2)
    adapter = write_adapter(tmp_path / "adapter", factors())
    other = write_adapter(tmp_path / "other", factors(1))
    vectors = {
        "adapter": Vector(str(adapter)),
        "of its base": Vector(str(adapter), str(paths["minus"])),
        "between": Vector(str(adapter), str(other)),
        "donors": vector_of(paths),
    }
    exact = {
        "adapter": whole(adapter),
        "of its base": whole(adapter),
        "between": difference(whole(adapter), whole(other)),
    }
    exact["donors"] = difference(whole(paths["plus"]), whole(paths["minus"]))
    sources = {source: open_source(source) for source in vectors["donors"].sources()}
    for name, storage in {
        "exact": Storage(), "rounded": Storage("BF16"), "low rank": Storage(rank=5), "sparse": Storage(density=0.1)
    }.items():  # fmt: skip
        save(vectors["donors"], sources, tmp_path / name, storage, say=lambda text: None)
        vectors[name], exact[name] = Vector(str(tmp_path / name)), whole(tmp_path / name)
    minus = whole(paths["minus"])
    anatomy = measured(vectors, paths["target"])
    check(anatomy, whole(paths["target"]), exact, {"of its base": minus, "donors": minus})
    found = anatomy.whole.vectors
    assert found["adapter"].elements == 48 * 48 + 131 * 48 + 301 * 48 and found["sparse"].zeros > 0.89
    (q,) = (part for part in anatomy.tensors if part.name == "model.layers.0.self_attn.q_proj.weight")
    assert q.vectors["adapter"].spectrum.values[4] < 1e-6 * q.vectors["adapter"].spectrum.values[0]
    assert q.vectors["low rank"].spectrum.effective_rank[0] <= 5.001


def test_fp8_is_measured_scaled(tmp_path):
    base = tensors(0)
    made = {
        name: write_fp8(tmp_path / name, quantized(near(base, seed), (16, 32)), (16, 32))
        for seed, name in enumerate(("target", "plus", "minus"))
    }
    target, plus, minus = (whole(path) for path in made.values())
    anatomy = measured({"v": vector_of(made)}, made["target"])
    check(anatomy, target, {"v": difference(plus, minus)}, {"v": minus})


def test_a_vector_has_the_rows_that_its_own_sources_have(family, tmp_path):
    """A padded vocabulary: what is beyond the rows of a source counts for nothing it is compared in."""
    paths, name = family(), "model.embed_tokens.weight"
    rows = {"target": 301, "plus": 280, "minus": 250}
    for role, count in rows.items():
        weights = load_checkpoint(paths[role])
        paths[role] = write_checkpoint(tmp_path / f"cut {role}", weights | {name: weights[name][:count].contiguous()})
    target, plus, minus = (whole(paths[role]) for role in rows)
    anatomy = measured(
        {"v": vector_of(paths), "whole": Vector(str(paths["plus"]), str(paths["plus"]))}, paths["target"]
    )
    (part,) = (part for part in anatomy.tensors if part.name == name)
    v, here = (plus[name][:250] - minus[name]).numpy().reshape(-1), target[name][:250].numpy().reshape(-1)
    found = part.vectors["v"]
    assert part.elements == 301 * 48 and found.elements == 250 * 48
    assert found.norm == exactly(norm(v)) and found.relative == exactly(norm(v) / float(target[name].norm()))
    apart = here - minus[name].numpy().reshape(-1)
    assert found.distance == exactly(norm(apart) / norm(here)) and found.toward == exactly(cosine(apart, v))
    assert found.spectrum.size == 48
    nothing = part.vectors["whole"]
    assert nothing.elements == 280 * 48 and nothing.zeros == 1 and nothing.norm == 0 and nothing.toward is None
    assert nothing.spectrum is None and part.cosines == ((1.0, None), (None, None))


def test_what_is_no_number_or_not_shared_is_left_out(tmp_path):
    base = {"a.weight": torch.ones(4, 4), "count": torch.arange(3), "alone": torch.ones(2), "empty": torch.ones(0, 4)}
    made = {
        "target": write_checkpoint(tmp_path / "t", base),
        "plus": write_checkpoint(tmp_path / "p", base | {"a.weight": torch.zeros(4, 4), "more": torch.ones(3)}),
        "minus": write_checkpoint(tmp_path / "m", {name: base[name] for name in ("a.weight", "count", "empty")}),
    }
    anatomy = measured({"v": vector_of(made)}, made["target"])
    assert [part.name for part in anatomy.tensors if part.vectors] == ["a.weight"]
    assert {part.name for part in anatomy.tensors} == {"a.weight", "alone", "empty"}
    assert anatomy.whole.vectors["v"].relative == exactly(4 / math.sqrt(18))


def test_nothing_shared_is_bad_input(family, tmp_path):
    paths = family() | {"target": write_checkpoint(tmp_path / "other", {"x": torch.ones(3)})}
    with pytest.raises(BadInput, match="other: has no floating-point tensor in common with a vector"):
        measured({"v": vector_of(paths)}, paths["target"])


@pytest.mark.parametrize("where", ["target", "plus", "minus"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.filterwarnings("error")
def test_what_is_not_finite_is_named(family, tmp_path, where, value):
    paths = family()
    weights = load_checkpoint(paths[where])
    weights["model.norm.weight"][3] = value
    paths[where] = write_checkpoint(tmp_path / "bad", weights)
    suspect = re.escape(str(paths["target"])) if where == "target" else "vector v"
    with pytest.raises(BadInput, match=f"{suspect}: tensor model.norm.weight is infinite or not a number"):
        measured({"v": vector_of(paths)}, paths["target"])


def test_the_bits_do_not_depend_on_chunks(tmp_path, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    base = {"a.weight": torch.randn(700, 123, generator=draw).bfloat16(), "b": torch.randn(99_999, generator=draw)}
    made = {"target": write_checkpoint(tmp_path / "t", base)}
    made |= {role: write_checkpoint(tmp_path / role, near(base, seed)) for seed, role in enumerate(("plus", "minus"))}
    found = []
    for chunk in (BLOCK, 5 * BLOCK, 100 * BLOCK):
        for place in (module, values):
            monkeypatch.setattr(place, "AT_ONCE", chunk)
        found.append(json.dumps(measured({"v": vector_of(made)}, made["target"]).to_json(), allow_nan=False))
    assert found[0] == found[1] == found[2]


def test_spectra_may_be_left_out_and_progress_adds_up(family):
    paths, done = family(), []
    anatomy = measured({"v": vector_of(paths)}, paths["target"], spectra=False, progress=done.append)
    assert all(part.vectors["v"].spectrum is None for part in anatomy.tensors)
    assert sum(done) == open_source(str(paths["target"])).nbytes


def test_vectors_that_share_donors_share_what_is_read(family, monkeypatch):
    paths, read = family(), []
    target, plus, minus = (str(paths[k]) for k in ("target", "plus", "minus"))
    close = Values.close
    monkeypatch.setattr(Values, "close", lambda self: (read.append(self.bytes_read), close(self)))
    measured({"a": Vector(plus, minus), "b": Vector(target, minus), "c": Vector(minus, plus)}, target, spectra=False)
    assert read == [sum(open_source(path).nbytes for path in (target, plus, minus))]


HOLES = """
import re, sys
from pathlib import Path
from rvdist.weights.anatomy.analyze import analyze
from rvdist.weights.checkpoint.header import build_header
from rvdist.weights.checkpoint.source import open_source
from rvdist.core.point import Vector

def write(path, rows, last):
    path.mkdir()
    file = "model.safetensors"
    header, (spec,) = build_header([("model.layers.0.mlp.up_proj.weight", "BF16", (rows, 64))], file, {})
    with open(path / file, "wb") as opened:
        opened.write(header)
        opened.seek(spec.offset + spec.nbytes - 2)
        opened.write(last)
    return open_source(str(path))

def measured(path, rows):
    path.mkdir()
    sources = {role: write(path / role, rows, b"\\x80\\x3f" if role == "plus" else bytes(2)) for role in
               ("target", "plus", "minus")}
    (part,) = analyze({"v": Vector("plus", "minus")}, "target", sources).tensors
    return part.vectors["v"]

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10

measured(Path(sys.argv[1]) / "small", 70_000)
before = peak()
found = measured(Path(sys.argv[1]) / "large", 1 << 20)
assert found.norm == 1 and found.spectrum.values == (1.0,) + (0.0,) * 63, found
print(peak() - before)
"""


@pytest.mark.heavy
def test_memory_does_not_grow_with_the_model(tmp_path):
    """Three files of holes, a matrix of 128 MiB in each, all 0 but for one element, and its spectrum."""
    alone = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", HOLES, tmp_path], env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16  # MiB
