"""Situations of the files that a checkpoint consists of: headers, indexes, shards, links, names, and what stands beside
the weights."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from checkpoints import near
from safetensors.torch import load_file, save_file
from situations import (
    HIDDEN,
    INDEX,
    ROLES,
    Asked,
    Refused,
    Right,
    Said,
    ask,
    edit,
    llama,
    merged,
    put,
    reheader,
    siblings,
    situation,
    write,
    write_all,
)

from rvdist.core.config import Config, VectorConfig


def plain(place: Path, shards: int = 1) -> Right:
    """Three siblings as they should be, and their merge."""
    weights = siblings(llama())
    write_all(place, weights, shards)
    return Right(merged(weights))


def change_index(path: Path, **changes: object) -> None:
    edit(path / INDEX, **changes)


# --- headers


@situation("headers", '"__metadata__": null in every header', "safetensors/safetensors#823", right="opens")
def metadata_null(place: Path) -> Asked:
    right = plain(place)
    for role in ROLES:
        reheader(place / role / "model.safetensors", lambda header: header.update(__metadata__=None))
    return ask(place, right)


@situation("headers", '"__metadata__": {} in every header', "foundation-model-stack/fastsafetensors#89", right="opens")
def metadata_empty(place: Path) -> Asked:
    right = plain(place)
    for role in ROLES:
        reheader(place / role / "model.safetensors", lambda header: header.update(__metadata__={}))
    return ask(place, right)


@situation("headers", "a header without __metadata__", "ml-explore/mlx#743", right="opens")
def metadata_absent(place: Path) -> Asked:
    right = plain(place)
    reheader(place / "plus/model.safetensors", lambda header: header.pop("__metadata__"))
    return ask(place, right)


@situation(
    "headers", "a shard that ends too early", "PersuGPT/PersuGPT.github.io#2",
    refused="names the file, what its header promises and what it has",
)  # fmt: skip
def shard_cut_short(place: Path) -> Asked:
    plain(place, 2)
    shard = place / "plus/model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    return ask(place, Refused(["plus/model-00001-of-00002.safetensors: truncated"]))


@situation(
    "headers", "a Git LFS pointer in place of a weight file", "microsoft/OmniParser#34",
    refused="says that it is a pointer, and how to get what it points to",
)  # fmt: skip
def lfs_pointer(place: Path) -> Asked:
    plain(place)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 988097824\n"
    put(place / "minus/model.safetensors", pointer)
    return ask(place, Refused(["minus/model.safetensors", "Git LFS pointer", "git lfs pull"]))


@situation(
    "headers", "a Git LFS pointer in place of tokenizer.json", "turboderp/exllama#242",
    refused="says that it is a pointer, and how to get what it points to",
)  # fmt: skip
def lfs_pointer_tokenizer(place: Path) -> Asked:
    plain(place)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'cd' * 32}\nsize 11421896\n"
    put(place / "target/tokenizer.json", pointer)
    return ask(place, Refused(["target/tokenizer.json", "Git LFS pointer", "git lfs pull"], possible=True))


@situation(
    "headers", "an HTML page saved in place of a weight file", "huggingface/transformers#27923",
    refused="names the file",
)  # fmt: skip
def page_for_a_shard(place: Path) -> Asked:
    plain(place)
    put(place / "plus/model.safetensors", "<!DOCTYPE html><html><head><title>401</title></head></html>\n")
    return ask(place, Refused(["plus/model.safetensors", "not a whole safetensors file"]))


@situation("headers", "a weight file of no bytes", "none found", refused="names the file and its size")
def empty_file(place: Path) -> Asked:
    plain(place)
    (place / "minus/model.safetensors").write_bytes(b"")
    return ask(place, Refused([r"minus/model.safetensors: not a whole safetensors file \(0 bytes\)"]))


# --- indexes and shards


@situation("indexes", "an index without metadata", "exo-explore/exo#1956", right="what it lists is enough")
def index_without_metadata(place: Path) -> Asked:
    right = plain(place, 2)
    for role in ROLES:
        change_index(place / role, metadata=...)
    return ask(place, right)


@situation("indexes", "an index with a wrong total", "none found", right="the total is not believed, and ours is right")
def index_with_a_wrong_total(place: Path) -> Asked:
    right = plain(place, 2)
    for role in ROLES:
        change_index(place / role, metadata={"total_size": 1})
    return ask(place, right)


@situation(
    "indexes", "an index that names a tensor which no file has", "huggingface/huggingface_hub#4728",
    refused="names the tensor and the file",
)  # fmt: skip
def index_names_an_absent_tensor(place: Path) -> Asked:
    plain(place, 2)
    listed = json.loads((place / "target" / INDEX).read_text())["weight_map"]
    change_index(place / "target", weight_map=listed | {"mtp.fc.weight": "model-00002-of-00002.safetensors"})
    return ask(place, Refused([INDEX, "mtp.fc.weight", "model-00002-of-00002.safetensors"], possible=True))


@situation(
    "indexes", "no index, and two shards", "Blaizzy/mlx-vlm#1464",
    refused="names the directory and the file that lacks",
)  # fmt: skip
def index_missing(place: Path) -> Asked:
    plain(place, 2)
    (place / "minus" / INDEX).unlink()
    return ask(place, Refused(["minus: has 2 safetensors files and no model.safetensors.index.json"]))


@situation("indexes", "no index, and the only shard is called model-00001-of-00001", "none found", right="it is read")
def only_shard_without_an_index(place: Path) -> Asked:
    right = plain(place)
    (place / "plus/model.safetensors").rename(place / "plus/model-00001-of-00001.safetensors")
    return ask(place, right)


@situation(
    "indexes", "a whole model.safetensors beside the index of an older, sharded save", "huggingface/diffusers#14719",
    right="the file is read, as transformers reads it",
)  # fmt: skip
def stale_index(place: Path) -> Asked:
    right = plain(place)
    listed = dict.fromkeys(llama(), "model-00001-of-00002.safetensors")
    put(place / "plus" / INDEX, {"metadata": {"total_size": 1}, "weight_map": listed})
    return ask(place, right)


@situation(
    "indexes", "a whole model.safetensors of one save beside the shards and the index of another",
    "huggingface/diffusers#14769", refused="names both, one of which is stale",
)  # fmt: skip
def two_whole_saves(place: Path) -> Asked:
    plain(place, 2)
    save_file(llama(50), place / "plus/model.safetensors", {"format": "pt"})
    return ask(place, Refused([INDEX, "model.safetensors", "stale"]))


@situation(
    "indexes",
    "shards of another save beside those that the index lists",
    "mflux-community/mflux#603",
    right="only what is listed is read",
)
def shards_of_two_saves(place: Path) -> Asked:
    right = plain(place, 2)
    for k in (1, 2, 3):
        save_file(llama(50 + k), place / "target" / f"model-0000{k}-of-00003.safetensors")
    return ask(place, right)


@situation(
    "indexes", "a listed shard is of another save, which was cut elsewhere", "mflux-community/mflux#603",
    refused="names a tensor that is not where the index says",
)  # fmt: skip
def shard_of_another_save(place: Path) -> Asked:
    plain(place, 2)
    half = dict(list(llama(50).items())[:5])
    save_file(half, place / "plus/model-00002-of-00002.safetensors", {"format": "pt"})
    return ask(place, Refused(["plus", "tensor model.", "model-0000[12]-of-00002.safetensors"]))


@situation(
    "indexes", "a stray weight file beside model.safetensors", "Blaizzy/mlx-vlm#1464",
    right="model.safetensors is the checkpoint, as for transformers",
)  # fmt: skip
def stray_weight_file(place: Path) -> Asked:
    right = plain(place)
    save_file(llama(50), place / "target/old-checkpoint.safetensors", {"format": "pt"})
    return ask(place, right)


@situation(
    "indexes", "Mistral's consolidated.safetensors and params.json beside the Hugging Face shards",
    "vllm-project/vllm#40765", right="the shards that the index lists are read; the other layout stays behind",
)  # fmt: skip
def both_layouts(place: Path) -> Asked:
    right = plain(place, 2)
    save_file(
        {"tok_embeddings.weight": llama(50)["model.embed_tokens.weight"]}, place / "target/consolidated.safetensors"
    )
    put(place / "target/params.json", {"dim": HIDDEN, "n_layers": 2})
    return ask(place, replace(right, left=["params.json"]))


@situation("indexes", "target and donors cut into shards differently", "none found", right="tensors are found by name")
def other_shard_layouts(place: Path) -> Asked:
    weights = siblings(llama())
    for role, shards in {"target": 3, "plus": 1, "minus": 5}.items():
        backwards = dict(reversed(weights[role].items())) if role == "minus" else weights[role]
        write(place / role, backwards, shards)
    return ask(place, Right(merged(weights)))


@situation("indexes", "a target of 1,000 shards", "none found", right="a thousand come out")
def a_thousand_shards(place: Path) -> Asked:
    base = {
        f"model.layers.{k}.norm.weight": tensor
        for k, tensor in enumerate(llama()["model.embed_tokens.weight"].repeat(25, 1))
    }
    weights = siblings(base)
    for role in ROLES:
        write(place / role, weights[role], 1000 if role == "target" else 1, tokens=40)
    return ask(place, Right(merged(weights)), made_up=True)


@situation(
    "indexes", "a tensor that stands in two listed shards", "none found", refused="names the tensor and both files"
)
def tensor_in_two_shards(place: Path) -> Asked:
    plain(place, 2)
    first, second = (place / f"plus/model-0000{k}-of-00002.safetensors" for k in (1, 2))
    save_file(load_file(first) | dict(list(load_file(second).items())[:1]), first, {"format": "pt"})
    words = ["plus: tensor model", "stands in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors"]
    return ask(place, Refused(words))


@situation("indexes", "pytorch_model.bin beside model.safetensors", "none found", right="safetensors are read")
def pickles_beside_safetensors(place: Path) -> Asked:
    right = plain(place)
    for role in ROLES:
        (place / role / "pytorch_model.bin").write_bytes(b"not even a pickle")
    return ask(place, right)


@situation("indexes", "pickled weights alone (pytorch_model.bin)", "none found", right="read, and not unpickled")
def pickled_weights(place: Path) -> Asked:
    right = plain(place)
    for role in ("plus", "minus"):
        torch.save(load_file(place / role / "model.safetensors"), place / role / "pytorch_model.bin")
        (place / role / "model.safetensors").unlink()
    return ask(place, right)


@situation(
    "indexes", "a pytorch_model.bin that is not what torch.save writes", "none found",
    refused="says why it cannot be read without running it, and how to convert it",
)  # fmt: skip
def another_pickle(place: Path) -> Asked:
    plain(place)
    (place / "plus/model.safetensors").rename(place / "plus/pytorch_model.bin")
    return ask(place, Refused(["plus/pytorch_model.bin: ", "without running it", "save_pretrained"]))


@situation(
    "indexes", "a trainer's output directory with checkpoint-50 and checkpoint-100 in it, and no weights of its own",
    "none found", refused="lists them, and says which is the last and which trainer_state.json calls the best",
)  # fmt: skip
def one_of_several(place: Path) -> Asked:
    plain(place)
    for step in (50, 100):
        shutil.copytree(place / "minus", place / f"out/checkpoint-{step}")
    (place / "out/checkpoint-100/trainer_state.json").write_text('{"best_model_checkpoint": "out/checkpoint-50"}')
    shutil.rmtree(place / "minus")
    (place / "out").rename(place / "minus")
    return ask(place, Refused(["minus: ", "checkpoint-50, checkpoint-100", "-100 is its last", "-50 is its best"]))


@situation("indexes", "a GGUF file alone", "arcee-ai/mergekit#494", refused="says what it is, and what to do")
def gguf(place: Path) -> Asked:
    plain(place)
    (place / "plus/model.safetensors").unlink()
    (place / "plus/model-Q4_K_M.gguf").write_bytes(b"GGUF" + bytes(60))
    return ask(place, Refused(["plus: ", r"GGUF"]))


@situation(
    "indexes", "a distributed checkpoint (.distcp) whose .metadata is damaged", "verl-project/verl#533",
    refused="says what is wrong, and what converts it",
)  # fmt: skip
def distcp(place: Path) -> Asked:
    plain(place)
    (place / "minus/model.safetensors").unlink()
    (place / "minus/__0_0.distcp").write_bytes(bytes(64))
    (place / "minus/.metadata").write_bytes(bytes(8))
    return ask(place, Refused(["minus/.metadata: ", "pickle", "accelerate merge-weights"]))


# --- links and names


def hub_cache(place: Path, role: str) -> Path:
    """The role's files as the Hub's cache keeps them: blobs, and a snapshot of links to them."""
    repository = place / f"models--org--{role}"
    snapshot = repository / "snapshots" / ("0123456789abcdef" * 3)[:40]
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((place / role).iterdir())):
        blob = repository / "blobs" / f"{number:040x}"
        shutil.move(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


@situation(
    "links",
    "snapshots of the Hub's cache, whose files are links to blobs",
    "huggingface/huggingface_hub#1388",
    right="links are followed",
)
def cache_of_links(place: Path) -> Asked:
    right = plain(place, 2)
    snapshots = [str(hub_cache(place, role)) for role in ROLES]
    return ask(place, right, target=snapshots[0], vector=VectorConfig(*snapshots[1:]))


@situation(
    "links", "a snapshot of the Hub's cache whose blob is gone", "debpalash/VoiceStudio#1056",
    refused="names the link and what it leads to",
)  # fmt: skip
def broken_link(place: Path) -> Asked:
    plain(place)
    snapshot = hub_cache(place, "plus")
    (snapshot / "model.safetensors").resolve().unlink()
    asked = VectorConfig(str(snapshot), str(place / "minus"))
    return ask(place, Refused(["model.safetensors", "broken link", "blobs"]), vector=asked)


@situation(
    "links", "a snapshot of the Hub's cache in which the link to config.json is broken",
    "replicate/cog-stable-diffusion#74",
    refused="names the link and what it leads to",
)  # fmt: skip
def broken_link_to_the_config(place: Path) -> Asked:
    plain(place)
    snapshot = hub_cache(place, "target")
    (snapshot / "config.json").resolve().unlink()
    return ask(place, Refused(["config.json", "broken link", "blobs"]), target=str(snapshot))


@situation("names", "weight files whose names have spaces and other alphabets", "none found", right="as any other name")
def odd_file_names(place: Path) -> Asked:
    right = plain(place, 2)
    for role in ROLES:
        index = json.loads((place / role / INDEX).read_text())
        for number in (1, 2):
            old, new = f"model-0000{number}-of-00002.safetensors", f"Модель {number} – 権重 (v=1).safetensors"
            (place / role / old).rename(place / role / new)
            index["weight_map"] = {name: new if file == old else file for name, file in index["weight_map"].items()}
        put(place / role / INDEX, index)
    return ask(place, right)


ODD = ("epoch=3-step=100", "my model", "Модель", "a{b}c", "run[v1]", "x#y", "50%", "a,b")


@situation(
    "names",
    f"directories called {', '.join(ODD[:-1])} or {ODD[-1]}",
    "hydra-ecosystem/hydra#2705",
    right="as any other name",
)
def odd_directories(place: Path) -> Asked:
    right = plain(place)
    names = [place / f"{ODD[k]} {ODD[k + 3]}" for k in range(3)]
    for role, name in zip(ROLES, names, strict=True):
        (place / role).rename(name)
    target, plus, minus = (str(name) for name in names)
    return ask(place, right, target=target, vector=VectorConfig(plus, minus))


def typed_without_quotes(place: Path, name: str, verdict: Refused | Said) -> Asked:
    plain(place)
    (place / "target").rename(place / name)
    typed = [f"target={name}", "vector.plus=plus", "vector.minus=minus", "output=out", "stages=[plan]"]
    return Asked(Config(), verdict, typed=typed)


@situation(
    "names", "target=… of a directory with =, a space, braces, brackets, # and % in its name, typed as it is",
    "hydra-ecosystem/hydra#1577", right="it is that directory",
)  # fmt: skip
def odd_directory_typed(place: Path) -> Asked:
    name = "epoch=3 a{b}c[1]#50%"
    return typed_without_quotes(place, name, Said([f"out: {re.escape(name)} "]))


@situation(
    "names", "the same with a comma in it, which Hydra takes for a list", "hydra-ecosystem/hydra#2705",
    refused="says how to quote it",
)  # fmt: skip
def comma_typed(place: Path) -> Asked:
    return typed_without_quotes(place, "a,b", Refused(["target: a,b", "quotes"]))


# --- what stands beside the weights


CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@situation(
    "companions", "the chat template in tokenizer_config.json", "hiyouga/LlamaFactory#8399", right="carried over"
)
def template_in_the_tokenizer_config(place: Path) -> Asked:
    right = plain(place)
    (place / "target/chat_template.jinja").unlink()
    edit(place / "target/tokenizer_config.json", chat_template=CHAT)
    return ask(place, right)


@situation("companions", "the chat template in chat_template.json", "none found", right="carried over")
def template_in_json(place: Path) -> Asked:
    right = plain(place)
    (place / "target/chat_template.jinja").unlink()
    put(place / "target/chat_template.json", {"chat_template": CHAT})
    return ask(place, right)


@situation(
    "companions", "the chat template in chat_template.jinja, which donors keep elsewhere", "gradients-ai/G.O.D#1295",
    right="the target's is carried over, the donors' are not",
)  # fmt: skip
def template_in_jinja(place: Path) -> Asked:
    right = plain(place)
    put(place / "target/chat_template.jinja", CHAT)
    (place / "plus/chat_template.jinja").unlink()
    edit(place / "plus/tokenizer_config.json", chat_template="{{ 'another' }}")
    return ask(place, right)


@situation(
    "companions",
    "several chat templates (additional_chat_templates/)",
    "arcee-ai/mergekit#589",
    right="all are carried over",
)
def several_templates(place: Path) -> Asked:
    right = plain(place)
    put(place / "target/chat_template.jinja", CHAT)
    put(place / "target/additional_chat_templates/tool_use.jinja", "{{ tools }}" + CHAT)
    put(place / "target/additional_chat_templates/rag.jinja", "{{ documents }}" + CHAT)
    return ask(place, right)


@situation(
    "companions", "preprocessor_config.json, video_preprocessor_config.json, processor_config.json",
    "hiyouga/LlamaFactory#5749", right="carried over",
)  # fmt: skip
def processors(place: Path) -> Asked:
    right = plain(place)
    for name in ("preprocessor_config", "video_preprocessor_config", "processor_config"):
        put(place / f"target/{name}.json", {"image_processor_type": "Qwen2VLImageProcessor", "name": name})
    return ask(place, right)


@situation(
    "companions", "remote code (auto_map and *.py) in the target and the donors", "arcee-ai/mergekit#105",
    right="the target's is carried over, and none is run",
)  # fmt: skip
def remote_code(place: Path) -> Asked:
    right = plain(place)
    for role in ROLES:
        code = f"open({str(place / 'executed')!r}, 'w').write('x')\n"
        put(place / role / "configuration_tiny.py", code)
        put(place / role / "modeling_tiny.py", code)
        edit(place / role / "config.json", auto_map={"AutoConfig": "configuration_tiny.TinyConfig"})
    return ask(place, right)


@situation(
    "companions", "a sentencepiece tokenizer (tokenizer.model, added_tokens.json, special_tokens_map.json), merges.txt "
    "and vocab.json", "2U1/Llama3.2-Vision-Finetune#5", right="carried over byte for byte",
)  # fmt: skip
def other_tokenizer_files(place: Path) -> Asked:
    right = plain(place)
    (place / "target/tokenizer.model").write_bytes(bytes(range(256)))
    put(place / "target/merges.txt", "#version: 0.2\nw 3\n")
    put(place / "target/special_tokens_map.json", {"bos_token": "<s>"})
    return ask(place, right)


@situation(
    "companions", "generation_config.json asks for sampling", "arcee-ai/mergekit#275", right="carried over"
)  # fmt: skip
def generation_config_carried(place: Path) -> Asked:
    right = plain(place)
    put(place / "target/generation_config.json", {"do_sample": True, "temperature": 0.6, "top_p": 0.95})
    return ask(place, right)


@situation(
    "companions", "the optimizer's states and the trainer's beside the weights (optimizer.pt, trainer_state.json)",
    "none found", right="what is no part of the model stays behind: pickles; JSON is carried over",
)  # fmt: skip
def training_states(place: Path) -> Asked:
    right = plain(place)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (place / "target" / name).write_bytes(b"pickle")
    put(place / "target/trainer_state.json", {"global_step": 3})
    return ask(place, right)


# --- asked for by mistake


@situation(
    "mistakes",
    "plus and minus are the same checkpoint",
    "none found",
    right="the output is the target, and that is said",
)
def plus_is_minus(place: Path) -> Asked:
    weights = siblings(llama())
    write_all(place, weights)
    same = VectorConfig(str(place / "plus"), str(place / "plus"))
    return ask(place, Right(weights["target"], notes=["hold the same weights: their vector is zero"]), vector=same)


@situation(
    "mistakes",
    "the output is a donor, with overwrite=true",
    "none found",
    refused="names the source that would be lost",
)
def output_over_a_donor(place: Path) -> Asked:
    plain(place)
    return ask(place, Refused(["is or holds the source"]), output=str(place / "plus"), overwrite=True)


@situation(
    "mistakes",
    "donors of another pre-training",
    "arcee-ai/mergekit#125",
    refused="gives their sampled distance from the target",
)
def another_pretraining(place: Path) -> Asked:
    stranger = llama(77)
    stranger["model.norm.weight"] = llama()["model.norm.weight"]
    weights = {"target": llama(), "plus": near(stranger, 1), "minus": near(stranger, 2)}
    write_all(place, weights)
    return ask(place, Refused(["not from the same pre-training", r"distance is 1\.\d"]))


@situation(
    "mistakes",
    "a base model's vector on another size of it",
    "arcee-ai/mergekit#125",
    refused="names a tensor and both shapes, or the key of the config",
)
def another_size(place: Path) -> Asked:
    weights = siblings(llama())
    write_all(place, weights)
    shutil.rmtree(place / "target")
    wide = {name: tensor.repeat(*[2] * tensor.dim()) for name, tensor in llama().items()}
    write(place / "target", wide, config={"hidden_size": 2 * HIDDEN})
    return ask(place, Refused([r"has shape \[|hidden_size"]))


@situation(
    "mistakes", "donors saved from a compiled model: every name begins with _orig_mod.", "karpathy/nanoGPT#325",
    refused="says that nothing is in common",
)  # fmt: skip
def compiled_donors(place: Path) -> Asked:
    weights = siblings(llama())
    for role in ROLES:
        prefix = "" if role == "target" else "_orig_mod."
        write(place / role, {prefix + name: tensor for name, tensor in weights[role].items()}, tokens=40)
    return ask(place, Refused(["no tensor in common|vector.rename"]))


@situation(
    "mistakes", "target=. typed in the target's directory, {target} in the output", "none found",
    right="the directory's name",
)  # fmt: skip
def target_is_here(place: Path) -> Asked:
    plain(place)
    typed = ["target=.", "vector.plus=../plus", "vector.minus=../minus", "output=../{target}-x", "stages=[plan]"]
    return Asked(Config(), Said(["target-x"], "target"), typed=typed)


@situation(
    "mistakes", "a RAY_TMPDIR whose name is too long for the sockets of Ray", "verl-project/verl#1120",
    refused="says to set a shorter one", heavy=True,
)  # fmt: skip
def long_temporary_directory(place: Path) -> Asked:
    plain(place)
    long = place / ("a_very_long_scratch_directory_of_a_cluster/" * 3)
    long.mkdir(parents=True)
    typed = ["target=target", "vector.plus=plus", "vector.minus=minus", "output=out", "merge.workers=1"]  # on Ray
    return Asked(Config(), Refused(["RAY_TMPDIR"]), typed=typed, environment={"RAY_TMPDIR": str(long)})
