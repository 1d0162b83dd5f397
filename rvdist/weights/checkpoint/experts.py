"""How a mixture's experts are stored: one by one, fused into one tensor a projection, or fused and interleaved.

Tensors are matched by name, so a vector in one layout does nothing for experts in another. Source: transformers'
modeling_qwen3_moe.py and modeling_gpt_oss.py (Qwen3MoeExperts, GptOssExperts).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

ONE_BY_ONE, FUSED, INTERLEAVED = "one by one", "fused", "fused and interleaved"
_SINGLE = re.compile(r"((?:.+\.)?experts)\.\d+\..+")
_FUSED = re.compile(r"((?:.+\.)?experts)\.(?:gate_up_proj|gate_proj|up_proj|down_proj)(?:\.weight|_bias)?")


def layouts(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The layout of each group of experts that these tensor names speak of, and a name that shows it. gate_up_proj has
    a bias beside it only where its columns are in turn gate's and up's."""
    by_prefix: dict[str, tuple[str, str]] = {}
    for name in names:
        if single := _SINGLE.fullmatch(name):
            by_prefix.setdefault(single[1], (ONE_BY_ONE, name))
        elif fused := _FUSED.fullmatch(name):
            if name.endswith("gate_up_proj_bias"):
                by_prefix[fused[1]] = (INTERLEAVED, name)
            else:
                by_prefix.setdefault(fused[1], (FUSED, name))
    return by_prefix
