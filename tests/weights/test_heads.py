"""A head that is its target's embedding: what masks and adapters do to the one they do to the other, and it is said."""

import re

import pytest
import torch
from adapters import RANK, factors, write_adapter
from checkpoints import load_checkpoint, near, tensors, write_checkpoint, write_family
from points import read_point, shifted

from rvdist.core.errors import BadInput
from rvdist.core.point import Mask, Term, Vector, WeightPoint
from rvdist.weights import compat
from rvdist.weights.checkpoint.source import open_source

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def said(point):
    return compat.check(point, {source: open_source(source) for source in point.sources()}).exceptions


def masked(point, **mask):
    return WeightPoint(point.base, (Term(1.0, point.terms[0].vector, Mask(**mask)),))


@pytest.mark.parametrize(
    ("mask", "pattern"),
    [
        ({"include": ("lm_head.*",)}, "lm_head.*"),
        ({"include": (".*norm.*", r"(?:model\.)?lm_head\.weight")}, r"(?:model\.)?lm_head\.weight"),
        ({"include": (r"(?:lm_head|model\.norm)\.weight",)}, r"(?:lm_head|model\.norm)\.weight"),
        ({"exclude": (HEAD,)}, HEAD),
        ({"exclude": (".*norm.*", "lm_head.*")}, "lm_head.*"),
    ],
)
def test_a_mask_that_names_the_head_alone_is_refused(tmp_path, mask, pattern):
    point = shifted(write_family(tmp_path))
    with pytest.raises(BadInput, match=rf"{re.escape(repr(pattern))} matches {HEAD} and not {EMBEDDING}.*both move or"):
        said(masked(point, **mask))


@pytest.mark.parametrize(
    ("mask", "note"),
    [
        ({}, None),
        ({"exclude": (".*lm_head.*", ".*embed.*")}, None),
        ({"include": (".*embed.*", ".*lm_head.*")}, None),
        ({"include": (".*embed.*", ".*lm_head.*"), "exclude": (HEAD, EMBEDDING)}, "leaves no tensor"),
        ({"layers": ((0, 1),)}, None),
        ({"depth": (0.0, 1.0)}, None),
        ({"include": (r"model\..*",)}, f"{HEAD} moves with {EMBEDDING}"),
        ({"exclude": (".*embed.*",)}, f"{HEAD} stays with {EMBEDDING}"),
    ],
)
def test_where_a_mask_means_one_of_the_two_it_is_told_what_the_other_does(tmp_path, mask, note):
    point = masked(shifted(write_family(tmp_path)), **mask)
    if note == "leaves no tensor":
        with pytest.raises(BadInput, match=note):
            said(point)
    else:
        assert [one.partition(":")[0] for one in said(point) if HEAD in one] == ([note] if note else [])


@pytest.mark.parametrize(
    ("mask", "refused"),
    [
        ({"exclude": (r"language_model\.lm_head\.weight",)}, True),
        ({"include": (".*norm.*", r"language_model\.lm_head.*")}, True),
        ({"exclude": (".*lm_head.*",)}, True),
        ({"include": (".*embed_tokens.*", "language_model.lm_head.*")}, False),
        ({"include": (".*embed_tokens.*", "lm_head.*")}, False),
        ({"exclude": ("language_model.lm_head.*", ".*embed_tokens.*")}, False),
        ({"include": (r"language_model\.model\.l.*",)}, False),
    ],
)
def test_a_head_is_named_as_untied_donors_name_theirs(tmp_path, mask, refused):
    base = tensors(0)
    for name, seed in (("target", 0), ("plus", 1), ("minus", 2)):
        own = near(base, seed) if seed else base
        nested = {f"language_model.{at}" if "model" in at else at: tensor for at, tensor in own.items()}
        heads = {"language_model.lm_head.weight": own[EMBEDDING] + 0.01} if seed else {}
        config = {"model_type": "tiny", "hidden_size": 48, "tie_word_embeddings": not seed}
        write_checkpoint(tmp_path / name, nested | heads, config=config)
    point = masked(shifted({name: tmp_path / name for name in ("target", "plus", "minus")}), **mask)
    if refused:
        with pytest.raises(BadInput, match="lm_head.weight and not language_model.model.embed_tokens.weight"):
            said(point)
    else:
        assert said(point)


def test_beside_a_head_of_its_own_a_mask_may_name_either(tmp_path):
    base = tensors(0)
    for name, seed in (("target", 0), ("plus", 1), ("minus", 2)):
        own = near(base, seed) if seed else base
        write_checkpoint(tmp_path / name, own | {HEAD: own[EMBEDDING] + 0.01})
    point = shifted({name: tmp_path / name for name in ("target", "plus", "minus")})
    for mask in ({"include": (HEAD,)}, {"exclude": (HEAD,)}, {"exclude": (EMBEDDING,)}):
        assert not any("tie_word_embeddings" in one for one in said(masked(point, **mask)))


def test_an_adapter_of_an_embedding_says_that_the_head_moves(tmp_path):
    write_checkpoint(tmp_path / "target", tensors(0))
    write_adapter(tmp_path / "adapter", factors())
    point = WeightPoint(str(tmp_path / "target"), (Term(1.0, Vector(str(tmp_path / "adapter"))),))
    note = (
        "adapter adapts model.embed_tokens, and the head of target is its embedding (tie_word_embeddings): it moves too"
    )
    assert any(note in one for one in said(point))
    assert not any(note in one for one in said(masked(point, exclude=(".*embed.*",))))


def test_an_adapter_of_a_tied_head_is_refused_with_a_mask_that_leaves_it_out(tmp_path):
    write_checkpoint(tmp_path / "target", tensors(0))
    head = "base_model.model.lm_head.lora_{}.weight"
    pairs = {head.format("A"): torch.ones(RANK, 48), head.format("B"): torch.ones(301, RANK)}
    write_adapter(tmp_path / "adapter", factors() | pairs)
    point = WeightPoint(str(tmp_path / "target"), (Term(1.0, Vector(str(tmp_path / "adapter"))),))
    with pytest.raises(BadInput, match="adapts lm_head, which .* ties to its embedding") as refused:
        said(point)
    patterns = re.findall(r"'([^']+)'", str(refused.value).partition("vector.mask.exclude=")[2])
    assert len(patterns) == 2 and said(masked(point, exclude=tuple(patterns)))


@pytest.mark.parametrize("tying", [False, True])
def test_lora_of_a_tied_embedding_is_what_peft_merges(tmp_path, tying):
    """With ensure_weight_tying peft 0.21 adds the product twice, to the embedding and to the head that it is: what it
    stores for both is refused."""
    peft = pytest.importorskip("peft", reason="peft, whose own merge is what is right here, cannot be imported")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=tying)
    adapted = peft.get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    point = WeightPoint(str(tmp_path / "base"), (Term(1.0, Vector(str(tmp_path / "adapter"))),))
    if tying:
        with pytest.raises(BadInput, match="adapts lm_head, which .* ties to its embedding"):
            said(point)
        return
    ours, theirs = dict(read_point(point)), load_checkpoint(tmp_path / "merged")
    assert ours.keys() == theirs.keys() and HEAD not in ours
    assert all(torch.allclose(ours[name], theirs[name], rtol=2e-6, atol=2e-7) for name in theirs)
    assert not torch.equal(ours[EMBEDDING], load_checkpoint(tmp_path / "base")[EMBEDDING])
