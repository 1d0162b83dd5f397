"""What a situation of the graveyard is, the list of all of them, and the tiny models they are made of.

A situation writes checkpoints into a directory and says what is asked of them and what is right. What is right is
computed here from whole tensors in fp64 and rounded once, never by rvdist. Knows nothing of how a situation is run.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from checkpoints import near, write_checkpoint

from rvdist.core.config import Config, VectorConfig
from rvdist.core.point import WeightPoint
from rvdist.core.record import Record

Weights = dict[str, torch.Tensor]
ALPHA = 0.7
HIDDEN, HEADS, KV_HEADS, MLP, ROWS, LAYERS = 16, 2, 1, 24, 40, 2
INDEX = "model.safetensors.index.json"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": MLP,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": ROWS,
    "head_dim": HIDDEN // HEADS, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
}  # fmt: skip


@dataclass(frozen=True)
class Right:
    """The output's tensors, all of them but for those it `may` also hold, which then are these; patterns of the notes,
    each of which is to be said, and nothing else; keys of its config that differ from the target's; files beside the
    target's weights that are `left` there."""

    weights: Mapping[str, torch.Tensor]
    notes: Sequence[str] = ()
    may: Mapping[str, torch.Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    left: Sequence[str] = ()


@dataclass(frozen=True)
class Refused:
    """Patterns of what the sentence must say. `underway`: it is found while results are computed, so that there is a
    run directory by then. `possible`: another tool may know how, or may be right to look away."""

    words: Sequence[str]
    underway: bool = False
    possible: bool = False


@dataclass(frozen=True)
class Said:
    """The command ends well, run in this directory below the situation's, and prints what has these patterns."""

    words: Sequence[str]
    where: str = "."


@dataclass(frozen=True)
class Scored:
    """A run that asks of checkpoints without what is the matter, and what is wrong with the records of both: sentences.
    With `failed`, patterns, the run itself fails in a sentence that has them; what it did score counts all the same."""

    control: Config
    wrong: Callable[[Sequence[Record], Sequence[Record]], list[str]]
    failed: Sequence[str] = ()


@dataclass(frozen=True)
class Asked:
    """A run, and what is right. `typed`: the arguments of the command, where it is about these, and what is set in its
    `environment`; `point`: what is written, where it is asked for from Python. `made_up`: no architecture has these
    tensors, so that tools which go by architectures cannot be asked."""

    settings: Config
    verdict: Right | Refused | Said | Scored
    typed: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    point: WeightPoint | None = None
    made_up: bool = False


@dataclass(frozen=True)
class Situation:
    """`what` it is; the public `report` it is taken from, as OWNER/REPO#NUMBER or an address; what we do: `right` or
    `refused` say how. `todo`: why it does not come out so yet; `slow`: it needs an engine; `heavy`: Ray."""

    name: str
    group: str
    what: str
    report: str
    right: str
    refused: str
    build: Callable[[Path], Asked]
    todo: str = ""
    slow: bool = False
    heavy: bool = False


SITUATIONS: list[Situation] = []


def situation(
    group: str, what: str, report: str, *, right: str = "", refused: str = "", **more: Any
) -> Callable[[Callable[[Path], Asked]], Callable[[Path], Asked]]:
    """Enters a builder, whose name is the situation's."""
    assert bool(right) != bool(refused), "either right or refused"

    def enter(build: Callable[[Path], Asked]) -> Callable[[Path], Asked]:
        SITUATIONS.append(Situation(build.__name__, group, what, report, right, refused, build, **more))
        return build

    return enter


def llama(seed: int = 0, dtype: torch.dtype = torch.bfloat16, tied: bool = True, rows: int = ROWS) -> Weights:
    """The weights of a Llama of a few kB, as transformers names and shapes them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.05).to(dtype)

    weights = {"model.embed_tokens.weight": normal(rows, HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name, (out, into) in MATRICES.items():
            weights[f"{at}.{name}.weight"] = normal(out, into)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{at}.{norm}.weight"] = (1 + normal(HIDDEN).double()).to(dtype)
    weights["model.norm.weight"] = (1 + normal(HIDDEN).double()).to(dtype)
    if not tied:
        weights["lm_head.weight"] = normal(rows, HIDDEN)
    return weights


_KV = KV_HEADS * HIDDEN // HEADS
MATRICES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (_KV, HIDDEN), "self_attn.v_proj": (_KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}  # fmt: skip
ROLES = ("target", "plus", "minus")


def siblings(base: Weights) -> dict[str, Weights]:
    """Target and donors of one initialisation."""
    return dict(zip(ROLES, (base, near(base, 1), near(base, 2)), strict=True))


def tokenizer(tokens: int = ROWS, **changes: Any) -> dict[str, Any]:
    """tokenizer.json of a vocabulary of words, three of them special."""
    special = ["<unk>", "<s>", "</s>"]
    vocabulary = {token: k for k, token in enumerate([*special, *(f"w{k}" for k in range(3, tokens))])}
    added = [
        {
            "id": k, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": True,
        }
        for k, token in enumerate(special)
    ]  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    } | changes  # fmt: skip


def write(
    path: Path, weights: Weights, shards: int = 1, config: Mapping[str, Any] | None = None, tokens: int | None = None
) -> Path:
    """A checkpoint with a config, a tokenizer of as many tokens as the embedding has rows, and a chat template.
    `config` is what differs from CONFIG; a value of ... leaves its key out."""
    rows = weights["model.embed_tokens.weight"].shape[0] if "model.embed_tokens.weight" in weights else ROWS
    merged = CONFIG | {"vocab_size": rows, "tie_word_embeddings": "lm_head.weight" not in weights} | (config or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(
        path,
        {name: tensor.contiguous() for name, tensor in weights.items()},
        shards,
        {k: v for k, v in merged.items() if v is not ...},
    )
    put(path / "tokenizer.json", tokenizer(tokens or rows))
    put(path / "tokenizer_config.json", TOKENIZER_CONFIG)
    put(path / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    return path


TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"
}  # fmt: skip


def put(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def edit(path: Path, **changes: Any) -> None:
    """Keys of a JSON file; a value of ... takes its key away."""
    merged = json.loads(path.read_text(encoding="utf-8")) | changes
    put(path, {key: value for key, value in merged.items() if value is not ...})


def reheader(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the JSON header of a weight file, and nothing else."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def write_all(place: Path, weights: Mapping[str, Weights], shards: int = 1, **config: Any) -> None:
    for role in ROLES:
        write(place / role, weights[role], shards, config)


def ask(place: Path, verdict: Right | Refused, made_up: bool = False, **settings: Any) -> Asked:
    """target + ALPHA · (plus − minus), written to out; `settings` are other keys."""
    asked = Config(
        target=str(place / "target"),
        vector=VectorConfig(str(place / "plus"), str(place / "minus")),
        alpha=ALPHA,
        output=str(place / "out"),
    )
    return Asked(replace(asked, **settings), verdict, made_up=made_up)


def vector(place: Path, **keys: Any) -> VectorConfig:
    """plus − minus, with other keys of `vector`."""
    return replace(VectorConfig(str(place / "plus"), str(place / "minus")), **keys)


def merged(weights: Mapping[str, Weights], alpha: float = ALPHA) -> Weights:
    """target + α · (plus − minus) in fp64, rounded once to the target's dtype: in the rows that all have, and of the
    tensors that all have; everything else is the target's."""
    target, plus, minus = (weights[role] for role in ROLES)
    out = {}
    for name, tensor in target.items():
        out[name] = tensor.clone()
        if tensor.is_floating_point() and name in plus and name in minus:
            out[name] = moved(tensor, plus[name], minus[name], alpha)
    return out


def moved(target: torch.Tensor, plus: torch.Tensor, minus: torch.Tensor, alpha: float = ALPHA) -> torch.Tensor:
    if not target.shape:
        return (target.double() + alpha * (plus.double() - minus.double())).to(target.dtype)
    rows = min(len(target), len(plus), len(minus))
    out = target.double()
    out[:rows] += alpha * (plus[:rows].double() - minus[:rows].double())
    return out.to(target.dtype)
