"""How a mixture's experts are stored: one by one, fused into one tensor a projection, or fused and interleaved.

Tensors are matched by name, so a vector in one layout does nothing for experts in another. Source: transformers'
conversion_mapping.py, modeling_qwen3_moe.py, modeling_gpt_oss.py and modeling_dbrx.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

ONE_BY_ONE, FUSED, INTERLEAVED = "one by one", "fused", "fused and interleaved"
_MIXTRAL = re.compile(r"(^|\.)block_sparse_moe\.")  # as Mixtral is saved; `mlp.` in memory
_EXPERTS = re.compile(r"((?:.+\.)?experts)\.(.+)")
GRANITE = re.compile(r"((?:.+\.)?block_sparse_moe)\.((?:in|out)put_linear)\.weight")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_SINGLE = re.compile(r"experts\.(?:.+\.)?N\.")
_W123 = re.compile(r"experts\.N\.w[123]\.")
# Routers, and what is added to their scores, as transformers has them in memory and as others save them.
_ROUTER = re.compile(r"(?<=\.mlp\.)router\.(?:layer\.)?")
_CORRECTION = re.compile(r"(?<=\.mlp\.)(?=(?:moe_statics\.)?e_score_correction_bias$)")


def in_memory(name: str) -> str:
    """A name, or a prefix of names, as Mixtral has it in memory."""
    return _MIXTRAL.sub(r"\1mlp.", name)


def beside_experts(name: str) -> str:
    """A name beside a layer's experts, under which all that it may be called in other layouts meet."""
    return _CORRECTION.sub("gate.", _ROUTER.sub("gate.", in_memory(name)))


def layouts(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """What these names call the tensors of each group of experts, by its prefix as Mixtral has it in memory: each name
    without its numbers → one that shows it."""
    by_prefix: dict[str, dict[str, str]] = {}
    for name in names:
        if (match := _EXPERTS.fullmatch(name)) or (match := GRANITE.fullmatch(name)):
            prefix = match[1] if match.re is _EXPERTS else match[1] + ".experts"
            by_prefix.setdefault(in_memory(prefix), {}).setdefault(_NUMBER.sub("N", name), name)
    return by_prefix


def layout_called(stems: Iterable[str]) -> str:
    """The layout that a group's names without numbers speak of, in words. gate_up_proj has a bias beside it only where
    its columns are in turn gate's and up's."""
    stems = list(stems)
    if any(stem.endswith(".gate_up_proj_bias") for stem in stems):
        return INTERLEAVED
    if not any(map(_SINGLE.search, stems)):
        return FUSED
    return ONE_BY_ONE + ", as w1, w2 and w3" * any(map(_W123.search, stems))
