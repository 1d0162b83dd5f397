"""Tiny random families for vLLM: a target and two donors far enough apart that α shows in every token."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rvdist.core.point import Term, Vector, WeightPoint
from rvdist.evaluate.fleet.arguments import EngineSettings
from rvdist.evaluate.fleet.engine import Engine
from rvdist.evaluate.request import Choice, Completion, Generate, Loglikelihood

SETTINGS = EngineSettings(max_model_len=256, kv_cache_gib=0.0625, max_num_seqs=16)
# vLLM's process-wide state goes with the first engine that is collected, so none ever is
_ALIVE: list[Engine] = []
CHARACTERS = "\n 0123456789+=.,;:?#abcdefghijklmnopqrstuvwxyzADQUR"


@dataclass(frozen=True)
class Family:
    """Three checkpoints of one shape, named as a point names them."""

    target: Path
    plus: Path
    minus: Path

    def point(self, alpha: float) -> WeightPoint:
        return WeightPoint(str(self.target), (Term(alpha, Vector(str(self.plus), str(self.minus))),))

    def write(self, alpha: float, out: Path) -> WeightPoint:
        """The point written as a checkpoint, by other code than the reader's; returned as a point of its own."""
        target, plus, minus = (_tensors(path) for path in (self.target, self.plus, self.minus))
        merged = {
            name: (t.float() + alpha * (plus[name].float() - minus[name].float())).to(t.dtype)
            for name, t in target.items()
        }
        out.mkdir()
        for file in self.target.iterdir():
            if ".safetensors" not in file.name:
                (out / file.name).write_bytes(file.read_bytes())
        save_file(merged, out / "model.safetensors", metadata={"format": "pt"})
        return WeightPoint(str(out))


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}


def shard(family: Family, out: Path, shards: int = 3) -> Family:
    """The same family, every checkpoint cut into several files with an index."""
    parts = []
    for path in (family.target, family.plus, family.minus):
        (out / path.name).mkdir(parents=True)
        for file in path.iterdir():
            if ".safetensors" not in file.name:
                (out / path.name / file.name).write_bytes(file.read_bytes())
        tensors = _tensors(path)
        weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
        for file_name in set(weight_map.values()):
            part = {name: t for name, t in tensors.items() if weight_map[name] == file_name}
            save_file(part, out / path.name / file_name, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": weight_map}
        (out / path.name / "model.safetensors.index.json").write_text(json.dumps(index))
        parts.append(out / path.name)
    return Family(*parts)


def fused(path: Path, out: Path) -> Path:
    """A checkpoint whose experts are one by one, with each layer's fused, as transformers has them in memory."""
    found, together = {}, {}
    for name, tensor in _tensors(path).items():
        prefix, _, rest = name.partition(".experts.")
        if not rest:
            found[name] = tensor
            continue
        number, projection, _ = rest.split(".")
        together.setdefault(f"{prefix}.experts", {})[projection, int(number)] = tensor
    for prefix, own in together.items():
        gate, up, down = (
            torch.stack([own[f"{part}_proj", k] for k in range(len(own) // 3)]) for part in ("gate", "up", "down")
        )
        found |= {f"{prefix}.gate_up_proj": torch.cat([gate, up], 1), f"{prefix}.down_proj": down}
    assert together
    out.mkdir()
    for file in path.iterdir():
        if ".safetensors" not in file.name:
            (out / file.name).write_bytes(file.read_bytes())
    save_file(found, out / "model.safetensors", metadata={"format": "pt"})
    return out


def make_family(kind: str, out: Path) -> Family:
    """`kind`: "tied" or "untied" (Qwen2), "llama", "moe" (Qwen3-MoE), "mla" (DeepSeek-V2)."""
    from transformers import DeepseekV2Config, LlamaConfig, Qwen2Config, Qwen3MoeConfig
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    shape = {
        "vocab_size": 70,  # no multiple of vLLM's padding
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": kind == "tied",
    }
    config = {
        "tied": lambda: Qwen2Config(**shape),
        "untied": lambda: Qwen2Config(**shape),
        "llama": lambda: LlamaConfig(**shape),
        "moe": lambda: Qwen3MoeConfig(**shape, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
        "mla": lambda: DeepseekV2Config(
            **(shape | {"num_key_value_heads": 4, "head_dim": 64}),
            q_lora_rank=48,
            kv_lora_rank=512,
            qk_nope_head_dim=32,
            qk_rope_head_dim=64,
            v_head_dim=32,
            first_k_dense_replace=1,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
        ),
    }[kind]()
    paths = []
    for seed, name in enumerate(["target", "plus", "minus"]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms start as constants, which would hide α
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(out / name)
        _tokenizer().save_pretrained(out / name)
        paths.append(out / name)
    return Family(*paths)


SMOL = {  # SmolLM2-135M, with 30 layers
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}


def make_deep(out: Path, layers: int, **shape: int) -> Family:
    """A Llama whose bytes are nearly all in its many layers, of 3 M parameters each; or of another shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    known = {
        "vocab_size": 70,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    config = LlamaConfig(
        **(known | shape),
        num_hidden_layers=layers,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    for name, factor in (("target", 1.0), ("minus", 0.5), ("plus", 1.5)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor)
        model.save_pretrained(out / name)
        _tokenizer().save_pretrained(out / name)
    return Family(out / "target", out / "plus", out / "minus")


def _tokenizer():
    """Byte-level without merges, plus one that crosses a blank, so that a pair's border can move."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    names = special + [{" ": "Ġ", "\n": "Ċ"}.get(c, c) for c in CHARACTERS] + ["Ġa", "=Ġ", "ab"]
    merges = [("Ġ", "a"), ("=", "Ġ"), ("a", "b")]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[1], clean_up_tokenization_spaces=False
    )


@dataclass(frozen=True)
class Answers:
    """What an engine says to one fixed batch of each kind."""

    texts: tuple[Completion, ...]
    scores: tuple[Loglikelihood, ...]


_PROMPTS = ("ab=12+34", "qu a a", "what is", "9", "Q: 472+314=?\nA: ", "what is 3+4? say: ")
_CHOICES = (("12+34", "=46 ab"), ("q a ", "a b"), ("", "7"), ("aaaa", ".,;"), ("what is 3+4? ", "7"))


def start(point: WeightPoint, settings: EngineSettings = SETTINGS) -> Engine:
    engine = Engine.__new__(Engine)
    _ALIVE.append(engine)  # also where its start fails
    engine.__init__(point.base, settings)
    return engine


def answers(engine: Engine) -> Answers:
    texts = engine.answer([Generate(prompt, 24) for prompt in _PROMPTS])
    return Answers(tuple(texts), tuple(engine.answer([Choice(*pair) for pair in _CHOICES])))
