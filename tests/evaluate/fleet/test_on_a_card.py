"""Engines on a card, each in 0.03 of it and with so many bytes for its cache, so that others may be there too. They
have not run yet: benchmarks/gpu_kit.py runs them, and more, where there is one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from families import SETTINGS, answers, make_family, start

from rvdist.evaluate.fleet.arguments import GRAPHS, further_arguments

pytestmark = [pytest.mark.gpu, pytest.mark.heavy]

ON_CARD = dataclasses.replace(SETTINGS, gpu_memory_utilization=0.03)
MODES = {
    "eager": {"enforce_eager": True},
    "graphs": {"enforce_eager": False, "args": further_arguments({"compilation_config": GRAPHS})},
}


@pytest.fixture(autouse=True)
def card() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["tied", "llama"])
def test_a_swap_is_a_fresh_engine(tmp_path: Path, kind: str, mode: str) -> None:
    settings = dataclasses.replace(ON_CARD, **MODES[mode])
    family = make_family(kind, tmp_path)
    engine = start(family.point(0.0), settings)
    before = answers(engine)
    engine.swap(family.point(0.5))
    info = engine.info()
    assert info["device"] == "cuda" and info["mode"] == mode and info["probe"] == "passed"
    assert answers(engine) == answers(start(family.write(0.5, tmp_path / "merged"), settings))
    engine.swap(family.point(0.0))
    assert answers(engine) == before
