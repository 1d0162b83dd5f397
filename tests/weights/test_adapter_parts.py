"""Adapters of some rows of an embedding, of an embedding that is the head, and of a part of the experts: each is what
peft's own merge_and_unload makes of it."""

import json
from dataclasses import replace

import pytest
import torch
from adapters import RANK, factors, write_adapter
from checkpoints import launch, load_checkpoint, near, tensors, write_checkpoint
from points import read_point
from safetensors.torch import load_file, save_file
from test_trained_adapters import EXPERTS, mixture, point, require_merged, train

from rvdist.core.errors import BadInput
from rvdist.core.point import Mask, Term, Vector, WeightPoint
from rvdist.inspect import inspect
from rvdist.weights import compat
from rvdist.weights.checkpoint.layouts import lay_out, layout_of
from rvdist.weights.checkpoint.source import open_source

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = "base_model.model.{}.token_adapter.trainable_tokens_delta"
BESIDE = "base_model.model.{}.token_adapter.base_layer.weight"


def llama(tied: bool) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, tie_word_embeddings=tied))


TRAINED = {
    "rows": (False, {"trainable_token_indices": [50, 3, 96]}),
    "rows of both": (False, {"trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [90]}}),
    "rows of a tied embedding": (True, {"trainable_token_indices": [50, 3, 0]}),
    "rows beside DoRA": (False, {"trainable_token_indices": [5], "use_dora": True}),
    "a tied embedding": (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
}


def laid_out(one):
    sources = {name: open_source(name) for name in one.sources()}
    return {name: lay_out(source, sources[one.base]) for name, source in sources.items()}


@pytest.mark.parametrize("kind", TRAINED)
def test_it_is_what_peft_merges(tmp_path, kind):
    tied, settings = TRAINED[kind]
    train(tmp_path, llama(tied), **settings)
    require_merged(tmp_path, 3)
    said = compat.check(point(tmp_path), laid_out(point(tmp_path))).exceptions
    assert any("the head of base is its embedding" in one for one in said) == tied


@pytest.mark.parametrize("parameter", EXPERTS)
def test_a_part_of_experts_is_what_peft_merges_where_they_lie_one_by_one(tmp_path, parameter):
    train(tmp_path, mixture("qwen3"), target_parameters=[parameter])
    require_merged(tmp_path, 8)
    sources = laid_out(point(tmp_path))
    assert not any("skipped" in one for one in compat.check(point(tmp_path), sources).exceptions)
    base, ours = load_checkpoint(tmp_path / "base"), dict(read_point(point(tmp_path)))
    moved = {name.split(".")[-2] for name in base if "experts" in name and not torch.equal(base[name], ours[name])}
    assert moved == ({"down_proj"} if "down" in parameter else {"gate_proj", "up_proj"})


def adapted(place, rows, tensor=None, beside=None, **config):
    """An adapter with factors of two matrices, and these rows of the embedding, which may stand beside it."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(len(rows), 48, generator=generator) if tensor is None else tensor
    pairs = {name: factor for name, factor in factors().items() if "embed" not in name}
    stored = {TOKENS.format("model.embed_tokens"): values}
    stored |= {} if beside is None else {BESIDE.format("model.embed_tokens"): beside}
    return values, write_adapter(place, pairs | stored, **{"trainable_token_indices": list(rows)} | config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_those_of_the_adapter_to_the_bit_whatever_part_is_read(tmp_path, dtype):
    from rvdist.weights.reader import open_point

    base, rows = tensors(0, dtype), [300, 17, 18, 0]
    write_checkpoint(tmp_path / "base", base)
    values, _ = adapted(tmp_path / "adapter", rows)
    expected = base[EMBEDDING].clone()
    expected[rows] = values.to(dtype)
    whole = dict(read_point(point(tmp_path)))[EMBEDDING]
    assert torch.equal(whole, expected)
    numel = whole.numel()
    reader = open_point(point(tmp_path))
    for step in (7, 48, 1000):
        found = torch.empty(numel, dtype=dtype)
        for begin in range(0, numel, step):
            reader.fill(EMBEDDING, begin, found[begin : begin + step])
        assert torch.equal(found.view(whole.shape), expected), step
    reader.close()
    target = near(base, 5)
    write_checkpoint(tmp_path / "target", target)
    half = dict(read_point(point(tmp_path, 0.5, "base", "target")))[EMBEDDING]
    exact = target[EMBEDDING].double()
    exact[rows] += 0.5 * (values.double() - base[EMBEDDING][rows].double())
    assert torch.allclose(half.double(), exact, rtol=2**-8 if dtype == torch.bfloat16 else 2**-23, atol=1e-9)
    others = [row for row in range(301) if row not in rows]
    assert torch.equal(half[others], target[EMBEDDING][others])


def test_a_mask_leaves_them_out_and_inspect_names_them(tmp_path):
    write_checkpoint(tmp_path / "base", tensors(0))
    _, path = adapted(tmp_path / "adapter", [3, 400])
    one = WeightPoint(str(tmp_path / "base"), (Term(1.0, Vector(str(path)), Mask(exclude=(".*embed.*",))),))
    assert inspect(str(path))["made_of"]["stored"] | {"scales": []} == {
        "low_rank": 2, "rows": 1, "ranks": [RANK], "scales": []
    }  # fmt: skip
    compat.check(one, laid_out(one))
    unmasked = replace(one, terms=(replace(one.terms[0], mask=Mask()),))
    with pytest.raises(BadInput, match=r"has 401 rows of model.embed_tokens.weight, 100 more than .*tokenizer=union"):
        compat.check(unmasked, laid_out(unmasked))


@pytest.mark.parametrize(
    ("config", "tensor", "reason"),
    [
        ({"trainable_token_indices": [1, 2, 2]}, torch.zeros(3, 48), r"shape \[3, 48\] for 2 different rows"),
        ({"trainable_token_indices": [1, 2]}, torch.zeros(3, 48), r"shape \[3, 48\] for 2 different rows"),
        ({"trainable_token_indices": [-1, 2]}, torch.zeros(2, 48), "does not tell by its trainable_token_indices"),
        ({"trainable_token_indices": [1.0, 2]}, torch.zeros(2, 48), "does not tell by its trainable_token_indices"),
        ({"trainable_token_indices": 7}, torch.zeros(1, 48), "does not tell by its trainable_token_indices"),
        ({"trainable_token_indices": {"wte": [1]}}, torch.zeros(1, 48), "does not tell by its trainable_token_indices"),
        ({"trainable_token_indices": {"tokens": [1], "embed_tokens": [1]}}, torch.zeros(1, 48), "does not tell by its"),
        ({"trainable_token_indices": [1]}, torch.zeros(48), r"shape \[48\] for 1 different rows"),
        ({"trainable_token_indices": [1]}, torch.zeros(1, 48).int(), "is stored as I32"),
        ({"trainable_token_indices": None}, torch.zeros(1, 48), "does not say what it is"),
    ],
)
def test_rows_that_cannot_be_told_are_refused(tmp_path, config, tensor, reason):
    with pytest.raises(BadInput, match=reason) as refused:
        open_source(str(adapted(tmp_path / "a", [1], tensor, **config)[1]))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("held", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_beside_the_matrix_that_has_them_are_put_into_it_whatever_part_is_read(tmp_path, dtype, held):
    from rvdist.weights.reader import open_point

    base, rows = tensors(0, dtype), [300, 17, 18, 0]
    write_checkpoint(tmp_path / "base", base)
    matrix = near(base, 3)[EMBEDDING].to(held)
    values, _ = adapted(tmp_path / "adapter", rows, beside=matrix)
    expected = matrix.to(torch.float32)
    expected[rows] = values
    whole = dict(read_point(point(tmp_path)))[EMBEDDING]
    assert torch.equal(whole, expected.to(dtype))
    reader = open_point(point(tmp_path))
    for step in (7, 48, 1000):
        found = torch.empty(whole.numel(), dtype=dtype)
        for begin in range(0, whole.numel(), step):
            reader.fill(EMBEDDING, begin, found[begin : begin + step])
        assert torch.equal(found.view(whole.shape), whole), step
    reader.close()


@pytest.mark.parametrize(
    ("matrix", "rows", "reason"),
    [
        (torch.zeros(301, 47), [1], r"has shape \[301, 47\], and a row 1 of 48 was trained"),
        (torch.zeros(48), [1], r"has shape \[48\], and a row 1 of 48"),
        (torch.zeros(5, 48), [1, 5], r"has shape \[5, 48\], and a row 5 of 48"),
        (torch.zeros(5, 48).int(), [1], "is stored as I32"),
    ],
)
def test_a_matrix_that_its_rows_do_not_fit_is_refused(tmp_path, matrix, rows, reason):
    with pytest.raises(BadInput, match=reason):
        open_source(str(adapted(tmp_path / "a", rows, beside=matrix)[1]))


def test_a_matrix_beside_which_no_rows_stand_is_refused(tmp_path):
    _, path = adapted(tmp_path / "a", [1])
    stored = load_file(path / "adapter_model.safetensors") | {BESIDE.format("lm_head"): torch.zeros(5, 48)}
    save_file(stored, path / "adapter_model.safetensors")
    with pytest.raises(BadInput, match="lm_head.*stands there without rows of tokens"):
        open_source(str(path))


def test_rows_without_tensors_are_refused(tmp_path):
    with pytest.raises(BadInput, match="trainable_token_indices, and 0 tensors are of trained tokens"):
        open_source(str(write_adapter(tmp_path / "a", factors(), trainable_token_indices=[1])))


def test_targets_of_one_batch_have_as_many_rows_as_they_have(tmp_path):
    """One adapter; two targets, of which one has a padded vocabulary and one a head of its own."""
    base, rows = tensors(0), [3, 300]
    longer = base[EMBEDDING].new_zeros(320, 48)
    longer[:301] = base[EMBEDDING]
    for name, own in (("a", base), ("b", base | {EMBEDDING: longer})):
        write_checkpoint(tmp_path / "models" / name, own)
    values, path = adapted(tmp_path / "adapter", rows)
    read = [lay_out(open_source(str(path)), open_source(str(tmp_path / "models" / name))) for name in "ab"]
    assert layout_of(read[0]) != layout_of(read[1])
    done = launch("target=models/*", "vector.path=adapter", "output=out/{target}", "stages=[merge]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name, own in (("a", base[EMBEDDING]), ("b", longer)):
        expected = own.clone()
        expected[rows] = values.bfloat16()
        assert torch.equal(load_checkpoint(tmp_path / "out" / name)[EMBEDDING], expected), name


def test_an_embedding_stored_twice_is_one_where_the_target_ties_them(tmp_path):
    """For a target with a head of its own both are applied; copies that differ are refused by the tied one."""
    base = tensors(0)
    generator = torch.Generator().manual_seed(2)
    trained = (torch.randn(301, 48, generator=generator) * 0.02).bfloat16()
    pairs = {name: factor for name, factor in factors().items() if "embed" not in name}
    for name, head in (("equal", trained), ("other", near({HEAD: trained}, 3)[HEAD])):
        stored = {f"base_model.model.{EMBEDDING}": trained, f"base_model.model.{HEAD}": head.clone()}
        write_adapter(tmp_path / name / "adapter", pairs | stored, modules_to_save=["embed_tokens", "lm_head"])
        write_checkpoint(tmp_path / name / "tied", base)
        write_checkpoint(tmp_path / name / "untied", base | {HEAD: near(base, 4)[EMBEDDING]})
        own = dict(read_point(point(tmp_path / name, base="untied")))
        assert all(torch.allclose(own[at], to, rtol=2**-7, atol=0) for at, to in ((EMBEDDING, trained), (HEAD, head)))
    tied = point(tmp_path / "equal", base="tied")
    compat.check(tied, laid_out(tied))
    found = dict(read_point(tied))
    assert HEAD not in found and torch.allclose(found[EMBEDDING], trained, rtol=2**-7, atol=0)
    other = point(tmp_path / "other", base="tied")
    with pytest.raises(BadInput, match="which .* ties to its"):
        compat.check(other, laid_out(other))
    assert json.loads((tmp_path / "equal/tied/config.json").read_text())["tie_word_embeddings"]
