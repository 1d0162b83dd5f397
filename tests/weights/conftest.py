"""The tests of weights compute by the compiled loops, which a merge loads where there is much to compute."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")
def loops() -> None:
    from rvdist.weights.arithmetic.method import warm_up

    warm_up()
