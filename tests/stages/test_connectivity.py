"""`analyze.text`: what a text costs along straight lines between models, on a real engine."""

import json

import pytest
from checkpoints import POCKET, launch

TEXT = "What is 3 plus 4?\nIt is 7.\n\n \nTom has 5 apples and eats 2.\n\nHe has 3 left.\n"


@pytest.mark.slow
def test_two_lines_and_their_barriers(tmp_path):
    """The target is the donor that the vector begins at: both lines are one, and so is the fleet."""
    (tmp_path / "text.txt").write_text(TEXT)
    done = launch(
        f"target={POCKET / 'sft'}",
        f"vector.plus={POCKET / 'grpo'}",
        f"vector.minus={POCKET / 'sft'}",
        *("stages=[analyze]", "analyze.text=text.txt", "analyze.points=3"),
        *("engine.count=1", "engine.kv_cache_gib=0.125", "engine.max_model_len=1024"),
        *("hydra.run.dir=run", "cache.dir=cache"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    donors, target = json.loads((tmp_path / "run/connectivity.json").read_text())
    assert (donors["name"], target["name"], donors["shares"]) == ("donors", "target", [0, 0.5, 1])
    assert donors["bits"] == target["bits"]
    first, middle, last = donors["bits"]
    assert donors["barrier"] == pytest.approx(max(0.0, middle - (first + last) / 2))
    assert donors["rise"] == pytest.approx(max(0.0, middle - max(first, last)))
    fleet = json.loads((tmp_path / "run/timing.json").read_text())["fleet"]
    assert (fleet["engines"], fleet["requests"]) == (1, 3 * 3)
    assert "the barrier is" in " ".join(done.stdout.split())
    assert (tmp_path / "run/anatomy-connectivity.png").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [(None, "text.txt: cannot be read as a text in UTF-8"), (b"\xff\xfe", "UTF-8"), (b" \n\n ", "holds no text")],
)
def test_a_text_that_is_none(tmp_path, text, reason):
    from rvdist.core.errors import BadInput
    from rvdist.evaluate.suite import Suite

    if text is not None:
        (tmp_path / "text.txt").write_bytes(text)
    with pytest.raises(BadInput, match=reason):
        Suite.load([f"text:{tmp_path / 'text.txt'}"], chat=False)
