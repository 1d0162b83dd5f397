"""Remapped checkpoints beside mergekit's results: ranges, our own key, what is written, and what is refused."""

import json
import os
import random
import re
import shutil
import tracemalloc
from contextlib import closing
from dataclasses import replace

import pairs
import pytest
import torch
from adapters import factors, write_adapter
from checkpoints import launch, load_checkpoint
from hostile import mutants
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from rvdist.core.errors import BadInput
from rvdist.core.point import Term, Vector, WeightPoint
from rvdist.core.vocabulary import TokenRule, Vocabulary, vocabulary_of
from rvdist.merge.plan import build_plan
from rvdist.pocket.tokenizer import CHAT_TEMPLATE, build
from rvdist.weights.checkpoint.beside import companions
from rvdist.weights.checkpoint.digest import checkpoint_digest
from rvdist.weights.checkpoint.remapped import MEAN, PADDING, ZERO
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.checkpoint.tokens import read_tokens
from rvdist.weights.checkpoint.vocabulary import remap
from rvdist.weights.operand import open_operand

EMBEDDING = "model.embed_tokens.weight"


def point(where, source="union", rules=(), multiple=None, others=("other",)):
    models = [str(where / name) for name in ("base", *others)]
    terms = tuple(Term(0.5, Vector(other, models[0])) for other in models[1:])
    return WeightPoint(models[0], terms, vocabulary=Vocabulary(source, tuple(models), tuple(rules), multiple))


def opened(asked):
    sources = {source: open_source(source) for source in asked.sources()}
    return sources | remap(asked, sources, open_source)


def as_bf16(where):
    for model in where.iterdir():
        as_bf16_of(model)


def as_bf16_of(model):
    tensors = {name: t.bfloat16() for name, t in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors")


def edit(path, **changed):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changed))


@pytest.mark.parametrize("halves", [False, True])
def test_any_range_is_that_of_the_whole(tmp_path, halves):
    pairs.write("means", tmp_path)
    if halves:
        as_bf16(tmp_path)
    rules = [TokenRule("ab", force=True), TokenRule("<new>", str(tmp_path / "two"), row=4)]
    sources = opened(point(tmp_path, rules=rules, multiple=32, others=("one", "two", "three", "four")))
    chance = random.Random(0)
    kinds = set()
    for source in sources.values():
        spec = source.tensors[EMBEDDING]
        kinds |= set(source.rows[EMBEDDING].owner.tolist())
        with closing(open_operand(source)) as operand, closing(open_operand(source)) as other:
            whole = operand.read(EMBEDDING, 0, spec.numel, torch.empty(8 * spec.numel, dtype=torch.uint8)).clone()
            for _ in range(60):
                begin = chance.randrange(spec.numel)
                end = chance.randrange(begin, spec.numel) + 1
                part = other.read(EMBEDDING, begin, end, torch.empty(8 * (end - begin), dtype=torch.uint8))
                assert torch.equal(part, whole[begin:end])
        rows = whole.view(spec.shape)
        tokens = source.rows[EMBEDDING].tokens
        padding = rows[:tokens].double().mean(0).to(rows.dtype)
        assert len(rows) == 32 and all(torch.equal(row, padding) for row in rows[tokens:])
    assert {ZERO, MEAN, PADDING, 0, 1} <= kinds


def test_our_own_key_on_three_models(tmp_path):
    pairs.write("means", tmp_path)
    given = (
        "target=base",
        "vector.plus=one",
        "vector.minus=two",
        "alpha=[0.5,-1]",
        "output=out/{alpha}",
        "cache.dir=c",
    )
    done = launch(*given, "tokenizer=union", "compat.force=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "note: the tokenizer is the union of all tokenizers\n" in done.stdout + done.stderr
    rows = {name: load_file(tmp_path / name / "model.safetensors")[EMBEDDING] for name in ("base", "one", "two")}
    ids = {name: read_tokens(tmp_path / name).ids for name in rows}
    for alpha in (0.5, -1.0):
        out = tmp_path / "out" / f"{alpha:g}"
        written = load_checkpoint(out)[EMBEDDING]
        tokens = AutoTokenizer.from_pretrained(out).get_vocab()
        assert len(tokens) == len(written) == len(set(ids["base"]) | set(ids["one"]) | set(ids["two"]))
        for token, number in tokens.items():
            has = {name: rows[name][ids[name][token]] for name in rows if token in ids[name]}
            default = has.get("base", sum(has.values()) / len(has))
            base, plus, minus = (has.get(name, default) for name in ("base", "one", "two"))
            assert torch.equal(written[number], base + alpha * (plus - minus)), token


@pytest.mark.heavy
def test_on_ray_and_in_this_process_the_bytes_are_the_same(tmp_path):
    pairs.write("rules", tmp_path)
    block = '{source: union, pad_to_multiple_of: 64, tokens: {"<pad>": {source: third, force: true}}}'
    rule = f"tokenizer='{block}'"
    given = ("target=base", "vector.plus=other", "vector.minus=third", rule, "cache.dir=c", "compat.force=true")
    for extra in (("output=a",), ("output=b", "merge.workers=2")):
        done = launch(*given, *extra, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_a_model_by_two_names_counts_once(tmp_path):
    pairs.write("means", tmp_path)
    named = point(tmp_path, others=("one", "two", "three"))
    again = str(tmp_path) + "//one"
    vector = named.terms[1].vector
    twice = replace(
        named,
        terms=(*named.terms, Term(0.5, replace(vector, plus=again))),
        vocabulary=replace(named.vocabulary, models=(*named.vocabulary.models, again)),
    )
    once, both = opened(named), opened(twice)
    assert all(both[source].digest == once[source].digest for source in once)
    assert both[again].digest == once[str(tmp_path / "one")].digest


def test_where_all_have_the_tokens_nothing_is_another(tmp_path):
    pairs.write("bpe", tmp_path)
    shutil.copytree(tmp_path / "base", tmp_path / "twin")
    asked = point(tmp_path, "base", others=("twin",))
    sources = {source: open_source(source) for source in asked.sources()}
    assert remap(asked, sources, open_source) == {}
    given = ("target=base", "vector.plus=twin", "vector.minus=base", "output=out", "cache.dir=c")
    assert launch(*given, "tokenizer=target", cwd=tmp_path).returncode == 0
    again = launch(*given, cwd=tmp_path)
    assert again.returncode == 0 and "already complete" in again.stdout + again.stderr


def test_what_decides_rows_decides_digests(tmp_path):
    pairs.write("bpe", tmp_path)

    def digests(asked):
        sources = opened(asked)
        (plan,), *_ = build_plan({tmp_path / "out": asked}, sources).digests
        return plan, asked.digest({name: checkpoint_digest(source) for name, source in sources.items()})

    asked = point(tmp_path)
    seen = [digests(asked), digests(replace(asked, vocabulary=replace(asked.vocabulary, multiple=64)))]
    seen.append(digests(replace(asked, vocabulary=replace(asked.vocabulary, source="base"))))
    content = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["j"] = vocab["j"], vocab["a"]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(content))
    seen.append(digests(asked))
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    save_file({name: t + 1 for name, t in tensors.items()}, tmp_path / "other" / "model.safetensors")
    seen.append(digests(asked))
    assert len({plan for plan, _ in seen}) == len({digest for _, digest in seen}) == len(seen)
    assert digests(asked) == seen[-1]
    assert WeightPoint.from_json(json.loads(json.dumps(asked.to_json()))) == asked


def test_every_file_that_decides_tokens_decides_the_plan(tmp_path):
    pairs.write("bpe", tmp_path)
    base, other, asked = tmp_path / "base", tmp_path / "other", point(tmp_path)
    seen = []

    def look():
        (plan,), *_ = build_plan({tmp_path / "out": asked}, opened(asked)).digests
        assert plan not in seen
        seen.append(plan)

    look()
    for change in (
        lambda: edit(base / "tokenizer.json", normalizer={"type": "NFC"}),
        lambda: edit(base / "tokenizer_config.json", padding_side="left"),
        lambda: edit(base / "special_tokens_map.json", bos_token="<s>"),
        lambda: edit(base / "config.json", eos_token_id=12),
        lambda: edit(base / "generation_config.json", eos_token_id=12),
        lambda: edit(other / "tokenizer_config.json", eos_token="bc"),  # which is a plain token else
        lambda: edit(other / "special_tokens_map.json", pad_token="cd"),
        lambda: edit(other / "tokenizer.json", added_tokens=as_special(other, "<tool>")),
        lambda: edit(other / "config.json", vocab_size=15),  # one row less
    ):
        change()
        look()
    edit(other / "added_tokens.json", **{"<tool>": 15})
    (plan,), *_ = build_plan({tmp_path / "out": asked}, opened(asked)).digests
    assert plan == seen[-1]  # says nothing new: a token of another id is refused


def as_special(where, token):
    listed = json.loads((where / "tokenizer.json").read_text())["added_tokens"]
    return [one | {"special": one["content"] == token or one["special"]} for one in listed]


def test_special_tokens_get_the_ids_that_they_have_in_another_tokenizer(tmp_path):
    pairs.write("of_a_model", tmp_path)
    edit(tmp_path / "base" / "config.json", bos_token_id=12, eos_token_id=[13, 12], text_config={"vocab_size": 14})
    edit(tmp_path / "base" / "generation_config.json", eos_token_id=[13], pad_token_id=-1, temperature=0.5)
    (tmp_path / "base" / "vocab.json").write_text("{}")
    (tmp_path / "other" / "chat_template.jinja").write_text("other's")
    given = ("target=base", "vector.plus=other", "vector.minus=base", "output=out", "cache.dir=c", "compat.force=true")
    refused = launch(*given, "tokenizer=other", cwd=tmp_path)
    assert refused.returncode == 0, refused.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    ids = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert (config["bos_token_id"], config["eos_token_id"]) == (ids["<s>"], [ids["</s>"], ids["<s>"]]) == (1, [0, 1])
    assert config["vocab_size"] == config["text_config"]["vocab_size"] == len(ids)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [0], "pad_token_id": -1, "temperature": 0.5}
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "other's"
    assert not (tmp_path / "out" / "vocab.json").exists()
    edit(tmp_path / "base" / "config.json", eos_token_id=10)  # "ab", which the other lacks
    refused = launch(*given, "tokenizer=other", "overwrite=true", cwd=tmp_path)
    assert refused.returncode == 2 and "eos_token_id is 10, token 'ab', which the tokenizer of" in refused.stderr


def test_the_pocket_family_s_tokenizer_with_more_tokens(tmp_path):
    pairs.write("bpe", tmp_path)
    for model, more in (("base", ["<tool>"]), ("other", ["<|user|>", "<tool>", "zz"])):
        tokenizer = build(CHAT_TEMPLATE, 64)
        tokenizer.add_tokens(more)
        tokenizer.save_pretrained(tmp_path / model)
        tensors = load_file(tmp_path / model / "model.safetensors")
        rows = torch.arange(4.0 * len(tokenizer)).view(-1, 4)
        tensors |= {name: rows.clone() for name in (EMBEDDING, "lm_head.weight")}
        save_file(tensors, tmp_path / model / "model.safetensors")
        edit(tmp_path / model / "config.json", vocab_size=len(tokenizer))
    given = ("target=base", "vector.plus=other", "vector.minus=base", "output=out", "cache.dir=c", "compat.force=true")
    done = launch(*given, "tokenizer=union", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    built = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert built.get_vocab() == Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).get_vocab()
    assert {token: number for token, number in built.get_vocab().items() if number > 257} == {
        "<tool>": 258, "<|user|>": 259, "zz": 260
    }  # fmt: skip
    assert built.encode("a<|user|>b<tool>zz") == [97, 259, 98, 258, 260]
    assert built.chat_template == CHAT_TEMPLATE and len(load_checkpoint(tmp_path / "out")[EMBEDDING]) == 261


def test_jobs_with_different_tokenizers_are_different_outputs(tmp_path):
    pairs.write("padded", tmp_path)
    given = ("target=base", "vector.plus=other", "vector.minus=base", "cache.dir=c", "compat.force=true")
    done = launch("-m", *given, "tokenizer=target,union", "output=out-${tokenizer}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sizes = {name: len(load_checkpoint(tmp_path / f"out-{name}")[EMBEDDING]) for name in ("target", "union")}
    assert sizes == {"target": 12, "union": 14}
    done = launch("-m", *given, "tokenizer=target,union", "output=same", cwd=tmp_path)
    assert done.returncode == 1 and "several jobs would write" in done.stderr


def test_a_vector_is_measured_by_token(tmp_path):
    pairs.write("bpe", tmp_path)
    given = ("target=base", "vector.plus=other", "vector.minus=base", "tokenizer=union", "cache.dir=c")
    more = ("compat.force=true", "alpha=1", "output=out", "stages=[merge,analyze]", "hydra.run.dir=run")
    done = launch(*given, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    name, written = "model.embed_tokens.weight", load_checkpoint(tmp_path / "out")
    ids = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    own = AutoTokenizer.from_pretrained(tmp_path / "base").get_vocab()
    base, v = load_checkpoint(tmp_path / "base")[name], torch.zeros_like(written[name])
    for token, row in own.items():  # what the base lacks it has as the other does
        v[ids[token]] = written[name][ids[token]] - base[row]
    (tensor,) = [
        one for one in json.loads((tmp_path / "run" / "anatomy.json").read_text())["tensors"] if one["name"] == name
    ]
    found = tensor["vectors"]["vector"]
    assert (tensor["elements"], found["zeros"]) == (v.numel(), (v == 0).sum().item() / v.numel())
    assert found["norm"] == pytest.approx(v.double().norm().item(), rel=1e-12)


GIVEN = ("target=base", "vector.plus=other", "vector.minus=base", "tokenizer=union", "cache.dir=c", "compat.force=true")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ("stages=[analyze]", "analyze.text=text"),
            "analyze.text reads donors with their own tokens; score it along α instead (benchmarks.tasks=[text:FILE]",
        ),
        (
            ("benchmarks=pocket", "arms=[{name: a, weights: base}, {name: b, alpha: 1}]"),
            "base: is wanted with different tokens, its own or those of a merge; write the output first",
        ),
        (
            ("stages=[analyze]", "analyze.text=text", "target=third"),
            "analyze.text reads donors with their own tokens; score it along α instead (benchmarks.tasks=[text:FILE]",
        ),
        (("vector.save=v",), "vector.save stores a vector with the tokens of its donors"),
        (("output=out", "tokenizer=nowhere"), "nowhere"),
        (("output=out", "tokenizer='{a'"), "tokenizer: is not YAML"),
        (("output=out", "tokenizer=3"), "tokenizer: 3 is not union, base, or the name of a model"),
        (("output=out", "tokenizer={source: base, tokens: {x: {source: y}}}"), "'y' is not one of the models"),
        (("recipe=r.yml", "target=''"), "recipe and"),
    ],
)
def test_what_the_command_refuses(tmp_path, more, said):
    pairs.write("bpe", tmp_path)
    shutil.copytree(tmp_path / "base", tmp_path / "third")
    done = launch(*GIVEN, *more, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_donors_of_different_tokens_are_stored_when_they_have_the_same(tmp_path):
    """What vector.save advises where tokenizer is set; and donors that have not the same are refused."""
    pairs.Model("bpe", pairs.words("ab"), [pairs.special("<s>")]).write(tmp_path / "minus", 0)
    pairs.Model("bpe", [*reversed(pairs.words("ab"))], ["<own>"]).write(tmp_path / "plus", 1)
    donors = ("vector.plus=plus", "vector.minus=minus", "cache.dir=c")
    refused = launch(*donors, "vector.save=v", cwd=tmp_path)
    assert refused.returncode == 2 and not (tmp_path / "v").exists()
    assert re.search("plus: its tokenizer differs from vector.minus's .*; compat.force=true stores", refused.stderr)
    refused = launch("target=minus", *donors, "tokenizer=union", "vector.save=v", cwd=tmp_path)
    said = refused.stderr.partition("before: ")[2].partition(", each with")[0]
    for command in said.replace("MINUS", "minus").replace("PLUS", "plus").split(", and then "):
        done = launch(*command.split(), *donors, "compat.force=true", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    done = launch("vector.plus=P", "vector.minus=M", "vector.save=v", "cache.dir=c", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = launch("target=M", "vector.path=v", "alpha=1", "output=again", "cache.dir=c", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again, written, own = (load_checkpoint(tmp_path / name) for name in ("again", "P", "plus"))
    assert all(torch.equal(again[name], tensor) for name, tensor in written.items())
    new, old = (read_tokens(tmp_path / name).ids for name in ("again", "plus"))
    assert all(torch.equal(again[EMBEDDING][new[token]], own[EMBEDDING][row]) for token, row in old.items())


def untied(where):
    tensors = load_file(where / "other" / "model.safetensors")
    save_file({k: t for k, t in tensors.items() if k != "lm_head.weight"}, where / "other" / "model.safetensors")


def hole(where):
    content = json.loads((where / "base" / "tokenizer.json").read_text())
    del content["model"]["vocab"]["b"]
    (where / "base" / "tokenizer.json").write_text(json.dumps(content))


def with_model(**said):
    def spoil(where):
        content = json.loads((where / "base" / "tokenizer.json").read_text())
        edit(where / "base" / "tokenizer.json", model=content["model"] | said)

    return spoil


def of_bytes(where):
    save_file(
        {"model.token_embedder.weight": torch.zeros(13, 4)} | load_file(where / "base" / "model.safetensors"),
        where / "base" / "model.safetensors",
    )


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda where: (where / "other" / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (with_model(merges=5, vocab={"a": 0, "b": 99}), "its merges are no pairs of tokens"),
        (with_model(vocab={f"{k}": k for k in range(2**20 + 1)}), "has 1,048,577 tokens, more than the 1,048,576"),
        (untied, "has no lm_head.weight"),
        (hole, "has 17 tokens and none of id 1, though there are higher ones"),
        (of_bytes, "tensor model.token_embedder.weight has as many rows as the vocabulary"),
        (lambda where: edit(where / "other" / "config.json", vocab_size=999), "has vocab_size=999, and .* has 16 rows"),
        (lambda where: edit(where / "other" / "tokenizer_config.json", pad_token="<none>"), "names token '<none>'"),
        (
            lambda where: edit(
                where / "other" / "tokenizer_config.json", added_tokens_decoder={"3": {"content": "<s>"}}
            ),
            "gives token '<s>' the id 3",
        ),
        (lambda where: edit(where / "other" / "special_tokens_map.json", pad_token={"content": "<none>"}), "'<none>'"),
        (lambda where: edit(where / "other" / "added_tokens.json", **{"<s>": 3}), "gives token '<s>' the id 3"),
        (
            lambda where: edit(where / "other" / "added_tokens.json", a=12),
            "names token 'a', which tokenizer.json lacks",
        ),
        (lambda where: edit(where / "other" / "added_tokens.json", a=12, b=12), "gives two tokens one id"),
        (with_model(merges=["a b"] * (2**20 + 1)), "has 1,048,577 merges, more than the 1,048,576"),
    ],
)
def test_what_is_refused(tmp_path, spoil, said):
    pairs.write("bpe", tmp_path)
    opened(point(tmp_path))
    spoil(tmp_path)
    with pytest.raises(BadInput, match=said):
        opened(point(tmp_path))


@pytest.mark.parametrize(
    ("file", "nbytes", "text", "said"),
    [
        ("tokenizer.json", 48 * 2**20 + 1, "", "it has 50,331,649 bytes, and at most 50,331,648 are read"),
        ("tokenizer.json", None, f"[{'0,' * 3_200_000}0]", "has 3,200,000 values, more than the 3,145,728"),
        ("tokenizer_config.json", 4 * 2**20 + 1, "", "at most 4,194,304 are read"),
        ("special_tokens_map.json", 4 * 2**20 + 1, "", "at most 4,194,304 are read"),
        ("added_tokens.json", 4 * 2**20 + 1, "", "at most 4,194,304 are read"),
    ],
)
def test_what_is_too_large_for_a_tokenizer_is_not_parsed(tmp_path, file, nbytes, text, said):
    pairs.write("bpe", tmp_path)
    (tmp_path / "other" / file).write_text(text)
    if nbytes:
        os.truncate(tmp_path / "other" / file, nbytes)
    tracemalloc.start()
    try:
        with pytest.raises(BadInput, match=said):
            read_tokens(tmp_path / "other")
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20  # the bytes alone
    finally:
        tracemalloc.stop()


def test_padding_is_to_a_multiple_that_models_have():
    assert vocabulary_of({"source": "union", "pad_to_multiple_of": 8192}, ["a"]).multiple == 8192
    with pytest.raises(BadInput, match="pad_to_multiple_of: 1048576 is not a number of rows from 0 to 8,192"):
        vocabulary_of({"source": "union", "pad_to_multiple_of": 2**20}, ["a"])


def with_tensor(name, shape, rows=None, **said):
    """Both models get a tensor that has as many rows as they have tokens, or so many."""

    def spoil(where):
        other = json.loads((where / "base" / "tokenizer.json").read_text())
        vocab = other["model"]["vocab"]
        vocab["a"], vocab["j"] = vocab["j"], vocab["a"]
        shutil.rmtree(where / "other")
        shutil.copytree(where / "base", where / "other")
        (where / "other" / "tokenizer.json").write_text(json.dumps(other))
        for model in ("base", "other"):
            tensors = load_file(where / model / "model.safetensors")
            values = torch.arange(float(rows or len(tensors[EMBEDDING])))
            save_file(tensors | {name: values.view(shape)}, where / model / "model.safetensors")
            edit(where / model / "config.json", **said)

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        with_tensor("cls.predictions.bias", (-1,)),
        with_tensor("final_logits_bias", (1, -1)),
        with_tensor("output.weight", (-1, 1)),
        with_tensor("model.embed_tokens_per_layer.weight", (-1, 1), 11, vocab_size_per_layer_input=11),
    ],
)
def test_what_may_have_rows_by_token_is_not_left_as_it_is(tmp_path, spoil):
    pairs.write("bpe", tmp_path)
    spoil(tmp_path)
    with pytest.raises(BadInput, match="has as many rows as the vocabulary .* leave tokenizer out"):
        opened(point(tmp_path))


@pytest.mark.parametrize("part", [None, "text_config"])
def test_a_config_that_leaves_the_number_of_rows_to_its_class_says_it(tmp_path, part):
    pairs.write("bpe", tmp_path)
    for model in ("base", "other"):
        config = json.loads((tmp_path / model / "config.json").read_text())
        del config["vocab_size"]
        (tmp_path / model / "config.json").write_text(json.dumps(config | ({part: {"hidden_size": 4}} if part else {})))
    config = next(iter(opened(point(tmp_path)).values())).config
    assert (config[part] if part else config)["vocab_size"] == 17 and ("vocab_size" in config) == (part is None)


def test_parts_of_a_config_under_any_name_get_the_number_of_rows(tmp_path):
    pairs.write("of_a_model", tmp_path)
    base = tmp_path / "base" / "config.json"
    own = {"vocab_size": 14, "eos_token_id": 13}
    edit(base, thinker={"text_config": own}, codec={"vocab_size": 9, "begin_token_id": -1})
    asked = point(tmp_path, str(tmp_path / "other"))
    config = opened(asked)[str(tmp_path / "base")].config
    assert config["thinker"] == {"text_config": {"vocab_size": 13, "eos_token_id": 0}}
    assert config["codec"] == {"vocab_size": 9, "begin_token_id": -1}
    edit(base, codec={"vocab_size": 9, "begin_token_id": 3})
    with pytest.raises(BadInput, match="codec.begin_token_id is 3, and it is not known whether these are"):
        opened(asked)
    config = json.loads(base.read_text()) | {"codec": {"vocab_size": 9}}
    del config["vocab_size"], config["thinker"]
    base.write_text(json.dumps(config))
    with pytest.raises(BadInput, match="codec.vocab_size is 9, the embedding has 14 rows, and it is not known"):
        opened(asked)


def test_a_special_token_without_a_row_is_no_other_token(tmp_path):
    pairs.write("bytes", tmp_path)
    base = tmp_path / "base"
    content = json.loads((base / "tokenizer.json").read_text())
    number = max(one["id"] for one in content["added_tokens"]) + 1  # of which the other model's first would be
    content["added_tokens"].append(content["added_tokens"][0] | {"id": number, "content": "<pad>"})
    (base / "tokenizer.json").write_text(json.dumps(content))
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {EMBEDDING: tensors[EMBEDDING][:number].clone()}, base / "model.safetensors")
    edit(base / "config.json", vocab_size=number, pad_token_id=number)
    with pytest.raises(BadInput, match=f"pad_token_id is {number}, token '<pad>', which the model has no row for"):
        opened(point(tmp_path))
    added = point(tmp_path, rules=[TokenRule("<pad>")])
    mapped = opened(added)[added.base]
    assert mapped.config["pad_token_id"] == mapped.tokenizer.ids["<pad>"] != number
    edit(base / "config.json", pad_token_id=None)
    edit(base / "tokenizer_config.json", pad_token="<pad>")
    with pytest.raises(BadInput, match="names token '<pad>', for which the model has no row"):
        opened(point(tmp_path))
    edit(base / "tokenizer_config.json", pad_token=None)
    edit(base / "generation_config.json", eos_token_id=[number])
    with pytest.raises(BadInput, match=f"generation_config.json: eos_token_id is {number}"):
        opened(point(tmp_path))


def test_no_file_of_another_tokenizer_goes_along(tmp_path):
    pairs.write("bpe", tmp_path)
    for name in ("tekken.json", "spiece.model", "sentencepiece.bpe.model", "encoder.json", "qwen.tiktoken"):
        (tmp_path / "base" / name).write_text("{}")
    mapped = opened(point(tmp_path))[str(tmp_path / "base")]
    assert sorted(map(str, companions(mapped))) == ["config.json", "tokenizer.json", "tokenizer_config.json"]


def test_an_adapter_of_layers_is_added_beside_models_that_are_merged_by_token(tmp_path):
    pairs.write("bpe", tmp_path)
    name = "model.layers.0.mlp.up_proj"
    parts = {"lora_A": torch.eye(4)[:2], "lora_B": torch.arange(12.0).view(6, 2)}
    parts = {f"base_model.model.{name}.{part}.weight": values for part, values in parts.items()}
    write_adapter(tmp_path / "adapter", parts, r=2, lora_alpha=2, rank_pattern={}, alpha_pattern={})
    given = ("target=base", "tokenizer=union", "cache.dir=c", "compat.force=true")
    other = "{plus: other, minus: base, alpha: 0.5}"
    adapters = "{path: adapter, alpha: 1}, {plus: adapter, minus: base, alpha: 1}"
    for vectors, out in ((other, "plain"), (f"{other}, {adapters}", "more")):
        done = launch(*given, f"vectors=[{vectors}]", f"output={out}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    plain, more = (load_checkpoint(tmp_path / out) for out in ("plain", "more"))
    plain[f"{name}.weight"][:, :2] += 2 * torch.arange(12.0).view(6, 2)
    assert plain.keys() == more.keys() and len(plain[EMBEDDING]) == 17
    assert all(torch.equal(tensor, plain[key]) for key, tensor in more.items())


def write_with_new_tokens(where, tokens=("<new>",), rows=None):
    """An adapter of the pair's base, beside whose factors are an embedding and a head with rows for new tokens."""
    up = "base_model.model.model.layers.0.mlp.up_proj"
    parts = {f"{up}.lora_A.weight": torch.eye(4)[:2], f"{up}.lora_B.weight": torch.arange(12.0).view(6, 2)}
    whole = torch.arange(4.0 * (rows or 13 + len(tokens))).view(-1, 4)
    parts |= {f"base_model.model.{EMBEDDING}": whole / 3, "base_model.model.lm_head.weight": whole / 7}
    write_adapter(where / "adapter", parts, r=2, lora_alpha=2, rank_pattern={}, alpha_pattern={})
    tokenizer = Tokenizer.from_file(str(where / "base" / "tokenizer.json"))
    tokenizer.add_tokens(list(tokens))
    tokenizer.save(str(where / "adapter" / "tokenizer.json"))
    return whole


@pytest.mark.parametrize("halves", [False, True])
def test_an_adapter_brings_the_rows_of_its_new_tokens(tmp_path, halves):
    pairs.write("bpe", tmp_path)
    if halves:
        as_bf16(tmp_path)
    whole = write_with_new_tokens(tmp_path, ("<new>", "<more>"), rows=24)[:15]
    base = load_checkpoint(tmp_path / "base")
    done = launch(
        *("target=base", "vector.path=adapter", "alpha=[0,0.5,1]", "output=out-{alpha}", "tokenizer=union"),
        "cache.dir=c",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for alpha in (0.0, 0.5, 1.0):
        out = tmp_path / f"out-{alpha:g}"
        written = load_checkpoint(out)
        for name, trained in ((EMBEDDING, whole / 3), ("lm_head.weight", whole / 7)):
            own = torch.cat([base[name], trained[13:].to(base[name].dtype)]).double()
            assert torch.equal(written[name], (own + alpha * (trained - own)).to(base[name].dtype)), (alpha, name)
        ids = AutoTokenizer.from_pretrained(out).get_vocab()
        assert (ids["<new>"], ids["<more>"]) == (13, 14)
        assert json.loads((out / "config.json").read_text())["vocab_size"] == 15


def test_an_adapter_whose_tokens_have_other_ids_is_refused(tmp_path):
    pairs.write("bpe", tmp_path)
    write_with_new_tokens(tmp_path)
    opened(point(tmp_path, others=("adapter",)))
    with pytest.raises(BadInput, match="in the output some ids are of others, or a rule has force"):
        opened(point(tmp_path, others=("adapter", "other")))
    with pytest.raises(BadInput, match="in the output some ids are of others, or a rule has force"):
        opened(point(tmp_path, others=("adapter",), rules=[TokenRule("ab", str(tmp_path / "base"), force=True)]))
    (tmp_path / "adapter" / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match="adapter: has no tokenizer.json"):
        opened(point(tmp_path, others=("adapter",)))


def test_a_row_of_another_dtype_is_rounded_once(tmp_path):
    pairs.write("bpe", tmp_path)
    exact = load_file(tmp_path / "other" / "model.safetensors")
    exact[EMBEDDING] = torch.randn(exact[EMBEDDING].shape, generator=torch.Generator().manual_seed(0))
    save_file(exact, tmp_path / "other" / "model.safetensors")
    as_bf16_of(tmp_path / "base")
    base = opened(point(tmp_path))[str(tmp_path / "base")]
    spec, own = base.tensors[EMBEDDING], read_tokens(tmp_path / "base").ids
    with closing(open_operand(base)) as operand:
        rows = operand.read(EMBEDDING, 0, spec.numel, torch.empty(8 * spec.numel, dtype=torch.uint8)).view(spec.shape)
    borrowed = {token: row for token, row in read_tokens(tmp_path / "other").ids.items() if token not in own}
    assert borrowed
    for token, row in borrowed.items():
        assert torch.equal(rows[base.tokenizer.ids[token]], exact[EMBEDDING][row].bfloat16())


def test_an_adapter_of_the_embedding_is_refused(tmp_path):
    pairs.write("bpe", tmp_path)
    write_adapter(tmp_path / "adapter", factors())
    with pytest.raises(
        BadInput, match="is an adapter that has no whole rows of model.embed_tokens.weight, .*; merge it"
    ):
        opened(point(tmp_path, others=("adapter",)))


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"])
@pytest.mark.parametrize("model", ["base", "other"])
@pytest.mark.parametrize("source", ["union", "other"])
def test_no_value_is_anything_but_taken_or_refused(tmp_path, file, model, source):
    pairs.write("bpe", tmp_path)
    edit(tmp_path / "base" / "generation_config.json", eos_token_id=12)
    decoder = {"12": {"content": "<s>", "special": True}}
    edit(tmp_path / "base" / "tokenizer_config.json", eos_token="<s>", added_tokens_decoder=decoder)
    edit(tmp_path / "other" / "tokenizer_config.json", additional_special_tokens=["<tool>"])
    edit(tmp_path / "other" / "generation_config.json", eos_token_id=12)
    asked = point(tmp_path, source if source == "union" else str(tmp_path / "other"))
    path = tmp_path / model / file
    taken = 0
    for mutant in mutants(json.loads(path.read_text())):
        path.write_text(json.dumps(mutant))
        try:
            for one in opened(asked).values():
                if getattr(one, "tokenizer", None):
                    assert one.written_beside() is not None and one.config is not None
            taken += 1
        except BadInput as error:
            assert "\n" not in str(error) and len(str(error)) < 4100, str(error)[:300]
        except Exception as error:
            raise AssertionError(f"{file}: {json.dumps(mutant)[:300]}") from error
    assert taken
