"""Records what mergekit makes of the recipes beside this file, in expected.safetensors.

    MERGEKIT-ENVIRONMENT/bin/python tests/core/mergekit/record.py [--out FILE]

Run it with the Python of an environment that has mergekit 0.1.5. The models are made here and recorded as well:
`inputs/MODEL/TENSOR`; results are `RECIPE/TENSOR`. Needs nothing of rvdist.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4, "intermediate_size": 6,
    "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 8,
    "tie_word_embeddings": False,
}  # fmt: skip


def models() -> dict[str, dict[str, torch.Tensor]]:
    """A base, three near it, and one that is not; each in fp32 and in bf16."""
    shapes = {"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,), "lm_head.weight": (8, 4)}
    for layer in range(3):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{part}_proj.weight": (4, 4) for part in "qkvo"}
        shapes |= {f"{at}.mlp.{part}_proj.weight": (6, 4) for part in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (4, 6)}
        shapes |= {f"{at}.{part}_layernorm.weight": (4,) for part in ("input", "post_attention")}
    generator = torch.Generator().manual_seed(0)
    base = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made = {"base": base}
    for name, noise in (("a", 0.01), ("b", 0.01), ("c", 0.02), ("far", 0.1)):
        made[name] = {key: t + noise * torch.randn(t.shape, generator=generator) for key, t in base.items()}
    return made | {f"{name}-bf16": {k: t.bfloat16() for k, t in one.items()} for name, one in made.items()}


def write_models(where: Path) -> None:
    for name, tensors in models().items():
        (where / name).mkdir()
        save_file(tensors, where / name / "model.safetensors", metadata={"format": "pt"})
        dtype = "bfloat16" if name.endswith("bf16") else "float32"
        (where / name / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": dtype}))
        vocabulary = {"<unk>": 0} | {f"word{k}": k for k in range(1, 8)}
        model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
        (where / name / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
        (where / name / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def main() -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=HERE / "expected.safetensors")
    out = parser.parse_args().out.absolute()
    recorded = {f"inputs/{name}/{key}": t for name, one in models().items() for key, t in one.items()}
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        write_models(Path(work))
        for recipe in sorted(HERE.absolute().glob("*.yml")):
            torch.manual_seed(0)
            asked = MergeConfiguration.model_validate(yaml.safe_load(recipe.read_text()))
            merged = Path(work) / f"merged-{recipe.stem}"
            run_merge(asked, str(merged), MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True))
            for file in merged.glob("*.safetensors"):
                recorded |= {f"{recipe.stem}/{key}": tensor for key, tensor in load_file(file).items()}
    versions = {name: version(name) for name in ("mergekit", "torch")}
    save_file({name: tensor.contiguous() for name, tensor in recorded.items()}, out, metadata=versions)


if __name__ == "__main__":
    main()
