"""A swapped engine against a fresh one on the written checkpoint: tokens and log-probabilities to the bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from families import SETTINGS, Answers, Family, answers, shard, start

from rvdist.checkpoint.source import open_source
from rvdist.fleet import swap
from rvdist.fleet.engine import Engine
from rvdist.point import WeightPoint


@pytest.mark.parametrize("alpha", [0.5, 1.0, -1.0])
def test_swapped_equals_fresh(engine: Engine, base: Answers, family: Family, alpha: float, tmp_path: Path) -> None:
    engine.swap(family.point(alpha))
    swapped = answers(engine)
    assert swapped == answers(start(family.write(alpha, tmp_path / "merged")))
    assert swapped.texts != base.texts and swapped.scores != base.scores


def test_a_donor_is_a_point_too(engine: Engine, family: Family) -> None:
    donor = WeightPoint(str(family.plus))
    engine.swap(donor)
    assert answers(engine) == answers(start(donor))


def test_there_and_back_ten_times(engine: Engine, base: Answers, family: Family) -> None:
    engine.swap(family.point(1.0))
    there = answers(engine)
    for _ in range(10):
        engine.swap(family.point(0.0))
        assert answers(engine) == base
        engine.swap(family.point(1.0))
        assert answers(engine) == there


def test_a_point_where_the_engine_is_already_is_not_read(
    engine: Engine, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.swap(family.point(0.0))
    monkeypatch.delattr(swap, "read_point")
    engine.swap(WeightPoint(str(family.target)))
    with pytest.raises(NameError):
        start(WeightPoint(str(family.target))).swap(family.point(0.5))


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
    family, read = families["untied"], swap.read_point
    monkeypatch.setattr(swap, "read_point", lambda point: (pair for pair in read(point) if pair[0] != lost))
    engine = start(WeightPoint(str(family.target)))
    with pytest.raises(RuntimeError, match=lost):
        engine.swap(family.point(0.5))
    with pytest.raises(RuntimeError, match="start a new engine"):
        answers(engine)
    with pytest.raises(RuntimeError, match="start a new engine"):
        engine.swap(family.point(0.0))


def test_what_vllm_did_not_load_is_named(families: dict[str, Family], monkeypatch: pytest.MonkeyPatch) -> None:
    family, read = families["untied"], swap.read_point
    monkeypatch.setattr(swap, "read_point", lambda point: (pair for pair in read(point) if "norm" not in pair[0]))
    monkeypatch.setattr(swap.SwapExtension, "_rvdist_expected", lambda self: set())
    with pytest.raises(RuntimeError, match=r"vLLM did not load.*model\.norm\.weight"):
        start(WeightPoint(str(family.target))).swap(family.point(0.5))


@pytest.mark.parametrize("kind", ["moe", "tied"])
def test_the_probe_finds_a_stale_packed_copy(
    kind: str, families: dict[str, Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = families[kind]
    monkeypatch.setattr(swap, "_repair_packed_copies", lambda model: None)
    with pytest.raises(RuntimeError, match="probe failed"):
        start(WeightPoint(str(family.target))).swap(family.point(0.5))


def test_the_probe_finds_any_matrix_or_bias_left_behind(
    families: dict[str, Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    family, mirror = families["tied"], swap.mirror
    old = dict(swap.read_point(WeightPoint(str(family.target))))
    engine = start(WeightPoint(str(family.target)))
    home = engine._at
    for name in old:
        if "norm" in name:
            continue  # a norm's weight has no other sign to take
        monkeypatch.setattr(
            swap, "mirror", lambda *args, name=name: ((k, old[k] if k == name else v) for k, v in mirror(*args))
        )
        with pytest.raises(RuntimeError, match="probe failed"):
            engine.swap(family.point(0.5))
        monkeypatch.setattr(swap, "mirror", mirror)
        engine._load(WeightPoint(str(family.target)))
        engine._at = home


def test_the_probe_ran_and_passed(engine: Engine, family: Family) -> None:
    engine.swap(family.point(0.5))
    assert engine.info()["probe"] == "passed"


def test_a_model_without_a_mirror_image_is_told_apart(families: dict[str, Family]) -> None:
    checkpoint = open_source(str(families["tied"].target))
    names, config = list(checkpoint.tensors), checkpoint.config
    assert swap.mirror_obstacle(names, config) is None
    assert "conv.weight" in str(swap.mirror_obstacle([*names, "model.layers.0.conv.weight"], config))
    assert "root mean square" in str(swap.mirror_obstacle(names, {}))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_tensor_parallel(
    kind: str, families: dict[str, Family], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    settings = dataclasses.replace(SETTINGS, tensor_parallel_size=2)
    family = families[kind]
    engine = start(WeightPoint(str(family.target)), settings)
    base = answers(engine)
    engine.swap(family.point(0.5))
    swapped = answers(engine)
    assert engine.info()["probe"] == "passed"
    assert swapped == answers(start(family.write(0.5, tmp_path / "merged"), settings))
    assert swapped.texts != base.texts
    engine.swap(family.point(0.0))
    assert answers(engine) == base
