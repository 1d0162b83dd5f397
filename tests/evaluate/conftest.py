"""Engines are dear: each family gets one for the whole session, and every test swaps it to where it wants it."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # the engine does so too, but a test may import torch first
import zoo
from families import Answers, Family, answers, make_family, start

from rvdist.core.point import WeightPoint
from rvdist.evaluate.fleet.engine import Engine

KINDS = ["moe", "tied", "untied", "llama"]  # vLLM makes its expert group only if its first model has experts


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Models with experts come first: vLLM's group for them goes with any engine that could not start."""
    items.sort(key=lambda item: "[moe" not in item.nodeid)


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    """Whatever test comes first, the first engine of the process has experts."""
    made = {kind: make_family(kind, tmp_path_factory.mktemp(kind)) for kind in [*KINDS, "mla"]}
    made |= {kind: zoo.make(kind, tmp_path_factory.mktemp(kind)) for kind in ("granitemoehybrid", "gpt_oss")}
    start(WeightPoint(str(made["moe"].target)))
    return made


@pytest.fixture(scope="session", params=KINDS)
def family(request: pytest.FixtureRequest, families: dict[str, Family]) -> Family:
    return families[request.param]


@pytest.fixture(scope="session")
def started(family: Family) -> tuple[Engine, Answers]:
    engine = start(WeightPoint(str(family.target)))
    return engine, answers(engine)


@pytest.fixture
def engine(started: tuple[Engine, Answers]) -> Engine:
    return started[0]


@pytest.fixture
def base(started: tuple[Engine, Answers]) -> Answers:
    """What the family's engine said before it was ever swapped."""
    return started[1]
