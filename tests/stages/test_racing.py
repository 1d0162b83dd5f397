"""`search=racing` on real engines: the best α, and α's of layer groups, from part of the grid's samples."""

import json

import pytest
from checkpoints import POCKET, launch

pytestmark = pytest.mark.heavy

SCORING = (
    "experiment=demo",
    f"target={POCKET / 'target'}",
    f"vector.plus={POCKET / 'grpo'}",
    f"vector.minus={POCKET / 'sft'}",
    "benchmarks.tasks=[pocket_sums,pocket_choice]",
    "search=racing",
    "output=null",
    "engine.count=1",
    "cache.dir=cache",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("racing")


def test_the_best_alpha_is_found_and_confirmed_on_documents_it_was_not_chosen_by(place):
    arguments = ("benchmarks.limit=100", "search.round=40", "search.holdout=0.3", "sweep.alphas=[-1,0,0.25,1]")
    done = launch(*SCORING, *arguments, "hydra.run.dir=run", cwd=place)
    assert done.returncode == 0, done.stderr
    found = json.loads((place / "run/search.json").read_text())
    assert found["best"] == "alpha=1" and {one["candidate"] for one in found["eliminated"]} >= {"alpha=-1", "baseline"}
    assert found["over"] and found["samples"] < found["full_grid"] == 4 * 140
    race, held = (found["documents"][part] for part in ("race", "held_out"))
    assert all(sorted(race[task] + held[task]) == list(range(100)) for task in ("pocket_sums", "pocket_choice"))
    rows = json.loads((place / "run/summary.json").read_text())
    assert {(row["arm"], row["n"]) for row in rows} == {("baseline", 30), ("alpha=1", 30)}
    records = (place / "run/samples/alpha=1.jsonl").read_text().splitlines()
    asked = {(record["task"], record["doc_id"]) for record in map(json.loads, records)}
    assert asked == {(task, document) for task, own in held.items() for document in own}
    assert "the race found alpha=1 the best of 4 candidates" in " ".join(done.stdout.split())
    assert "documents that it did not see" in (place / "run/report.html").read_text()
    fleet = json.loads((place / "run/timing.json").read_text())["fleet"]
    assert fleet["engines"] == 1 and fleet["cached"] == 0

    again = launch(*SCORING, *arguments, "hydra.run.dir=again", cwd=place)
    assert again.returncode == 0, again.stderr
    assert (place / "again/search.json").read_bytes() == (place / "run/search.json").read_bytes()
    assert (place / "again/summary.json").read_bytes() == (place / "run/summary.json").read_bytes()
    assert json.loads((place / "again/timing.json").read_text())["fleet"]["requests"] == 0


@pytest.mark.slow
def test_a_race_takes_what_a_grid_has_answered(place):
    """After the grid of the same α's a race asks nothing; after that of some of them, only the others."""
    arguments = ("benchmarks.limit=60", "search.round=40", "engine.slice_size=20", "cache.dir=grid-cache")
    grid = launch(
        *(one for one in SCORING if one not in ("search=racing", "cache.dir=cache")),
        *(one for one in arguments if not one.startswith("search")),
        *("sweep.alphas=[-1,0,1]", "hydra.run.dir=grid"),
        cwd=place,
    )
    assert grid.returncode == 0, grid.stderr
    own = tuple(one for one in SCORING if one != "cache.dir=cache")
    done = launch(*own, *arguments, "sweep.alphas=[-1,0,1]", "hydra.run.dir=after", cwd=place)
    assert done.returncode == 0, done.stderr
    fleet = json.loads((place / "after/timing.json").read_text())["fleet"]
    assert fleet["requests"] == 0 and fleet["cached"] > 0
    lines = {run: (place / run / "samples/baseline.jsonl").read_text().splitlines() for run in ("grid", "after")}
    found = {
        run: {(one["task"], one["doc_id"]): one["response"] for one in map(json.loads, own)}
        for run, own in lines.items()
    }
    assert found["after"] and found["after"].items() <= found["grid"].items(), "its answers are the grid's"
    more = launch(*own, *arguments, "sweep.alphas=[-1,0,0.5,1]", "hydra.run.dir=more", cwd=place)
    assert more.returncode == 0, more.stderr
    fleet = json.loads((place / "more/timing.json").read_text())["fleet"]
    assert 0 < fleet["requests"] < fleet["cached"]


@pytest.mark.slow
def test_alphas_of_groups_of_tensors(place):
    groups = r"search.groups=[{layers:[[0,0]]},{layers:[[1,9]]},{exclude:['.*layers.*']}]"
    arguments = ("benchmarks.limit=60", "search.round=60", "search.alphas=[0,1]", groups)
    done = launch(*SCORING, *arguments, "hydra.run.dir=groups", cwd=place)
    assert done.returncode == 0, done.stderr
    found = json.loads((place / "groups/search.json").read_text())
    assert len(found["means"]) == 8 and "alpha=0,1,1" in found["means"]
    assert found["means"][found["best"]] > found["means"]["baseline"]
    rows = json.loads((place / "groups/summary.json").read_text())
    assert {row["arm"] for row in rows} == {"baseline", found["best"]}
