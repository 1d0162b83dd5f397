"""Adapters that are more than products of two factors: weights that were trained themselves, and biases of B. Each is
what peft's own merge_and_unload makes of it, and the written checkpoint is what an engine reads."""

import json
import math
from collections import Counter, defaultdict
from contextlib import closing
from pathlib import Path

import pytest
import torch
from adapters import EMBEDDING, MODULES, factors, write_adapter
from checkpoints import launch, load_checkpoint, near, tensors, write_checkpoint
from peaks import peak_while
from points import read_point
from safetensors.torch import load_file, save_file

from rvdist.core.errors import BadInput
from rvdist.core.point import Term, Vector, WeightPoint
from rvdist.merge import plan as planning
from rvdist.merge.actor import WorkerSettings
from rvdist.merge.driver import merge
from rvdist.merge.plan import build_plan
from rvdist.weights import compat, products
from rvdist.weights.checkpoint.bound import bind, settle
from rvdist.weights.checkpoint.digest import checkpoint_digest
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.operand import open_operand
from rvdist.weights.reader import open_point

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.2.mlp.up_proj"
BIAS = "base_model.model.{}.base_layer.bias"

MAGNITUDE = "base_model.model.{}.lora_magnitude_vector"
MAGNITUDES = {MAGNITUDE.format(module): torch.ones(rows) for module, (rows, _) in MODULES.items()}
MAGNITUDES[MAGNITUDE.format(EMBEDDING)] = torch.ones(48)

KINDS = {
    "lora_bias": {"lora_bias": True, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}},
    "lora_bias, rsLoRA": {"lora_bias": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "bias=all": {"bias": "all"},
    "bias=lora_only": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["lm_head", "input_layernorm", "embed_tokens", "k_proj"]},
    "DoRA": {"use_dora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}},
    "DoRA, rsLoRA, embeddings": {"use_dora": True, "use_rslora": True, "target_modules": ["embed_tokens", "o_proj"]},
    "DoRA, bias=all, modules_to_save": {"use_dora": True, "modules_to_save": ["norm"], "bias": "all"},
    "bias=all, modules_to_save": {"bias": "all", "modules_to_save": ["lm_head", "norm", "layers.1.mlp"]},
}


def base_model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, attention_bias=True, tie_word_embeddings=False))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.05)
    return model.to(dtype)


def train(place: Path, model: torch.nn.Module, **settings: object) -> None:
    """Saves `model` as base, what peft makes of it as adapter, with everything that it trains moved, and merged."""
    peft = pytest.importorskip("peft", reason="peft, whose own merge is what is right here, cannot be imported")
    model.save_pretrained(place / "base")
    chosen = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj"]} | settings
    adapted = peft.get_peft_model(model, peft.LoraConfig(**chosen))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    adapted.save_pretrained(place / "adapter")
    adapted.merge_and_unload().save_pretrained(place / "merged")


def point(place: Path, alpha: float = 1.0, minus: str | None = None, base: str = "base") -> WeightPoint:
    vector = Vector(str(place / "adapter"), minus and str(place / minus))
    return WeightPoint(str(place / base), (Term(alpha, vector),))


def require_merged(place: Path, at_least: int) -> None:
    """Read and written, base + 1 · Δ is what peft merged; and the donors may be named or the target be the base."""
    base, theirs = load_checkpoint(place / "base"), load_checkpoint(place / "merged")
    ours = dict(read_point(point(place)))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.allclose(ours[name], theirs[name], rtol=2e-6, atol=2e-7), name
    assert sum(not torch.equal(ours[name], base[name]) for name in base) >= at_least
    named = dict(read_point(point(place, minus="base")))
    assert all(torch.equal(named[name], ours[name]) for name in ours)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_peft_merges(tmp_path, kind):
    train(tmp_path, base_model(), **KINDS[kind])
    require_merged(tmp_path, 3)


def test_dora_of_transposed_matrices_is_what_peft_merges(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=24, n_layer=2, n_head=2, tie_word_embeddings=False))
    modules = ["c_attn", "mlp.c_proj"]
    train(tmp_path, model, use_dora=True, fan_in_fan_out=True, target_modules=modules)
    require_merged(tmp_path, 4)


def test_dora_does_not_depend_on_chunks(tmp_path, monkeypatch):
    """Whatever elements are asked for, and however many rows are taken at a time; of rows and of columns."""
    write_checkpoint(tmp_path / "base", tensors(0))
    magnitudes = {name: 0.5 + torch.rand(ones.shape) for name, ones in MAGNITUDES.items()}
    write_adapter(tmp_path / "adapter", factors() | magnitudes, use_dora=True, use_rslora=True)
    sources = {str(tmp_path / name): open_source(str(tmp_path / name)) for name in ("adapter", "base")}
    bound = bind(*sources.values())
    name_of_columns, name_of_rows = "model.embed_tokens.weight", f"{UP}.weight"

    def read(name: str, size: int) -> torch.Tensor:
        with closing(open_operand(bound)) as operand:
            numel = bound.tensors[name].numel
            cuts = [(k, min(k + size, numel)) for k in range(0, numel, size)]
            cuts = cuts[1::2] + cuts[::2]
            parts = {cut: operand.read(name, *cut, torch.empty(8 * size, dtype=torch.uint8)).clone() for cut in cuts}
            return torch.cat([parts[cut] for cut in sorted(parts)])

    whole = {name: read(name, 1 << 20) for name in (name_of_columns, name_of_rows)}
    for rows, size in ((1, 7), (40, 1000), (100, 33)):
        monkeypatch.setattr("rvdist.weights.products._BLOCK", rows * 48)
        assert all(torch.equal(read(name, size), taken) for name, taken in whole.items())
    assert all(taken.dtype == torch.float64 and taken.all() for taken in whole.values())


def test_one_worker_finds_the_lengths_of_columns(tmp_path, monkeypatch):
    """Whatever part of the tensor it reads, it reads all of it first; rows are anybody's."""
    monkeypatch.setattr(planning, "UNIT_BYTES", 5000)
    base = write_checkpoint(tmp_path / "base", tensors(0))
    magnitudes = {name: 0.5 + torch.rand(ones.shape) for name, ones in MAGNITUDES.items()}
    write_adapter(tmp_path / "adapter", factors() | magnitudes, use_dora=True)
    asked = WeightPoint(str(base), (Term(0.5, Vector(str(tmp_path / "adapter"), str(base))),))
    sources = {name: open_source(name) for name in asked.sources()}
    plan = build_plan({tmp_path / "out": asked}, sources)
    cuts = Counter(segment.tensor for unit in plan.units for segment in unit.segments)
    assert cuts["model.embed_tokens.weight"] == 1 < cuts[f"{UP}.weight"]
    merge(plan, sources, defaultdict(str), WorkerSettings(2, alone=True))
    wanted = dict(read_point(asked))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in read_point(WeightPoint(str(tmp_path / "out"))))


def test_a_row_without_a_direction_is_told(tmp_path):
    """peft makes NaNs of it; a merge refuses them."""
    base = tensors(0)
    base[f"{UP}.weight"][7] = 0
    pairs = {name: tensor for name, tensor in factors().items() if "up_proj" in name}
    pairs[f"base_model.model.{UP}.lora_B.weight"][7] = 0
    write_checkpoint(tmp_path / "base", base)
    magnitude = {MAGNITUDE.format(UP): torch.ones(131)}
    write_adapter(tmp_path / "adapter", pairs | magnitude, use_dora=True)
    with closing(open_point(point(tmp_path))) as reader:
        out = torch.empty(131 * 48, dtype=torch.bfloat16)
        reader.fill(f"{UP}.weight", 0, out)
        assert reader.nonfinite == [48] and out.view(131, 48)[7].isnan().all()
        blame = reader.blame(f"{UP}.weight")
        assert "adapter_model.safetensors (the vector) has 48 values that are not finite" in blame


def test_values_trained_themselves_are_those_of_the_adapter_to_the_bit(tmp_path):
    train(tmp_path, base_model(torch.bfloat16), **KINDS["bias=all, modules_to_save"])
    ours, trained = dict(read_point(point(tmp_path))), load_file(tmp_path / "adapter/adapter_model.safetensors")
    whole = {n.removeprefix("base_model.model.").replace(".base_layer.", "."): t for n, t in trained.items()}
    whole = {name: tensor for name, tensor in whole.items() if "lora_" not in name}
    assert len(whole) == 8 + 5 + 1 + 3
    for name, tensor in whole.items():
        assert torch.equal(ours[name], tensor.to(torch.bfloat16)), name


def alone(place: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A base and an adapter with whole values made here: a bias that no other of its tensors changes, and a matrix."""
    base = tensors(0) | {f"{Q}.bias": torch.randn(48) * 0.02}
    base[f"{Q}.bias"] = base[f"{Q}.bias"].bfloat16()
    whole = {f"{Q}.bias": base[f"{Q}.bias"] + 0.5, f"{UP}.weight": near(base, 3)[f"{UP}.weight"]}
    write_checkpoint(place / "base", base)
    pairs = {name: tensor for name, tensor in factors().items() if "up_proj" not in name}
    stored = {BIAS.format(Q): whole[f"{Q}.bias"], f"base_model.model.{UP}.weight": whole[f"{UP}.weight"]}
    write_adapter(place / "adapter", pairs | stored, bias="lora_only", modules_to_save=["layers.2.mlp.up_proj"])
    return base, whole


def test_a_part_of_the_way(tmp_path):
    """target + α · (value − minus), of another target than the base; as of donors, to the bit."""
    base, whole = alone(tmp_path)
    target = near(base, 5)
    write_checkpoint(tmp_path / "target", target)
    write_checkpoint(tmp_path / "plus", base | whole)
    ours = dict(read_point(point(tmp_path, 0.5, "base", "target")))
    donors = Vector(str(tmp_path / "plus"), str(tmp_path / "base"))
    theirs = dict(read_point(WeightPoint(str(tmp_path / "target"), (Term(0.5, donors),))))
    assert all(torch.equal(ours[name], theirs[name]) and not torch.equal(ours[name], target[name]) for name in whole)


def test_the_base_is_part_of_the_point(tmp_path):
    """What bytes there are depends on it: so do the digest and the plan, and what is stored knows both."""
    base, _ = alone(tmp_path)
    write_checkpoint(tmp_path / "target", near(base, 5))
    write_checkpoint(tmp_path / "other", near(base, 6))
    digests = set()
    for minus in ("base", "other", None):
        one = point(tmp_path, minus=minus, base="target")
        sources = {source: open_source(source) for source in one.sources()}
        compat.check(one, sources)
        settled = settle(one, sources)
        assert settled.terms[0].vector.minus == str(tmp_path / (minus or "target"))
        said = " ".join(compat.check(one, sources).exceptions)
        assert ("the target is taken to be that" in said) == (minus is None)
        digests.add(settled.digest({name: checkpoint_digest(source) for name, source in sources.items()}))
    assert len(digests) == 3


def test_whole_commands_write_what_engines_read(tmp_path):
    base, whole = alone(tmp_path)
    done = launch("target=base", "vector.path=adapter", "output=out", "stages=[merge]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written, read = load_checkpoint(tmp_path / "out"), dict(read_point(point(tmp_path)))
    assert written.keys() == read.keys() and all(torch.equal(written[name], read[name]) for name in read)
    assert all(torch.equal(written[name], tensor) for name, tensor in whole.items())
    assert not torch.equal(written[f"{Q}.weight"], base[f"{Q}.weight"])
    kept = launch("vector.plus=adapter", "vector.minus=base", "vector.save=v", cwd=tmp_path)
    assert kept.returncode == 0, kept.stderr
    assert set(json.loads((tmp_path / "v/vector.json").read_text())["donors"]) == {"plus", "minus"}
    again = dict(read_point(WeightPoint(str(tmp_path / "base"), (Term(1.0, Vector(str(tmp_path / "v"))),))))
    assert all(torch.equal(again[name], read[name]) for name in read)
    refused = launch("vector.path=adapter", "vector.save=w", cwd=tmp_path)
    assert refused.returncode == 2 and "a difference only from what it was trained on" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1 and not (tmp_path / "w").exists()
    looked = launch("target=base", "vector.path=adapter", "stages=[analyze]", "hydra.run.dir=look", cwd=tmp_path)
    assert looked.returncode == 0, looked.stderr
    assert json.loads((tmp_path / "look/anatomy.json").read_text())["vectors"]


@pytest.mark.heavy
def test_on_ray_and_in_this_process_the_bytes_are_the_same(tmp_path):
    alone(tmp_path)
    for extra in (("output=a",), ("output=b", "merge.workers=2")):
        done = launch("target=base", "vector.path=adapter", "cache.dir=c", *extra, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    for file in sorted((tmp_path / "a").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("change", "config", "reason"),
    [
        ({f"base_model.model.{Q}.bias": torch.zeros(48)}, {}, "does not say what it is"),
        ({f"base_model.model.{Q}.lora_B.bias": torch.zeros(48)}, {}, "does not say what it is"),
        ({f"base_model.model.{Q}.lora_B.bias": torch.zeros(47)}, {"lora_bias": True}, r"shape \[47\] where \[48\]"),
        ({f"base_model.model.{Q}.lora_B.bias": torch.zeros(48, 1)}, {"lora_bias": True}, r"shape \[48, 1\] where"),
        ({f"base_model.model.{Q}.lora_B.bias": torch.zeros(48).double()}, {"lora_bias": True}, "is stored as F64"),
        ({"base_model.model.model.norm.lora_B.bias": torch.zeros(48)}, {"lora_bias": True}, "stands there without fac"),
        ({}, {"use_dora": True}, "has use_dora, and module .* no lora_magnitude_vector"),
        ({MAGNITUDE.format(Q): torch.ones(48)}, {}, "does not say what it is"),
        (MAGNITUDES | {MAGNITUDE.format(Q): torch.ones(47)}, {"use_dora": True}, r"shape \[47\] where \[48"),
        (MAGNITUDES | {MAGNITUDE.format(Q): torch.ones(48, 1)}, {"use_dora": True}, r"shape \[48, 1\]"),
        (MAGNITUDES | {MAGNITUDE.format(Q): torch.ones(48).int()}, {"use_dora": True}, "is stored as I32"),
        (MAGNITUDES | {MAGNITUDE.format("model.norm"): torch.ones(48)}, {"use_dora": True}, "stands there without fac"),
        ({f"base_model.model.{Q}.weight": torch.zeros(48, 48)}, {"modules_to_save": ["q_proj"]}, "others in it change"),
        (
            {f"base_model.model.{Q}.lora_B.bias": torch.zeros(48), BIAS.format(Q): torch.zeros(48)},
            {"lora_bias": True, "bias": "all"},
            "others in it change",
        ),
        (
            {BIAS.format("x"): torch.zeros(3), "base_model.model.x.bias": torch.zeros(3)},
            {"bias": "all"},
            "others in it change x.bias too",
        ),
        ({"base_model.model.model.norm.weight": torch.zeros(48).int()}, {"modules_to_save": ["norm"]}, "stored as I32"),
        (MAGNITUDES, {"use_dora": True, "lora_bias": True}, "use_dora and lora_bias, which peft has not together"),
        ({}, {"modules_to_save": "norm"}, "damaged modules_to_save"),
        ({}, {"modules_to_save": [""]}, "damaged modules_to_save"),
        ({}, {"bias": "some"}, "bias='some', and only none, all, lora_only"),
        ({}, {"bias": ["all"]}, "and only none, all, lora_only are known"),
    ],
)
def test_what_cannot_be_told_is_refused(tmp_path, change, config, reason):
    with pytest.raises(BadInput, match=reason) as refused:
        open_source(str(write_adapter(tmp_path / "a", factors() | change, **config)))
    assert "\n" not in str(refused.value)


def test_bases_that_do_not_fit_are_refused(tmp_path):
    base, _ = alone(tmp_path)

    def refused(reason: str, one: WeightPoint) -> None:
        sources = {source: open_source(source) for source in one.sources()}
        with pytest.raises(BadInput, match=reason):
            compat.check(one, sources)

    write_checkpoint(tmp_path / "lacking", {n: t for n, t in base.items() if n != f"{Q}.bias"})
    refused(f"lacking: lacks tensor {Q}.bias of the adapter", point(tmp_path, minus="lacking"))
    write_checkpoint(tmp_path / "short", base | {f"{UP}.weight": base[f"{UP}.weight"][:-1].clone()})
    refused(r"shape \[130, 48\]", point(tmp_path, minus="short"))
    refused(r"has \[131, 48\]", point(tmp_path, base="short"))
    again = Vector(str(tmp_path / "adapter"), str(write_adapter(tmp_path / "second", factors())))
    refused(
        "needs what it was trained on, and another adapter is none",
        WeightPoint(str(tmp_path / "base"), (Term(1.0, again),)),
    )
    embeddings = {"base_model.model.model.embed_tokens.weight": torch.zeros(301, 48)}
    pairs = {name: tensor for name, tensor in factors().items() if "embed" not in name}
    write_adapter(tmp_path / "tied", pairs | embeddings, modules_to_save=["embed_tokens"])
    write_adapter(tmp_path / "dora", factors() | MAGNITUDES, use_dora=True)
    dora = Vector(str(tmp_path / "dora"), str(tmp_path / "short"))
    refused(r"shape \[130, 48\]", WeightPoint(str(tmp_path / "base"), (Term(1.0, dora),)))
    tied = WeightPoint(str(tmp_path / "base"), (Term(1.0, Vector(str(tmp_path / "tied"))),))
    refused("ties to its head .tie_word_embeddings., so that the head would move too", tied)


def test_more_rows_follow_the_policy(tmp_path):
    """A vocabulary that the adapter's training padded: with compat.extra_rows=keep, those that both have."""
    _, whole = alone(tmp_path)
    longer = torch.cat([whole[f"{UP}.weight"], torch.ones(5, 48).bfloat16()])
    path = tmp_path / "adapter/adapter_model.safetensors"
    save_file(load_file(path) | {f"base_model.model.{UP}.weight": longer}, path, metadata={"format": "pt"})
    one = point(tmp_path)
    sources = {source: open_source(source) for source in one.sources()}
    with pytest.raises(BadInput, match=r"shape \[131, 48\] where .* has \[136, 48\].*extra_rows=keep"):
        compat.check(one, sources)
    compat.check(one, sources, extra_rows=True)
    read = dict(read_point(one))
    assert torch.equal(read[f"{UP}.weight"], whole[f"{UP}.weight"])


def mixture(kind: str, moved: bool = True) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, GptOssConfig, Qwen3MoeConfig

    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "head_dim": 16, "num_experts_per_tok": 2, "tie_word_embeddings": False}
    config = {
        "qwen3": lambda: Qwen3MoeConfig(**shape, intermediate_size=24, num_experts=4, moe_intermediate_size=24),
        "gpt-oss": lambda: GptOssConfig(**shape, intermediate_size=24, num_local_experts=4),
        "square": lambda: GptOssConfig(**shape, intermediate_size=32, num_local_experts=4),
    }[kind]()
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


EXPERTS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
PARAMETERS = {
    "both": {"target_parameters": EXPERTS},
    "both, of other ranks": {
        "target_parameters": EXPERTS,
        "use_rslora": True,
        "rank_pattern": {"gate_up_proj": 2, "experts.down_proj": 3},
        "alpha_pattern": {r"layers.1.mlp.experts.gate_up_proj": 5},
    },
    "with modules_to_save": {"target_parameters": EXPERTS, "modules_to_save": ["lm_head"]},
    "whole": {"modules_to_save": ["mlp.experts"]},
    "one": {"target_parameters": ["experts.down_proj"]},
}


@pytest.mark.parametrize("kind", ["qwen3", "gpt-oss", "square"])
@pytest.mark.parametrize("settings", PARAMETERS)
def test_adapted_experts_are_what_peft_merges(tmp_path, kind, settings):
    """In memory transformers has them in one tensor, and so peft adapts them; Qwen3's files have them one by one."""
    train(tmp_path, mixture(kind), **PARAMETERS[settings])
    require_merged(tmp_path, 4)


AT = "base_model.model.model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("stored", "config", "reason"),
    [
        ({AT: (8, 16, 32, 8)}, {"target_parameters": EXPERTS}, "does not tell which of down_proj, gate_up_proj"),
        ({AT: (8, 16, 32, 8)}, {"target_parameters": ["a.experts.x"]}, "rank 4"),
        ({AT: (8, 16, 32, 8)}, {"target_parameters": "experts.x"}, "damaged target_parameters"),
        ({AT: (8, 16, 32, 8)}, {"target_parameters": ["down_proj"]}, "which does not name its module"),
        ({AT: (8, 16, 32, 8)}, {"target_parameters": ["experts.a", "experts.b"]}, "does not tell which of a, b"),
        ({AT: (8, 16, 32, 8), f"{AT}.base_layer": (8, 8, 8, 8)}, {}, "does not tell which of no parameters"),
        (
            {AT: (8, 32, 32, 8), f"{AT}.base_layer": (8, 16, 32, 8)},
            {"target_parameters": EXPERTS},
            "do not fit its down_proj and gate_up_proj",
        ),
        ({AT: (9, 16, 32, 9)}, {"target_parameters": EXPERTS[:1]}, "rank 4"),
        ({AT: (3, 16, 32, 3)}, {"target_parameters": EXPERTS[:1]}, "rank 4"),
        ({AT: (8, 16, 32, 4)}, {"target_parameters": EXPERTS[:1]}, "rank 4"),
        ({AT: (8, 16, 32, 8)}, {"target_parameters": EXPERTS[:1], "r": 0}, "rank 0"),
        ({AT: (5, 16, 32, 5)}, {"target_parameters": EXPERTS[:1], "r": 2.5}, "rank 2.5"),
        (
            {AT: (8, 16, 32, 8)},
            {"target_parameters": EXPERTS[:1], "use_dora": True},
            "and use_dora, which peft has",
        ),
        ({AT: (8, 16, 32, 8)}, {"target_parameters": EXPERTS[:1], "lora_bias": True}, "and lora_bias, which peft has"),
    ],
)
def test_experts_that_cannot_be_told_are_refused(tmp_path, stored, config, reason):
    """(rows and columns of A, those of B) by module."""
    pairs = {
        f"{at}.lora_{factor}.weight": torch.zeros(shape)
        for at, (rows, columns, out, into) in stored.items()
        for factor, shape in (("A", (rows, columns)), ("B", (out, into)))
    }
    with pytest.raises(BadInput, match=reason) as refused:
        open_source(str(write_adapter(tmp_path / "a", pairs, **config)))
    assert "\n" not in str(refused.value)


def test_which_way_experts_lie_is_the_base_s_to_tell(tmp_path):
    """An adapter alone does not say it, and is not stored by a guess; nor taken apart for a model that stores them
    otherwise than peft adapts them."""
    train(tmp_path, mixture("gpt-oss"), target_parameters=EXPERTS)
    alone = launch("vector.path=adapter", "vector.save=v", cwd=tmp_path)
    assert alone.returncode == 2 and "name the adapter as vector.plus" in alone.stderr
    beside = launch("vector.plus=adapter", "vector.minus=base", "vector.save=v", cwd=tmp_path)
    assert beside.returncode == 0, beside.stderr
    vector = WeightPoint(str(tmp_path / "base"), (Term(1.0, Vector(str(tmp_path / "v"))),))
    stored, ours = dict(read_point(vector)), dict(read_point(point(tmp_path)))
    assert all(torch.equal(stored[name], tensor) for name, tensor in ours.items())
    base = {n: t for n, t in load_checkpoint(tmp_path / "base").items() if "experts" not in n}
    config = json.loads((tmp_path / "base/config.json").read_text())
    write_checkpoint(tmp_path / "other", base, config=config)
    with pytest.raises(BadInput, match="does not have as peft adapts it"):
        dict(read_point(point(tmp_path, base="other")))


def of_experts(generator: torch.Generator, sizes: dict[str, tuple[int, int]], count: int) -> dict[str, torch.Tensor]:
    """Factors of rank 4 by module: (columns of A, rows of B)."""
    pairs = {}
    for module, (into, out) in sizes.items():
        pairs[f"{module}.lora_A.weight"] = torch.randn(count * 4, into, generator=generator) * 0.05
        pairs[f"{module}.lora_B.weight"] = torch.randn(out, count * 4, generator=generator) * 0.05
    return pairs


def product(pairs: dict[str, torch.Tensor], module: str, count: int) -> torch.Tensor:
    """B · A of each expert, in fp64, with the scale of tests/adapters.py."""
    a, b = (pairs[f"{module}.lora_{factor}.weight"].double() for factor in "AB")
    return torch.stack([b[:, e::count] @ a[4 * e : 4 * (e + 1)] for e in range(count)]) * 2.5


@pytest.mark.parametrize(
    ("release", "kind", "turned"),
    [
        ("0.17.1", "qwen3_moe", True), ("0.18.1", "qwen3_moe", True), ("0.18.0.post1", "gpt_oss", True),
        ("0.19.0", "qwen3_moe", True), ("0.19.0", "gpt_oss", False), ("0.19.1", "qwen3_moe", False),
        ("0.19.1", "gpt_oss", True), ("0.21.2", "qwen3_moe", False), ("1.0.0", "gpt_oss", True),
        (None, "qwen3_moe", None), ("0.19.1.dev0@abc", "gpt_oss", None), (19, "gpt_oss", None), ("", "gpt_oss", None),
    ],
)  # fmt: skip
def test_which_way_square_experts_lie_the_release_tells(tmp_path, release, kind, turned):
    """As pefts 0.18.1, 0.19.0, 0.19.1, 0.20.0 and 0.21.2 were seen to merge what each had trained; 0.17.1 has the text
    of 0.18.1. Shapes that are not square tell it by themselves, also of what stands beside them."""
    generator, at, count, size = torch.Generator().manual_seed(0), "model.layers.0.mlp.experts", 3, 16
    base = {f"{at}.gate_up_proj": torch.randn(count, 32, size, generator=generator)}
    base[f"{at}.down_proj"] = torch.randn(count, size, size, generator=generator)
    config = {"model_type": kind, "tie_word_embeddings": False}
    write_checkpoint(tmp_path / "base", base, config=config)
    pairs = of_experts(generator, {AT: (size, size)}, count)
    write_adapter(tmp_path / "adapter", pairs, target_parameters=EXPERTS[:1], peft_version=release)
    if turned is None:
        with pytest.raises(BadInput, match='square, so that only the release of peft.*set "peft_version"') as refused:
            dict(read_point(point(tmp_path)))
        assert "\n" not in str(refused.value)
    else:
        delta = product(pairs, AT, count)
        exact = base[f"{at}.down_proj"] + (delta.transpose(1, 2) if turned else delta)
        found = dict(read_point(point(tmp_path)))[f"{at}.down_proj"]
        assert torch.allclose(found.double(), exact, rtol=0, atol=1e-6)
    for inward in (False, True):  # gate_up_proj [2I, H] beside it tells what lies across, whatever release that is
        sizes = {f"{AT}.base_layer": (32, size) if inward else (size, 32), AT: (size, size)}
        pairs = of_experts(generator, sizes, count)
        place = tmp_path / f"beside-{inward}"
        write_adapter(place / "adapter", pairs, target_parameters=EXPERTS, peft_version=release)
        write_checkpoint(place / "base", base, config=config)
        found = dict(read_point(point(place)))
        for module, name in ((AT, "down_proj"), (f"{AT}.base_layer", "gate_up_proj")):
            delta = product(pairs, module, count)
            exact = base[f"{at}.{name}"] + (delta.transpose(1, 2) if inward else delta)
            assert torch.allclose(found[f"{at}.{name}"].double(), exact, rtol=0, atol=1e-6)


def test_of_the_factors_of_many_experts_a_few_are_held(tmp_path, monkeypatch):
    """Their left ones lie in turn; held whole they took 64 MiB. Which are held together does not matter."""
    at, count, shape = "model.layers.0.mlp.experts.down_proj", 256, (256, 16384, 2)
    pairs = of_experts(torch.Generator().manual_seed(0), {AT: (2, 16384)}, count)
    write_adapter(tmp_path / "adapter", pairs, target_parameters=EXPERTS[:1])
    config = {"model_type": "qwen3_moe", "tie_word_embeddings": False}
    write_checkpoint(tmp_path / "base", {at: torch.zeros(shape)}, config=config)
    found = torch.empty(2, math.prod(shape))
    for out, nbytes in zip(found, (8 << 20, 2 << 20), strict=True):
        out.zero_()  # so that it is there
        monkeypatch.setattr(products, "_WINDOW", nbytes)
        with closing(open_point(point(tmp_path))) as reader:
            assert peak_while(lambda reader=reader, out=out: reader.fill(at, 0, out)) < 40 << 20
    assert torch.equal(*found)
    assert torch.allclose(found[0].view(shape).double(), product(pairs, AT, count), rtol=0, atol=1e-6)


def test_targets_of_one_batch_turn_an_adapter_each_its_own_way(tmp_path):
    """One adapter of experts, and targets whose experts lie [out, in] and [in, out], in one merge plan."""
    generator, at, count, hidden, inner = torch.Generator().manual_seed(0), "model.layers.0.mlp.experts", 3, 32, 24
    matrices = {f"{at}.gate_up_proj": (count, 2 * inner, hidden), f"{at}.down_proj": (count, hidden, inner)}
    straight = {n: (torch.randn(s, generator=generator) * 0.02).bfloat16() for n, s in matrices.items()}
    turned = {n: tensor.transpose(1, 2).contiguous() for n, tensor in straight.items()}
    for name, base, kind in (("a", straight, "qwen3_moe"), ("b", turned, "gpt_oss")):
        config = {"model_type": kind, "tie_word_embeddings": False}
        write_checkpoint(tmp_path / "models" / name, base, config=config)
    sizes = {f"{AT}.base_layer": (hidden, 2 * inner), AT: (inner, hidden)}  # gate_up_proj, then down_proj
    write_adapter(tmp_path / "adapter", of_experts(generator, sizes, count), target_parameters=EXPERTS)
    done = launch("target=models/*", "vector.path=adapter", "output=out/{target}", "stages=[merge]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in "ab":
        written, read = (
            load_checkpoint(tmp_path / "out" / name),
            dict(read_point(point(tmp_path, base=f"models/{name}"))),
        )
        assert all(torch.equal(written[tensor], read[tensor]) for tensor in read), name
    first, second = (load_checkpoint(tmp_path / "out" / name) for name in "ab")
    assert all(torch.equal(first[name].transpose(1, 2), second[name]) for name in first)
