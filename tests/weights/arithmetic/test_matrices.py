"""Methods that see matrices, against the papers' formulas in numpy's fp64 on whole tensors; by reader and merges."""

import math
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from adapters import EMBEDDING, factors, write_adapter
from checkpoints import near, tensors, write_checkpoint
from peaks import peak_while
from points import read_point

from rvdist.core.config import Config, MergeConfig
from rvdist.core.errors import BadInput
from rvdist.core.method import MethodSpec
from rvdist.core.point import Mask, Term, Vector, WeightPoint
from rvdist.merge import plan as planning
from rvdist.merge.actor import WorkerSettings
from rvdist.merge.driver import merge
from rvdist.merge.plan import build_plan
from rvdist.weights import rows
from rvdist.weights.arithmetic import aside, matrices
from rvdist.weights.arithmetic.method import Place, combine
from rvdist.weights.arithmetic.registry import build
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.lanes import HostLane
from rvdist.weights.reader import PointReader

METHODS = [MethodSpec("iso_c"), MethodSpec("tsv_m")]

STACK = "model.layers.1.mlp.experts.gate_up_proj"
CORE = [MethodSpec("core_space"), MethodSpec("core_space_iso")]


def iso_c(matrices, alphas):
    """The paper's algorithm 1, with every α in place."""
    u, s, v = np.linalg.svd(sum(a * m for a, m in zip(alphas, matrices, strict=True)), full_matrices=False)
    kept = s > 1e-6 * s[0]
    return s.mean() * u[:, kept] @ v[kept]


def tsv_m(matrices, alphas):
    """The paper's algorithm 1: truncate, concatenate, make orthogonal by singular values."""
    kept = min(matrices[0].shape) // len(matrices)
    parts = [np.linalg.svd(matrix, full_matrices=False) for matrix in matrices]
    u = np.concatenate([u[:, :kept] for u, _, _ in parts], 1)
    s = np.concatenate([alpha * s[:kept] for alpha, (_, s, _) in zip(alphas, parts, strict=True)])
    v = np.concatenate([v[:kept] for _, _, v in parts])
    (p, _, q), (x, _, y) = (np.linalg.svd(one, full_matrices=False) for one in (u, v))
    return p @ q @ np.diag(s) @ x @ y


WHOLE = {"iso_c": iso_c, "tsv_m": tsv_m}


def trivial(vector):
    """Two factors of a matrix, or of a stack of some, for what sees factors."""
    return (np.broadcast_to(np.eye(vector.shape[-2]), (*vector.shape[:-1], vector.shape[-2])), vector)


def change(spec, vectors, alphas, shape, chunk=1000, dtype=torch.float64, pairs=None):
    """What a method adds to nothing, computed by chunks; or from factors, which are of `dtype`."""
    method, numel = build(spec), math.prod(shape)
    pairs = pairs or [trivial(vector) for vector in vectors if spec.facts.low_rank]
    vectors = vectors or [left @ right for left, right in pairs]
    place = Place("w", numel, shape=shape, alphas=tuple(alphas))
    flat = [torch.from_numpy(vector).to(dtype).view(-1) for vector in vectors]
    cuts = [slice(start, start + chunk) for start in range(0, numel, chunk)]

    def chunks(start=0, stop=numel):
        for begin in range(start, stop, chunk):
            yield [vector[begin : min(begin + chunk, stop)].clone() for vector in flat]

    def of_factors(number):
        for pair in pairs:
            yield [torch.tensor(side.reshape(-1, *side.shape[-2:])[number], dtype=dtype).double() for side in pair]

    method.survey(place, of_factors if spec.facts.low_rank else chunks)
    out, base = torch.empty(numel, dtype=dtype), torch.zeros(numel, dtype=dtype)
    for cut in cuts:
        terms = [(alpha, vector[cut], None) for alpha, vector in zip(alphas, flat, strict=True)]
        combine(method, base[cut], terms, out[cut], place=replace(place, start=cut.start), work=dtype)
    return out.view(shape).double().numpy()


def with_spectrum(values, shape, seed):
    """A matrix of these singular values and random directions."""
    generator = np.random.default_rng(seed)
    k = len(values)
    left, right = (np.linalg.qr(generator.standard_normal((side, k)))[0] for side in shape)
    return (left * values) @ right.T


@pytest.mark.parametrize("shape", [(60, 100), (100, 60), (50, 50), (1, 40), (40, 1)])
@pytest.mark.parametrize("spec", METHODS, ids=lambda spec: spec.name)
def test_equals_the_papers_formula_on_whole_matrices(spec, shape):
    generator = np.random.default_rng(1)
    vectors, alphas = [generator.standard_normal(shape) for _ in range(3)], (0.5, -0.3, 0.9)
    wanted = WHOLE[spec.name](vectors, alphas)
    found = change(spec, vectors, alphas, shape)
    assert abs(found - wanted).max() <= 1e-10 * abs(wanted).max()
    assert np.array_equal(change(spec, vectors, alphas, shape, 10**6), found), "chunks do not matter"
    rounded = change(spec, [v.astype(np.float32) for v in vectors], alphas, shape, dtype=torch.float32)
    assert abs(rounded - wanted).max() <= 1e-6 * abs(wanted).max()


@pytest.mark.parametrize("shape", [(30, 101), (101, 30), (2, 20, 50)])
@pytest.mark.parametrize("spec", [*METHODS, *CORE], ids=lambda spec: spec.name)
def test_panels_do_not_matter(spec, shape, monkeypatch):
    """One that holds a matrix, a few of it, and of one block each; by chunks that end in the middle of rows."""
    generator = np.random.default_rng(9)
    vectors = [generator.standard_normal(shape) for _ in range(2)]
    whole = change(spec, vectors, (0.5, -0.3), shape)
    monkeypatch.setattr(matrices, "_BLOCK", 14 * min(shape[-2:]))
    monkeypatch.setattr(matrices, "_TILE", 9)
    for nbytes in (1 << 20, 50 * 30 * 16, 1):
        monkeypatch.setattr(matrices, "_PANEL", nbytes)
        found = change(spec, vectors, (0.5, -0.3), shape)
        assert abs(found - whole).max() <= 1e-10 * abs(whole).max()
        for chunk in (33, 101):
            assert np.array_equal(change(spec, vectors, (0.5, -0.3), shape, chunk), found), "chunks do not matter"


@pytest.mark.parametrize("shape", [(30, 101), (101, 30), (2, 20, 50), (700, 40), (1, 40)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_waits_in_a_file_is_what_waits_in_memory(count, shape, monkeypatch):
    """To the bit, by a panel and by many, also where vectors share their directions or have few."""
    generator = np.random.default_rng(10)
    vectors = [generator.standard_normal(shape) for _ in range(count - 1)]
    vectors.append(generator.standard_normal((*shape[:-1], 1)) * np.ones(shape))
    alphas = (0.5, -0.3, 0.9)[:count]
    monkeypatch.setattr(matrices, "_TILE", 9)
    for nbytes in (64 << 20, 3000):
        monkeypatch.setattr(matrices, "_PANEL", nbytes)
        monkeypatch.setattr(aside, "_LARGE", 8 << 20)
        wanted = change(MethodSpec("tsv_m"), vectors, alphas, shape)
        monkeypatch.setattr(aside, "_LARGE", 0)
        assert np.array_equal(change(MethodSpec("tsv_m"), vectors, alphas, shape), wanted)
        assert wanted.any() == (count <= min(shape[-2:]))


def memory_taken(method, vectors, shape, end=1, pairs=()):
    """Bytes at most while a method computes elements up to `end` from these vectors, or from factors, beside what was
    there before."""
    numel, size, count = math.prod(shape), math.prod(shape[-2:]), len(vectors or pairs)
    repeated = [vector.repeat(1 + (numel > size)) for vector in vectors]  # of a stack one matrix is given

    def chunks(start=0, stop=numel):
        for begin in range(start, stop, 1 << 17):
            first, count = begin % size, min(1 << 17, stop - begin)
            yield [vector[first : first + count].float() for vector in repeated]

    change(MethodSpec("tsv_m"), [np.eye(300, 400)] * 2, (1, 1), (300, 400))  # what LAPACK keeps is there
    place = Place("w", numel, shape=shape, alphas=(1.0,) * count)

    def of_factors(number):
        for pair in pairs:
            yield [side.double() for side in pair]

    def work():
        method.survey(place, of_factors if pairs else chunks)
        for start in range(0, end, 1 << 17):
            total = torch.zeros(min(1 << 17, end - start))
            method.add(total, place.alphas, [torch.zeros_like(total)] * count, replace(place, start=start))

    return peak_while(work)


@pytest.mark.parametrize("spec", METHODS, ids=lambda spec: spec.name)
def test_no_matrix_is_held_beside_what_is_added(spec):
    """Nor are vectors or their singular vectors, in fp64 128 MiB; a panel of what is added has 32."""
    method, shape = build(spec), (512, 8192)
    vectors = [torch.randn(512 * 8192, generator=torch.Generator().manual_seed(k)).bfloat16() for k in range(2)]
    assert memory_taken(method, vectors, shape) <= 112 << 20 < method.bytes_held(shape, 0, 4)


@pytest.mark.parametrize("spec", METHODS, ids=lambda spec: spec.name)
def test_two_squares_are_held(spec, monkeypatch):
    """Beside panels that are small here, and what the C library keeps, for all of what is added: TSV-M has four."""
    monkeypatch.setattr(matrices, "_PANEL", 1 << 20)
    monkeypatch.setattr(matrices, "_BLOCK", 1 << 17)
    monkeypatch.setattr(matrices, "_TILE", 64)
    shape = (1100, 1200)
    vectors = [torch.randn(1100 * 1200, generator=torch.Generator().manual_seed(k)).bfloat16() for k in range(2)]
    taken = memory_taken(build(spec), vectors, shape, math.prod(shape)) / (8 * 1100**2)
    assert taken < 3.4


def test_chunks_leave_no_holes_in_memory():
    """Where a chunk was is the next one's place: all of these have 256 MiB. In a process where nothing is free yet."""
    done = subprocess.run(
        [sys.executable, "-c", HOLES],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 128 << 20


HOLES = """
import torch
from peaks import peak_while
from rvdist.weights.arithmetic.matrices import Matrix
from rvdist.weights.arithmetic.method import Place

half = torch.ones(1 << 20).bfloat16()

def chunks(start, stop):
    other = torch.zeros(len(half))
    for begin in range(start, stop, len(half)):
        own = min(len(half), stop - begin)
        yield [half[:own].float().sub_(other[:own]) for _ in range(2)]

place = Place("w", 1 << 25, shape=(256, 1 << 17), alphas=(1.0, 1.0))
matrix = Matrix(place, chunks, 0, lambda differences: differences)
print(max(peak_while(lambda: matrix.largest()) for _ in range(3)))
assert matrix.largest() == [1.0, 1.0]
"""


@pytest.mark.parametrize("spec", METHODS, ids=lambda spec: spec.name)
def test_of_a_stack_one_matrix_is_held(spec):
    """What is added to all of these experts has 80 MiB."""
    method, shape = build(spec), (40, 128, 4096)
    vectors = [torch.randn(128 * 4096, generator=torch.Generator().manual_seed(k)).bfloat16() for k in range(2)]
    taken = memory_taken(method, vectors, shape, math.prod(shape))
    assert taken <= method.bytes_held(shape, 0, 4) == method.bytes_held(shape[1:], 0, 4) <= 48 << 20


def taken_by_factors(spec, shape, rank, count):
    method, generator = build(spec), torch.Generator().manual_seed(0)
    sides = [
        [torch.randn(side, generator=generator) for side in ((shape[0], rank), (rank, shape[1]))] for _ in range(count)
    ]
    return memory_taken(method, [], shape, pairs=sides)


@pytest.mark.parametrize("spec", CORE, ids=lambda spec: spec.name)
def test_factors_of_high_rank_are_counted(spec):
    shape, method = (512, 4096), build(spec)
    assert method.bytes_held(shape, 0, 4) < taken_by_factors(spec, shape, 300, 5) <= method.bytes_held(shape, 1500, 4)


@pytest.mark.parametrize("spec", CORE, ids=lambda spec: spec.name)
def test_core_space_holds_no_square(spec):
    """Which has 128 MiB; a panel of what is added has 64."""
    shape, method = (4096, 4200), build(spec)
    assert taken_by_factors(spec, shape, 16, 2) <= 96 << 20 < method.bytes_held(shape, 32, 4) <= 136 << 20


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
@pytest.mark.parametrize("spec", [*METHODS, *CORE], ids=lambda spec: spec.name)
def test_numbers_whose_squares_fp64_does_not_hold(spec, scale):
    generator = np.random.default_rng(5)
    vectors = [generator.standard_normal((6, 9)) for _ in range(2)]
    wanted = change(spec, vectors, (1, 1), (6, 9))
    found = change(spec, [scale * vector for vector in vectors], (1, 1), (6, 9))
    assert abs(found / scale - wanted).max() < 1e-12 * abs(wanted).max()


def core_space(pairs, alphas, isotropic):
    """The paper's, from the factors: bases by singular values of all of them side by side."""
    count, alphas = len(pairs), np.array(alphas)
    u = np.linalg.svd(np.concatenate([b for b, _ in pairs], 1), full_matrices=False)[0]
    v = np.linalg.svd(np.concatenate([a for _, a in pairs]), full_matrices=False)[2]
    cores = [u.T @ b @ a @ v.T for b, a in pairs]
    if isotropic:
        p, s, q = np.linalg.svd(sum(alpha * core for alpha, core in zip(alphas, cores, strict=True)))
        return u @ (s.mean() * p @ q) @ v
    assert cores[0].shape[0] % count == 0
    return u @ tsv_m(cores, alphas) @ v


@pytest.mark.parametrize("shape", [(60, 100), (100, 60), (50, 50)])
@pytest.mark.parametrize("alphas", [(1.0, 1.0, 1.0), (0.5, -0.3, 0.9)])
@pytest.mark.parametrize("isotropic", [False, True])
def test_core_space_equals_the_papers_formula_on_factors(isotropic, alphas, shape):
    generator, spec = np.random.default_rng(8), CORE[isotropic]
    pairs = [(generator.standard_normal((shape[0], 4)), generator.standard_normal((4, shape[1]))) for _ in range(3)]
    wanted = core_space(pairs, alphas, isotropic)
    found = change(spec, None, alphas, shape, pairs=pairs)
    assert abs(found - wanted).max() < 1e-9 * abs(wanted).max()
    assert np.array_equal(change(spec, None, alphas, shape, 10**6, pairs=pairs), found), "chunks do not matter"
    rounded = change(spec, None, alphas, shape, dtype=torch.float32, pairs=pairs)
    assert abs(rounded - wanted).max() < 1e-5 * abs(wanted).max(), "what fp32 rounds is no direction"
    again = [
        (b @ turn, np.linalg.solve(turn, a))
        for (b, a), turn in zip(pairs, generator.random((3, 4, 4)) + np.eye(4), strict=True)
    ]
    assert abs(change(spec, None, alphas, shape, pairs=again) - wanted).max() < 1e-9 * abs(wanted).max(), (
        "nor how a product is split"
    )
    assert not change(spec, [np.zeros(shape)] * 2, (1, 1), shape).any()


@pytest.mark.parametrize("spec", METHODS, ids=lambda spec: spec.name)
def test_alphas_alike_scale_what_is_added(spec):
    generator = np.random.default_rng(2)
    vectors = [generator.standard_normal((30, 40)) for _ in range(2)]
    one = change(spec, vectors, (1, 1), (30, 40))
    for alpha in (0.25, -2.0):
        assert np.allclose(change(spec, vectors, (alpha, alpha), (30, 40)), alpha * one, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("orders", "error"), [(1, 1e-9), (3, 1e-7), (5, 1e-5)])
@pytest.mark.parametrize("shape", [(64, 200), (200, 64)])
def test_directions_of_little_size_are_as_exact_as_said(orders, error, shape):
    matrix = with_spectrum(np.logspace(0, -orders, 64), shape, 3)
    wanted = iso_c([matrix], (1,))
    sigma = np.logspace(0, -orders, 64).mean()
    assert abs(change(MethodSpec("iso_c"), [matrix], (1,), shape) - wanted).max() < error * sigma


def test_where_there_are_no_directions_nothing_is_added():
    generator = np.random.default_rng(4)
    left, right = generator.standard_normal((50, 4)), generator.standard_normal((4, 80))
    found = change(MethodSpec("iso_c"), [left @ right], (1,), (50, 80))
    values = np.linalg.svd(found, compute_uv=False)
    mean = np.linalg.svd(left @ right, compute_uv=False).sum() / 50
    assert np.allclose(values[:4], mean) and values[4] < 1e-9 * mean
    assert not change(MethodSpec("iso_c"), [np.zeros((5, 7))], (1,), (5, 7)).any()


def test_directions_that_tasks_share_count_once():
    """Two equal tasks are the larger half of the directions of one; the paper's code adds arbitrary ones to these."""
    matrix = np.random.default_rng(7).standard_normal((40, 60))
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    found = change(MethodSpec("tsv_m"), [matrix, matrix], (1, 1), (40, 60))
    assert np.allclose(found, u[:, :20] * s[:20] @ v[:20], rtol=0, atol=1e-7)
    assert not change(MethodSpec("tsv_m"), [np.zeros((5, 7))], (1,), (5, 7)).any()


@pytest.mark.parametrize("spec", METHODS, ids=lambda spec: spec.name)
def test_other_dimensions(spec):
    """One: the mean of the terms. Three: each matrix by itself."""
    generator = np.random.default_rng(5)
    vectors, alphas = [generator.standard_normal(60) for _ in range(2)], (0.5, 2.0)
    assert np.allclose(change(spec, vectors, alphas, (60,)), (0.5 * vectors[0] + 2.0 * vectors[1]) / 2)
    stacked = [generator.standard_normal((3, 10, 20)) for _ in range(2)]
    found = change(spec, stacked, alphas, (3, 10, 20))
    for number in range(3):
        assert np.allclose(found[number], WHOLE[spec.name]([one[number] for one in stacked], alphas))


@pytest.mark.parametrize("spec", [*METHODS, *CORE], ids=lambda spec: spec.name)
def test_what_is_not_finite_makes_no_number(spec):
    vector = np.ones((6, 8))
    vector[2, 3] = np.inf
    assert np.isnan(change(spec, [vector, np.eye(6, 8)], (1, 1), (6, 8))).all()


@pytest.mark.parametrize("spec", [*METHODS, *CORE], ids=lambda spec: spec.name)
def test_threads_do_not_matter(spec):
    generator = np.random.default_rng(6)
    vectors = [generator.standard_normal((300, 500)) for _ in range(2)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append(change(spec, vectors, (1, 1), (300, 500), 10**6, torch.float32))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(*found)


@pytest.fixture
def point(tmp_path):
    """`point(spec)`: two vectors, one of which leaves a layer out; of matrices, and a stack of these."""
    base = tensors(0) | {STACK: torch.randn(5, 20, 30, generator=torch.Generator().manual_seed(3)).bfloat16()}
    paths = [str(write_checkpoint(tmp_path / f"donor{k}", near(base, 10 + k), 1 + k)) for k in range(2)]
    target = str(write_checkpoint(tmp_path / "target", near(base, 20), 2))
    minus = str(write_checkpoint(tmp_path / "minus", base))

    def make(spec):
        terms = (Term(0.75, Vector(paths[0], minus), Mask(layers=((0, 1),))), Term(1.25, Vector(paths[1], minus)))
        return WeightPoint(target, terms, spec)

    return make


@pytest.mark.parametrize("spec", METHODS, ids=lambda spec: spec.name)
def test_merges_do_not_depend_on_workers_units_or_chunks(spec, point, tmp_path, monkeypatch):
    """And hold one point's matrix at a time: several α are several passes."""
    asked = point(spec)
    doubled = replace(asked, terms=tuple(replace(term, alpha=2 * term.alpha) for term in asked.terms))
    sources = {source: open_source(source) for source in asked.sources()}
    wanted = dict(read_point(asked))
    reader = PointReader([asked], sources, lanes=[HostLane(997)])
    for name, spec_ in reader.base.tensors.items():
        parts = [tensor.clone() for _, (tensor,) in reader.chunks(name, 0, spec_.numel)]
        assert torch.equal(torch.cat(parts).view(spec_.shape), wanted[name]), name
    for workers, unit_bytes in ((1, 32 << 20), (2, 5000)):
        monkeypatch.setattr(planning, "UNIT_BYTES", unit_bytes)
        outs = [tmp_path / f"{name}-{workers}" for name in ("once", "twice")]
        plan = build_plan(dict(zip(outs, (asked, doubled), strict=True)), sources)
        assert len(plan.outputs) == 2
        cuts = [part.start for unit in plan.units for part in unit.segments if part.tensor == STACK]
        assert cuts == ([0] if workers == 1 else [0, 2400]) * 2, "between matrices"
        merge(plan, sources, defaultdict(str), WorkerSettings(workers, alone=True))
        for out, one in zip(outs, (asked, doubled), strict=True):
            found = dict(read_point(WeightPoint(str(out))))
            assert all(torch.equal(found[name], tensor) for name, tensor in read_point(one))


@pytest.mark.parametrize("spec", METHODS, ids=lambda spec: spec.name)
def test_a_part_of_a_tensor_is_one_of_the_whole(spec, point):
    """As an engine's rank asks for it."""
    asked = point(spec)
    wanted, name = dict(read_point(asked)), "model.layers.0.mlp.up_proj.weight"
    reader = PointReader([asked], {source: open_source(source) for source in asked.sources()})
    for start, stop in ((48 * 60, 48 * 131), (0, 48 * 60), (100, 333)):
        out = torch.empty(stop - start, dtype=torch.bfloat16)
        reader.fill(name, start, out)
        assert torch.equal(out, wanted[name].view(-1)[start:stop])
    out = torch.empty(131 * 10, dtype=torch.bfloat16)
    reader.fill_columns(name, range(131), range(5, 15), out)
    assert torch.equal(out.view(131, 10), wanted[name][:, 5:15])


@pytest.mark.parametrize("spec", METHODS, ids=lambda spec: spec.name)
def test_what_is_asked_for_first_does_not_matter(spec, point, monkeypatch):
    """Of several panels, in matrices that are square, high and of a stack; from the last elements to the first."""
    monkeypatch.setattr(matrices, "_PANEL", 8 * 2000)
    asked = point(spec)
    wanted = dict(read_point(asked))
    reader = PointReader([asked], {source: open_source(source) for source in asked.sources()})
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight", STACK):
        whole = wanted[name].view(-1)
        for start in reversed(range(0, len(whole), 700)):
            out = torch.empty(min(700, len(whole) - start), dtype=torch.bfloat16)
            reader.fill(name, start, out)
            assert torch.equal(out, whole[start : start + 700]), (name, start)


@pytest.mark.parametrize("isotropic", [False, True])
def test_core_space_merges_adapters(isotropic, tmp_path):
    """And nothing that is not stored as factors; other methods merge the same adapters."""
    base, module = tensors(0, torch.float32), "model.layers.2.mlp.up_proj"
    target = str(write_checkpoint(tmp_path / "target", base))
    lora = [factors(1), factors(2)]
    paths = [str(write_adapter(tmp_path / f"adapter{k}", one)) for k, one in enumerate(lora)]
    asked = WeightPoint(target, tuple(Term(0.5, Vector(path)) for path in paths), CORE[isotropic])
    sources = {source: open_source(source) for source in asked.sources()}
    rows.require_low_rank(asked, sources)
    more = rows.matrix_memory(asked, sources)[0] - rows.matrix_memory(replace(asked, terms=asked.terms[:1]), sources)[0]
    assert more == (4 * 3 * (48 + 301) + 8 * (8 * 8 - 4 * 4)) * 8, "the factors of one more adapter of rank 4"
    names = [f"base_model.model.{module}.lora_{side}.weight" for side in "BA"]
    pairs = [(2.5 * one[names[0]].double().numpy(), one[names[1]].double().numpy()) for one in lora]
    found = dict(read_point(asked))
    exact = base[f"{module}.weight"].double().numpy() + core_space(pairs, (0.5, 0.5), isotropic)
    assert np.allclose(found[f"{module}.weight"].double().numpy(), exact, rtol=2.0**-22, atol=1e-7)
    assert torch.equal(found["model.norm.weight"], base["model.norm.weight"])
    by_chunks = PointReader([asked], sources, lanes=[HostLane(997)])
    for name, tensor in found.items():
        parts = [part.clone() for _, (part,) in by_chunks.chunks(name, 0, tensor.numel())]
        assert torch.equal(torch.cat(parts).view(tensor.shape), tensor), name
    whole = str(write_checkpoint(tmp_path / "whole", near(base, 3)))
    mixed = replace(asked, terms=(asked.terms[0], Term(0.5, Vector(whole, target))))
    with pytest.raises(BadInput, match=r"whole: holds tensor .* not as two factors, and core_space(_iso)? merges"):
        rows.require_low_rank(mixed, {source: open_source(source) for source in mixed.sources()})
    rows.require_low_rank(replace(mixed, method=MethodSpec("tsv_m")), sources)


@pytest.mark.parametrize("isotropic", [False, True])
def test_core_space_of_other_rows_and_of_differences(isotropic, tmp_path):
    """Adapters of embeddings with fewer rows than the base's, or more, each less another."""
    base, name = tensors(0, torch.float32), "model.embed_tokens.weight"
    target, paths, sides = str(write_checkpoint(tmp_path / "target", base)), [], []
    for seed, count in enumerate((290, 310, 400, 302)):
        a = torch.randn(4, count, generator=torch.Generator().manual_seed(seed))
        own = factors(seed) | {f"base_model.model.{EMBEDDING}.lora_embedding_A": a}
        paths.append(str(write_adapter(tmp_path / f"adapter{seed}", own)))
        b = own[f"base_model.model.{EMBEDDING}.lora_embedding_B"]
        sides.append((a.T.double().numpy(), 2.5 * b.T.double().numpy()))
    pairs = []
    for plus, minus, count in ((*sides[:2], 290), (*sides[2:], 301)):
        left = np.concatenate([plus[0][:count], -minus[0][:count]], 1)
        pairs.append((np.pad(left, ((0, 301 - count), (0, 0))), np.concatenate([plus[1], minus[1]])))
    terms = tuple(Term(0.5, Vector(*paths[k : k + 2])) for k in (0, 2))
    exact = base[name].double().numpy() + core_space(pairs, (0.5, 0.5), isotropic)
    found = dict(read_point(WeightPoint(target, terms, CORE[isotropic])))[name].double().numpy()
    assert np.allclose(found, exact, rtol=2.0**-22, atol=1e-6)


@pytest.mark.parametrize("spec", [*METHODS, *CORE], ids=lambda spec: spec.name)
def test_a_matrix_that_takes_too_much_is_refused(spec, point):
    asked = point(spec)
    sources = {source: open_source(source) for source in asked.sources()}
    nbytes, name, shape = rows.matrix_memory(asked, sources)
    assert name == "model.embed_tokens.weight" and shape == (301, 48)
    assert rows.matrix_memory(asked, sources, "F32")[0] > nbytes > 301 * 48 * 4
    rows.require_memory(asked, sources, nbytes)
    said = rf"target: {spec.name} decomposes a matrix of tensor .*\(301 × 48\).*merge.memory is"
    with pytest.raises(BadInput, match=said):
        rows.require_memory(asked, sources, nbytes - 1)
    masked = replace(asked, terms=tuple(replace(t, mask=Mask(exclude=(".*embed.*",))) for t in asked.terms))
    rows.require_memory(masked, sources, nbytes - 1)
    assert rows.matrix_memory(replace(asked, method=MethodSpec("ties")), sources) == (0, "", ())
    assert Config(merge=MergeConfig(memory="1GiB")).matrix_memory == 2**30
    with pytest.raises(BadInput, match="merge.memory: 'much' is not a size"):
        Config(merge=MergeConfig(memory="much"))
