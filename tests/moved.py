"""A checkpoint whose tokens have other ids, and one token of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_BY_TOKEN = ("model.embed_tokens.weight", "lm_head.weight")


def move(source: Path, out: Path, own: str) -> Path:
    """`source` with its tokens in the opposite order, and `own` as the last, whose row is the mean of all."""
    shutil.copytree(source, out)
    tokenizer, config = (json.loads((out / name).read_text()) for name in ("tokenizer.json", "config.json"))
    last = config["vocab_size"] - 1
    vocab = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: last - number for token, number in vocab.items()}
    for one in tokenizer["added_tokens"]:
        one["id"] = last - one["id"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append({"id": last + 1, "content": own, "special": True} | flags)
    said = {key: last - number for key, number in config.items() if key.endswith("_token_id") and number is not None}
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    (out / "config.json").write_text(json.dumps(config | said | {"vocab_size": last + 2}))
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors.keys() & set(_BY_TOKEN):
            rows = tensors[name]
            tensors[name] = torch.cat([rows.flip(0), rows.mean(0, keepdim=True)])
        save_file(tensors, file, metadata={"format": "pt"})
    return out
