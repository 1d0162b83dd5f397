"""Situations of LoRA adapters. Right is Δ = scale · B · A as peft documents it, computed here in fp64."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from adapters import CONFIG, write_adapter
from situations import (
    ALPHA,
    HIDDEN,
    MATRICES,
    ROWS,
    Asked,
    Refused,
    Right,
    Weights,
    ask,
    llama,
    put,
    siblings,
    situation,
    write,
)

from rvdist.core.config import VectorConfig

PREFIX = "base_model.model."
ADAPTED = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.v_proj")
RANK, LORA_ALPHA = 4, 10
HEAD_MOVES = "adapts model.embed_tokens, and the head of target is its embedding"
SKIPS = "only tensor names and shapes were compared"  # what is always said of an adapter alone
LACKS = "lacks .* of the target's tensors"


def shape_of(module: str) -> tuple[int, int]:
    return MATRICES[module.split(".", 3)[3]]


def factors(ranks: dict[str, int] | None = None, seed: int = 0) -> Weights:
    """A and B of the adapted modules, under peft's names."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for module in ADAPTED:
        rank, (rows, columns) = (ranks or {}).get(module, RANK), shape_of(module)
        found[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * 0.1
        found[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.1
    return found


def deltas(tensors: Weights, scales: dict[str, float] | None = None) -> Weights:
    """scale · B · A of every module; scales that are not given are lora_alpha / r."""
    found = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            b = tensors[name.replace("lora_A", "lora_B")]
            scale = (scales or {}).get(module, LORA_ALPHA / a.shape[0])
            found[f"{module}.weight"] = scale * (b.double() @ a.double())
    return found


def added(target: Weights, delta: Weights, alpha: float = ALPHA) -> Weights:
    return {
        name: (tensor.double() + alpha * delta[name]).to(tensor.dtype) if name in delta else tensor
        for name, tensor in target.items()
    }


def adapter(place: Path, tensors: Weights, **config: object) -> VectorConfig:
    config = {"r": RANK, "lora_alpha": LORA_ALPHA, "target_modules": ["q_proj", "up_proj", "v_proj"]} | config
    write_adapter(place / "adapter", tensors, **config)
    return VectorConfig(path=str(place / "adapter"))


def applied(place: Path, tensors: Weights, scales: dict[str, float] | None = None, **config: object) -> Asked:
    """target + α · Δ of this adapter, which is right."""
    target = llama()
    write(place / "target", target)
    out = added(target, deltas(tensors, scales))
    return ask(place, Right(out, notes=[SKIPS, LACKS]), vector=adapter(place, tensors, **config))


def refused(place: Path, tensors: Weights, *words: str, **config: object) -> Asked:
    write(place / "target", llama())
    verdict = Refused(["adapter: ", *words], possible="merge_and_unload" in words or "init_lora" in words[0])
    return ask(place, verdict, vector=adapter(place, tensors, **config))


FORMULA = "peft's formula"


@situation("adapters", "a LoRA adapter", "none found", right=FORMULA)
def lora(place: Path) -> Asked:
    return applied(place, factors())


@situation("adapters", "rank_pattern: other ranks for some modules", "huggingface/peft#3582", right=FORMULA)
def rank_pattern(place: Path) -> Asked:
    tensors = factors({ADAPTED[1]: 2})
    return applied(place, tensors, {ADAPTED[1]: LORA_ALPHA / 2}, rank_pattern={"up_proj": 2})


@situation("adapters", "alpha_pattern: another lora_alpha for some modules", "huggingface/peft#3582", right=FORMULA)
def alpha_pattern(place: Path) -> Asked:
    patterns = {"layers.1.self_attn.v_proj": 3, r"layers\.0\..*": 7}
    return applied(place, factors(), {ADAPTED[2]: 3 / RANK, ADAPTED[0]: 7 / RANK}, alpha_pattern=patterns)


@situation(
    "adapters",
    "rank and alpha patterns that both match a module, and a pattern that matches the end of a word only",
    "huggingface/peft#2419",
    right=FORMULA,
)
def both_patterns(place: Path) -> Asked:
    tensors = factors({ADAPTED[0]: 8})
    patterns = {"rank_pattern": {"q_proj": 8, "roj": 1}, "alpha_pattern": {"q_proj": 32, "oj": 5}}
    return applied(place, tensors, {ADAPTED[0]: 32 / 8}, **patterns)


@situation("adapters", "rsLoRA: lora_alpha / √r", "NVIDIA/TensorRT-LLM#1668", right=FORMULA)
def rslora(place: Path) -> Asked:
    scale = LORA_ALPHA / math.sqrt(RANK)
    return applied(place, factors(), dict.fromkeys(ADAPTED, scale), use_rslora=True)


@situation(
    "adapters", "rsLoRA with a rank pattern: the pattern's rank is under the root", "paiml/aprender#2189", right=FORMULA
)
def rslora_with_a_pattern(place: Path) -> Asked:
    ranks = {ADAPTED[1]: 2}
    scales = {module: LORA_ALPHA / math.sqrt(ranks.get(module, RANK)) for module in ADAPTED}
    return applied(place, factors(ranks), scales, use_rslora=True, rank_pattern={"up_proj": 2})


@situation(
    "adapters",
    "base_model_name_or_path is null",
    "none found",
    right=f"{FORMULA}; that the base is not named is said",
)
def base_name_null(place: Path) -> Asked:
    return applied(place, factors(), base_model_name_or_path=None)


@situation("adapters", "an adapter whose lora_B is still 0", "none found", right="the target itself")
def untrained(place: Path) -> Asked:
    tensors = {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in factors().items()}
    return applied(place, tensors)


@situation(
    "adapters", "an embedding's factors (lora_embedding_A, lora_embedding_B)", "arcee-ai/mergekit#328", right=FORMULA
)
def adapted_embedding(place: Path) -> Asked:
    generator = torch.Generator().manual_seed(8)
    a, b = torch.randn(RANK, ROWS, generator=generator) * 0.1, torch.randn(HIDDEN, RANK, generator=generator) * 0.1
    at = f"{PREFIX}model.embed_tokens.lora_embedding_"
    target, tensors = llama(), factors()
    write(place / "target", target)
    change = deltas(tensors) | {"model.embed_tokens.weight": LORA_ALPHA / RANK * (b.double() @ a.double()).T}
    asked = adapter(
        place, tensors | {f"{at}A": a, f"{at}B": b}, target_modules=["q_proj", "up_proj", "v_proj", "embed_tokens"]
    )
    return ask(place, Right(added(target, change), notes=[SKIPS, LACKS, HEAD_MOVES]), vector=asked)


@situation(
    "adapters",
    "the adapter as plus, what it was trained on as minus",
    "none found",
    right=f"{FORMULA}: (base + Δ) − base is Δ",
)
def adapter_against_its_base(place: Path) -> Asked:
    weights, tensors = siblings(llama()), factors()
    write(place / "target", weights["target"])
    write(place / "minus", weights["minus"])
    adapter(place, tensors)
    asked = VectorConfig(str(place / "adapter"), str(place / "minus"))
    right = Right(added(weights["target"], deltas(tensors)), notes=["is taken to be what it was trained on", LACKS])
    return ask(place, right, vector=asked)


@situation(
    "adapters", "an adapter of lm_head, and a target whose head is tied to the embedding", "huggingface/peft#2018",
    refused="names the head and the tie: the embedding must not move",
)  # fmt: skip
def adapter_of_a_tied_head(place: Path) -> Asked:
    generator = torch.Generator().manual_seed(9)
    head = {
        f"{PREFIX}lm_head.lora_A.weight": torch.randn(RANK, HIDDEN, generator=generator),
        f"{PREFIX}lm_head.lora_B.weight": torch.randn(ROWS, RANK, generator=generator),
    }
    write(place / "target", llama())
    asked = adapter(place, factors() | head, target_modules=["q_proj", "up_proj", "v_proj", "lm_head"])
    return ask(place, Refused(["adapter", "lm_head", "tie"]), vector=asked)


@situation("adapters", "an adapter of lm_head, and an untied target", "huggingface/peft#2018", right=FORMULA)
def adapter_of_an_untied_head(place: Path) -> Asked:
    generator = torch.Generator().manual_seed(9)
    tensors = factors() | {
        f"{PREFIX}lm_head.lora_A.weight": torch.randn(RANK, HIDDEN, generator=generator) * 0.1,
        f"{PREFIX}lm_head.lora_B.weight": torch.randn(ROWS, RANK, generator=generator) * 0.1,
    }
    target = llama(tied=False)
    write(place / "target", target)
    asked = adapter(place, tensors, target_modules=["q_proj", "up_proj", "v_proj", "lm_head"])
    return ask(place, Right(added(target, deltas(tensors)), notes=[SKIPS, LACKS]), vector=asked)


BY_NAME = "named, with the way out (merge_and_unload)"


@situation("adapters", "DoRA", "unslothai/unsloth-zoo#828", right="the rows of base + Δ, as long as trained")
def dora(place: Path) -> Asked:
    target, tensors = llama(), factors()
    write(place / "target", target)
    lengths = {module: torch.linspace(0.5, 1.5, shape_of(module)[0]) for module in ADAPTED}
    change = {}
    for name, delta in deltas(tensors).items():
        moved = target[name].double() + delta
        length = lengths[name.removesuffix(".weight")].double() / moved.norm(dim=1)
        change[name] = length[:, None] * moved - target[name].double()
    magnitudes = {f"{PREFIX}{module}.lora_magnitude_vector": length for module, length in lengths.items()}
    asked = adapter(place, tensors | magnitudes, use_dora=True)
    return ask(place, Right(added(target, change), notes=[SKIPS, LACKS]), vector=asked)


WHOLE = "base + (value − base): the trained value, of α = 1"


@situation("adapters", "modules_to_save: a whole copy of the head", "ymcui/Chinese-LLaMA-Alpaca#454", right=WHOLE)
def modules_to_save(place: Path) -> Asked:
    target = llama(tied=False)
    write(place / "target", target)
    head = siblings(target)["plus"]["lm_head.weight"]
    change = deltas(factors()) | {"lm_head.weight": head.double() - target["lm_head.weight"].double()}
    asked = adapter(place, factors() | {f"{PREFIX}lm_head.weight": head}, modules_to_save=["lm_head"])
    return ask(place, Right(added(target, change), notes=[SKIPS, LACKS]), vector=asked)


@situation("adapters", "bias: lora_only", "huggingface/peft#3306", right=WHOLE)
def trained_biases(place: Path) -> Asked:
    target = llama() | {f"{ADAPTED[0]}.bias": torch.full((HIDDEN,), 0.25).bfloat16()}
    write(place / "target", target)
    change = deltas(factors()) | {f"{ADAPTED[0]}.bias": torch.full((HIDDEN,), 0.5).double()}
    biases = {f"{PREFIX}{ADAPTED[0]}.base_layer.bias": torch.full((HIDDEN,), 0.75)}
    asked = adapter(place, factors() | biases, bias="lora_only")
    return ask(place, Right(added(target, change), notes=[SKIPS, LACKS]), vector=asked)


@situation("adapters", "lora_bias: a bias beside lora_B", "huggingface/peft#2486", right=FORMULA)
def lora_bias(place: Path) -> Asked:
    target = llama() | {f"{module}.bias": torch.full((shape_of(module)[0],), 0.25).bfloat16() for module in ADAPTED}
    write(place / "target", target)
    biases = {f"{PREFIX}{module}.lora_B.bias": torch.full((shape_of(module)[0],), 0.3) for module in ADAPTED}
    change = {name.removeprefix(PREFIX).replace("lora_B.", ""): LORA_ALPHA / RANK * t for name, t in biases.items()}
    asked = adapter(place, factors() | biases, lora_bias=True)
    return ask(place, Right(added(target, deltas(factors()) | change), notes=[SKIPS, LACKS]), vector=asked)


@situation(
    "adapters",
    "a vocabulary resized before training: whole embeddings in the adapter",
    "hiyouga/LlamaFactory#3125",
    refused=BY_NAME,
)
def resized_embeddings(place: Path) -> Asked:
    whole = {f"{PREFIX}{name}.weight": torch.zeros(ROWS + 2, HIDDEN) for name in ("model.embed_tokens", "lm_head")}
    return refused(place, factors() | whole, "model.embed_tokens.weight", "merge_and_unload")


@situation(
    "adapters",
    "target_parameters: adapted experts, which are no modules",
    "sgl-project/sglang#25528",
    right="peft's formula, for each expert: its rows of A, and every E-th column of B",
)
def target_parameters(place: Path) -> Asked:
    at, experts, inner, generator = "model.layers.0.mlp.experts", 3, 6, torch.Generator().manual_seed(10)
    shapes = {"down_proj": (HIDDEN, inner), "gate_up_proj": (2 * inner, HIDDEN)}
    target, tensors, change = llama(), factors(), {}
    for parameter, (rows, columns) in shapes.items():
        a = torch.randn(RANK * experts, columns, generator=generator) * 0.1
        b = torch.randn(rows, RANK * experts, generator=generator) * 0.1
        module = f"{PREFIX}{at}{'.base_layer' * (parameter == 'gate_up_proj')}"
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        products = [b[:, e::experts].double() @ a[e * RANK : (e + 1) * RANK].double() for e in range(experts)]
        change[f"{at}.{parameter}"] = LORA_ALPHA / RANK * torch.stack(products)
        target[f"{at}.{parameter}"] = torch.randn(experts, rows, columns, generator=generator).bfloat16()
    write(place / "target", target)
    change |= {name: t for name, t in deltas(tensors).items() if "experts" not in name}
    asked = adapter(place, tensors, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    return ask(place, Right(added(target, change), notes=[SKIPS, LACKS]), vector=asked)


@situation(
    "adapters",
    "trainable_token_indices: rows of the embedding that were trained whole",
    "none found",
    right="these rows, as peft's merge replaces them",
)
def trainable_tokens(place: Path) -> Asked:
    name, rows = "model.embed_tokens", [4, 3]
    values = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(8)) * 0.1
    target, tensors = llama(), factors()
    write(place / "target", target)
    change = torch.zeros(ROWS, HIDDEN, dtype=torch.float64)
    change[rows] = values.double() - target[f"{name}.weight"][rows].double()
    tokens = {f"{PREFIX}{name}.token_adapter.trainable_tokens_delta": values}
    asked = adapter(place, tensors | tokens, trainable_token_indices={"embed_tokens": rows})
    out = added(target, deltas(tensors) | {f"{name}.weight": change})
    return ask(place, Right(out, notes=["taken to be", LACKS, HEAD_MOVES]), vector=asked)


@situation(
    "adapters",
    "PiSSA: the base's own weights changed at the start",
    "huggingface/transformers#34468",
    refused="named, with the way out",
)
def pissa(place: Path) -> Asked:
    return refused(place, factors(), "init_lora_weights='pissa'", init_lora_weights="pissa")


@situation("adapters", "another kind of adapter (IA3)", "none found", refused="named, with the way out")
def another_kind(place: Path) -> Asked:
    return refused(place, factors(), "peft_type='IA3'", peft_type="IA3")


@situation(
    "adapters", "kohya's names (lora_unet_….lora_down.weight) with a 0-dimensional alpha tensor", "none found",
    refused="names a tensor, and says to save it with peft",
)  # fmt: skip
def kohya_names(place: Path) -> Asked:
    at = "lora_te_model_layers_0_self_attn_q_proj"
    tensors = {
        f"{at}.lora_down.weight": torch.zeros(RANK, HIDDEN), f"{at}.lora_up.weight": torch.zeros(HIDDEN, RANK),
        f"{at}.alpha": torch.tensor(8.0),
    }  # fmt: skip
    return refused(place, tensors, at, "peft")


@situation(
    "adapters", "a state_dict saved as it is: names with the adapter's own (lora_A.default.weight)",
    "none found", refused="names a tensor that is no factor as peft saves it",
)  # fmt: skip
def default_adapter_name(place: Path) -> Asked:
    tensors = {name.replace(".weight", ".default.weight"): tensor for name, tensor in factors().items()}
    return refused(place, tensors, r"lora_[AB]\.default\.weight")


@situation(
    "adapters", "anchored patterns: ^q_proj matches no module, ^ and a whole name does", "huggingface/peft#2419",
    right=FORMULA,
)  # fmt: skip
def anchored_pattern(place: Path) -> Asked:
    patterns = {"^q_proj": 100, f"^{ADAPTED[2]}": 6}
    return applied(place, factors(), {ADAPTED[2]: 6 / RANK}, alpha_pattern=patterns)


@situation(
    "adapters",
    "an adapter without adapter_config.json",
    "none found",
    refused="names the file that lacks, which has the scale",
)
def adapter_without_a_config(place: Path) -> Asked:
    write(place / "target", llama())
    asked = adapter(place, factors())
    (place / "adapter/adapter_config.json").unlink()
    return ask(place, Refused(["adapter: has adapter_model.safetensors but no adapter_config.json"]), vector=asked)


@situation(
    "adapters",
    "a config that says another rank than the factors have",
    "none found",
    refused="names the module, both shapes and the rank",
)
def another_rank(place: Path) -> Asked:
    return refused(place, factors(), "q_proj|up_proj|v_proj", "rank 8", r=8)


@situation(
    "adapters",
    "names of modules that the target does not have",
    "none found",
    refused="names a tensor that both lack",
)
def adapter_of_another_model(place: Path) -> Asked:
    tensors = {name.replace("model.layers", "transformer.h"): t for name, t in factors().items()}
    return refused(place, tensors, "no tensor in common")


@situation(
    "adapters",
    "the target given is itself an adapter",
    "none found",
    refused="says that a target is a whole model",
)
def adapter_as_target(place: Path) -> Asked:
    write(place / "plus", llama())
    write(place / "minus", llama())
    adapter(place, factors())
    put(place / "adapter/config.json", CONFIG)
    return ask(place, Refused(["is an adapter, and a target is a whole model"]), target=str(place / "adapter"))
