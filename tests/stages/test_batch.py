"""`batch`: what an entry stands for; and the command, in which one that fails loses no other."""

import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
from checkpoints import POCKET, SCORING, launch, load_checkpoint, near, tensors, write_checkpoint
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from made_up import make_experiment
from omegaconf import OmegaConf

import rvdist
from rvdist.core import config
from rvdist.core.config import (
    BatchConfig,
    BenchmarksConfig,
    Config,
    DonorsConfig,
    EachConfig,
    VectorConfig,
    WeightedVectorConfig,
)
from rvdist.core.errors import BadInput, Failed
from rvdist.core.timing import Timing
from rvdist.launch import CONF
from rvdist.report.findings import Findings
from rvdist.report.statistics.compare import summarise
from rvdist.stages import multirun
from rvdist.stages.batch import Batch
from rvdist.stages.job import Job
from rvdist.stages.jobs import run_jobs
from rvdist.stages.warm import Warm


def settings(**changes):
    return Config(**({"target": "org/t", "vector": VectorConfig("p", "m"), "output": "o/{target}-{alpha}"} | changes))


def asked(**changes):
    """The merges of a batch: (output below o/, base, [(plus, α)]), or why there is none."""
    found = []
    for part in Batch(Job(settings(**changes), None, "", Timing())).parts:
        if isinstance(part.job, BadInput):
            found.append(str(part.job))
            continue
        ((directory, point),) = part.job.outputs.items()
        assert directory == part.output and not part.job.settings.batch
        terms = [(term.vector.plus, term.alpha) for term in point.terms]
        found.append((str(directory).rpartition("/o/")[2], point.base, terms))
    return found


def test_an_entry_is_as_the_top_level_but_for_what_it_sets():
    batch = [
        BatchConfig(alpha=[0.5, 1.0]),
        BatchConfig(target="org/u", alpha=-1.0),
        BatchConfig(vectors=[WeightedVectorConfig("q", "m", alpha=2.0)], output="o/both"),
        BatchConfig(vector=DonorsConfig(path="stored/v"), output="o/{vector}"),
    ]
    assert asked(batch=batch) == [
        ("t-0.5", "org/t", [("p", 0.5)]),
        ("t-1", "org/t", [("p", 1.0)]),
        ("u--1", "org/u", [("p", -1.0)]),
        ("both", "org/t", [("q", 2.0)]),
        ("v", "org/t", [("stored/v", 1.0)]),
    ]
    assert config.stages(settings(batch=batch, output=None)) == ["merge"]


def test_an_entry_is_every_target_with_every_vector_and_alpha(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("models/b", "models/a", "models/c.partial", "steps/20", "steps/10", "odd[1]"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models/file").touch()
    each = [EachConfig("p", "m", name="math"), EachConfig("steps/*", "m")]
    found = asked(batch=[BatchConfig(["models/*", "org/t"], each=each)], output="o/{target}/{vector}")
    assert " ".join(place for place, _, _ in found) == "a/math b/math a/10 a/20 b/10 b/20 t/math t/10 t/20"
    assert asked(target="models/?", output="o/{target}") == [
        ("a", "models/a", [("p", 1.0)]),
        ("b", "models/b", [("p", 1.0)]),
    ], "a pattern is a batch by itself"
    assert asked(batch=[BatchConfig("odd[1]")]) == [("odd[1]-1", "odd[1]", [("p", 1.0)])], "it exists: no pattern"


def test_the_example_of_the_documentation(tmp_path, monkeypatch):
    text = (Path(rvdist.__file__).parent.parent / "docs/batches.md").read_text()
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(text.partition("```yaml\n")[2].partition("```")[0])
    monkeypatch.chdir(tmp_path)
    for name in ("models/small", "models/large", "code/checkpoint-1", "code/checkpoint-2", "adapters/style"):
        (tmp_path / name).mkdir(parents=True)
    multirun.register()
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        mine = OmegaConf.to_object(compose("config", [f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"]))
    assert isinstance(mine, Config)
    made = [part.output for part in Batch(Job(mine, tmp_path, "", Timing())).parts if isinstance(part.job, Job)]
    named = [
        f"{vector}-{alpha}" for vector in ("math", "checkpoint-1", "checkpoint-2", "style") for alpha in ("0.5", "1")
    ]
    wanted = [f"{target}/{name}" for target in ("small", "large") for name in named]
    assert sorted(str(path.relative_to(tmp_path / "out")) for path in made) == sorted(
        [*wanted, "model/grpo+style-1", "small/grpo+style-1"]
    )


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        (BatchConfig("no/*"), "batch[1].target: no directory matches no/*; check the pattern"),
        (BatchConfig([]), "batch[1].target is not set, nor is target; set one of them"),
        (BatchConfig(3), "batch[1].target: 3 is neither a checkpoint nor a list of them"),
        (BatchConfig(alpha="one"), "batch[1].alpha: 'one' is not a finite number"),
        (BatchConfig(each=[]), "batch[1].each is an empty list; give at least one vector"),
        (BatchConfig(each=[EachConfig("no/*", "m")]), "batch[1].vector.plus: no directory matches no/*"),
        (BatchConfig(vector=DonorsConfig("p")), "batch[1].vector.minus is not set; "),
        (
            BatchConfig(vector=DonorsConfig("p", "m"), each=[EachConfig("p", "m")]),
            "batch[1].vector and each are both set; set one of vector, vectors and each",
        ),
    ],
)  # fmt: skip
def test_an_entry_that_cannot_be_loses_no_other(entry, sentence):
    whole = [BatchConfig("org/a"), entry, BatchConfig("org/b")]
    found = asked(batch=whole, target="" if entry.target == [] else "org/t")
    assert found[0::2] == [("a-1", "org/a", [("p", 1.0)]), ("b-1", "org/b", [("p", 1.0)])]
    assert found[1].startswith(sentence)


def test_what_is_asked_for_twice_is_made_once_and_what_collides_not_at_all():
    twice = asked(batch=[BatchConfig(alpha=1.0), BatchConfig("org/t", alpha=[1.0, 2.0])])
    assert [place for place, _, _ in twice] == ["t-1", "t-2"]
    both = asked(batch=[BatchConfig(alpha=[1.0, 2.0], output="o/x"), BatchConfig("org/u")])
    assert [one if isinstance(one, str) else one[0] for one in both] == [
        *2 * [f"output: several points would be written to {Path('o/x').absolute()}; put {{alpha}}, {{target}}, "
              "{vector} or {recipe} into it"],
        "u-1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"stages": ["analyze"]}, "stages: analyze is for one target, and batch is set"),
        (
            {"benchmarks": config.BenchmarksConfig(["x"]), "sweep": config.SweepConfig([1.0])},
            "what it makes of each target is scored; leave out arms, sweep.alphas and search",
        ),
        ({"vector": VectorConfig("p", "m", save="v")}, "vector.save stores one vector, and batch is set"),
        ({"merge": config.MergeConfig(method="tie")}, "merge.method: 'tie' is not one of"),
    ],
)
def test_what_concerns_all_of_a_batch_is_refused_once(changes, reason):
    with pytest.raises(BadInput, match=reason):
        asked(batch=[BatchConfig()], **changes)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two targets and two donors of one origin, a donor of another, and a file where a directory is wanted."""
    where = tmp_path_factory.mktemp("batch")
    base = tensors(0, torch.float32)
    for number, name in enumerate(("models/one", "models/two", "plus", "minus")):
        write_checkpoint(where / name, near(base, number))
    write_checkpoint(where / "odd", tensors(9, torch.float32))
    (where / "file").touch()
    return where


GOOD = "{target:models/*,each:[{plus:plus,minus:minus},{name:back,plus:minus,minus:plus}],alpha:[0.5,1]}"
BAD = (
    "{target:nowhere}",
    "{target:models/one,output:other,vector:{plus:plus,minus:odd}}",
    "{target:models/one,output:file/below}",
    "{target:none/*}",
)
COMMON = ("vector.plus=plus", "vector.minus=minus", "output=out/{target}/{vector}-{alpha}", "merge.workers=1")


def table(place, run="run"):
    return json.loads((place / run / "batch.json").read_text())


@pytest.mark.heavy
def test_one_that_fails_loses_no_other(place):
    done = launch(f"batch=[{BAD[0]},{GOOD},{','.join(BAD[1:])}]", *COMMON, "hydra.run.dir=run", cwd=place)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (sentence,) = done.stderr.splitlines()
    assert "batch: of 12 merges 4 failed, the others are done; the first: nowhere: no such checkpoint" in sentence
    written = sorted(str(path.parent.relative_to(place / "out")) for path in (place / "out").glob("*/*/config.json"))
    assert written == [
        f"{target}/{vector}-{alpha}"
        for target in ("one", "two")
        for vector in ("back", "plus")
        for alpha in ("0.5", "1")
    ]
    one, plus, minus, out = (load_checkpoint(place / p) for p in ("models/one", "plus", "minus", "out/one/back-0.5"))
    for name, tensor in out.items():
        exact = one[name].double() + 0.5 * (minus[name].double() - plus[name].double())
        assert torch.equal(tensor, exact.float()), name
    timing = json.loads((place / "run/timing.json").read_text())
    size = sum(tensor.nbytes for tensor in one.values())
    assert (timing["bytes_read"], timing["bytes_written"]) == (4 * size, 8 * size), "every source byte once"
    rows = table(place)
    assert [row["status"] for row in rows] == ["failed", *8 * ["written"], *3 * ["failed"]]
    assert rows[1] == {
        "output": str(place / "out/one/plus-0.5"),
        "alpha": 0.5,
        "vector": "plus",
        "target": "models/one",
        "status": "written",
        "reason": None,
    }
    for row, reason in zip(
        [rows[0], *rows[9:]],
        ("nowhere: no such", "is not from the same pre-training", "below: cannot be created", "none/*"),
        strict=True,
    ):
        assert reason in row["reason"] and row["reason"] in done.stdout
    assert done.stdout.count("already complete") == 0 and "models" not in done.stdout.partition("status")[0]
    assert "GOOD" not in (place / "run/config.yaml").read_text() and "each:" in (place / "run/config.yaml").read_text()

    again = launch(f"batch=[{GOOD}]", *COMMON, "hydra.run.dir=again", cwd=place)
    assert again.returncode == 0 and not again.stderr, again.stderr
    assert [row["status"] for row in table(place, "again")] == 8 * ["already complete"]


@pytest.mark.heavy
def test_a_batch_in_which_all_is_bad_input_writes_nothing(place):
    before = sorted(place.rglob("*"))
    done = launch(f"batch=[{','.join(BAD)}]", *COMMON, "hydra.run.dir=bad", cwd=place)
    assert done.returncode == 2 and sorted(place.rglob("*")) == before
    (sentence,) = done.stderr.splitlines()
    assert sentence == "rvdist: nowhere: no such checkpoint directory; check the path (and 3 more, above)"
    planned = launch(f"batch=[{GOOD}]", *COMMON, "stages=[plan]", "overwrite=true", "hydra.run.dir=bad", cwd=place)
    assert planned.returncode == 0 and planned.stdout.count(" bytes, writes ") == 1, "one plan"
    assert planned.stdout.count("planned") == 8 and sorted(place.rglob("*")) == before
    refused = launch("batch=[{vector:{plus:plus,minus:minus,save:v}}]", *COMMON, "target=models/one", cwd=place)
    assert refused.returncode == 2 and refused.stderr == "rvdist: batch: Key 'save' not in 'DonorsConfig'\n"


def test_all_targets_are_one_page_with_links_to_their_own(tmp_path):
    arms, records, tasks = make_experiment(n=30)
    batch = Batch(Job(settings(batch=[BatchConfig(["org/t", "org/u", "org/lost"])], output="o/{target}",
                               benchmarks=BenchmarksConfig(tasks=["task_0"])), tmp_path, "", Timing()))  # fmt: skip
    one, other, lost = batch.scorers({})
    one.directory.mkdir()
    (one.directory / "report.html").touch()
    found = Findings(arms, summarise(arms, records, tasks, "baseline"), records, tasks)
    with pytest.raises(Failed):
        batch.conclude({lost: Failed("it is lost")}, {}, {one: found, other: found})
    page = (tmp_path / "report.html").read_text()
    assert page.count("<a href=") == 1 and '<a href="t/report.html">' in page, "the other has no report of its own"
    assert "<h1>2 targets</h1>" in page and all(f'scope="rowgroup">{name}<' in page for name in "tu")


def test_no_merge_overwrites_what_another_one_reads(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    batch = [BatchConfig("models/one", output="models/two"), BatchConfig("models/two", output="late/three")]
    asked = settings(batch=batch, vector=VectorConfig("plus", "minus"), overwrite=True, stages=["plan"])
    with closing(Warm()) as warm:
        (ended,) = run_jobs([Job(asked, tmp_path, "", Timing())], warm)
    error = ended.error
    assert isinstance(error, Failed) and "of 2 merges 1 failed" in str(error)
    assert f"output: {place}/models/two is or holds the source models/two, which would be lost" in str(error)


@pytest.mark.slow
def test_a_merge_that_fails_on_its_way_loses_no_other(place):
    alphas = "alpha=[0.25,1e43,0.75,1.25]"
    done = launch(
        "target=models/*", alphas, *COMMON[:2], "output=late/{target}-{alpha}", "hydra.run.dir=late", cwd=place
    )
    assert done.returncode == 1, done.stderr
    assert [row["status"] for row in table(place, "late")] == 2 * ["written", "failed", "written", "written"]
    assert "would be infinite or not a number" in table(place, "late")[1]["reason"]
    assert len(list((place / "late").iterdir())) == 6 + 4  # and config, table, timing, log


@pytest.mark.slow
def test_what_a_batch_makes_of_each_target_is_scored_beside_it(tmp_path):
    vectors = f"each:[{{plus:{POCKET}/grpo,minus:{POCKET}/sft}},{{name:back,plus:{POCKET}/sft,minus:{POCKET}/grpo}}]"
    batch = f"batch=[{{target:['{POCKET}/[st]*t',nowhere],{vectors},alpha:[0.5,1]}}]"
    places = ("output=out/{target}/{vector}-{alpha}", "hydra.run.dir=run", "merge.workers=1")
    done = launch(batch, *SCORING, *places, cwd=tmp_path)
    assert done.returncode == 1 and "batch: of 12 merges and 2 evaluations 4 failed" in done.stderr, done.stderr
    rows = table(tmp_path)
    assert [row["status"] for row in rows] == 8 * ["written"] + 4 * ["failed"]
    assert len(list((tmp_path / "out").glob("*/*/config.json"))) == 8 and "mean score" in done.stdout
    for target in ("sft", "target"):
        summary = json.loads((tmp_path / "run" / target / "summary.json").read_text())
        arms = ["baseline", "grpo alpha=0.5", "grpo alpha=1", "back alpha=0.5", "back alpha=1"]
        assert list(dict.fromkeys(row["arm"] for row in summary)) == arms
        assert (tmp_path / "run" / target / "report.html").exists()
        assert f'<a href="{target}/report.html">' in (tmp_path / "run/report.html").read_text()
        by_arm = {arm: [row["value"] for row in summary if row["arm"] == arm and row["primary"]] for arm in arms}
        own = [row for row in rows if row["target"].endswith(target) and row["score"] is not None]
        assert len(own) == 4
        for row in own:
            values = by_arm[f"{row['vector']} alpha={config.alpha_text(row['alpha'])}"]
            assert row["score"] == pytest.approx(sum(values) / len(values))
    assert len({row["score"] for row in rows}) > 2
