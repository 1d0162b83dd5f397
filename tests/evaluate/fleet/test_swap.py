"""A swapped engine against a fresh one on the written checkpoint: tokens and log-probabilities to the bit."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import statistics
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import ALPHA, RANK, write_adapter
from alone import write
from checkpoints import load_checkpoint
from families import SETTINGS, SMOL, Answers, Family, answers, fused, make_deep, shard, start
from mixtures import as_fp8, as_int4
from points import read_point
from safetensors.torch import load_file, save_file

from rvdist.core.config.points import Storage
from rvdist.core.errors import BadInput
from rvdist.core.method import MethodSpec
from rvdist.core.point import Term, Vector, WeightPoint
from rvdist.core.timing import anonymous_bytes
from rvdist.evaluate.fleet import mirror, private_vllm, readers, recorded, swap
from rvdist.evaluate.fleet.arguments import further_arguments
from rvdist.evaluate.fleet.bounce import BounceBuffers
from rvdist.evaluate.fleet.deferred import Deferred
from rvdist.evaluate.fleet.engine import Engine
from rvdist.evaluate.fleet.mirror import mirror_obstacle
from rvdist.evaluate.request import Choice, Unusable
from rvdist.weights import compat
from rvdist.weights.checkpoint.layouts import Relaid, lay_out
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.store import save


@pytest.mark.parametrize("alpha", [0.5, 1.0, -1.0])
def test_swapped_equals_fresh(engine: Engine, base: Answers, family: Family, alpha: float, tmp_path: Path) -> None:
    engine.swap(family.point(alpha))
    swapped = answers(engine)
    assert swapped == answers(start(family.write(alpha, tmp_path / "merged")))
    assert swapped.texts != base.texts and swapped.scores != base.scores


@pytest.mark.parametrize("family", ["tied"], indirect=True)
def test_a_source_that_was_replaced_is_read_again_where_the_point_stays(
    engine: Engine, base: Answers, family: Family, tmp_path: Path
) -> None:
    """As between the batches of a sweep, whose jobs name the same point by the same paths."""
    plus = Path(shutil.copytree(family.plus, tmp_path / "plus"))
    point = WeightPoint(str(family.target), (Term(0.5, Vector(str(plus), str(family.minus))),))
    engine.swap(point)
    first = answers(engine)
    assert engine.is_at(point)
    (before,) = plus.glob("*.safetensors")
    shutil.copyfile(family.minus / before.name, tmp_path / "new")
    (tmp_path / "new").rename(before)
    assert not engine.is_at(point)
    engine.swap(point)
    assert answers(engine) == base != first  # a vector of nothing
    engine.swap(family.point(0.0))


@pytest.mark.parametrize(
    ("kind", "records"),
    [
        pytest.param("mla", True, id="moe-mla"),
        pytest.param("granitemoehybrid", False, id="moe-mamba"),
        pytest.param("gpt_oss", False, id="moe-gpt-oss"),
    ],
)
def test_what_vllm_makes_of_weights_after_loading_them_follows_a_swap(
    kind: str, records: bool, families: dict[str, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLA: of kv_b_proj vLLM makes two parameters, which no checkpoint has. Mamba-2: the layer has a view of its
    convolution from before that is packed. gpt-oss: experts and sinks are copied into parameters without their
    loaders."""
    family = families[kind]
    engine = start(WeightPoint(str(family.target)))
    base = answers(engine)
    if records:
        monkeypatch.setattr(recorded, "reload", None)
    engine.swap(family.point(0.5))
    swapped = answers(engine)
    monkeypatch.undo()
    assert engine.info()["probe"] == "passed"
    assert swapped == answers(start(family.write(0.5, tmp_path / "merged")))
    assert swapped.texts != base.texts and swapped.scores != base.scores
    engine.swap(family.point(0.0))
    assert answers(engine) == base


@pytest.mark.parametrize("family", ["moe"], indirect=True)
def test_a_vector_in_another_layout_of_experts(engine: Engine, base: Answers, family: Family, tmp_path: Path) -> None:
    """Donors whose experts are fused, for a target whose are stored one by one, as transformers saves Qwen3-MoE."""
    donors = [fused(path, tmp_path / path.name) for path in (family.plus, family.minus)]
    point = WeightPoint(str(family.target), (Term(0.5, Vector(*map(str, donors))),))
    engine.swap(point)
    swapped = answers(engine)
    assert swapped == answers(start(family.write(0.5, tmp_path / "merged")))
    assert swapped.texts != base.texts and swapped.scores != base.scores
    engine.swap(family.point(0.0))


@pytest.mark.parametrize("family", ["moe"], indirect=True)
def test_adapters_that_need_what_they_were_trained_on(
    engine: Engine, base: Answers, family: Family, tmp_path: Path
) -> None:
    """DoRA, a whole head, and experts adapted as one tensor, which the target stores one by one: as written."""
    generator, prefix, layer = torch.Generator().manual_seed(4), "base_model.model.", "model.layers.0"

    def pair(module: str, a: tuple[int, int], b: tuple[int, int]) -> dict[str, torch.Tensor]:
        shapes = {"A": a, "B": b}
        return {
            f"{prefix}{module}.lora_{k}.weight": torch.randn(s, generator=generator) * 0.2 for k, s in shapes.items()
        }

    head = load_file(family.plus / "model.safetensors")["lm_head.weight"]
    dora = pair(f"{layer}.self_attn.q_proj", (4, 128), (128, 4)) | {
        f"{prefix}{layer}.self_attn.q_proj.lora_magnitude_vector": 1 + torch.rand(128, generator=generator),
        f"{prefix}lm_head.weight": head,
    }
    at = f"{layer}.mlp.experts"
    experts = pair(at, (16, 64), (128, 16)) | pair(f"{at}.base_layer", (16, 128), (128, 16))
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    one = write_adapter(tmp_path / "one", dora, use_dora=True, modules_to_save=["lm_head"])
    two = write_adapter(tmp_path / "two", experts, target_parameters=targets)
    terms = (Term(0.5, Vector(str(one), str(family.target))), Term(1.0, Vector(str(two))))
    point = WeightPoint(str(family.target), terms)
    engine.swap(point)
    swapped = answers(engine)
    assert swapped == answers(start(written_out(point, family, tmp_path / "merged")))
    assert swapped.texts != base.texts and swapped.scores != base.scores
    engine.swap(family.point(0.0))


@pytest.mark.parametrize("family", ["moe"], indirect=True)
def test_methods_that_see_matrices(
    engine: Engine, base: Answers, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Iso-C and TSV-M of two vectors, Core Space of two adapters: as written, in one engine after another point."""
    generator, adapters = torch.Generator().manual_seed(6), []
    for number in range(2):
        pairs = {}
        for name, tensor in load_checkpoint(family.target).items():
            if name.endswith("proj.weight"):
                module = f"base_model.model.{name.removesuffix('.weight')}"
                pairs[f"{module}.lora_A.weight"] = torch.randn(RANK, tensor.shape[1], generator=generator)
                pairs[f"{module}.lora_B.weight"] = torch.randn(tensor.shape[0], RANK, generator=generator)
        adapters.append(Vector(str(write_adapter(tmp_path / f"adapter{number}", pairs, r=RANK, lora_alpha=ALPHA))))
    target, plus, minus = (str(path) for path in (family.target, family.plus, family.minus))
    donors = [Vector(plus, minus), Vector(minus, target)]
    monkeypatch.setattr(compat, "check", lambda *given: None)  # its checkpoints are of no one pre-training
    found = [base]
    for name in ("iso_c", "tsv_m", "core_space", "core_space_iso"):
        vectors = adapters if name.startswith("core") else donors
        point = WeightPoint(target, tuple(Term(0.5, vector) for vector in vectors), MethodSpec(name))
        engine.swap(point)
        found.append(answers(engine))
        assert found[-1] == answers(start(written_out(point, family, tmp_path / name))), name
    assert all(one.scores != other.scores for one, other in itertools.pairwise(found))
    engine.swap(family.point(0.0))
    assert answers(engine) == base


def written_out(point: WeightPoint, family: Family, place: Path) -> WeightPoint:
    """A point's checkpoint, with what stands beside the target's weights."""
    write({place: point})
    for file in family.target.iterdir():
        if ".safetensors" not in file.name:
            shutil.copy(file, place)
    return WeightPoint(str(place))


def as_w123(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A Qwen3-MoE under Mixtral's names."""
    for ours, theirs in ((".mlp.", ".block_sparse_moe."), ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        weights = {name.replace(ours, theirs): tensor for name, tensor in weights.items()}
    return weights


def donor(kind: str, path: Path, out: Path) -> Path:
    """A donor in another layout than its own, quantised."""
    weights, said = (
        as_fp8(load_checkpoint(fused(path, out))) if kind == "fp8" else as_int4(as_w123(load_checkpoint(path)))
    )
    shutil.copytree(path, out, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, out / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    return out


def vector_elsewhere(kind: str, family: Family, place: Path) -> Vector:
    """A vector of a kind, for a target whose experts are one by one."""
    if kind == "adapter":
        generator, pairs = torch.Generator().manual_seed(5), {}
        for name, tensor in as_w123(load_checkpoint(family.target)).items():
            if ".experts." in name:
                module = f"base_model.model.{name.removesuffix('.weight')}"
                pairs[f"{module}.lora_A.weight"] = torch.randn(RANK, tensor.shape[1], generator=generator)
                pairs[f"{module}.lora_B.weight"] = torch.randn(tensor.shape[0], RANK, generator=generator)
        return Vector(str(write_adapter(place / "adapter", pairs, r=RANK, lora_alpha=ALPHA)))
    if kind == "stored":
        donors = Vector(*(str(fused(path, place / path.name)) for path in (family.plus, family.minus)))
        sources = {source: open_source(source) for source in donors.sources()}
        save(donors, sources, place / "v", Storage(), say=lambda text: None)
        return Vector(str(place / "v"))
    return Vector(*(str(donor(kind, path, place / path.name)) for path in (family.plus, family.minus)))


@pytest.mark.parametrize("family", ["moe"], indirect=True)
@pytest.mark.parametrize("kind", ["stored", "adapter", "fp8", "int4"])
def test_any_vector_in_another_layout_swaps_as_it_is_written(
    engine: Engine, base: Answers, family: Family, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stored vector and fp8 whose experts are fused, an adapter and packed codes under w1, w2 and w3."""
    point = WeightPoint(str(family.target), (Term(0.5, vector_elsewhere(kind, family, tmp_path)),))
    written = open_source(str(family.target))
    for source in point.terms[0].vector.sources():
        assert isinstance(lay_out(open_source(source), written), Relaid)
    engine.swap(point)
    swapped = answers(engine)
    monkeypatch.setattr(compat, "check", lambda *given: None)  # its checkpoints are of no one pre-training
    assert swapped == answers(start(written_out(point, family, tmp_path / "merged")))
    assert swapped.texts != base.texts and swapped.scores != base.scores
    engine.swap(family.point(0.0))


def test_weights_that_vllm_quantizes_are_those_of_a_fresh_engine(families: dict[str, Family], tmp_path: Path) -> None:
    """In fp8, with a scale for each output channel: two points, and the base again."""
    settings = dataclasses.replace(SETTINGS, args=further_arguments({"quantization": "fp8_per_channel"}))
    family = families["tied"]
    engine = start(family.point(0.0), settings)
    found = {0.0: answers(engine)}
    for alpha in (0.5, -1.0):
        engine.swap(family.point(alpha))
        found[alpha] = answers(engine)
        written = family.write(alpha, tmp_path / str(alpha))
        assert found[alpha] == answers(start(written, settings))
    assert engine.info()["probe"] == "passed" and rank_of(engine).rvdist_forget(), "by what was recorded"
    assert found[-1.0] != answers(start(written)), "what is served is rounded"
    assert found[0.0].texts != found[0.5].texts != found[-1.0].texts
    engine.swap(family.point(0.0))
    assert answers(engine) == found[0.0]


@pytest.mark.slow  # where an engine could not start before it, vLLM's group for experts is gone
def test_what_the_cpu_build_cannot_quantize_is_said(families: dict[str, Family]) -> None:
    """It lacks an operation that experts need."""
    settings = dataclasses.replace(SETTINGS, args=further_arguments({"quantization": "fp8_per_channel"}))
    with pytest.raises(
        BadInput, match=r"quantization='fp8_per_channel': vLLM's CPU build lacks .* leave it out, or use"
    ):
        start(WeightPoint(str(families["moe"].target)), settings)


def test_a_donor_is_a_point_too(engine: Engine, family: Family) -> None:
    donor = WeightPoint(str(family.plus))
    engine.swap(donor)
    assert answers(engine) == answers(start(donor))


def test_fifty_swaps_leave_no_trace(engine: Engine, base: Answers, family: Family) -> None:
    """Neither in what it answers nor in memory."""
    points = [family.point(1.0), family.point(0.0), family.point(-0.5), WeightPoint(str(family.plus))]
    choices = [Choice("what is 3+4? ", "7"), Choice("q a ", "a b")]
    first, memory = {}, []
    for k in range(52):
        engine.swap(points[k % 4])
        scores = engine.answer(choices)
        assert first.setdefault(k % 4, scores) == scores, f"drift after {k} swaps"
        memory.append(anonymous_bytes())
    assert len(set(map(tuple, first.values()))) == 4
    assert max(memory[40:]) - max(memory[:12]) < 16 << 20
    engine.swap(family.point(0.0))
    assert answers(engine) == base


def test_memory_of_a_swap_does_not_grow_with_the_model(families: dict[str, Family], tmp_path: Path) -> None:
    """So no engine has a host copy of target or vector: what they share is the page cache."""
    start(WeightPoint(str(families["untied"].target))).swap(families["untied"].point(0.5))  # loads what swaps need
    family = make_deep(tmp_path / "deep", layers=28)
    nbytes = sum(file.stat().st_size for file in family.target.glob("*.safetensors"))
    engine = start(WeightPoint(str(family.target)))
    answers(engine)
    before, seen, over = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            seen.append(anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for k in range(1, 6):
        engine.swap(family.point(k / 10))
    over.set()
    watcher.join()
    shutil.rmtree(tmp_path / "deep")
    print(f"a model of {nbytes >> 20} MiB: {max(seen) - before >> 20} MiB more while it was swapped")
    assert nbytes > 150 << 20 and max(seen) - before < 0.7 * nbytes


def test_a_point_where_the_engine_is_already_is_not_read(
    engine: Engine, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.swap(family.point(0.0))
    monkeypatch.delattr(swap, "defer_tensors")
    engine.swap(WeightPoint(str(family.target)))
    with pytest.raises(NameError):
        start(WeightPoint(str(family.target))).swap(family.point(0.5))


def test_every_byte_is_read_once_and_into_place(
    engine: Engine, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whatever buffers, and by however many threads."""
    point, rank = family.point(0.5), rank_of(engine)
    specs = [spec for source in point.sources() for spec in open_source(source).tensors.values()]
    engine.swap(point)  # and the probe, which wants tensors of its own
    expected = answers(engine)
    monkeypatch.delattr(Deferred, "read")
    monkeypatch.setattr(readers, "CHUNK", 1024)
    for buffers, count in ((None, 1), (None, 3), (BounceBuffers(False, 5000), 1), (BounceBuffers(False, 30000), 4)):
        monkeypatch.setattr(rank, "_rvdist_bounce", buffers)
        monkeypatch.setattr(rank, "_rvdist_readers", count)
        engine.swap(family.point(1.0))
        before = rank.rvdist_bytes()
        engine.swap(point)
        assert rank.rvdist_bytes() - before == sum(spec.nbytes for spec in specs)
        assert answers(engine) == expected


def rank_of(engine: Engine) -> Any:
    return engine._llm.llm_engine.model_executor.driver_worker.worker


def test_vllm_searches_once_where_a_tensor_goes(
    engine: Engine, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "reload", None)
    engine.swap(family.point(0.5))
    engine.swap(WeightPoint(str(family.plus)))


def test_another_search_changes_nothing(families: dict[str, Family]) -> None:
    family, found = families["tied"], []
    points = [family.point(0.5), WeightPoint(str(family.plus)), family.point(-1.0)]
    engine = start(WeightPoint(str(family.target)))
    for point in points:
        engine.swap(point)
        found.append(answers(engine))
    assert rank_of(engine).rvdist_forget()
    for point, own in zip(points, found, strict=True):
        engine.swap(point)
        assert answers(engine) == own
    assert found[0].texts != found[1].texts != found[2].texts


def test_a_base_of_other_tensors_is_left_to_vllm(families: dict[str, Family], tmp_path: Path) -> None:
    """Here of one more, which it reads over."""
    family = families["llama"]
    more, engine = family.write(0.5, tmp_path / "more"), start(WeightPoint(str(family.target)))
    path = tmp_path / "more" / "model.safetensors"
    tensors = load_file(path) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    save_file(tensors, path, metadata={"format": "pt"})
    engine.swap(family.point(0.5))
    expected = answers(engine)
    engine.swap(family.point(1.0))
    engine.swap(more)
    assert answers(engine) == expected


def test_a_record_that_fails_the_probe_is_forgotten(
    families: dict[str, Family], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    family = families["llama"]
    engine = start(WeightPoint(str(family.target)))
    places = rank_of(engine)._rvdist_recorded._places
    gate, up = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up"))
    places[gate], places[up] = places[up], places[gate]
    engine.swap(family.point(0.5))
    assert "the probe failed" in capfd.readouterr().err and not rank_of(engine).rvdist_forget()
    assert engine.info()["probe"] == "passed"
    assert answers(engine) == answers(start(family.write(0.5, tmp_path / "merged")))


def test_a_record_that_vllm_cannot_follow_is_forgotten(
    families: dict[str, Family], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where a layer is left half made: its memory is the same as before."""
    from vllm.model_executor.model_loader.reload import layerwise

    family, own, seen = families["llama"], layerwise._layerwise_process, []
    engine, other = (start(WeightPoint(str(family.target))) for _ in range(2))
    layers = [layer.weight.data_ptr() for layer in rank_of(engine).model_runner.get_model().modules() if is_norm(layer)]

    def failing(layer: Any, info: Any) -> None:
        if is_norm(layer) and not seen:
            seen.append(layer)
            raise RuntimeError("no kernel image is available")
        own(layer, info)

    monkeypatch.setattr(layerwise, "_layerwise_process", failing)
    engine.swap(family.point(0.5))
    assert seen and "no kernel image is available: vLLM has to search" in capfd.readouterr().err
    assert engine.info()["probe"] == "passed" and not rank_of(engine).rvdist_forget()
    assert layers == [
        layer.weight.data_ptr() for layer in rank_of(engine).model_runner.get_model().modules() if is_norm(layer)
    ]
    other.swap(family.point(0.5))
    assert answers(engine) == answers(other)


def is_norm(layer: Any) -> bool:
    return "Norm" in type(layer).__name__


def test_where_a_model_changes_what_it_loads_nothing_is_recorded(
    families: dict[str, Family], capfd: pytest.CaptureFixture[str]
) -> None:
    family = families["llama"]
    engine = start(WeightPoint(str(family.target)))
    engine.swap(family.point(0.5))
    expected, rank = answers(engine), rank_of(engine)
    model, rank._rvdist_recorded = rank.model_runner.get_model(), recorded.Recorded(rank)
    load = model.load_weights
    model.load_weights = lambda weights: load(
        (name, tensor * 1 if "norm" in name else tensor) for name, tensor in weights
    )
    engine.swap(family.point(1.0))
    assert "every swap has it search anew" in capfd.readouterr().err and not rank.rvdist_forget()
    engine.swap(family.point(0.5))
    assert answers(engine) == expected


def test_without_a_probe_nothing_that_was_recorded_is_used(
    families: dict[str, Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = families["llama"]
    engine = start(WeightPoint(str(family.target)))
    monkeypatch.setattr(mirror, "mirror_obstacle", lambda *_: "nobody knows it")
    engine.swap(family.point(0.5))
    assert engine.info()["probe"] == "nobody knows it" and not rank_of(engine).rvdist_forget()
    settings = dataclasses.replace(SETTINGS, args=further_arguments({"quantization": "fp8_per_channel"}))
    with pytest.raises(Unusable, match="nobody knows it, and quantized it is swapped where a probe shows how"):
        start(WeightPoint(str(family.target)), settings).swap(family.point(0.5))


@pytest.mark.parametrize("kind", ["moe", "tied"])
def test_shards_change_nothing(kind: str, families: dict[str, Family], tmp_path: Path) -> None:
    whole, sharded = families[kind], shard(families[kind], tmp_path)
    engine = start(WeightPoint(str(sharded.target)))
    engine.swap(whole.point(0.5))
    expected = answers(engine)
    engine.swap(sharded.point(0.5))
    assert answers(engine) == expected


@pytest.mark.parametrize("lost", ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight"])
def test_a_missing_tensor_is_named(lost: str, families: dict[str, Family], monkeypatch: pytest.MonkeyPatch) -> None:
    family, read = families["untied"], swap.defer_tensors
    engine = start(WeightPoint(str(family.target)))
    monkeypatch.setattr(swap, "defer_tensors", lambda reader, _: (pair for pair in read(reader) if pair[0] != lost))
    with pytest.raises(RuntimeError, match=lost):
        engine.swap(family.point(0.5))
    with pytest.raises(RuntimeError, match="start a new engine"):
        answers(engine)
    with pytest.raises(RuntimeError, match="start a new engine"):
        engine.swap(family.point(0.0))


def test_what_vllm_did_not_load_is_named(families: dict[str, Family], monkeypatch: pytest.MonkeyPatch) -> None:
    family, read = families["untied"], swap.defer_tensors
    monkeypatch.setattr(
        swap, "defer_tensors", lambda reader, _: (pair for pair in read(reader) if "norm" not in pair[0])
    )
    monkeypatch.setattr(swap.SwapExtension, "_rvdist_expected", lambda self: set())
    with pytest.raises(RuntimeError, match=r"vLLM did not load.*model\.norm\.weight"):
        start(WeightPoint(str(family.target))).swap(family.point(0.5))


@pytest.mark.parametrize("kind", [pytest.param("gpt_oss", id="moe-gpt-oss")])
def test_what_a_model_writes_past_vllms_loaders_is_named(
    kind: str, families: dict[str, Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes into parameters without memory, and vLLM says that it was loaded."""
    monkeypatch.setattr(private_vllm, "_past_loaders", lambda model: nullcontext())
    with pytest.raises(RuntimeError, match=r"vLLM did not load.*attn\.sinks.*experts\.w2_weight"):
        start(WeightPoint(str(families[kind].target)))


@pytest.mark.parametrize("kind", ["moe", "tied", pytest.param("granitemoehybrid", id="moe-mamba")])
def test_the_probe_finds_a_stale_packed_copy(
    kind: str, families: dict[str, Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = families[kind]
    monkeypatch.setattr(swap, "repair_packed_copies", lambda model: None)
    with pytest.raises(RuntimeError, match="probe failed"):
        start(WeightPoint(str(family.target))).swap(family.point(0.5))


@pytest.mark.parametrize(
    "kind",
    [
        "tied",
        pytest.param("mla", id="moe-mla", marks=pytest.mark.slow),
        pytest.param("granitemoehybrid", id="moe-mamba", marks=pytest.mark.slow),
        pytest.param("gpt_oss", id="moe-gpt-oss", marks=pytest.mark.slow),
    ],
)
def test_the_probe_finds_any_matrix_or_bias_left_behind(
    kind: str, families: dict[str, Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    family, own = families[kind], swap.mirror
    monkeypatch.setattr(swap.SwapExtension, "rvdist_forget", lambda self: False)  # what was recorded is used throughout
    old = dict(read_point(WeightPoint(str(family.target))))
    engine = start(WeightPoint(str(family.target)))
    home = engine._at
    for name in old:
        if re.search(r"norm|A_log|\.D$|dt_bias|conv1d\.bias|sinks|router\.bias|gate_up_proj_bias", name):
            continue  # it has no other sign to take
        monkeypatch.setattr(
            swap, "mirror", lambda *args, name=name: ((k, old[k] if k == name else v) for k, v in own(*args))
        )
        with pytest.raises(RuntimeError, match="probe failed"):
            engine.swap(family.point(0.5))
        monkeypatch.setattr(swap, "mirror", own)
        engine._load(WeightPoint(str(family.target)))
        engine._at = home


def test_the_probe_ran_and_passed(engine: Engine, family: Family) -> None:
    engine.swap(family.point(0.5))
    assert engine.info()["probe"] == "passed"


def test_a_model_without_a_mirror_image_is_told_apart(families: dict[str, Family]) -> None:
    checkpoint = open_source(str(families["tied"].target))
    names, config = list(checkpoint.tensors), checkpoint.config
    assert mirror_obstacle(names, config) is None
    assert "conv.weight" in str(mirror_obstacle([*names, "model.layers.0.conv.weight"], config))
    assert "root mean square" in str(mirror_obstacle(names, {}))
    elsewhere = [name.replace("o_proj", "out_proj") for name in names]  # which would be that of a convolution
    assert "nothing is known" in str(mirror_obstacle(elsewhere, config))


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "shape"), [(36, {}), (30, SMOL)], ids=["deep", "smol"])
def test_what_a_swap_costs(layers: int, shape: dict[str, int], tmp_path: Path) -> None:
    """Against reading every byte of target and donors once and vLLM's own reload of tensors that are merged already;
    and against a start, of an engine in a process that has imported vLLM. In seconds of CPU, all of
    them one thread's, which other work on the machine changes least."""
    family = make_deep(tmp_path / "deep", layers, **shape)
    point = family.point(0.5)
    files = [file for path in point.sources() for file in Path(path).glob("*.safetensors")]
    engine = start(WeightPoint(str(family.target)))
    engine.swap(point)
    merged = dict(read_point(point))
    buffer = torch.empty(8 << 20, dtype=torch.uint8).numpy()  # aligned: Linux else takes twice as long, or more

    def read() -> None:
        for file in files:
            with open(file, "rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass

    def reload() -> None:
        engine._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(merged.items())})

    seconds: dict[str, list[float]] = {"swap": [], "read": [], "reload": []}
    for _ in range(9):
        for name, step in (("swap", lambda: engine._load(point)), ("read", read), ("reload", reload)):
            begin = time.process_time()
            step()
            seconds[name].append(time.process_time() - begin)
    took = {name: statistics.median(times) for name, times in seconds.items()}
    begin = time.perf_counter()
    start(WeightPoint(str(family.target)))
    took["start"] = time.perf_counter() - begin
    shutil.rmtree(tmp_path / "deep")
    count = sum(tensor.numel() for tensor in merged.values())
    ratio = took["swap"] / (took["read"] + took["reload"])
    print(f"{count / 1e6:.0f} M parameters: " + ", ".join(f"{name} {t:.2f} s" for name, t in took.items()))
    print(f"a swap takes {ratio:.2f} times reading and reloading, {took['swap'] / took['start']:.2f} times a start")
    assert count > 1e8 and ratio < 1.8 and took["swap"] < took["start"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tied", "untied", "moe"])
def test_tensor_parallel(kind: str, families: dict[str, Family], tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, tensor_parallel_size=2)
    family = families[kind]
    engine = start(WeightPoint(str(family.target)), settings)
    base = answers(engine)
    engine.swap(family.point(0.5))
    swapped = answers(engine)
    assert engine.info()["probe"] == "passed"
    before = engine._llm.collective_rpc("rvdist_bytes")
    engine._load(family.point(0.5))
    read = [after - sooner for after, sooner in zip(engine._llm.collective_rpc("rvdist_bytes"), before, strict=True)]
    engine._at = (family.point(0.5).base, family.point(0.5).active_terms)
    specs = open_source(str(family.target)).tensors.values()
    rows = sum(spec.nbytes for spec in specs if spec.shape[0] == 70)  # of the vocabulary, which ranks share unevenly
    shared = sum(spec.nbytes for spec in specs if len(spec.shape) > 1 and not spec.name.endswith(".gate.weight")) - rows
    other = sum(spec.nbytes for spec in specs) - shared - rows
    assert 0 <= sum(read) - 3 * (shared + rows) <= 2 * 3 * other, "each reads its share"
    assert all(own <= 3 * (shared / 2 + rows + other) for own in read)
    fresh = start(family.write(0.5, tmp_path / "merged"), settings)
    assert swapped == answers(fresh)
    assert swapped.texts != base.texts
    engine.swap(family.point(0.0))
    assert answers(engine) == base
    for ranks in (engine, fresh):
        ranks._llm.llm_engine.model_executor.shutdown()
