"""Stored vectors, adapters and quantised donors whose experts lie in another layout than the target's: the same merge
in the donors' own layout, permuted."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from itertools import cycle, product
from pathlib import Path

import pytest
import torch
from adapters import ALPHA, RANK, write_adapter
from alone import planned, write
from checkpoints import load_checkpoint, near, write_checkpoint
from mixtures import PLAIN, E, Weights, as_fp8, as_int4, canonical, stored, unstored
from points import read_point

from rvdist.core.config.points import Storage
from rvdist.core.errors import BadInput
from rvdist.core.point import Term, Vector, WeightPoint
from rvdist.merge import plan as planning
from rvdist.merge.worker import MergeWorker
from rvdist.weights import compat
from rvdist.weights.checkpoint.bound import settle, settle_vector
from rvdist.weights.checkpoint.difference import Difference
from rvdist.weights.checkpoint.layouts import Relaid, lay_out
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.operand import open_operand
from rvdist.weights.store import save

AT = "model.layers.0"
STORED = {"exact": Storage(), "rounded": Storage(dtype="F16"), "factors": Storage(rank=3), "few": Storage(density=0.2)}


def named(layout: str, **more: object) -> dict[str, object]:
    return {"model_type": "gpt_oss" if layout == "interleaved" else "mixtral", **more}


def put(place: Path, name: str, weights: Weights, layout: str, of: str = "") -> Path:
    return write_checkpoint(place / name, stored(weights, layout), config=named(of or layout))


def require_permuted(place: Path, base: Weights, donors: str, target: str, vector: Vector) -> None:
    """The merge of a target in one layout is the permuted merge of it in the donors'."""
    merged = {}
    for layout in {donors, target}:
        own = put(place, f"target-{layout}", base, layout)
        merged[layout] = dict(read_point(WeightPoint(str(own), (Term(0.5, vector),))))
    expected = stored(unstored(merged[donors], donors), target)
    assert expected.keys() == merged[target].keys()
    assert all(torch.equal(expected[name], tensor) for name, tensor in merged[target].items())
    moved = [name for name, tensor in stored(base, target).items() if not torch.equal(merged[target][name], tensor)]
    assert any("experts" in name for name in moved)
    sources = {name: open_source(name) for name in (str(place / f"target-{target}"), *vector.sources())}
    sources = {name: lay_out(source, sources[str(place / f"target-{target}")]) for name, source in sources.items()}
    assert isinstance(sources[vector.plus], Relaid) == (donors != target)
    point = WeightPoint(str(place / f"target-{target}"), (Term(0.5, vector),))
    said = compat.check(settle(point, sources), sources, force=True).exceptions
    assert not any("skipped" in note for note in said)


PAIRS = [(*pair, False) for pair in product(PLAIN, repeat=2) if pair[0] != pair[1]]
PAIRS += [("gate_proj", "interleaved", True), ("interleaved", "gate_proj", True)]


@pytest.mark.parametrize(
    ("kind", "donors", "target", "biased"),
    [("exact", *pair) for pair in PAIRS]
    + [(kind, *pair) for kind in ("rounded", "factors", "few") for pair in (PAIRS[1], PAIRS[-2])],
)
def test_a_stored_vector_applies_in_any_layout(
    tmp_path: Path, kind: str, donors: str, target: str, biased: bool
) -> None:
    base = canonical(0, biased, 70, 130)  # several blocks of a packed tensor
    plus, minus = near(base, 1), near(base, 2)
    for name in plus:
        plus[name][..., ::2] = minus[name][..., ::2]  # so that the exact one is packed
    paths = {name: put(tmp_path, name, weights, donors) for name, weights in (("plus", plus), ("minus", minus))}
    sources = {str(path): open_source(str(path)) for path in paths.values()}
    save(Vector(*sources), sources, tmp_path / "v", STORED[kind], say=lambda text: None)
    vector = Vector(str(tmp_path / "v"))
    if kind == "exact":
        description = json.loads((tmp_path / "v" / "vector.json").read_text())
        assert "packed" in {entry["form"] for entry in description["tensors"].values()}
        own = str(put(tmp_path, "own", base, target))
        by_donors, by_itself = (
            dict(read_point(WeightPoint(own, (Term(0.5, term),)))) for term in (Vector(*sources), vector)
        )
        assert all(torch.equal(by_donors[name], tensor) for name, tensor in by_itself.items())
    require_permuted(tmp_path, base, donors, target, vector)


def adapter(place: Path, layout: str, weights: Weights, left_out: str = "nothing") -> Path:
    """One of all experts' projections and of the router, but for what has `left_out` in its name."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for name, tensor in stored(weights, layout).items():
        if name.endswith(".bias") or left_out in name:
            continue
        module = f"base_model.model.{name.removesuffix('.weight')}"
        rows, columns = tensor.shape
        found[f"{module}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) * 0.05
        found[f"{module}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.05
    return write_adapter(place, found, r=RANK, lora_alpha=ALPHA)


@pytest.mark.parametrize(
    ("donors", "target", "biased"),
    [
        ("gate_proj", "fused", False),
        ("w1", "fused", False),
        ("gate_proj", "w1", False),
        ("w1", "gate_proj", False),
        ("gate_proj", "interleaved", True),
    ],
)
def test_an_adapter_of_single_experts_applies_in_any_layout(
    tmp_path: Path, donors: str, target: str, biased: bool
) -> None:
    """Without biases, which adapters have none of: the target's stay."""
    base = canonical(0, biased)
    vector = Vector(str(adapter(tmp_path / "adapter", donors, base)))
    require_permuted(tmp_path, base, donors, target, vector)
    trained_on = str(put(tmp_path, "trained-on", base, donors))
    sources = {name: open_source(name) for name in (vector.plus, trained_on, str(tmp_path / f"target-{target}"))}
    laid_out = {name: lay_out(source, sources[str(tmp_path / f"target-{target}")]) for name, source in sources.items()}
    assert settle_vector(Vector(vector.plus, trained_on), laid_out) == vector


@pytest.mark.parametrize("left_out", [".down_proj", ".2."])
def test_a_difference_of_some_experts_is_refused_in_another_layout(tmp_path: Path, left_out: str) -> None:
    base = canonical(0, False)
    own = str(put(tmp_path, "target", base, "fused"))
    donor = str(adapter(tmp_path / "adapter", "gate_proj", base, left_out))
    sources = {name: open_source(name) for name in (own, donor)}
    sources[donor] = lay_out(sources[donor], sources[own])
    with pytest.raises(BadInput, match=r"adapter: stores its experts one by one \(.*experts.*merge_and_unload"):
        compat.check(WeightPoint(own, (Term(1.0, Vector(donor)),)), sources)


def in_fp8(path: Path, weights: Weights, layout: str) -> Path:
    found, said = as_fp8(stored(weights, layout))
    return write_checkpoint(path, found, shards=2, config=named(layout, quantization_config=said))


def in_int4(path: Path, weights: Weights, layout: str) -> Path:
    found, said = as_int4(stored(weights, layout))
    return write_checkpoint(path, found, config=named(layout, quantization_config=said))


def in_mxfp4(path: Path, weights: Weights, layout: str = "interleaved") -> Path:
    found: Weights = {}
    for name, tensor in stored(weights, layout).items():
        if not name.endswith("_proj"):
            found[name] = tensor
            continue
        rows = tensor.transpose(1, 2).float().reshape(E, tensor.shape[2], -1, 32)
        power = torch.ceil(torch.log2(rows.abs().amax(-1) / 6))
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        codes = (rows.abs()[..., None] / 2 ** power[..., None, None] - values).abs().argmin(-1) + 8 * (rows < 0)
        found[f"{name}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
        found[f"{name}_scales"] = (power + 127).to(torch.uint8)
    return write_checkpoint(path, found, config=named(layout, quantization_config={"quant_method": "mxfp4"}))


@pytest.mark.parametrize(
    ("quantizer", "donors", "target", "biased"),
    [
        (in_fp8, "gate_proj", "fused", False),
        (in_fp8, "fused", "w1", False),
        (in_fp8, "gate_proj", "interleaved", True),
        (in_int4, "gate_proj", "fused", False),
        (in_int4, "w1", "gate_proj", False),
        (in_int4, "gate_proj", "interleaved", True),
        (in_mxfp4, "interleaved", "gate_proj", True),
    ],
)
def test_quantised_donors_apply_in_any_layout(tmp_path, quantizer, donors, target, biased) -> None:  # type: ignore[no-untyped-def]
    base = canonical(0, biased, 64, 32)
    names = {"plus": near(base, 1), "minus": near(base, 2)}
    vector = Vector(*(str(quantizer(tmp_path / name, weights, donors)) for name, weights in names.items()))
    require_permuted(tmp_path, base, donors, target, vector)


@pytest.mark.parametrize("quantizer", [in_fp8, in_int4, in_mxfp4])
def test_a_quantised_target_takes_donors_in_any_layout(tmp_path, quantizer) -> None:  # type: ignore[no-untyped-def]
    """Its blocks and scales are those of the merge in its own layout, to the byte."""
    layout, other = ("interleaved", "gate_proj") if quantizer is in_mxfp4 else ("gate_proj", "fused")
    base = canonical(0, layout == "interleaved", 64, 32)
    target = quantizer(tmp_path / "target", base, layout)
    for own in (layout, other):
        donors = [str(put(tmp_path, f"{own}-{seed}", near(base, seed), own, layout)) for seed in (1, 2)]
        write({tmp_path / f"out-{own}": WeightPoint(str(target), (Term(0.5, Vector(*donors)),))})
    for file in (tmp_path / f"out-{layout}").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / f"out-{other}" / file.name).read_bytes()
        assert file.read_bytes() != (target / file.name).read_bytes()
    assert load_checkpoint(tmp_path / f"out-{other}").keys() == load_checkpoint(target).keys()


def test_a_stored_vector_of_gpt_oss_that_lies_out_by_in_is_not_guessed(tmp_path: Path) -> None:
    """[E, 2I, H], as nobody of its kind stores them: rows of gate and up may then be in turn, or one half each."""
    base = canonical(0, False)
    target = str(put(tmp_path, "target", base, "gate_proj"))
    for kind, mapped in (("gpt_oss", False), ("mixtral", True)):
        vector = Vector(
            *(str(put(tmp_path / kind, str(seed), near(base, seed), "fused", f"of {kind}")) for seed in (1, 2))
        )
        for name in vector.sources():
            (Path(name) / "config.json").write_text(json.dumps({"model_type": kind}))
        donors = {name: open_source(name) for name in vector.sources()}
        save(vector, donors, tmp_path / kind / "v", Storage(), say=lambda text: None)
        point = WeightPoint(target, (Term(1.0, Vector(str(tmp_path / kind / "v"))),))
        sources = {name: open_source(name) for name in point.sources()}
        sources = {name: lay_out(source, sources[target]) for name, source in sources.items()}
        assert isinstance(sources[str(tmp_path / kind / "v")], Relaid) == mapped
        if not mapped:
            with pytest.raises(BadInput, match="stores its experts fused .* where .*target stores them one by one"):
                compat.check(point, sources)


def test_an_expert_that_is_transposed_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By workers that take one unit after the other in turn, however small units are to be; gate and up of an
    interleaved donor for two tensors, too, where one worker has both."""
    base = canonical(0, True, 64, 32)
    for donors, target, limits in (
        ("gate_proj", "interleaved", (1 << 20, 6000, 3500)),
        ("interleaved", "gate_proj", (1 << 20,)),
    ):
        place = tmp_path / target
        vector = Vector(*(str(put(place, str(seed), near(base, seed), donors, "gpt_oss")) for seed in (1, 2)))
        for name in vector.sources():
            (Path(name) / "config.json").write_text('{"model_type": "gpt_oss"}')
        own = put(place, "target", base, target, "interleaved")
        for limit in limits:
            monkeypatch.setattr(planning, "UNIT_BYTES", limit)
            out = place / str(limit)
            plan, sources = planned({out: WeightPoint(str(own), (Term(0.5, vector),))})
            out.mkdir()
            for file, (header, size) in plan.layouts[0].files.items():
                (out / file).write_bytes(header + bytes(size - len(header)))
            workers = [MergeWorker(plan.outputs, sources, None, direct_io=False) for _ in range(2)]
            turns = zip(cycle(workers), plan.units, strict=False)
            read = sum(worker.run(unit, (None,)).bytes_read for worker, unit in turns)
            assert read == sum(source.nbytes for source in sources.values()), (donors, limit)


def test_a_difference_stays_one(tmp_path: Path) -> None:
    base = canonical(0, False)
    donor = open_source(str(adapter(tmp_path / "adapter", "gate_proj", base)))
    laid_out = lay_out(donor, open_source(str(put(tmp_path, "target", base, "fused"))))
    assert isinstance(laid_out, Difference) and laid_out.kind == "adapter" and isinstance(laid_out, Relaid)


@pytest.mark.parametrize("quantizer", [in_fp8, put])
def test_a_laid_out_donor_is_read_where_a_worker_is_told_that_it_is(tmp_path, monkeypatch, quantizer) -> None:  # type: ignore[no-untyped-def]
    """Commands name relative paths, and workers have another working directory."""
    base = canonical(0, False, 64, 32)
    if quantizer is put:
        put(tmp_path, "donor", base, "gate_proj")
    else:
        quantizer(tmp_path / "donor", base, "gate_proj")
    own = put(tmp_path, "target", base, "fused")
    monkeypatch.chdir(tmp_path)
    laid_out = lay_out(open_source("donor"), open_source(str(own)))
    told = replace(laid_out, path=laid_out.path.absolute())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with closing(open_operand(told)) as operand:
        operand.read(f"{AT}.mlp.experts.down_proj", 0, 10, torch.empty(80, dtype=torch.uint8))
