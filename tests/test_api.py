"""The Python API: its examples, what it refuses, and what it leaves as it was."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import forked
import pytest
from checkpoints import POCKET, launch, load_checkpoint

from rvdist import api
from rvdist.api import BadInput, Mask, MethodSpec, Term, Vector, WeightPoint
from rvdist.core.record import Record, write_records

DOCS = Path(__file__).resolve().parent.parent / "docs/python.md"
VECTOR = Vector(str(POCKET / "grpo"), str(POCKET / "sft"))
TARGET = WeightPoint(str(POCKET / "target"))
RECORD = Record("a", "p", 1.0, "plain", "task", "none", 0, 3, "hash", {"acc": 1.0}, "prompt", "4", "#### 4", "4")


def at(alpha, **changes):
    return WeightPoint(TARGET.base, (Term(alpha, VECTOR),), **changes)


def python(code, cwd):
    script = cwd / "script.py"
    script.write_text(code)
    return subprocess.run([sys.executable, script], cwd=cwd, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """The blocks of the page as one program."""
    place = tmp_path_factory.mktemp("examples")
    blocks = re.findall(r"^```python\n(.*?)^```$", DOCS.read_text(), re.DOTALL | re.MULTILINE)
    (place / "script.py").write_text("\n".join(blocks))
    done = forked.run("script", [], place, os.environ, timeout=600)
    assert done.returncode == 0, done.stderr
    return place, done.stdout


def test_the_examples_say_what_they_should(examples):
    place, said = examples
    assert "alpha=1    pocket_sums 1.00" in said and "no/such/directory" in said
    assert not [line for line in said.splitlines() if line.startswith(("merge:", "evaluate:", "fleet:", "wrote"))]
    assert {path.name for path in place.iterdir()} - {"__pycache__"} == {"script.py", "out", "run", "cache"}
    exact = load_checkpoint(POCKET / "target")
    plus, minus = load_checkpoint(POCKET / "grpo"), load_checkpoint(POCKET / "sft")
    for name, tensor in load_checkpoint(place / "out/half").items():
        wanted = exact[name].double() + 0.5 * (plus[name].double() - minus[name].double())
        assert (tensor == wanted.to(tensor.dtype)).float().mean() > 0.9999
    assert WeightPoint.from_json(json.loads((place / "run/points.json").read_text())["alpha=0.5"]) == at(0.5)


@pytest.mark.slow
def test_the_command_finds_the_same_in_the_same_cache(examples):
    place, _ = examples
    done = launch(
        *(f"target={TARGET.base}", f"vector.plus={VECTOR.plus}", f"vector.minus={VECTOR.minus}"),
        *("sweep.alphas=[0.5,1]", "benchmarks.tasks=[pocket_sums]", "benchmarks.limit=8", "cache.dir=cache"),
        *("engine.count=1", "engine.max_model_len=1024", "engine.kv_cache_gib=0.125", "hydra.run.dir=command"),
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    assert "were answered before: no engine is needed" in done.stdout
    assert (place / "command/summary.json").read_bytes() == (place / "run/summary.json").read_bytes()
    by_arm = [api.load_records(place / f"{run}/samples/alpha=1.jsonl") for run in ("run", "command")]
    assert by_arm[0] == by_arm[1] and len(by_arm[0]) == 8
    assert len(api.load_records(place / "run")) == 3 * 8


WITH_AND_WITHOUT_RAY = f"""
import asyncio, io, threading, time
import ray
from rich.console import Console
from rvdist.api import BadInput, ClusterConfig, Config, Term, Vector, WeightPoint, merge

vector = Vector({VECTOR.plus!r}, {VECTOR.minus!r})
one, two = (WeightPoint({TARGET.base!r}, (Term(alpha, vector),)) for alpha in (1, 2))

def among_three():
    try:
        merge({{"more": one}}, settings=Config(cluster=ClusterConfig(nodes=3, timeout=0.0)))
    except BadInput as error:
        return "only 1 joined" in str(error)

assert among_three() and not ray.is_initialized()

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
done = []
thread = threading.Thread(target=lambda: done.append(merge({{"thread": one}}, workers=1)))
thread.start()

async def cell():
    return merge({{"notebook": two}}, workers=1)

done.append(asyncio.run(cell()))
thread.join()
assert [merged.timing.bytes_written for merged in done] == [854784] * 2, done
said = io.StringIO()
assert merge({{"thread": one}}, console=Console(file=said)).timing.bytes_written == 0
assert "already complete" in said.getvalue()
assert among_three() and ray.get(ray.put(1)) == 1
deadline = time.monotonic() + 60
while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
    time.sleep(0.2)
assert ray.available_resources()["CPU"] == 2, "workers are left"
ray.shutdown()
"""


@pytest.mark.slow
def test_a_ray_that_is_there_is_used_from_any_thread_and_left_alone(tmp_path):
    """And one that was started is ended, even where too few nodes join it: it would die with its thread, and the
    process stay connected to it."""
    done = python(WITH_AND_WITHOUT_RAY, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert {path.name for path in tmp_path.iterdir()} == {"script.py", "thread", "notebook"}


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        ({}, "points is empty"),
        ([at(1)], "points: give a dictionary"),
        ({3: at(1)}, "points: give a dictionary"),
        ({"a": TARGET.base}, "points: a: is no WeightPoint"),
        ({"a": WeightPoint(TARGET.base, [Term(1, VECTOR)])}, "points: a: is no WeightPoint with a tuple"),
        ({"a": WeightPoint(TARGET.base, (1.0, VECTOR))}, "points: a: is no WeightPoint with a tuple"),
        ({"a": at(1), "./a": at(2)}, "two of them would be written to"),
        ({"a": at(1, method=MethodSpec("soup"))}, "points: a: method: 'soup' is not one of linear"),
        ({"a": at(1, method=MethodSpec("ties", 0.0))}, "density 0.0 is not above 0"),
        ({"a": WeightPoint(TARGET.base, method=MethodSpec("slerp"))}, "slerp goes from the base to one other model"),
        ({"a": WeightPoint(POCKET)}, "name a source by str"),
        ({"a": WeightPoint(TARGET.base, (Term(1, VECTOR, Mask(("none",))),))}, "leaves no tensor"),
    ],
)
def test_points_that_cannot_be_merged(points, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=reason):
        api.merge(points)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("points", "tasks", "changes", "reason"),
    [
        ({}, ["pocket_sums"], {}, "points is empty"),
        ({"a/b": TARGET}, ["pocket_sums"], {}, "points: 'a/b' cannot be the name of a file"),
        ({"a": TARGET}, "pocket_sums", {}, r"give \['pocket_sums'\]"),
        ({"a": TARGET}, [], {}, "tasks is empty"),
        ([TARGET], ["pocket_sums"], {}, "points: give a dictionary"),
        ({"a": TARGET}, ["pocket_sums"], {"limit": 0}, "benchmarks.limit: 0"),
        ({"a": TARGET}, ["pocket_sums"], {"limit": "x"}, "benchmarks.limit: 'x'"),
        ({"a": TARGET}, ["pocket_sums"], {"engines": 0}, "engine.count: 0"),
        ({"a": TARGET}, ["pocket_sums"], {"settings": {"engine": 1}}, "settings: give a Config"),
        ({"a": TARGET}, ["pocket_sums"], {"directory": "file"}, "file is a file; choose another"),
        ({"a": WeightPoint("nowhere")}, ["pocket_sums"], {"directory": "run"}, "nowhere"),
    ],
)
def test_what_cannot_be_evaluated(points, tasks, changes, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(BadInput, match=reason):
        api.evaluate(points, tasks, **changes)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_only_arms_on_one_line_have_an_alpha():
    other = WeightPoint(TARGET.base, (Term(1, Vector(VECTOR.minus, VECTOR.plus)),))
    donor, two = WeightPoint(VECTOR.plus), WeightPoint(TARGET.base, at(1).terms + other.terms)
    points = {"t": TARGET, "half": at(0.5), "other": other, "donor": donor, "two": two, "zero": at(0), "one": at(1)}
    found = {arm.name: arm.alpha for arm in api._arms(points)}
    assert found == {"t": 0, "half": 0.5, "other": None, "donor": None, "two": None, "zero": 0, "one": 1}


def test_records_of_a_file_and_of_a_run(tmp_path):
    (tmp_path / "samples").mkdir()
    other = replace(RECORD, arm="b", alpha=None)
    write_records(tmp_path / "samples/b.jsonl", [other])
    write_records(tmp_path / "samples/a.jsonl", [RECORD, RECORD])
    write_records(tmp_path / "samples/of_an_earlier_run.jsonl", [RECORD])
    (tmp_path / "summary.json").write_text('[{"arm": "b"}, {"arm": "a"}, {"arm": "b"}]')
    assert api.load_records(tmp_path) == [other, RECORD, RECORD]
    assert api.load_records(str(tmp_path / "samples/b.jsonl")) == [other]


@pytest.mark.parametrize("summary", ["[", "{}x", "[1]", '[{"arm": 1}]', '[{"arm": "../a"}]', "[" * 100_000, '["arm"]'])
def test_a_summary_that_is_none(summary, tmp_path):
    (tmp_path / "summary.json").write_text(summary)
    with pytest.raises(BadInput, match="summary.json: is not the summary of a run"):
        api.load_records(tmp_path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"arm": "a"', "line 2 is no record"),
        (b"", "line 2 is no record"),
        (b"[]", "it is not an object"),
        (b"\xff", "line 2 is no record"),
        (b"[" * 100_000, "line 2 is no record"),
        (b'{"arm": "a"}', "it lacks 'alpha'"),
        (json.dumps(asdict(RECORD) | {"more": 1}).encode(), "it has 'more'"),
        *(
            (json.dumps(asdict(RECORD) | changed).encode(), f"{next(iter(changed))} (is|are)")
            for changed in ({"arm": 1}, {"doc_id": True}, {"alpha": "1"}, {"seed": 1.5}, {"metrics": []})
        ),
        (json.dumps(asdict(RECORD) | {"metrics": {"acc": "1"}}).encode(), "acc is '1'"),
    ],
)
def test_damaged_records_are_named(line, reason, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(json.dumps(asdict(RECORD)).encode() + b"\n" + line + b"\n")
    with pytest.raises(BadInput, match=f"a.jsonl: .*{reason}"):
        api.load_records(file)


@pytest.mark.parametrize("place", [".", "nothing.jsonl", "a_directory.jsonl"])
def test_where_there_are_no_records(place, tmp_path):
    (tmp_path / "a_directory.jsonl").mkdir()
    with pytest.raises(BadInput, match="give"):
        api.load_records(tmp_path / place)


def test_the_import_is_cheap():
    heavy = ("torch", "ray", "vllm", "lm_eval", "transformers", "hydra", "omegaconf")
    done = python_line(f"import rvdist.api, sys; print([m for m in {heavy} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def python_line(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path.home())
