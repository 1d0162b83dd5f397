"""Merges by token of several targets and α, as one command writes and publishes them: read back by transformers, they
answer as the merges of the same models with one vocabulary."""

import json
import shutil

import pytest
import torch
from checkpoints import POCKET, launch
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rvdist.inspect import inspect
from rvdist.verify import verify

pytestmark = pytest.mark.heavy
BYTES = 256


def turned_round(source, where):
    """The same model with the ids of its bytes turned round, and one more token; its head is its embedding."""
    shutil.copytree(source, where)
    content = json.loads((where / "tokenizer.json").read_text())
    vocab, added = content["model"]["vocab"], content["added_tokens"]
    content["model"]["vocab"] = {
        token: BYTES - 1 - number if number < BYTES else number for token, number in vocab.items()
    }
    added.append(added[-1] | {"id": len(vocab), "content": "<|tool|>"})
    (where / "tokenizer.json").write_text(json.dumps(content))
    tensors = load_file(where / "model.safetensors")
    rows = tensors["model.embed_tokens.weight"]
    new = torch.full((1, rows.shape[1]), 0.25, dtype=rows.dtype)
    tensors["model.embed_tokens.weight"] = torch.cat([rows[:BYTES].flip(0), rows[BYTES : len(vocab)], new])
    save_file(tensors, where / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(json.dumps(config | {"vocab_size": len(vocab) + 1}))


def test_what_is_published_answers_as_the_merge_of_one_vocabulary(tmp_path):
    for name, source in (("one", "target"), ("two", "sft")):
        shutil.copytree(POCKET / source, tmp_path / "models" / name)
    turned_round(POCKET / "grpo", tmp_path / "plus")
    common = (f"vector.minus={POCKET / 'sft'}", "alpha=[0.5,1]", "cache.dir=c", "hydra.run.dir=run")
    by_token = (*common, "vector.plus=plus", "tokenizer=union")
    server = HubServer("hf_token")
    hub = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    hub |= {"HF_TOKEN": "hf_token", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    try:
        done = launch("target=models/*", *by_token, "output=out/{target}-{alpha}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        plain = (f"vector.plus={POCKET / 'grpo'}", "output=plain/{target}-{alpha}")
        assert launch("target=models/*", *common, *plain, cwd=tmp_path).returncode == 0
        publish = ("target=models/one", "output=out/one-{alpha}", "publish=org/one-{alpha}", "hub.confirmed=true")
        again = launch(*by_token, *publish, cwd=tmp_path, **hub)
        assert again.returncode == 0 and (again.stdout + again.stderr).count("already complete") == 2, again.stderr
        for alpha in ("0.5", "1"):
            own, repository = tmp_path / "out" / f"one-{alpha}", f"org/one-{alpha}"
            root = server.root(repository, server.commit(repository, "main"))
            local = {file.name: file.read_bytes() for file in own.iterdir() if file.name != "README.md"}
            assert all((root / file).read_bytes() == content for file, content in local.items())
            readme = (root / "README.md").read_text()
            assert str(tmp_path) not in readme and "models/" not in readme
            assert "the rows of its vocabulary are 258 its own, 1 another model's" in readme
            require_alike(root, tmp_path / "plain" / f"one-{alpha}")
        for name in ("one-0.5", "two-1"):
            assert not verify(tmp_path / "out" / name).problems and inspect(str(tmp_path / "out" / name))
        require_alike(tmp_path / "out" / "two-1", tmp_path / "plain" / "two-1")
    finally:
        server.stop()


def require_alike(by_token, plain):
    """Rows, logits and answers are the same to the bit where both have the tokens."""
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (by_token, plain)]
    models = [AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval() for path in (by_token, plain)]
    embeddings = [model.get_input_embeddings().weight for model in models]
    shared = len(embeddings[1])
    assert len(embeddings[0]) == shared + 1 and torch.equal(embeddings[0][:shared], embeddings[1])
    assert models[0].get_output_embeddings().weight is embeddings[0]
    for text in ("12+34=", "Question: 7+8?\nAnswer:"):
        given = [tokenizer(text, return_tensors="pt") for tokenizer in tokenizers]
        assert torch.equal(given[0].input_ids, given[1].input_ids)
        with torch.no_grad():
            logits = [model(**one).logits for model, one in zip(models, given, strict=True)]
        assert torch.equal(logits[0][..., :shared], logits[1])
    assert tokenizers[0].encode("a<|tool|>") == [97, shared] and models[0].generation_config.eos_token_id == 257
