"""A vector stored as a LoRA adapter is what the low-rank vector is, and says what it does not hold."""

import json
import math
import shlex
import subprocess
import sys

import pytest
import torch
from checkpoints import launch, load_checkpoint, near, tensors, write_checkpoint
from safetensors.torch import load_file
from test_store import load, relative_error, store, wide

from rvdist.core import config
from rvdist.core.config import Config, VectorConfig
from rvdist.core.errors import BadInput
from rvdist.verify import verify
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.store import Storage

HELD = {f"model.layers.{layer}.{part}.weight" for layer in range(3) for part in ("self_attn.q_proj", "mlp.up_proj")}


def delta(path):
    """W's change by peft's formula, from the files alone: scale · B · A, the scale of the pattern or of the whole."""
    said, found = json.loads((path / "adapter_config.json").read_text()), load_file(path / "adapter_model.safetensors")
    assert said["peft_type"] == "LORA" and said["bias"] == "none" and not said["use_rslora"]
    changes = {}
    for module in said["target_modules"]:
        a, b = (found.pop(f"base_model.model.{module}.lora_{factor}.weight") for factor in "AB")
        rank = said["rank_pattern"].get(module, said["r"])
        assert a.shape[0] == b.shape[1] == rank
        changes[f"{module}.weight"] = said["alpha_pattern"].get(module, said["lora_alpha"]) / rank * (b @ a)
    assert not found
    return changes


@pytest.mark.parametrize("dtype", [None, "BF16"])
def test_it_is_the_low_rank_vector_of_what_lora_holds(family, tmp_path, dtype):
    paths = family()
    store(paths, tmp_path / "v", Storage(dtype, rank=5))
    said = store(paths, tmp_path / "a", Storage(dtype, rank=5, format="peft"))
    adapter, vector, exact = load(tmp_path / "a"), load(tmp_path / "v"), wide(paths)
    assert adapter.keys() == HELD and all(torch.equal(adapter[name], vector[name]) for name in HELD)
    for name, change in delta(tmp_path / "a").items():
        assert torch.allclose(change.float(), adapter[name], atol=1e-8 if dtype is None else 1e-4), name
        error = relative_error({0: adapter[name]}, {0: exact[name]})
        assert said["tensors"][name]["relative_error"] == pytest.approx(error, rel=1e-9)
    norm = {name: float(v.norm()) for name, v in exact.items()}
    whole, left = math.hypot(*norm.values()), {n: norm[n] for n in exact.keys() - HELD}
    everything = {name: adapter.get(name, torch.zeros_like(v)) for name, v in exact.items()}
    assert said["relative_error"] == pytest.approx(relative_error(everything, exact), rel=1e-9)
    assert said["held_relative_error"] == pytest.approx(
        relative_error(adapter, {name: exact[name] for name in HELD}), rel=1e-9
    )
    assert said["left_out_share"] == pytest.approx(math.hypot(*left.values()) / whole)
    assert {kind: one["tensors"] for kind, one in said["left_out"].items()} == {"embedding": 1, "norm": 1, "scalar": 1}
    assert said["left_out"]["embedding"]["share"] == pytest.approx(left["model.embed_tokens.weight"] / whole)
    assert said["kind"] == "adapter" and not (tmp_path / "a" / "config.json").exists()
    assert open_source(str(tmp_path / "a")).trained_on == "minus"
    assert verify(tmp_path / "a").problems == []


def test_ranks_are_the_least_within_the_error(tmp_path):
    base = tensors(0, torch.float32)
    plus = near(base, 1)
    zero, small = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    generator = torch.Generator().manual_seed(3)
    plus[zero] = base[zero]
    plus[small] = base[small] + torch.randn(131, 2, generator=generator) @ torch.randn(2, 48, generator=generator)
    paths = {"plus": write_checkpoint(tmp_path / "p", plus), "minus": write_checkpoint(tmp_path / "m", base)}
    said = store(paths, tmp_path / "a", Storage(error=0.3, format="peft"))
    assert load(tmp_path / "a").keys() == HELD - {zero} and said["tensors"][zero]["norm"] == 0
    assert said["held_relative_error"] <= 0.3
    changes = delta(tmp_path / "a")
    for name, v in wide(paths).items():
        if name in changes:
            values = torch.linalg.svdvals(v)
            rank = int(torch.linalg.matrix_rank(changes[name].double(), rtol=1e-5))
            assert float(values[rank:].norm()) <= 0.3 * float(values.norm()) < float(values[rank - 1 :].norm()), name
            assert said["tensors"][name]["relative_error"] <= 0.3 * (1 + 1e-5)
    assert int(torch.linalg.matrix_rank(changes[small].double(), rtol=1e-5)) <= 2
    own = store(paths, tmp_path / "v", Storage(error=0.3))["tensors"]
    assert all(own[name]["relative_error"] <= 0.3 * (1 + 1e-5) for name in own if own[name]["form"] == "low_rank")


def test_it_is_said(family, tmp_path, capsys):
    from rvdist.stages.jobs import run_stages

    paths, run = family(), tmp_path / "run"
    run.mkdir()
    vector = VectorConfig(str(paths["plus"]), str(paths["minus"]), save=str(tmp_path / "a"), rank=4, format="peft")
    run_stages(Config(vector=vector, cache=config.CacheConfig(str(tmp_path / "cache"))), run, [])
    said = " ".join(capsys.readouterr().out.split())
    assert "a LoRA adapter of rank 4, relative error 0." in said
    assert "of the vector's norm is in what LoRA does not hold and is left out: embedding " in said


def test_what_cannot_be_an_adapter(family, tmp_path):
    paths = family()
    same = {"plus": paths["plus"], "minus": write_checkpoint(tmp_path / "same", load_checkpoint(paths["plus"]))}
    with pytest.raises(BadInput, match="the vector is 0 in every matrix that LoRA holds"):
        store(same, tmp_path / "a", Storage(rank=4, format="peft"))
    gpt2 = {"plus": write_checkpoint(tmp_path / "gpt2", tensors(0), config={"model_type": "gpt2"})}
    gpt2["minus"] = write_checkpoint(tmp_path / "gpt2-base", tensors(1), config={"model_type": "gpt2"})
    with pytest.raises(BadInput, match="is a gpt2, which stores its matrices transposed"):
        store(gpt2, tmp_path / "a", Storage(rank=4, format="peft"))
    assert not list(tmp_path.glob("a*"))
    for changes, reason in (
        ({"format": "peft"}, "writes factors; set vector.rank, or vector.error"),
        ({"format": "peft", "density": 0.5}, "writes factors; set vector.rank, or vector.error"),
        ({"rank": 2, "error": 0.1}, "vector.rank and vector.error are two ways"),
        ({"error": 1.5}, "vector.error: 1.5 is not a relative error"),
        ({"format": "gguf"}, "vector.format: 'gguf' is not one of peft"),
    ):
        with pytest.raises(BadInput, match=reason):
            config.vector_to_save(Config(target="t", vector=VectorConfig("p", "m", save="v", **changes)))


@pytest.mark.parametrize("kind", ["Qwen2_5_VL", "Gemma3", "Mistral3", "GraniteMoe"])
def test_modules_are_called_as_transformers_has_them_in_memory(tmp_path, kind):
    """Files of models with a tower call them otherwise, and routers of Granite's mixtures are none."""
    import transformers

    vision = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    patches = vision | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    towers = {
        "Qwen2_5_VL": vision | {"depth": 1, "num_heads": 2, "out_hidden_size": 64, "fullatt_block_indexes": [0]},
        "Gemma3": patches,
        "Mistral3": patches | {"head_dim": 16},
    }
    text = LAYERS | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}}
    parts = {"text_config": text if kind == "Qwen2_5_VL" else LAYERS, "vision_config": towers.get(kind)}
    settings = getattr(transformers, f"{kind}Config")(**parts if kind in towers else LAYERS | {"num_local_experts": 2})
    model = getattr(transformers, f"{kind}For{'ConditionalGeneration' if kind in towers else 'CausalLM'}")(settings)
    model.save_pretrained(tmp_path / "minus")
    for parameter in model.parameters():
        parameter.data += 0.02
    model.save_pretrained(tmp_path / "plus")
    told = ["vector.plus=plus", "vector.minus=minus", "vector.save=a", "vector.format=peft", "vector.rank=2"]
    done = launch(*told, cwd=tmp_path)
    if kind in towers:
        assert done.returncode == 2 and "called otherwise than" in done.stderr
        done = launch(*told, shlex.split(done.stderr.partition("set ")[2])[0], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = set(json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"])
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert said - {"lm_head"} == linear - {"lm_head"}  # which some tie


LAYERS = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "tie_word_embeddings": False,
}  # fmt: skip


def donors(place):
    """Two Llamas that differ in their linear layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    for name in ("minus", "plus"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**LAYERS)).eval()
        if name == "plus":
            for module in model.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.data += 0.02 * torch.randn_like(module.weight)
        model.save_pretrained(place / name)
    return {name: place / name for name in ("plus", "minus")}


def test_peft_loads_it(tmp_path):
    """With full ranks minus and the adapter are plus."""
    peft = pytest.importorskip("peft", reason="peft cannot be imported")
    from transformers import AutoModelForCausalLM

    paths = donors(tmp_path)
    store(paths, tmp_path / "a", Storage(rank=64, format="peft"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "minus")
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "a").merge_and_unload().state_dict()
    plus = AutoModelForCausalLM.from_pretrained(tmp_path / "plus").state_dict()
    assert all(torch.allclose(merged[name], plus[name], atol=1e-6) for name in plus)


@pytest.mark.slow
def test_vllm_loads_it(tmp_path):
    """With full ranks vLLM's log-probabilities of minus with the adapter are those of plus."""
    paths = donors(tmp_path)
    store(paths, tmp_path / "a", Storage(rank=64, format="peft"))
    found = {}
    for name, adapter in (("plus", None), ("minus", None), ("minus", tmp_path / "a")):
        asked = [sys.executable, "-c", ASK, str(paths[name]), str(adapter or "")]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=500, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found[name, adapter is not None] = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    adapted, plus, minus = found["minus", True], found["plus", False], found["minus", False]
    assert float((adapted - plus).abs().max()) < 0.1 * float((minus - plus).abs().max())


ASK = """
import json, os, sys
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

model, adapter = sys.argv[1:]
lora = {"enable_lora": True, "max_lora_rank": 64} if adapter else {}
llm = LLM(model, skip_tokenizer_init=True, enforce_eager=True, max_model_len=64, dtype="float32", **lora)
params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
request = LoRARequest("a", 1, adapter) if adapter else None
(answer,) = llm.generate([{"prompt_token_ids": list(range(3, 40))}], params, lora_request=request, use_tqdm=False)
print(json.dumps([next(iter(one.values())).logprob for one in answer.prompt_logprobs[1:]]))
"""
