"""Arms of one's own: checkpoints as they are, each with its own tokenizer, and prompt styles."""

import json

import pytest
from checkpoints import POCKET, launch

from rvdist.core.record import read_records

pytestmark = pytest.mark.heavy

THINK = "Think step by step.\n"
ARMS = (
    'arms=[{name:Baseline,alpha:0},{name:"G+T",weights:"${vector.plus}",prompt:think},{name:"+Vector",alpha:1},'
    '{name:"+Vector+Think",alpha:1,prompt:think},{name:"−Vector",alpha:-1}]'
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("arms")
    done = launch(
        "experiment=demo",
        *(f"{key}={POCKET / name}" for key, name in (("target", "target"), ("vector.plus", "grpo"))),
        f"vector.minus={POCKET / 'sft'}",
        *("output=null", "sweep.alphas=null", "benchmarks.limit=24", "benchmarks.tasks=[pocket_sums,pocket_choice]"),
        *(ARMS, "engine.count=1", "cache.dir=cache", "hydra.run.dir=run"),
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    return place / "run"


def test_every_arm_has_its_rows_and_the_first_is_the_baseline(run):
    rows = {(row["arm"], row["task"]): row for row in json.loads((run / "summary.json").read_text())}
    assert len(rows) == 10
    found = {arm: (row["alpha"], row["prompt"]) for (arm, _), row in rows.items()}
    assert found == {
        "Baseline": (0.0, "plain"),
        "G+T": (None, "think"),
        "+Vector": (1.0, "plain"),
        "+Vector+Think": (1.0, "think"),
        "−Vector": (-1.0, "plain"),
    }
    assert rows["Baseline", "pocket_sums"]["delta"] is None and rows["+Vector", "pocket_sums"]["delta"] > 0


def test_the_prompt_goes_before_the_question_and_nothing_else_changes(run):
    plain, think = (list(read_records(run / f"samples/{arm}.jsonl")) for arm in ("+Vector", "+Vector+Think"))
    assert [record.doc for record in plain] == [record.doc for record in think]
    for one, other in zip(plain, think, strict=True):
        assert other.prompt_text.count(THINK) == 1 and other.prompt_text.replace(THINK, "") == one.prompt_text
        assert other.target == one.target and other.prompt == "think"


def test_an_arm_is_asked_through_its_own_template(run):
    """The donors' template is another one than the target's, so their engine is another one too."""
    target, donor = (next(read_records(run / f"samples/{arm}.jsonl")).prompt_text for arm in ("+Vector+Think", "G+T"))
    assert target != donor and THINK in donor
    assert json.loads((run / "timing.json").read_text())["fleet"]["swaps"] <= 3
