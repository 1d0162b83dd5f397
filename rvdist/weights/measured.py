"""v by chunks, and how what was stored of it differs from it.

Knows donors and what reads the stored one, nothing of how that is written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from rvdist.weights import peft
from rvdist.weights.arithmetic.method import Scratch, working_dtype
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.stream import TORCH_DTYPE
from rvdist.weights.stored import Operand
from rvdist.weights.values import AT_ONCE, Values


def work_of(name: str, donors: Sequence[Checkpoint]) -> torch.dtype:
    """The precision a merge takes the difference in, where neither its target nor its output asks for more."""
    plus, *minus = (TORCH_DTYPE[donor.tensors[name].dtype] for donor in donors)
    return working_dtype((), [(plus, minus[0] if minus else None)])


class Differences:
    """v by chunks: in the working precision as a merge computes it, or in fp64. Valid until the next chunk."""

    def __init__(self, donors: Sequence[Checkpoint], values: Values) -> None:
        self._donors, self._values, self._scratch = donors, values, Scratch(AT_ONCE)

    def __call__(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """(first element, elements in working precision) for each chunk of a tensor."""
        numel, work = self._donors[0].tensors[name].numel, work_of(name, self._donors)
        for begin in range(0, numel, AT_ONCE):
            yield begin, self._fill(name, begin, self._scratch(0, min(AT_ONCE, numel - begin), work))

    def wide(self, name: str, begin: int, count: int) -> torch.Tensor:
        """Elements of one chunk in fp64."""
        return self._fill(name, begin, self._scratch(1, count, torch.float64))

    def whole(self, name: str) -> torch.Tensor:
        """All of a tensor in working precision, 1-d."""
        numel = self._donors[0].tensors[name].numel
        return self._fill(name, 0, torch.empty(numel, dtype=work_of(name, self._donors)))

    def _fill(self, name: str, begin: int, out: torch.Tensor) -> torch.Tensor:
        plus, *minus = self._values.operands
        return self._values.difference(name, begin, plus, minus[0] if minus else None, out)


def measure(name: str, differences: Differences, result: Operand) -> dict[str, Any]:
    """How what was written differs from v: `exact` is against what a merge takes, the rest against v in fp64. `zeros`
    counts v's own, where donors agree."""
    buffer = torch.empty(AT_ONCE * 8, dtype=torch.uint8)
    exact, worst, error, norm, zeros = True, 0.0, 0.0, 0.0, 0
    for begin, taken in differences(name):
        held = name in result.checkpoint.tensors
        stored = result.read(name, begin, begin + taken.numel(), buffer) if held else torch.zeros_like(taken)
        wide = differences.wide(name, begin, taken.numel())
        exact = exact and torch.equal(stored.double(), taken.double())
        norm += float(wide.square().sum())
        zeros += wide.numel() - int(torch.count_nonzero(wide))
        off = wide.sub_(stored)
        worst = max(worst, float(off.abs().max()))
        error += float(off.square().sum())
    relative = math.sqrt(error / norm) if norm else 0.0
    measured = {"exact": exact, "max_error": worst, "relative_error": relative, "norm": math.sqrt(norm)}
    return measured | {"zeros": zeros}


def summarise(entries: Mapping[str, Mapping[str, Any]], adapter: bool) -> dict[str, Any]:
    """What was measured of all tensors together, and for what a vector is exact: whatever is wider than 16 bits asks
    for the difference in fp64, and everything else for what a merge takes."""
    worst = max(entry["max_error"] for entry in entries.values())
    error = math.hypot(*(entry["relative_error"] * entry["norm"] for entry in entries.values()))
    norm = math.hypot(*(entry["norm"] for entry in entries.values()))
    exact = all(entry["exact"] for entry in entries.values())
    holds = "every target and output" if worst == 0 else "targets and outputs of 16 bits" if exact else None
    elements = sum(math.prod(entry["shape"]) for entry in entries.values())
    zeros = sum(entry["zeros"] for entry in entries.values()) / elements if elements else 0.0
    relative = error / norm if norm else 0.0
    said = {"exact": exact, "exact_for": holds, "max_error": worst, "relative_error": relative, "zeros": zeros}
    return said | (peft.left_out(entries) if adapter else {})


def as_lines(description: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]]) -> str:
    """JSON with one line a tensor."""
    lines = [f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()]
    head = json.dumps(description, indent=2, ensure_ascii=False).removesuffix("\n}")
    return head + ',\n  "tensors": {\n' + ",\n".join(lines) + "\n  }\n}\n"
