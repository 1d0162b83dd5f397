"""How a mixture's experts are stored: one by one, fused into one tensor a projection, or fused and interleaved.

Tensors are matched by name, so a vector in one layout does nothing for experts in another. Source: transformers'
modeling_qwen3_moe.py and modeling_gpt_oss.py (Qwen3MoeExperts, GptOssExperts).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

ONE_BY_ONE, FUSED, INTERLEAVED = "one by one", "fused", "fused and interleaved"
_SINGLE = re.compile(r"((?:.+\.)?experts)\.\d+\.(w[123]\.)?.+")
_MIXTRAL = re.compile(r"(^|\.)block_sparse_moe\.")  # as Mixtral is saved; `mlp.` in memory
_FUSED = re.compile(r"((?:.+\.)?experts)\.(?:gate_up_proj|gate_proj|up_proj|down_proj)(?:\.weight|_bias)?")


def in_memory(name: str) -> str:
    """A name, or a prefix of names, as Mixtral has it in memory."""
    return _MIXTRAL.sub(r"\1mlp.", name)


def layouts(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The layout of each group of experts that these tensor names speak of, by its prefix as Mixtral has it in memory,
    and a name that shows it. gate_up_proj has a bias beside it only where its columns are in turn gate's and up's."""
    by_prefix: dict[str, tuple[str, str]] = {}
    for name in names:
        if single := _SINGLE.fullmatch(name):
            by_prefix.setdefault(in_memory(single[1]), (ONE_BY_ONE + ", as w1, w2 and w3" * bool(single[2]), name))
        elif fused := _FUSED.fullmatch(name):
            if name.endswith("gate_up_proj_bias"):
                by_prefix[in_memory(fused[1])] = (INTERLEAVED, name)
            else:
                by_prefix.setdefault(in_memory(fused[1]), (FUSED, name))
    return by_prefix
