"""What a tensor is of, from its name alone: `model.layers.7.self_attn.q_proj.bias` is of a q_proj.

Knows names; the layer is `rvdist.core.point.layer_of`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_USUAL = ("embedding", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "norm", "lm_head")


def kind_of(name: str) -> str:
    """The kind of module: its path inside its layer, or outside the layers its last component; without numbers, so
    that all experts of a layer are of one kind. Every normalisation is `norm`, every embedding `embedding`."""
    path = re.sub(r"(.)\.(weight|bias)$", r"\1", name).split(".")
    last = next((part for part in reversed(path) if not part.isdigit()), name)
    if "norm" in last or last.startswith("ln_"):
        return "norm"
    if "embed" in last or last in ("wte", "wpe"):
        return "embedding"
    first = next((k for k, part in enumerate(path) if part.isdigit()), len(path) - 2)
    inside = ".".join(part for part in path[first + 1 :] if not part.isdigit())
    return re.sub(r"^(self_attn|mlp)\.", "", inside) or last


def in_order(kinds: Iterable[str]) -> list[str]:
    """Each kind once: the usual ones in the order in which a token meets them, then the others as they come."""
    present = dict.fromkeys(kinds)
    return [kind for kind in _USUAL if kind in present] + [kind for kind in present if kind not in _USUAL]
