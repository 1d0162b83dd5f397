"""No point leaves a trace in the next: in any order, and whatever its forward pass gave."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from families import Family
from orders import Alone, ask_alone, traces

from rvdist.evaluate.fleet import swap


@pytest.fixture(scope="module")
def alone(families: dict[str, Family], tmp_path_factory: pytest.TempPathFactory) -> Alone:
    return ask_alone(families["tied"], tmp_path_factory.mktemp("orders"))


def test_every_order_gives_the_same_answers(families: dict[str, Family], alone: Alone) -> None:
    assert traces(families["tied"], alone, range(3)) == []


def test_without_clearing_the_caches_points_do_leave_traces(
    families: dict[str, Family], alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the test above would notice."""
    monkeypatch.setattr(swap, "clear_caches", lambda caches: None)
    assert traces(families["tied"], alone, range(1)) != []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "kind"), [("eager", "moe"), ("eager", "untied"), ("eager", "llama"), ("compiled", "tied")]
)
def test_every_order_of_other_models_and_in_compiled_mode(mode: str, kind: str, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "orders.py"
    done = subprocess.run(
        [sys.executable, str(script), mode, kind, str(tmp_path), "0", "1", "2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
