"""Adapters that were trained on a base with two new tokens, by real peft (0.21.0), and what its merge_and_unload makes
of each: all numbers are sums of few bits, so that they are exact. Run as a program it records trained_rows.json anew,
with peft and accelerate. Needs nothing of rvdist.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pairs
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

RECORDED = Path(__file__).with_suffix(".json")
NEW = ("<new>", "<more>")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BOTH = ["embed_tokens", "lm_head"]


@dataclass(frozen=True)
class Kind:
    """An adapter of a base whose head is its embedding where `tied`, with so many `rows` (None: a row for each of its
    13 tokens), which are made a `multiple` of with the new tokens (0: they are enough)."""

    tied: bool
    settings: dict[str, Any] = field(default_factory=dict)  # of LoraConfig
    multiple: int | None = None
    rows: int | None = None
    saved: dict[str, Any] = field(default_factory=dict)  # of save_pretrained


ROWS: dict[str, Any] = {"trainable_token_indices": [13, 14]}
ROWS_OF_BOTH = {"trainable_token_indices": {"embed_tokens": [13, 14], "lm_head": [14, 13]}}
ROWS_ALONE = {"save_embedding_layers": False}
KINDS = {
    "whole, untied": Kind(False, {"modules_to_save": BOTH}),
    "the embedding whole, untied": Kind(False, {"modules_to_save": BOTH[:1]}),
    "resized, untied": Kind(False),
    "resized, tied": Kind(True),
    "padded, untied": Kind(False, {"modules_to_save": BOTH}, 8),
    "padded, tied": Kind(True, multiple=24),
    "whole, tied as one": Kind(True, {"modules_to_save": BOTH[:1], "ensure_weight_tying": True}),
    "whole, a copy of what is tied": Kind(True, {"modules_to_save": BOTH[:1]}),
    "rows, untied": Kind(False, ROWS),
    "rows, tied": Kind(True, ROWS),
    "rows, tied as one": Kind(True, ROWS | {"ensure_weight_tying": True}),
    "rows of both": Kind(False, ROWS_OF_BOTH),
    "rows of both, tied": Kind(True, {"trainable_token_indices": {name: [13, 14] for name in BOTH}}),
    "other rows of both, tied": Kind(True, {"trainable_token_indices": {"embed_tokens": [13, 14], "lm_head": [3]}}),
    "a new row and an old one": Kind(False, {"trainable_token_indices": [14, 3]}),
    "rows, and the head whole": Kind(False, ROWS | {"modules_to_save": BOTH[1:]}),
    "rows, padded": Kind(False, ROWS, 8),
    "rows alone, untied": Kind(False, ROWS, saved=ROWS_ALONE),
    "rows alone, tied": Kind(True, ROWS, saved=ROWS_ALONE),
    "rows alone of both": Kind(False, ROWS_OF_BOTH, saved=ROWS_ALONE),
    "the last new row alone": Kind(True, {"trainable_token_indices": [14]}, saved=ROWS_ALONE),
    "rows that a base has to spare": Kind(False, {"trainable_token_indices": [14, 3, 13]}, 0, 16),
    "rows beside factors of the head": Kind(False, ROWS | {"target_modules": ["up_proj", "lm_head"]}),
}


def write_base(where: Path, kind: str) -> None:
    tied, rows = KINDS[kind].tied, KINDS[kind].rows
    pairs.Model("bpe", pairs.words("ab", "abc"), [pairs.special("<s>")], rows, tied=tied).write(where, 0)


def write_tokenizer(base: Path, where: Path) -> None:
    """The base's with the new tokens."""
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.add_tokens([*NEW])
    tokenizer.save(str(where / "tokenizer.json"))


def train(kind: str, place: Path) -> dict[str, Any]:
    """What peft stores and says of an adapter of this kind, and what it merges."""
    import peft
    from transformers import AutoModelForCausalLM

    own = KINDS[kind]
    write_base(place / "base", kind)
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    if own.multiple != 0:
        model.resize_token_embeddings(13 + len(NEW), pad_to_multiple_of=own.multiple, mean_resizing=False)
        with torch.no_grad():
            for number, one in enumerate((model.get_input_embeddings(), model.get_output_embeddings())):
                one.weight[13:] = torch.arange(4.0) / 8 + 5 + number * (not own.tied)
    chosen = peft.LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]} | own.settings)
    adapted = peft.get_peft_model(model, chosen)
    with torch.no_grad():
        for k, (_, one) in enumerate(adapted.named_parameters()):
            if one.requires_grad:
                one.copy_((torch.arange(one.numel()) % 7 - 3).view(one.shape) / 4 + k % 3)
    adapted.save_pretrained(place / "adapter", **own.saved)
    said = json.loads((place / "adapter/adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    said["target_modules"].sort()  # peft has them as a set
    stored = load_file(place / "adapter/adapter_model.safetensors")
    merged = adapted.merge_and_unload().state_dict()
    if torch.equal(merged[HEAD], merged[EMBEDDING]):
        del merged[HEAD]
    return {
        "config": {key: value for key, value in sorted(said.items()) if value not in (None, False, [], {})},
        "stored": {name: tensor.tolist() for name, tensor in sorted(stored.items())},
        "merged": {name: tensor.tolist() for name, tensor in sorted(merged.items())},
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        found = {}
        for number, kind in enumerate(KINDS):
            (own := Path(place, str(number))).mkdir()
            found[kind] = train(kind, own)
    lines = [f"{json.dumps(kind)}: {json.dumps(one)}" for kind, one in found.items()]
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
