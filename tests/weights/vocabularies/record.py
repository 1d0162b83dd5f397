"""Records what mergekit makes of the models in pairs.py, in expected.json.

    MERGEKIT-ENVIRONMENT/bin/python tests/weights/vocabularies/record.py [--out FILE]

Run it with the Python of an environment that has mergekit 0.1.5. Needs nothing of rvdist.

mergekit numbers the tokens that the base lacks in the order of a hash map and of a set, another at every run. Here the
vocabularies go by id and the models as they are listed, which is one of these orders.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pairs
import torch
import transformers
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import MergeOptions, run_merge
from mergekit.tokenizer import embed
from safetensors.torch import load_file

HERE = Path(__file__).parent
seen: dict[str, Any] = {}


def in_one_order() -> None:
    own_vocab = transformers.PreTrainedTokenizerFast.get_vocab
    own_models = MergeConfiguration.referenced_models

    def get_vocab(self: Any) -> dict[str, int]:
        return dict(sorted(own_vocab(self).items(), key=lambda pair: pair[1]))

    def referenced_models(self: MergeConfiguration) -> list[Any]:
        listed = [self.base_model, *(one.model for one in self.models)]
        assert {*listed} == {*own_models(self)}
        return list(dict.fromkeys(listed))

    transformers.PreTrainedTokenizerFast.get_vocab = get_vocab
    MergeConfiguration.referenced_models = referenced_models


def watched() -> None:
    """Keeps what each model's rows became."""
    own = embed.PermutedVocabulary.execute

    def execute(self: Any, tokenizer_info: Any, tensors: Any) -> Any:
        found = own(self, tokenizer_info, tensors)
        name = (
            "lm_head.weight" if any(float(t[0].max()) > 900 for t in tensors.values()) else "model.embed_tokens.weight"
        )
        seen.setdefault("rows", {})[name] = {str(model): tensor.tolist() for model, tensor in found.items()}
        seen["tokens"] = dict(sorted(tokenizer_info.tokenizer.get_vocab().items(), key=lambda pair: pair[1]))
        seen["ids"] = {
            str(model): [ids[k] for k in range(len(ids))] for model, ids in tokenizer_info.permutations.items()
        }
        return found

    embed.PermutedVocabulary.execute = execute


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=HERE / "expected.json")
    out = parser.parse_args().out.absolute()
    in_one_order()
    watched()
    recorded: dict[str, Any] = {
        "versions": {name: version(name) for name in ("mergekit", "transformers", "tokenizers")}
    }
    torch.set_num_threads(1)
    for name in pairs.PAIRS:
        with tempfile.TemporaryDirectory() as work:
            os.chdir(work)
            pairs.write(name, Path(work))
            seen.clear()
            LoaderCache.loaders.clear()  # of models of these names before
            asked = MergeConfiguration.model_validate(pairs.recipe(name))
            run_merge(asked, "merged", MergeOptions(write_model_card=False, quiet=True))
            tensors = {key: t for file in Path("merged").glob("*.safetensors") for key, t in load_file(file).items()}
            by_token = {key: t.tolist() for key, t in tensors.items() if "embed" in key or "head" in key}
            config = json.loads(Path("merged/config.json").read_text())
            reloaded = transformers.AutoTokenizer.from_pretrained("merged").get_vocab()
            assert reloaded == seen["tokens"], name
            recorded[name] = dict(seen) | {"merged": by_token, "vocab_size": config["vocab_size"]}
    out.write_text(json.dumps(recorded, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
