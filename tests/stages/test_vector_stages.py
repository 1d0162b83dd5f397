"""Vectors and adapters from the configuration on: what is refused, what is noted, what is written."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapters import factors, write_adapter
from checkpoints import launch, load_checkpoint, write_checkpoint
from points import read_point

from rvdist.core import config
from rvdist.core.config import BatchConfig, Config, VectorConfig, WeightedVectorConfig
from rvdist.core.errors import BadInput
from rvdist.core.point import Term, Vector, WeightPoint
from rvdist.stages.jobs import run_stages
from rvdist.weights import compat, interference
from rvdist.weights.checkpoint.bound import settle
from rvdist.weights.checkpoint.source import open_source


def saved(tmp_path, **changes):
    """Runs a configuration that only saves a vector."""
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    cache = config.CacheConfig(str(tmp_path / "cache"))
    return run_stages(
        Config(vector=VectorConfig(**{k: v and str(v) for k, v in changes.items()}), cache=cache), run, []
    )


def check(base, vector):
    point = WeightPoint(str(base), (Term(1.0, vector),))
    sources = {source: open_source(source) for source in point.sources()}
    return compat.check(point, sources), settle(point, sources)


def test_a_vector_alone_needs_no_target_and_no_cluster(family, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rvdist.core.cluster.connect", None)
    paths = family()
    assert saved(tmp_path, plus=paths["plus"], minus=paths["minus"], save=tmp_path / "v") is None
    said = json.loads((tmp_path / "v" / "vector.json").read_text())
    assert (tmp_path / "run" / "config.yaml").exists()
    assert said["exact"] and "vector" in json.loads((tmp_path / "run" / "timing.json").read_text())["phases"]
    assert f"exact for {said['exact_for']}" in " ".join(capsys.readouterr().out.split())


def test_vectors_are_looked_at_without_a_cluster(family, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rvdist.core.cluster.connect", None)
    paths = {name: str(path) for name, path in family().items()}
    (tmp_path / "run").mkdir()
    vectors = [WeightedVectorConfig(paths["plus"], paths["minus"]), WeightedVectorConfig(paths["minus"], paths["plus"])]
    cache = config.CacheConfig(str(tmp_path / "cache"))
    settings = Config(target=paths["target"], vectors=vectors, stages=["analyze"], cache=cache)
    assert run_stages(settings, tmp_path / "run", []) is None
    found = json.loads((tmp_path / "run/anatomy.json").read_text())
    assert found["vectors"] == ["vectors[0]", "vectors[1]"]
    assert found["whole"]["cosines"][0][1] == pytest.approx(-1)
    assert (tmp_path / "run/anatomy-cosines.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "run/anatomy.csv").exists() and (tmp_path / "run/config.yaml").exists()
    timing = json.loads((tmp_path / "run/timing.json").read_text())
    sizes = sum(Path(path).stat().st_size for name in paths for path in Path(paths[name]).glob("*.safetensors"))
    assert timing["cpu_seconds"] > 0 and 0.5 * sizes < timing["bytes_read"] <= 2 * sizes
    said = capsys.readouterr().out
    assert "of this, 0 % in the same direction" in " ".join(said.split())
    assert "The cosine between" in said and "“vectors[0]” may not help: " in " ".join(said.split())
    reasons = found["transfer"]["vectors[0]"]["reasons"]
    assert {reason["name"] for reason in reasons} == {
        "too far",
        "noise",
        "embeddings",
    }  # it was drawn, and is a fifth of θ

    planned = replace(settings, stages=["plan"], output=str(tmp_path / "out"))
    sampled, measure = [], interference.measure_interference

    def measure_once(point, sources):
        sampled.append(point)
        return measure(point, sources)

    monkeypatch.setattr(interference, "measure_interference", measure_once)
    assert run_stages(planned, tmp_path / "run", []) is None
    assert len(sampled) == 1, "for its warnings and its pairs"
    said = " ".join(capsys.readouterr().out.split())
    assert "note: vectors[0]: along it the sum goes 0.00 of its way (a sample), since others go against it" in said
    assert (
        "vectors[0] and vectors[1]: norms " in said and "cosine −1.000; of what either changes both change 100%" in said
    )


@pytest.mark.parametrize(("alphas", "along"), [((1.0, 1.0), "2.00"), ((1.0, -0.9), "0.10")])
def test_one_vector_given_twice_is_told_of_where_it_means_the_same_weights(alphas, along, family, tmp_path, capsys):
    paths = {name: str(path) for name, path in family().items()}
    for masks in ({}, {}), ({"exclude": [".*mlp.*"]}, {"include": [".*mlp.*"]}):
        vectors = [
            WeightedVectorConfig(paths["plus"], paths["minus"], alpha=alpha, mask=config.MaskConfig(**mask))
            for alpha, mask in zip(alphas, masks, strict=True)
        ]
        settings = Config(target=paths["target"], vectors=vectors, stages=["plan"], output=str(tmp_path / "out"))
        settings = replace(settings, cache=config.CacheConfig(str(tmp_path / "cache")))
        (run := tmp_path / f"run{len(masks[0])}").mkdir()
        assert run_stages(settings, run, []) is None
        said = " ".join(capsys.readouterr().out.split())
        assert (f"vectors[0]: along it the sum goes {along} of its way" in said) != bool(masks[0]), said


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vector": VectorConfig("p", "m", rank=3)}, "vector.rank says how to store a vector, and vector.save"),
        ({"vector": VectorConfig("p", "m", save="v", dtype="int8")}, "vector.dtype: 'int8' is not one of bfloat16"),
        ({"vector": VectorConfig("p", "m", save="v", rank=0)}, "vector.rank: 0 is not a rank"),
        ({"vector": VectorConfig("p", "m", save="v", density=1.5)}, "vector.density: 1.5 is not a share"),
        ({"vector": VectorConfig("p", "m", save="v", density=float("nan"))}, "vector.density: nan is not a share"),
        ({"vector": VectorConfig("p", "m", save="v", rank=2, density=0.5)}, "are two ways to store a vector"),
        ({"vector": VectorConfig("p", save="v")}, "vector.minus is not set"),
        ({"vector": VectorConfig("p", "m", save="v"), "batch": [BatchConfig("t")]}, "and batch is set"),
        (
            {"vector": VectorConfig(save="v"), "vectors": [WeightedVectorConfig("p", "m")]},
            "vector.save stores one vector",
        ),
    ],
)
def test_settings_that_cannot_be_saved(changes, reason):
    with pytest.raises(BadInput, match=reason):
        config.vector_to_save(Config(target="t", **changes))


def test_saving_is_part_of_the_merge_stage():
    assert config.stages(Config(vector=VectorConfig("p", "m", save="v"))) == ["merge"]
    assert config.vector_to_save(Config(vector=VectorConfig("p", "m"))) is None


def test_donors_that_make_no_vector(family, tmp_path):
    paths = family()
    adapter = write_adapter(tmp_path / "adapter", factors())
    saved(tmp_path, plus=paths["plus"], minus=paths["minus"], save=tmp_path / "v")
    for donors, reason in (
        ({"path": paths["plus"]}, "is a whole checkpoint, and vector.path wants a stored vector or an adapter"),
        ({"plus": tmp_path / "v", "minus": paths["minus"]}, "v: is a stored vector, a difference already"),
        ({"plus": paths["plus"], "minus": tmp_path / "v"}, "v: is a stored vector, a difference already"),
        ({"plus": paths["plus"], "minus": adapter}, "adapter: is an adapter, and vector.plus is a whole checkpoint"),
    ):
        with pytest.raises(BadInput, match=reason):
            saved(tmp_path, save=tmp_path / "w", **donors)
    for target, kind in ((tmp_path / "v", "a stored vector"), (adapter, "an adapter")):
        with pytest.raises(BadInput, match=f"is {kind}, and a target is a whole model; name it as vector.path"):
            check(target, Vector(str(adapter)))
    assert not (tmp_path / "w").exists() and not (tmp_path / "w.partial").exists()


def test_a_stored_vector_is_compared_by_its_donors_config_and_tokenizer(family, tmp_path):
    paths = family()
    saved(tmp_path, plus=paths["plus"], minus=paths["minus"], save=tmp_path / "v")
    vector = Vector(str(tmp_path / "v"))
    report, _ = check(paths["target"], vector)
    assert report.distances == {}
    assert report.exceptions == (
        "v is a stored vector: whether its donors and the target share a pre-training was not sampled",
    )
    tokenizer = {"model": {"vocab": {"a": 1, "b": 0}}, "added_tokens": []}
    (tmp_path / "v" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(BadInput, match="v: its tokenizer differs"):
        check(paths["target"], vector)


def test_an_adapter_beside_what_it_was_trained_on_is_its_own_difference(family, tmp_path):
    paths = family()
    adapter = str(write_adapter(tmp_path / "adapter", factors(dtype=torch.bfloat16)))
    report, settled = check(paths["target"], Vector(adapter, str(paths["minus"])))
    assert settled.terms[0].vector == Vector(adapter)
    assert any(
        "minus is taken to be what it was trained on (its config names org/base)" in e for e in report.exceptions
    )
    assert next(iter(report.distances.values())) < 0.5
    alone, _ = check(paths["target"], Vector(adapter))
    assert any("adapter is an adapter, trained on org/base: only tensor names" in e for e in alone.exceptions)
    with pytest.raises(BadInput, match=r"tensor model.embed_tokens.weight has shape \[301, 49\]"):
        weights = load_checkpoint(paths["minus"]) | {"model.embed_tokens.weight": torch.zeros(301, 49)}
        check(paths["target"], Vector(adapter, str(write_checkpoint(tmp_path / "other", weights))))


def test_names_are_not_guessed(family, tmp_path):
    paths, lora = family(), factors()
    moved = {name.replace("model.layers.0", "language_model.layers.0"): tensor for name, tensor in lora.items()}
    report, _ = check(paths["target"], Vector(str(write_adapter(tmp_path / "a", moved))))
    skipped = "1 of the vector's tensors are not in the target and were skipped"
    name = "language_model.layers.0.self_attn.q_proj.weight"
    assert any(e.startswith(skipped) and name in e for e in report.exceptions)
    alien = {name.replace("model.model.model.", "model.model.other."): tensor for name, tensor in lora.items()}
    with pytest.raises(BadInput, match="has no tensor in common"):
        check(paths["target"], Vector(str(write_adapter(tmp_path / "b", alien))))


@pytest.mark.heavy
def test_the_command_stores_applies_and_says_what_is_wrong(family, tmp_path):
    """One vector stored, and applied in place of its donors."""
    paths = family()
    donors = ("vector.plus=plus", "vector.minus=minus")
    done = launch(*donors, "vector.save=v", "target=target", "alpha=0.7", "output=one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = launch("vector.path=v", "target=target", "alpha=0.7", "output=two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = load_checkpoint(tmp_path / "one"), load_checkpoint(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["scalar"], load_checkpoint(paths["target"])["scalar"])
    refused = launch("vector.path=plus", "target=target", "output=three", cwd=tmp_path)
    assert refused.returncode == 2 and not (tmp_path / "three").exists()
    assert len(refused.stderr.strip().splitlines()) == 1 and "is a whole checkpoint" in refused.stderr


def test_peft_merges_to_what_we_read(tmp_path):
    peft = pytest.importorskip("peft", reason="peft cannot be imported")
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2}
    model = Qwen2ForCausalLM(Qwen2Config(**shape, num_attention_heads=4, num_key_value_heads=2))
    model.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=10, use_rslora=True,
        target_modules=["q_proj", "up_proj", "embed_tokens"],
        rank_pattern={"layers.1.self_attn.q_proj": 7}, alpha_pattern={"up_proj": 3},
    )  # fmt: skip
    adapted = peft.get_peft_model(model, settings)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    ours = dict(read_point(WeightPoint(str(tmp_path / "base"), (Term(1.0, Vector(str(tmp_path / "adapter"))),))))
    base, theirs = load_checkpoint(tmp_path / "base"), load_checkpoint(tmp_path / "merged")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-7), name
    assert sum(not torch.equal(ours[name], base[name]) for name in base) == 5
