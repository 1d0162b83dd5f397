"""Checkpoints of real models' shapes, for benchmarks: dense with random weights, or sparse files that take no disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from rvdist.weights.checkpoint.directory import INDEX
from rvdist.weights.checkpoint.header import build_header
from rvdist.weights.checkpoint.stream import write_exactly

Shapes = dict[str, tuple[int, ...]]


def qwen2(hidden: int, layers: int, intermediate: int, key_value: int, vocabulary: int) -> Shapes:
    """Tied embeddings, biases on q, k and v."""
    found: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name, rows in (("q", hidden), ("k", key_value), ("v", key_value)):
            found[f"{at}self_attn.{name}_proj.weight"] = (rows, hidden)
            found[f"{at}self_attn.{name}_proj.bias"] = (rows,)
        found |= _block(at, hidden, intermediate)
    return found | {"model.norm.weight": (hidden,)}


def llama(hidden: int, layers: int, intermediate: int, key_value: int, vocabulary: int) -> Shapes:
    """Untied embeddings, no biases."""
    found: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name, rows in (("q", hidden), ("k", key_value), ("v", key_value)):
            found[f"{at}self_attn.{name}_proj.weight"] = (rows, hidden)
        found |= _block(at, hidden, intermediate)
    return found | {"model.norm.weight": (hidden,)}


def deepseek_v3() -> Shapes:
    """61 layers, the first three dense, the others of 256 experts and a shared one; multi-head latent attention."""
    hidden, heads, vocabulary = 7168, 128, 129280
    found: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    for layer in range(61):
        at = f"model.layers.{layer}."
        found |= {
            f"{at}self_attn.q_a_proj.weight": (1536, hidden),
            f"{at}self_attn.q_a_layernorm.weight": (1536,),
            f"{at}self_attn.q_b_proj.weight": (heads * 192, 1536),
            f"{at}self_attn.kv_a_proj_with_mqa.weight": (576, hidden),
            f"{at}self_attn.kv_a_layernorm.weight": (512,),
            f"{at}self_attn.kv_b_proj.weight": (heads * 256, 512),
            f"{at}self_attn.o_proj.weight": (hidden, heads * 128),
            f"{at}input_layernorm.weight": (hidden,),
            f"{at}post_attention_layernorm.weight": (hidden,),
        }
        if layer < 3:
            found |= _mlp(f"{at}mlp.", hidden, 18432)
            continue
        found[f"{at}mlp.gate.weight"] = (256, hidden)
        found[f"{at}mlp.gate.e_score_correction_bias"] = (256,)
        for expert in (*(f"experts.{k}" for k in range(256)), "shared_experts"):
            found |= _mlp(f"{at}mlp.{expert}.", hidden, 2048)
    return found | {"model.norm.weight": (hidden,)}


def mixture(layout: str, hidden: int, intermediate: int, experts: int, biased: bool) -> Shapes:
    """A layer of experts: `one by one`, `fused`, or `interleaved` as gpt-oss's."""
    at = "model.layers.0.mlp."
    found: Shapes = {"model.embed_tokens.weight": (1024, hidden), f"{at}gate.weight": (experts, hidden)}
    if layout == "one by one":
        for k in range(experts):
            own = _mlp(f"{at}experts.{k}.", hidden, intermediate)
            found |= own | {f"{name[:-6]}bias": shape[:1] for name, shape in own.items() if biased}
        return found
    both, down = (experts, 2 * intermediate, hidden), (experts, hidden, intermediate)
    if layout == "interleaved":
        both, down = (experts, hidden, 2 * intermediate), (experts, intermediate, hidden)
    biases = {"gate_up_proj_bias": (experts, 2 * intermediate), "down_proj_bias": (experts, hidden)} if biased else {}
    own = {"gate_up_proj": both, "down_proj": down} | biases
    return found | {f"{at}experts.{name}": shape for name, shape in own.items()}


def _block(at: str, hidden: int, intermediate: int) -> Shapes:
    norms = (f"{at}input_layernorm.weight", f"{at}post_attention_layernorm.weight")
    attention: Shapes = {f"{at}self_attn.o_proj.weight": (hidden, hidden)}
    return attention | _mlp(f"{at}mlp.", hidden, intermediate) | dict.fromkeys(norms, (hidden,))


def _mlp(at: str, hidden: int, intermediate: int) -> Shapes:
    up = dict.fromkeys((f"{at}gate_proj.weight", f"{at}up_proj.weight"), (intermediate, hidden))
    return up | {f"{at}down_proj.weight": (hidden, intermediate)}


QWEN_1_5B = qwen2(1536, 28, 8960, 256, 151936)
QWEN_7B = qwen2(3584, 28, 18944, 512, 152064) | {"lm_head.weight": (152064, 3584)}
LLAMA_70B = llama(8192, 80, 28672, 1024, 128256)
LLAMA_405B = llama(16384, 126, 53248, 1024, 128256)
DEEPSEEK_V3 = deepseek_v3()


def write_checkpoint(
    path: Path, shapes: Shapes, shards: int, seed: int, config: Mapping[str, object], holes: bool = False
) -> int:
    """Writes a bf16 checkpoint and returns its bytes. Those of several seeds are siblings: one block of random weights
    plus noise of the seed (none of 0), repeated, since only how many bytes there are matters. Of `holes` are all but
    the first elements of each file, the seed's own: files that are equal would be compared to their end."""
    path.mkdir(parents=True)
    block = torch.full((4096,), 0.001 * (1 + seed)).bfloat16() if holes else _block_of_weights(seed)
    weight_map = {}
    total = 0
    groups = _groups(shapes, shards)
    for number, names in enumerate(groups, 1):
        file = "model.safetensors" if shards == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        header, placed = build_header([(name, "BF16", shapes[name]) for name in names], file, {"format": "pt"})
        with open(path / file, "wb") as opened:
            opened.write(header)
            opened.truncate(placed[-1].offset + placed[-1].nbytes)
            opened.flush()
            for spec in placed:
                weight_map[spec.name] = file
                total += spec.nbytes
                if holes and spec is not placed[0]:
                    continue
                for begin in (0,) if holes else range(0, spec.numel, block.numel()):
                    piece = block[: min(block.numel(), spec.numel - begin)]
                    write_exactly(opened.fileno(), spec.offset + 2 * begin, piece)
    if shards > 1:
        (path / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(config))
    return total


def _block_of_weights(seed: int) -> torch.Tensor:
    block = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02
    noise = 0.002 * torch.randn(block.shape, generator=torch.Generator().manual_seed(seed))
    return (block + noise * (seed > 0)).bfloat16()


def _groups(shapes: Shapes, shards: int) -> Iterable[list[str]]:
    share = sum(torch.Size(shape).numel() for shape in shapes.values()) / shards
    groups: list[list[str]] = [[]]
    count = 0
    for name, shape in shapes.items():
        if count >= share * len(groups):
            groups.append([])
        groups[-1].append(name)
        count += torch.Size(shape).numel()
    return groups
