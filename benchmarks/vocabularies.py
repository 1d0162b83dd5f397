"""Token maps and rows of merges by token beside mergekit's, on tokenizers that people have.

    python benchmarks/vocabularies.py --mergekit PYTHON BASE OTHER [OTHER …] [--source SOURCE]

Each argument is a directory with a tokenizer.json; its model is an embedding whose rows say whose they are. PYTHON is
that of an environment with mergekit 0.1.5, which numbers new tokens in another order at every run: here by model and
id, as ours. mergekit adds tokens one by one, in quadratic time (SmolLM2 and Gemma take longer than 8 minutes): here it
adds them at once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

EMBEDDING = "model.embed_tokens.weight"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4, "intermediate_size": 4,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "torch_dtype": "float32",
    "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": True,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizers", type=Path, nargs="+")
    parser.add_argument("--mergekit", required=True)
    parser.add_argument("--source", default="union", help="union, base, or model1, model2, …")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        names = [f"model{number}" for number in range(len(given.tokenizers))]
        for number, tokenizer in enumerate(given.tokenizers):
            write(tokenizer, Path(work) / names[number], number)
        recipe = {"merge_method": "task_arithmetic", "base_model": names[0], "dtype": "float32"}
        models = [{"model": name, "parameters": {"weight": 0.5}} for name in names[1:]]
        recipe |= {"models": models, "tokenizer_source": given.source}
        (Path(work) / "recipe.yml").write_text(json.dumps(recipe))
        subprocess.run([given.mergekit, __file__, "--record"], cwd=work, check=True)
        os.chdir(work)
        compare()


def write(tokenizer: Path, where: Path, number: int) -> None:
    """A model whose row of an id is [100 · number + 1, id, id mod 7, −id]."""
    where.mkdir()
    for file in tokenizer.iterdir():
        if file.name.startswith(("tokenizer", "special_tokens", "added_tokens")) and file.suffix == ".json":
            shutil.copy(file, where)
    content = json.loads((where / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    ids = range(len(vocab)) if isinstance(vocab, list) else vocab.values()
    rows = 1 + max([*ids, *(one["id"] for one in content["added_tokens"])])
    (where / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": rows}))
    at, ids = "model.layers.0", torch.arange(rows, dtype=torch.float32)
    tensors = {EMBEDDING: torch.stack([torch.full_like(ids, 100 * number + 1), ids, ids % 7, -ids], 1)}
    matrices = [
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    ]
    tensors |= {f"{at}.{name}.weight": torch.ones(4, 4) for name in matrices}
    norms = ("model.norm", f"{at}.input_layernorm", f"{at}.post_attention_layernorm")
    save_file(
        tensors | {f"{name}.weight": torch.ones(4) for name in norms}, where / "model.safetensors", {"format": "pt"}
    )


def record() -> None:
    """What mergekit makes of recipe.yml: its tokens and the rows of each model. Runs in its environment."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge
    from mergekit.tokenizer import build, embed
    from transformers import PreTrainedTokenizerFast

    own_union, own_add = build.build_union_tokenizer, PreTrainedTokenizerFast.add_tokens

    def union(*given: Any, **more: Any) -> Any:
        waiting: list[Any] = []

        def add(self: Any, token: Any, **more: Any) -> Any:
            return own_add(self, token, **more) if isinstance(token, list) or more else waiting.append(token)

        PreTrainedTokenizerFast.add_tokens = add
        try:
            built = own_union(*given, **more)
        finally:
            PreTrainedTokenizerFast.add_tokens = own_add
        built.add_tokens(waiting)
        return built

    build.build_union_tokenizer = union
    own_vocab, own_execute = PreTrainedTokenizerFast.get_vocab, embed.PermutedVocabulary.execute

    def get_vocab(self: Any) -> dict[str, int]:
        return dict(sorted(own_vocab(self).items(), key=lambda pair: pair[1]))

    def listed(self: Any) -> list[Any]:
        return [self.base_model, *(one.model for one in self.models)]

    def execute(self: Any, tokenizer_info: Any, tensors: Any) -> Any:
        found = own_execute(self, tokenizer_info, tensors)
        Path("tokens.json").write_text(json.dumps(tokenizer_info.tokenizer.get_vocab()))
        save_file({str(model): tensor.contiguous().clone() for model, tensor in found.items()}, "rows.safetensors")
        return found

    PreTrainedTokenizerFast.get_vocab, embed.PermutedVocabulary.execute = get_vocab, execute
    MergeConfiguration.referenced_models = listed
    asked = MergeConfiguration.model_validate(json.loads(Path("recipe.yml").read_text()))
    run_merge(asked, "merged", MergeOptions(write_model_card=False, quiet=True))


def compare() -> None:
    from rvdist.core.recipe import read_recipe
    from rvdist.weights.checkpoint.remapped import Remapped
    from rvdist.weights.checkpoint.source import open_source
    from rvdist.weights.checkpoint.tokens import read_tokens
    from rvdist.weights.checkpoint.vocabulary import remap
    from rvdist.weights.operand import open_operand

    point = read_recipe(Path("recipe.yml"), lambda base: open_source(base).tensors).point
    sources = {source: open_source(source) for source in point.sources()}
    sources |= remap(point, sources, open_source)
    base = sources[point.base]
    tokens = base.tokenizer.ids if isinstance(base, Remapped) and base.tokenizer else read_tokens(base.beside).ids
    expected = json.loads(Path("tokens.json").read_text())
    print(f"{len(tokens):,} tokens, mergekit {len(expected):,}: {'equal' if tokens == expected else 'NOT equal'}")
    for model, rows in load_file("rows.safetensors").items():
        spec = sources[model].tensors[EMBEDDING]
        with closing(open_operand(sources[model])) as operand:
            own = operand.read(EMBEDDING, 0, spec.numel, torch.empty(8 * spec.numel, dtype=torch.uint8)).view(
                spec.shape
            )
            print(f"rows of {model}: {'equal' if torch.equal(own, rows) else 'NOT equal'}")


if __name__ == "__main__":
    record() if sys.argv[1:] == ["--record"] else main()
