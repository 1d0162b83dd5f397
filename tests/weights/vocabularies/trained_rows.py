"""Adapters that were trained on a base with two new tokens, by real peft (0.21.0), and what its merge_and_unload makes
of each: all numbers are sums of few bits, so that they are exact. Run as a program it records trained_rows.json anew,
with peft and accelerate. Needs nothing of rvdist.
"""

from __future__ import annotations

import json
import tempfile
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
KINDS: dict[str, tuple[bool, int | None, dict[str, Any]]] = {  # tied; rows to a multiple of; of LoraConfig
    "whole, untied": (False, None, {"modules_to_save": BOTH}),
    "the embedding whole, untied": (False, None, {"modules_to_save": BOTH[:1]}),
    "resized, untied": (False, None, {}),
    "resized, tied": (True, None, {}),
    "padded, untied": (False, 8, {"modules_to_save": BOTH}),
    "padded, tied": (True, 24, {}),
    "whole, tied as one": (True, None, {"modules_to_save": BOTH[:1], "ensure_weight_tying": True}),
    "whole, a copy of what is tied": (True, None, {"modules_to_save": BOTH[:1]}),
    "rows, untied": (False, None, {"trainable_token_indices": [13, 14]}),
    "rows, tied": (True, None, {"trainable_token_indices": [13, 14]}),
}


def write_base(where: Path, tied: bool) -> None:
    pairs.Model("bpe", pairs.words("ab", "abc"), [pairs.special("<s>")], tied=tied).write(where, 0)


def write_tokenizer(base: Path, where: Path) -> None:
    """The base's with the new tokens."""
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.add_tokens([*NEW])
    tokenizer.save(str(where / "tokenizer.json"))


def train(kind: str, place: Path) -> dict[str, Any]:
    """What peft stores and says of an adapter of this kind, and what it merges."""
    import peft
    from transformers import AutoModelForCausalLM

    tied, multiple, settings = KINDS[kind]
    write_base(place / "base", tied)
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    model.resize_token_embeddings(13 + len(NEW), pad_to_multiple_of=multiple, mean_resizing=False)
    with torch.no_grad():
        for number, own in enumerate((model.get_input_embeddings(), model.get_output_embeddings())):
            own.weight[13:] = torch.arange(4.0) / 8 + 5 + number * (not tied)
    chosen = peft.LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]} | settings)
    adapted = peft.get_peft_model(model, chosen)
    with torch.no_grad():
        for k, (_, own) in enumerate(adapted.named_parameters()):
            if own.requires_grad:
                own.copy_((torch.arange(own.numel()) % 7 - 3).view(own.shape) / 4 + k % 3)
    adapted.save_pretrained(place / "adapter")
    said = json.loads((place / "adapter/adapter_config.json").read_text()) | {"base_model_name_or_path": None}
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
