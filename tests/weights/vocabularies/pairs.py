"""Models with different tokenizers, and what mergekit is asked to make of them: written by the `tokenizers` library,
the same at every call. Needs nothing of rvdist.

A row of a model's embedding says whose it is: [100 · model + 1, id, id mod 7, −id], so that sums of few are exact.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4, "intermediate_size": 6,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "torch_dtype": "float32",
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LETTERS = "abcdefghij"


@dataclass(frozen=True)
class Model:
    """`kind` of tokenizer with these tokens (of BPE its merges make them), and `added` ones; `rows` of the embedding
    where they are not as many; `said` is what its config says they are."""

    kind: str
    tokens: Sequence[str]
    added: Sequence[str | AddedToken] = ()
    rows: int | None = None
    said: int | None = None
    tied: bool = True
    config: dict[str, Any] = field(default_factory=dict)

    def tokenizer(self) -> Tokenizer:
        ids = {token: k for k, token in enumerate(dict.fromkeys(self.tokens))}
        if self.kind in ("bpe", "bytes"):
            merges = [
                (token[:-1], token[-1]) for token in ids if len(token) > 1 and {token[:-1], token[-1]} <= ids.keys()
            ]
            made = Tokenizer(models.BPE(vocab=ids, merges=merges))
            if self.kind == "bytes":
                made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        elif self.kind == "unigram":
            made = Tokenizer(models.Unigram([(token, -float(k)) for token, k in ids.items()], unk_id=0))
        else:
            made = Tokenizer(models.WordPiece(vocab=ids, unk_token=next(iter(ids))))
            made.pre_tokenizer = pre_tokenizers.Whitespace()
        made.add_tokens(list(self.added))
        return made

    def write(self, where: Path, number: int) -> None:
        """A checkpoint of model `number`."""
        where.mkdir()
        tokenizer = self.tokenizer()
        tokenizer.save(str(where / "tokenizer.json"))
        (where / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        rows = self.rows or tokenizer.get_vocab_size()
        config = CONFIG | {"vocab_size": self.said or rows, "tie_word_embeddings": self.tied} | self.config
        (where / "config.json").write_text(json.dumps(config))
        at, ids = "model.layers.0", torch.arange(rows, dtype=torch.float32)
        embedding = torch.stack([torch.full_like(ids, 100 * number + 1), ids, ids % 7, -ids], 1)
        tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(4)}
        tensors |= {f"{at}.self_attn.{part}_proj.weight": torch.full((4, 4), 2.0 + number) for part in "qkvo"}
        tensors |= {f"{at}.mlp.{part}_proj.weight": torch.full((6, 4), 4.0 + number) for part in ("gate", "up")}
        tensors |= {f"{at}.mlp.down_proj.weight": torch.full((4, 6), 8.0 + number)}
        tensors |= {f"{at}.{part}_layernorm.weight": torch.ones(4) for part in ("input", "post_attention")}
        if not self.tied:
            tensors["lm_head.weight"] = embedding.flip(1) + 1000
        save_file(tensors, where / "model.safetensors", metadata={"format": "pt"})


def special(content: str) -> AddedToken:
    return AddedToken(content, special=True, normalized=False)


def words(*more: str) -> list[str]:
    return [*LETTERS, *more]


BYTES = [*"abcdefghij", "Ġ", "Ċ", "Ġa", "ab", "Ġab"]

# name → the models (the first is the base), and the tokenizer that is asked for
PAIRS: dict[str, tuple[dict[str, Model], Any]] = {
    "bpe": (
        {
            "base": Model("bpe", words("ab", "abc"), [special("<s>")], tied=False),
            "other": Model("bpe", ["<x>", *reversed(words("ab", "cd")), "bc"], [special("<s>"), "<tool>"], tied=False),
        },
        "union",
    ),
    "bytes": (
        {
            "base": Model("bytes", BYTES, [special("<|endoftext|>")], rows=32),
            "other": Model(
                "bytes", BYTES, [special(f"<|{name}|>") for name in ("endoftext", "im_start", "im_end")], 48
            ),
        },
        "union",
    ),
    "unigram": (
        {
            "base": Model("unigram", ["<unk>", "<s>", "▁a", "b", "▁ab", "c"], ["<extra_0>"]),
            "other": Model("unigram", ["<unk>", "▁ab", "▁a", "d", "b", "▁", "<s>", "e"], [special("<extra_1>")]),
        },
        "union",
    ),
    "wordpiece": (
        {
            "base": Model("wordpiece", ["[UNK]", "[CLS]", "[SEP]", "play", "##ing", "##ed"], [special("[CLS]")]),
            "other": Model(
                "wordpiece", ["[UNK]", "run", "##ing", "[CLS]", "##s", "play"], ["[MASK]", special("[CLS]")]
            ),
        },
        "union",
    ),
    "across_kinds": (
        {
            "base": Model("unigram", ["<unk>", "a", "b", "▁a", "cd"], [special("<end>")], tied=False),
            "other": Model("bpe", words("ab", "cd"), [special("<start>"), "<end>"], tied=False),
        },
        "union",
    ),
    "means": (
        {
            "base": Model("bpe", words("ab")),
            "one": Model("bpe", words("cd", "ef"), ["<both>", "<one>"]),
            "two": Model("bpe", ["ef", *words("gh")], ["<two>", "<both>"]),
            "three": Model("bpe", words("cd", "gh", "ef"), [special("<both>")]),
            "four": Model("bpe", words()),
        },
        "union",
    ),
    "rules": (
        {
            "base": Model("bpe", words("ab"), [special("<s>"), special("</s>")]),
            "other": Model("bpe", ["cd", *words("ab")], [special("</s>"), special("<|im_end|>"), "<pad>"]),
            "third": Model("bpe", words("ef", "ab"), [special("<s>"), "<pad>"]),
        },
        {
            "source": "union",
            "tokens": {
                "<s>": {"source": "base"},
                "</s>": {"source": "other", "force": True},
                "<|im_end|>": {"source": {"kind": "model_token", "model": "base", "token": "</s>"}},
                "<pad>": {"source": {"kind": "zero"}, "force": True},
                "<new>": {"source": {"kind": "model_token", "model": "third", "token_id": 3}},
                "<zero>": {"source": {"kind": "zero"}},
                "ef": {"source": {"kind": "model_token", "model": "other", "token": "cd"}, "force": True},
            },
        },
    ),
    "padded": (
        {
            "base": Model("bpe", words("ab"), [special("<s>")], tied=False),
            "other": Model("bpe", words("cd", "ef"), [special("<s>")], rows=24, tied=False),
        },
        {"source": "union", "pad_to_multiple_of": 16},
    ),
    "base_s": (
        {
            "base": Model("bytes", BYTES, [special("<|endoftext|>")], rows=40),
            "other": Model("bytes", ["Ċ", *BYTES], [special("<|im_end|>"), special("<|endoftext|>")], rows=32),
        },
        "base",
    ),
    "of_a_model": (
        {
            "base": Model("bpe", words("ab", "cd"), [special("<s>"), special("</s>")], config={"eos_token_id": 13}),
            "other": Model("bpe", ["</s>", "<s>", *words("ef")], [special("</s>"), special("<s>")], rows=24),
        },
        {"source": "other", "pad_to_multiple_of": 8},
    ),
    "too_few_rows": (
        {
            "base": Model("bpe", words("ab", "zz", "yx"), [special("<s>")], rows=12),
            "other": Model("bpe", ["<s>", *words("cd")], ["<tool>"], rows=16, said=13),
        },
        "union",
    ),
}


def recipe(name: str) -> dict[str, Any]:
    """mergekit's of a pair: the base, and of every other model 0.5 · its difference."""
    listed, asked = PAIRS[name]
    others = [model for model in listed if model != "base"]
    return {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": model, "parameters": {"weight": 0.5}} for model in others],
        "dtype": "float32",
        **({"tokenizer_source": asked} if isinstance(asked, str) else {"tokenizer": asked}),
    }


def write(name: str, where: Path) -> None:
    """The models of a pair, each in a directory of its name."""
    for number, (model, one) in enumerate(PAIRS[name][0].items()):
        one.write(where / model, number)
