import json
import os
import subprocess
import sys

import pytest
import torch
from checkpoints import load_checkpoint, tensors, write_checkpoint

from rvdist.core.errors import BadInput
from rvdist.weights.checkpoint.digest import checkpoint_digest, file_digest
from rvdist.weights.checkpoint.directory import open_checkpoint
from rvdist.weights.checkpoint.source import open_source

INDEX = "model.safetensors.index.json"


def test_one_file_and_many_shards_hold_the_same_tensors(tmp_path):
    one = open_checkpoint(write_checkpoint(tmp_path / "one", tensors(0)))
    many = open_checkpoint(write_checkpoint(tmp_path / "many", tensors(0), shards=3))
    assert one.tensors.keys() == many.tensors.keys() and len(many.files) == 3
    assert one.nbytes == many.nbytes


def edit_index(path, change):
    index = json.loads((path / INDEX).read_text())
    change(index)
    (path / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", 3, ".."])
def test_an_index_cannot_name_a_file_outside_its_directory(tmp_path, name):
    path = write_checkpoint(tmp_path / "c", tensors(0), shards=2)
    edit_index(path, lambda index: index["weight_map"].update({"scalar": name}))
    with pytest.raises(BadInput, match="not a safetensors file of its directory"):
        open_checkpoint(path)


def test_index_and_files_must_agree(tmp_path):
    path = write_checkpoint(tmp_path / "c", tensors(0), shards=2)
    edit_index(path, lambda index: index["weight_map"].pop("scalar"))
    with pytest.raises(BadInput, match="does not list tensor scalar"):
        open_checkpoint(path)
    edit_index(path, lambda index: index["weight_map"].update({"ghost": "model-00001-of-00002.safetensors"}))
    with pytest.raises(BadInput, match="says tensor ghost"):
        open_checkpoint(path)
    (path / INDEX).write_text("{")
    with pytest.raises(BadInput, match="is not JSON"):
        open_checkpoint(path)


def test_a_missing_shard_and_a_missing_directory(tmp_path):
    path = write_checkpoint(tmp_path / "c", tensors(0), shards=2)
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BadInput, match="model-00002-of-00002.safetensors: cannot be read"):
        open_checkpoint(path)
    with pytest.raises(BadInput, match="no such checkpoint directory"):
        open_source(str(tmp_path / "nowhere"))


def test_a_hub_name_that_cannot_be_had_is_one_sentence():
    with pytest.raises(BadInput, match="org/name: no such directory, and not to be had from the Hub") as caught:
        open_source("org/name")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("model.bin", "pickled weights.*save_file"),
        ("model-Q4_K_M.gguf", "GGUF weights.*gguf_file='model-Q4_K_M.gguf'.*save_pretrained"),
        ("__0_0.distcp", "distributed checkpoint.*accelerate merge-weights"),
        ("llama.nemo", "NeMo archive.*convert_"),
        ("consolidated.00.pth", "Meta's own layout.*convert_llama_weights_to_hf"),
        ("zero_to_fp32.py", "ZeRO checkpoint of DeepSpeed.*zero_to_fp32.py"),
    ],
)
def test_weights_in_another_format_are_refused_with_what_converts_them(tmp_path, file, said):
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(BadInput, match=f"{tmp_path}: holds .*{said}") as caught:
        open_checkpoint(tmp_path)
    assert file in str(caught.value)
    if not file.endswith(".py"):
        with pytest.raises(BadInput, match=said):
            open_checkpoint(tmp_path / file)


def test_pickled_shards_without_their_index(tmp_path):
    """transformers reads none of them without it, and with it we do; the same of one of them that is given alone."""
    state, listed = tensors(0), {}
    for number, names in enumerate((list(state)[:4], list(state)[4:]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: state[name] for name in names}, tmp_path / file)
        listed |= dict.fromkeys(names, file)
    sentence = r"has 2 pickled shards \(pytorch_model-00001-of-00002.bin\) and no pytorch_model.bin.index.json; down"
    with pytest.raises(BadInput, match=f"^{tmp_path}: {sentence}") as caught:
        open_source(str(tmp_path))
    assert "python" not in str(caught.value)
    for file in ("pytorch_model-00001-of-00002.bin", "pytorch_model.bin"):
        (tmp_path / file).touch()
        with pytest.raises(BadInput, match=f"{file}: is a file; give the directory that holds it"):
            open_source(str(tmp_path / file))
        (tmp_path / "pytorch_model.bin").unlink(missing_ok=True)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": listed}))
    assert open_source(str(tmp_path)).tensors.keys() == state.keys()


class Hostile:
    """Leaves a file called `ran` where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def convert(refusal, place):
    """Runs the line that a refusal gives, in `place`."""
    command = refusal.partition("convert it: ")[2].partition(", and copy config.json")[0]
    assert command.startswith("python -c")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    line = command.replace("python", sys.executable, 1)
    return subprocess.run(line, shell=True, cwd=place, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("within", "prefix"), [("state_dict", "model."), ("model", "module.model."), (None, "")])
def test_the_line_that_converts_a_training_s_pickle_works_as_it_stands(tmp_path, within, prefix):
    """As Lightning, or a loop of one's own, saves a model: a tied head, a transposed matrix, names with a prefix."""
    model = tensors(0)
    model |= {"lm_head.weight": model["model.embed_tokens.weight"], "model.turned": torch.arange(6).view(2, 3).T}
    state = {prefix + name: tensor for name, tensor in model.items()}
    saved = {within: state, "epoch": 1, "hyper_parameters": {"lr": 0.1}} if within else state
    (place := tmp_path / "it's $HOME").mkdir()
    torch.save(saved, place / "epoch=0-step=10.ckpt")
    for named in (place, place / "epoch=0-step=10.ckpt"):
        with pytest.raises(BadInput, match="which can run code when opened") as caught:
            open_source(str(named))
    done = convert(str(caught.value), tmp_path)
    assert done.returncode == 0, done.stderr
    open_source(str(tmp_path / "OUT"))
    found = load_checkpoint(tmp_path / "OUT")
    assert found.keys() == model.keys() and all(torch.equal(found[name], own) for name, own in model.items())


def test_the_line_that_converts_a_training_s_pickle_runs_nothing_that_is_in_it(tmp_path):
    torch.save({"state_dict": tensors(0), "hyper_parameters": Hostile()}, tmp_path / "last.ckpt")
    with pytest.raises(BadInput) as caught:
        open_source(str(tmp_path))
    done = convert(str(caught.value), tmp_path)
    assert done.returncode != 0 and "mkdir" in done.stderr
    assert not (tmp_path / "ran").exists() and not (tmp_path / "OUT").exists()


def test_a_file_in_place_of_its_directory(tmp_path):
    path = write_checkpoint(tmp_path / "c", tensors(0))
    with pytest.raises(BadInput, match="is a file; give the directory that holds it"):
        open_source(str(path / "model.safetensors"))


def test_a_whole_file_beside_the_index_of_an_older_save(tmp_path):
    """Without its shards the index is stale, and the file is read as transformers reads it; with some, who knows."""
    path = write_checkpoint(tmp_path / "c", tensors(0), shards=2)
    write_checkpoint(tmp_path / "whole", tensors(1))
    (tmp_path / "whole" / "model.safetensors").rename(path / "model.safetensors")
    with pytest.raises(BadInput, match=f"{INDEX}: lists model-00001-of-00002.safetensors .* is stale"):
        open_checkpoint(path)
    for shard in path.glob("model-0*"):
        shard.unlink()
    found = open_checkpoint(path)
    assert found.files == ["model.safetensors"] and found.tensors.keys() == tensors(1).keys()


def test_a_file_that_changed_is_noticed(tmp_path):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "c", tensors(0)))
    checkpoint.require_unchanged()
    os.utime(tmp_path / "c" / "model.safetensors", (1, 1))
    with pytest.raises(BadInput, match="changed while it was being read"):
        checkpoint.require_unchanged()


def test_digests_name_contents_and_remember_them(tmp_path):
    one = open_checkpoint(write_checkpoint(tmp_path / "one", tensors(0)))
    same = open_checkpoint(write_checkpoint(tmp_path / "same", tensors(0)))
    other = open_checkpoint(write_checkpoint(tmp_path / "other", tensors(1)))
    cache = tmp_path / "cache"
    assert checkpoint_digest(one) == checkpoint_digest(same, cache) == checkpoint_digest(same, cache)
    assert checkpoint_digest(one) != checkpoint_digest(other)
    path = tmp_path / "one" / "model.safetensors"
    before = file_digest(path, cache)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert file_digest(path, cache) != before


@pytest.mark.parametrize("url", ["s3://bucket/model", "https://host/org/name", "hf://org/name"])
def test_a_url_is_no_source(url):
    with pytest.raises(BadInput, match=rf"^{url}: is a URL, and a checkpoint is a directory or a Hub repository"):
        open_source(url)
