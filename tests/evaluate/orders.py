"""Ten points, five of them bad, in random orders on one engine: what is asked of it, and of engines that see one point.

Run as a script (mode, kind of model, directory, seeds), it asks engines in a process of their own, which has one mode.
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__" and sys.argv[1] == "eager":
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

from families import SETTINGS, Family, make_family, start
from safetensors.torch import load_file, save_file

from rvdist.core.point import Term, Vector, WeightPoint
from rvdist.evaluate.fleet.arguments import EngineSettings
from rvdist.evaluate.fleet.engine import Engine
from rvdist.evaluate.request import Choice, Generate, Rolling, Unscorable

# so few blocks that all are used again and again; and NaN weights are let through, to spoil what they can
_SETTINGS = dataclasses.replace(SETTINGS, kv_cache_gib=0.004, allow_nonfinite=True)
_SPOILED = {
    "layers.0.self_attn.k_proj.weight": math.nan,
    "embed_tokens.weight": math.nan,
    "layers.1.input_layernorm.weight": math.inf,
}
_TEXTS = ("ab=12+34", "qu a a", "9", "Q: 472+314=?\nA: " * 4, "what is 3+4? say: ")
_CHOICES = (("12+34", "=46 ab"), ("q a ", "a b"), ("what is 3+4? " * 6, "7"))


def points(family: Family, out: Path) -> tuple[list[WeightPoint], list[WeightPoint]]:
    """Good ones and bad ones: NaN and infinite donors, and finite weights so large that the forward pass overflows."""
    bad = [family.point(1e20), family.point(-1e30)]
    for number, (name, value) in enumerate(_SPOILED.items()):
        donor = out / f"donor{number}"
        donor.mkdir(parents=True)
        for file in family.plus.iterdir():
            (donor / file.name).write_bytes(file.read_bytes())
        tensors = load_file(donor / "model.safetensors")
        tensors[f"model.{name}"].view(-1)[::7] = value
        save_file(tensors, donor / "model.safetensors", metadata={"format": "pt"})
        bad.append(WeightPoint(str(family.target), (Term(1.0, Vector(str(donor), str(family.minus))),)))
    good = [WeightPoint(str(family.target)), WeightPoint(str(family.plus)), *map(family.point, (0.5, 1.0, -1.0))]
    return good, bad


def asked(engine: Engine, point: WeightPoint) -> Any:
    """All that an engine says at a point; None where it says that the point has no score."""
    try:
        engine.swap(point)
        return (
            engine.answer([Generate(text, 24) for text in _TEXTS]),
            engine.answer([Choice(*pair) for pair in _CHOICES]),
            engine.answer([Rolling("12+34=46 " * 40)]),
        )
    except Unscorable:
        return None


@dataclass(frozen=True)
class Alone:
    """Good points and bad ones, and what engines that see one point say at it."""

    good: list[WeightPoint]
    bad: list[WeightPoint]
    said: dict[WeightPoint, Any]


def ask_alone(family: Family, out: Path, settings: EngineSettings = _SETTINGS) -> Alone:
    good, bad = points(family, out)
    home = WeightPoint(str(family.target))
    return Alone(good, bad, {point: asked(start(home, settings), point) for point in [*good, *bad]})


def traces(family: Family, alone: Alone, seeds: Sequence[int], settings: EngineSettings = _SETTINGS) -> list[str]:
    """What is wrong on an engine that is taken through the points in the order of each seed."""
    good, bad, said = alone.good, alone.bad, alone.said
    wrong = [f"{point} has no score" for point in good if said[point] is None]
    wrong += [f"{point} has a score" for point in bad[-len(_SPOILED) :] if said[point] is not None]
    engine = start(WeightPoint(str(family.target)), settings)
    for seed in seeds:
        order = [*good, *bad]
        random.Random(seed).shuffle(order)
        wrong += [
            f"seed {seed}: {point} after {order[: order.index(point)]}"
            for point in order
            if asked(engine, point) != said[point]
        ]
    return wrong


if __name__ == "__main__":
    _, mode, kind, place, *seeds = sys.argv
    family = make_family(kind, Path(place))
    settings = dataclasses.replace(_SETTINGS, enforce_eager=mode == "eager")
    found = traces(family, ask_alone(family, Path(place) / "bad", settings), list(map(int, seeds)), settings)
    print(*found, sep="\n")
    sys.stdout.flush()
    os._exit(len(found) > 0)
