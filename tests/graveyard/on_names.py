"""Situations of what a checkpoint's tensors are called and which there are: tied heads, padded vocabularies, layers
that are declared or not, towers, experts."""

from __future__ import annotations

from pathlib import Path

import torch
from checkpoints import near
from situations import (
    HIDDEN,
    LAYERS,
    ROWS,
    Asked,
    Refused,
    Right,
    Weights,
    ask,
    llama,
    merged,
    put,
    siblings,
    situation,
    tokenizer,
    vector,
    write,
    write_all,
)

from rvdist.core.config import CompatConfig, MaskConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = {"tie_word_embeddings": True}
KEEP = CompatConfig(extra_rows="keep")


def with_head(weights: Weights) -> Weights:
    return weights | {HEAD: weights[EMBEDDING].clone()}


# --- tied heads


@situation(
    "tied heads", "a tied config, and an equal lm_head.weight in the target's file", "arcee-ai/mergekit#464",
    right="the head is the embedding: both move",
)  # fmt: skip
def tied_target_with_a_head(place: Path) -> Asked:
    weights = siblings(llama())
    for role in weights:
        write(place / role, with_head(weights[role]) if role == "target" else weights[role], config=TIED)
    out = merged(weights)
    return ask(place, Right(out, may={HEAD: out[EMBEDDING]}))


@situation(
    "tied heads", "a tied config, and an equal lm_head.weight in one donor's file", "arcee-ai/mergekit#464",
    right="it is that donor's embedding, and is left out",
)  # fmt: skip
def tied_donor_with_a_head(place: Path) -> Asked:
    weights = siblings(llama())
    for role in weights:
        write(place / role, with_head(weights[role]) if role == "plus" else weights[role], config=TIED)
    return ask(place, Right(merged(weights)))


@situation(
    "tied heads", "a tied config, and an lm_head.weight that is not the embedding", "huggingface/transformers#45127",
    refused="names the tensor and the key that contradicts it",
)  # fmt: skip
def tied_target_with_another_head(place: Path) -> Asked:
    weights = siblings(llama())
    head = llama(9)[EMBEDDING]
    for role in weights:
        own = weights[role] | ({HEAD: head} if role == "target" else {})
        write(place / role, own, config=TIED)
    return ask(place, Refused(["target", "lm_head.weight", "tie_word_embeddings"]))


@situation(
    "tied heads", "tie_word_embeddings is true at the top and false in text_config", "NVIDIA-NeMo/Automodel#2601",
    refused="names both",
)  # fmt: skip
def tying_that_disagrees(place: Path) -> Asked:
    weights = siblings(with_head(llama()))
    for role in weights:
        write(place / role, weights[role], config=TIED | {"text_config": {"tie_word_embeddings": False}})
    return ask(place, Refused(["tie_word_embeddings", "text_config"]))


@situation(
    "tied heads", "untied heads", "arcee-ai/mergekit#308", right="head and embedding each by their own difference"
)  # fmt: skip
def untied_heads(place: Path) -> Asked:
    weights = siblings(llama(tied=False))
    write_all(place, weights)
    return ask(place, Right(merged(weights)))


# --- vocabularies


def padded(weights: Weights, rows: int, seed: int = 7) -> Weights:
    more = near({EMBEDDING: torch.zeros(rows, HIDDEN)}, seed)[EMBEDDING].to(weights[EMBEDDING].dtype)
    return weights | {EMBEDDING: torch.cat([weights[EMBEDDING], more])}


def with_padding(place: Path, roles: tuple[str, ...], verdict: str) -> Asked:
    """These have 8 rows more, of no token: as 152,064 rows for 151,665 tokens."""
    weights = siblings(llama())
    for role in roles:
        weights[role] = padded(weights[role], 8)
    for role in weights:
        write(place / role, weights[role], tokens=ROWS)
    if verdict == "refused":
        return ask(place, Refused([EMBEDDING, rf"\[{ROWS + 8}, {HIDDEN}\]", "compat.extra_rows=keep"]))
    note = rf"{EMBEDDING}: its first {ROWS} rows get the vector"
    return ask(place, Right(merged(weights), notes=[note]), compat=KEEP)


PADDED = "rows that no token has (152,064 for 151,665; 128,320 for 128,256)"
COUNTS = "names the tensor, both shapes and compat.extra_rows=keep"


@situation("vocabularies", f"the target has {PADDED}", "arcee-ai/mergekit#425", refused=COUNTS)
def padded_target(place: Path) -> Asked:
    return with_padding(place, ("target",), "refused")


@situation("vocabularies", f"plus has {PADDED}", "arcee-ai/mergekit#425", refused=COUNTS)
def padded_plus(place: Path) -> Asked:
    return with_padding(place, ("plus",), "refused")


@situation("vocabularies", f"minus has {PADDED}", "arcee-ai/mergekit#425", refused=COUNTS)
def padded_minus(place: Path) -> Asked:
    return with_padding(place, ("minus",), "refused")


ASKED_TO = "with compat.extra_rows=keep"
SHARED_ROWS = "the rows that all have get the vector, the target's others stay; the counts are said"


@situation("vocabularies", f"the target has such rows, {ASKED_TO}", "arcee-ai/mergekit#425", right=SHARED_ROWS)
def padded_target_kept(place: Path) -> Asked:
    return with_padding(place, ("target",), "right")


@situation("vocabularies", f"plus has such rows, {ASKED_TO}", "arcee-ai/mergekit#139", right=SHARED_ROWS)
def padded_plus_kept(place: Path) -> Asked:
    return with_padding(place, ("plus",), "right")


@situation("vocabularies", f"minus has such rows, {ASKED_TO}", "arcee-ai/mergekit#139", right=SHARED_ROWS)
def padded_minus_kept(place: Path) -> Asked:
    return with_padding(place, ("minus",), "right")


@situation("vocabularies", f"both donors have such rows, {ASKED_TO}", "arcee-ai/mergekit#139", right=SHARED_ROWS)
def padded_donors_kept(place: Path) -> Asked:
    return with_padding(place, ("plus", "minus"), "right")


def two_tokens_more(place: Path) -> dict[str, Weights]:
    weights = siblings(llama())
    weights["plus"] = padded(weights["plus"], 2)
    write_all(place, weights)
    return weights


@situation("vocabularies", "one donor has two added tokens", "arcee-ai/mergekit#47", refused=COUNTS)
def added_tokens(place: Path) -> Asked:
    two_tokens_more(place)
    return ask(place, Refused([EMBEDDING, "compat.extra_rows=keep"]))


@situation(
    "vocabularies", f"one donor has two added tokens, {ASKED_TO}", "arcee-ai/mergekit#139",
    right="as above; the tokens that not all have are said",
)  # fmt: skip
def added_tokens_kept(place: Path) -> Asked:
    weights = two_tokens_more(place)
    notes = [rf"{EMBEDDING}: its first {ROWS} rows get the vector", "plus has 2 tokens that the target lacks"]
    return ask(place, Right(merged(weights), notes=notes), compat=KEEP)


@situation(
    "vocabularies", "a donor's tokenizer numbers two tokens the other way round", "arcee-ai/mergekit#342",
    refused="names a token and both of its ids",
)  # fmt: skip
def swapped_tokens(place: Path) -> Asked:
    write_all(place, siblings(llama()))
    said = tokenizer()
    said["model"]["vocab"] |= {"w5": 6, "w6": 5}
    put(place / "plus/tokenizer.json", said)
    return ask(place, Refused(["plus: its tokenizer differs", "token 'w5' has id 6 where the target has 5"]))


@situation(
    "vocabularies", "tokenizer.json as another version of transformers spells it: the same ids, other JSON",
    "ggml-org/llama.cpp#9692", right="as if they were spelled alike: nothing is said",
)  # fmt: skip
def tokenizer_of_another_version(place: Path) -> Asked:
    weights = siblings(llama())
    write_all(place, weights)
    pairs = [["w", "3"], ["w", "4"]]
    ours = tokenizer(
        model={"type": "BPE", "vocab": tokenizer()["model"]["vocab"], "merges": [" ".join(p) for p in pairs]}
    )
    put(place / "target/tokenizer.json", ours)
    for role in ("plus", "minus"):
        vocabulary = dict(sorted(ours["model"]["vocab"].items()))
        model = {"type": "BPE", "dropout": None, "ignore_merges": False, "vocab": vocabulary, "merges": pairs}
        put(place / role / "tokenizer.json", tokenizer(model=model, added_tokens=ours["added_tokens"][::-1]))
    return ask(place, Right(merged(weights)))


# --- layers and towers


def mtp(base: Weights) -> Weights:
    """A layer more, as multi-token prediction is stored."""
    at = f"model.layers.{LAYERS}"
    layer = {
        name.replace("layers.0", f"layers.{LAYERS}"): tensor.clone()
        for name, tensor in base.items()
        if "layers.0" in name
    }
    return layer | {f"{at}.eh_proj.weight": llama(3)["model.layers.0.self_attn.q_proj.weight"]}


@situation(
    "layers", "config.json declares a multi-token prediction layer (num_nextn_predict_layers) that no file has",
    "MiniMax-AI/MiniMax-M2.7#16", right="what is there gets the vector",
)  # fmt: skip
def mtp_declared_and_absent(place: Path) -> Asked:
    weights = siblings(llama())
    write_all(place, weights, num_nextn_predict_layers=1)
    return ask(place, Right(merged(weights)))


@situation(
    "layers", "the target has a multi-token prediction layer that config.json does not declare, and the donors none",
    "local-inference-lab/vllm#436", right="it stays as it is, and is said to",
)  # fmt: skip
def mtp_present_and_undeclared(place: Path) -> Asked:
    base = llama()
    weights = siblings(base)
    weights["target"] = base | mtp(base)
    write_all(place, weights)
    return ask(
        place, Right(merged(weights), notes=[f"lacks 10 of the target's tensors, .*layers.{LAYERS}"]), made_up=True
    )


@situation(
    "layers", "layers are numbered with gaps (0, 3, 17), and a mask names some of them", "none found",
    right="numbers are read from names, not counted",
)  # fmt: skip
def layers_with_gaps(place: Path) -> Asked:
    renumbered = {"layers.0.": "layers.3.", "layers.1.": "layers.17."}

    def rename(name: str) -> str:
        for old, new in renumbered.items():
            name = name.replace(old, new)
        return name

    weights = siblings({rename(name): tensor for name, tensor in llama().items()})
    write_all(place, weights)
    out = {name: tensor if "layers.3." in name else weights["target"][name] for name, tensor in merged(weights).items()}
    return ask(place, Right(out), vector=vector(place, mask=MaskConfig(layers=[[2, 9]])), made_up=True)


def tower(seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"visual.blocks.{k}.attn.qkv.weight": (torch.randn(24, 8, generator=generator) * 0.05).bfloat16()
        for k in range(2)
    }


@situation(
    "layers", "one donor has lost the vision tower", "ML-GSAI/LLaDA-V#9",
    refused="names the donor and a tensor it lacks",
)  # fmt: skip
def tower_lost_by_a_donor(place: Path) -> Asked:
    weights = siblings(llama() | tower(1))
    weights["plus"] = {name: tensor for name, tensor in weights["plus"].items() if "visual" not in name}
    write_all(place, weights)
    return ask(place, Refused(["plus: lacks tensor visual.blocks.0.attn.qkv.weight, which .*minus has"]), made_up=True)


@situation(
    "layers", "one donor has lost the vision tower, which the mask leaves out", "Blaizzy/mlx-vlm#1963",
    right="what the mask leaves out need not be in both donors",
)  # fmt: skip
def tower_lost_and_masked_out(place: Path) -> Asked:
    weights = siblings(llama() | tower(1))
    write(place / "target", weights["target"])
    write(place / "minus", weights["minus"])
    write(place / "plus", {name: tensor for name, tensor in weights["plus"].items() if "visual" not in name})
    out = merged(weights) | tower(1)
    mask = MaskConfig(exclude=[r"visual\..*"])
    return ask(place, Right(out, notes=["target's tensors|mask"]), vector=vector(place, mask=mask), made_up=True)


@situation("layers", "both donors have lost the vision tower", "Blaizzy/mlx-vlm#1879", right="it stays, and is said to")
def tower_lost_by_both(place: Path) -> Asked:
    text = llama()
    weights = {"target": text | tower(1), "plus": near(text, 1), "minus": near(text, 2)}
    write_all(place, weights)
    return ask(place, Right(merged(weights), notes=["lacks 2 of the target's tensors.*visual.blocks.0"]), made_up=True)


@situation(
    "layers", "vision-language models of two versions of transformers: model.language_model.* against model.*, only "
    "the equal vision tower matches", "vllm-project/vllm#19054",
    refused="says how little would be applied, and the vector.rename that fits",
)  # fmt: skip
def prefixes_of_two_versions(place: Path) -> Asked:
    weights = siblings(llama())
    weights["target"] = {n.replace("model.", "model.language_model.", 1): t for n, t in weights["target"].items()}
    seen = {f"model.{name}": tensor for name, tensor in tower(1).items()}
    write_all(place, {role: own | seen for role, own in weights.items()}, vocab_size=ROWS, model_type="qwen2_5_vl")
    return ask(place, Refused([r"vector\.rename"]), made_up=True)


@situation(
    "layers", "the same with vector.rename", "QwenLM/Qwen3-VL#1471",
    right="the language tower gets the vector",
)  # fmt: skip
def prefixes_renamed(place: Path) -> Asked:
    weights = siblings(llama())
    seen = {f"model.{name}": tensor for name, tensor in tower(1).items()}
    prefixed = {n.replace("model.", "model.language_model.", 1): t for n, t in weights["target"].items()}
    for role, own in (weights | {"target": prefixed}).items():
        write(place / role, own | seen, config={"vocab_size": ROWS, "model_type": "qwen2_5_vl"}, tokens=ROWS)
    out = {n.replace("model.", "model.language_model.", 1): t for n, t in merged(weights).items()} | seen
    rename = [[r"^model\.(?!visual)", "model.language_model."]]
    return ask(place, Right(out, notes=["were renamed"]), vector=vector(place, rename=rename), made_up=True)


# --- experts


def experts(layout: str, layer: int, count: int = 4) -> Weights:
    """The experts of a layer of a mixture, in one of the layouts that published checkpoints have."""
    generator = torch.Generator().manual_seed(4 + layer)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.05

    gate, up, down = normal(count, 12, HIDDEN), normal(count, 12, HIDDEN), normal(count, HIDDEN, 12)
    at = f"model.layers.{layer}.mlp.experts"
    if layout == "one by one":
        found = {}
        for k in range(count):
            found |= {
                f"{at}.{k}.gate_proj.weight": gate[k],
                f"{at}.{k}.up_proj.weight": up[k],
                f"{at}.{k}.down_proj.weight": down[k],
            }
    elif layout == "fused":  # as transformers 5 keeps Qwen3-MoE: [experts, 2 · intermediate, hidden]
        found = {f"{at}.gate_up_proj": torch.cat([gate, up], 1), f"{at}.down_proj": down}
    else:  # interleaved, as gpt-oss: [experts, hidden, 2 · intermediate], columns of gate and up in turn
        pairs = torch.stack([gate, up], 2).reshape(count, 24, HIDDEN)
        found = {
            f"{at}.gate_up_proj": pairs.transpose(1, 2).contiguous(),
            f"{at}.gate_up_proj_bias": normal(count, 24),
            f"{at}.down_proj": down.transpose(1, 2).contiguous(),
            f"{at}.down_proj_bias": normal(count, HIDDEN),
        }
    return {name: tensor.bfloat16() for name, tensor in found.items()}


def mixture(layout: str) -> Weights:
    """As Qwen3-MoE, but for the layout."""
    found = {name: tensor for name, tensor in llama(tied=False).items() if ".mlp." not in name}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        generator = torch.Generator().manual_seed(layer)
        norms = {f"{at}.self_attn.{name}_norm.weight": torch.ones(8).bfloat16() for name in "qk"}
        router = (torch.randn(4, HIDDEN, generator=generator) * 0.05).bfloat16()
        found |= norms | {f"{at}.mlp.gate.weight": router} | experts(layout, layer)
    return found


MOE = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 12, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
}  # fmt: skip


def alike(place: Path, layout: str, made_up: bool = False, **config: object) -> Asked:
    weights = siblings(mixture(layout))
    write_all(place, weights, **(MOE | config))
    return ask(place, Right(merged(weights)), made_up=made_up)


@situation(
    "experts", "experts stored one by one in all three", "EfficientMoE/MoE-Infinity#108", right="as any other tensor"
)
def experts_one_by_one(place: Path) -> Asked:
    return alike(place, "one by one")


@situation(
    "experts", "experts fused (gate_up_proj) in all three", "vllm-project/vllm#36997", right="as any other tensor"
)
def experts_fused(place: Path) -> Asked:
    return alike(place, "fused")


@situation(
    "experts",
    "experts fused and interleaved in all three",
    "vllm-project/llm-compressor#3100",
    right="as any other tensor",
)
def experts_interleaved(place: Path) -> Asked:
    return alike(place, "interleaved", made_up=True, model_type="gpt_oss")


def relaid(place: Path, target: str, donors: str) -> Asked:
    """Donors in another layout than the target's: what comes out is what comes out in the target's."""
    weights, others = siblings(mixture(target)), mixture(donors)
    for role, own in weights.items():
        write(place / role, own if role == "target" else in_layout(own, others, donors), config=MOE)
    return ask(place, Right(merged(weights)))


def in_layout(weights: Weights, others: Weights, layout: str) -> Weights:
    """Tensors of Qwen3-MoE, their experts one by one or fused, in the other of these layouts."""
    found = {name: tensor for name, tensor in weights.items() if ".experts." not in name}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}.mlp.experts"
        if layout == "fused":
            gate, up, down = (
                torch.stack([weights[f"{at}.{k}.{name}_proj.weight"] for k in range(4)])
                for name in ("gate", "up", "down")
            )
            found |= {f"{at}.gate_up_proj": torch.cat([gate, up], 1), f"{at}.down_proj": down}
            continue
        for k in range(4):
            both, down = weights[f"{at}.gate_up_proj"][k], weights[f"{at}.down_proj"][k]
            found[f"{at}.{k}.gate_proj.weight"] = both[:12].clone()
            found[f"{at}.{k}.up_proj.weight"] = both[12:].clone()
            found[f"{at}.{k}.down_proj.weight"] = down.clone()
    assert found.keys() == others.keys()
    return found


def unlike(place: Path, target: str, donors: str, *words: str) -> Asked:
    weights = siblings(mixture(donors))
    weights["target"] = mixture(target)
    for role, own in weights.items():
        write(place / role, own, config=MOE)
    return ask(place, Refused([*words, "convert"]), made_up="interleaved" in (target, donors))


LAYOUTS = "names both layouts"


@situation(
    "experts",
    "the target's experts are stored one by one, the donors' fused",
    "sgl-project/sglang#29659",
    right="as in the target's layout",
)
def fused_vector_for_single_experts(place: Path) -> Asked:
    return relaid(place, "one by one", "fused")


@situation(
    "experts",
    "the target's experts are fused, the donors' stored one by one",
    "NVIDIA-NeMo/Megatron-Bridge#4706",
    right="as in the target's layout",
)
def single_vector_for_fused_experts(place: Path) -> Asked:
    return relaid(place, "fused", "one by one")


@situation(
    "experts",
    "the target's experts are fused, the donors' fused and interleaved",
    "vllm-project/llm-compressor#3100",
    refused=LAYOUTS,
)
def interleaved_vector_for_fused_experts(place: Path) -> Asked:
    return unlike(place, "fused", "interleaved", "fused", "interleaved")


@situation(
    "experts",
    "the two donors keep their experts in different layouts",
    "arcee-ai/mergekit#692",
    right="as in the target's layout",
)
def donors_of_two_expert_layouts(place: Path) -> Asked:
    weights = siblings(mixture("fused"))
    stored = weights | {"minus": in_layout(weights["minus"], mixture("one by one"), "one by one")}
    write_all(place, stored, **MOE)
    return ask(place, Right(merged(weights)))
