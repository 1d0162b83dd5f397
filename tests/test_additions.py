"""What is added by a file, or a file and a row, is known everywhere: tried on a copy of the package, by commands."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import POCKET, load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
FAMILY = (f"target={POCKET / 'target'}", f"vector.plus={POCKET / 'grpo'}", f"vector.minus={POCKET / 'sft'}")

SIGN = '''"""A step of the same size for every element: r = t + Σ α_k · density · sign(d_k)."""


class Sign:
    elementwise_sum = False
    surveys_base = False

    def __init__(self, density):
        self._density = density

    def survey(self, place, chunks):
        """Needs no survey."""

    def add(self, total, alphas, differences, place):
        for alpha, difference in zip(alphas, differences, strict=True):
            total.add_(difference.sign_().mul_(alpha * self._density))
'''
ROW = """    Facts(
        "sign", "sign.Sign", "t + Σ α_k·density·sign(d_k)", "Every element moves by {density}.", ("density",)
    ),
"""
DOCS = "| `sign` | t + Σ α_k·density·sign(d_k) | size of the step, (0, 1] | not used | none |\n"
KNOWN = """
import json, sys
from rvdist.core import config
from rvdist.core.point import WeightPoint
from rvdist.report.wording import formula
chosen = config.Config(target="t", vector=config.VectorConfig("p", "m"))
chosen.merge = config.MergeConfig(method="sign", density=0.25, seed=9)
point = config.point(chosen, -1)
point.method.check()
print(json.dumps([point.to_json()["method"], formula(point)]))
"""

DOUBLES = {
    "__init__.py": '"""Doubling numbers."""\n',
    "doubles.yaml": """task: doubles
custom_dataset: !function rvdist.evaluate.tasks.doubles.nearness.documents
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 8}
process_results: !function rvdist.evaluate.tasks.doubles.nearness.score
metric_list: [{metric: close, aggregation: mean, higher_is_better: true}]
""",
    "nearness.py": '''"""The documents of the folder, and whether an answer is near."""

import json
from pathlib import Path


def documents(**_):
    from datasets import Dataset, DatasetDict

    lines = Path(__file__).with_name("doubles.jsonl").read_text().splitlines()
    return DatasetDict(test=Dataset.from_list([json.loads(line) for line in lines]))


def score(doc, results):
    return {"close": float(abs(int(results[0]) - doc["answer"]) <= 1)}
''',
    "doubles.jsonl": "".join(json.dumps({"question": f"{k} + {k} =", "answer": 2 * k}) + "\n" for k in range(8)),
}
CLUSTER = """# The machines of a laboratory, which are slow to come.
address: auto
nodes: 3
timeout: 77
"""
LINES = ("test_docs.py", "test_what_can_be_added_has_its_line_in_the_docs")
REFERENCE = ("test_configuration_reference.py", "test_the_reference_is_up_to_date")


@pytest.fixture
def copy(tmp_path):
    """A tree of its own with the package, its configuration and its docs."""
    for part in ("rvdist", "conf", "docs"):
        shutil.copytree(ROOT / part, tmp_path / part, symlinks=True)  # with what is compiled
    for page in ("README.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / page, tmp_path)
    return tmp_path


def run(copy, *line):
    environment = os.environ | {"PYTHONPATH": str(copy)}
    return subprocess.run(
        [sys.executable, *line], cwd=copy, env=environment, capture_output=True, text=True, timeout=300
    )


def ending(copy, file, name):
    """How a test of ours ends in the copy."""
    (copy / "tests").mkdir(exist_ok=True)
    shutil.copy(ROOT / "tests" / file, copy / "tests")
    alone = ("-q", "--noconftest", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={copy}")
    return run(copy, "-m", "pytest", *alone, f"tests/{Path(file).name}::{name}")


def after(file, mark, added):
    text = file.read_text()
    assert text.count(mark) == 1
    file.write_text(text.replace(mark, mark + added))


@pytest.mark.heavy
def test_a_merge_method_is_one_file_and_one_row(copy):
    (copy / "rvdist/weights/arithmetic/sign.py").write_text(SIGN)
    after(copy / "rvdist/core/method.py", "FACTS = (\n", ROW)

    known = run(copy, "-c", KNOWN)
    assert known.returncode == 0, known.stderr
    method, formula = json.loads(known.stdout)
    assert method == {"name": "sign", "density": 0.25, "seed": 0}
    assert formula == "SIGN(t − 1 · (p − m); density 0.25)"

    chosen = ("merge.method=sign", "merge.density=0.25", "alpha=-0.5", "output=out")
    done = run(copy, "-m", "rvdist.launch", *FAMILY, *chosen)
    assert done.returncode == 0, done.stderr
    target, grpo, sft = (load_checkpoint(POCKET / member) for member in ("target", "grpo", "sft"))
    out = load_checkpoint(copy / "out")
    assert out.keys() == target.keys()
    for name, tensor in out.items():
        step = -0.125 * (grpo[name].float() - sft[name].float()).sign()
        assert torch.equal(tensor, (target[name].float() + step).bfloat16()), name
    card = (copy / "out/README.md").read_text()
    assert "θ = SIGN(target − 0.5 · (grpo − sft); density 0.25)" in card
    assert "Every element moves by density 0.25." in card

    check = ("core/test_method.py", "test_the_docs_have_a_row_for_every_method")
    lacking = ending(copy, *check)
    assert lacking.returncode == 1 and "docs/methods.md and the table of methods differ" in lacking.stdout
    after(copy / "docs/methods.md", "|---|---|---|---|---|\n", DOCS)
    written = ending(copy, *check)
    assert written.returncode == 0, written.stdout


@pytest.mark.heavy
def test_a_benchmark_is_a_folder(copy):
    """Scored from recorded answers, of which three are off by more than one."""
    folder, recorded = copy / "rvdist/evaluate/tasks/doubles", copy / "recorded"
    folder.mkdir()
    recorded.mkdir()
    for name, text in DOUBLES.items():
        (folder / name).write_text(text)
    with (recorded / "samples_doubles_2026-01-01T00-00-00.000000.jsonl").open("w") as samples:
        for k, doc in enumerate(map(json.loads, DOUBLES["doubles.jsonl"].splitlines())):
            said = doc["answer"] + (k if k > 4 else 1)
            samples.write(json.dumps({"doc_id": k, "doc": doc, "resps": [[f" {said}"]]}) + "\n")

    chosen = ("benchmarks.tasks=[doubles]", "engine=replay", "engine.replay=recorded", "hydra.run.dir=run")
    done = run(copy, "-m", "rvdist.launch", FAMILY[0], *chosen)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((copy / "run/summary.json").read_text())
    assert (row["task"], row["metric"], row["value"], row["n"]) == ("doubles", "close", 0.625, 8)
    assert "doubles" in (copy / "run/report.html").read_text()

    assert ending(copy, *LINES).returncode == 1, "a benchmark that the docs lack is noticed"
    page = copy / "docs/benchmarks.md"
    page.write_text(page.read_text() + "\n`doubles` asks for twice a number.\n")
    written = ending(copy, *LINES)
    assert written.returncode == 0, written.stdout


@pytest.mark.heavy
def test_a_kind_of_cluster_is_one_file(copy):
    (copy / "conf/cluster/laboratory.yaml").write_text(CLUSTER)
    shown = run(copy, "-m", "rvdist.launch", *FAMILY, "cluster=laboratory", "--cfg", "job", "--package", "cluster")
    assert shown.returncode == 0, shown.stderr
    assert yaml.safe_load(shown.stdout) == {"address": "auto", "nodes": 3, "timeout": 77.0}

    assert [ending(copy, *check).returncode for check in (LINES, REFERENCE)] == [1, 1]
    after(copy / "docs/clusters.md", "`cluster=slurm`, which the script sets |\n", "| racks | `cluster=laboratory` |\n")
    assert run(copy, "docs/configuration.py").returncode == 0
    said = "| `cluster=laboratory` | The machines of a laboratory, which are slow to come. |"
    assert said in (copy / "docs/configuration.md").read_text()
    for check in (LINES, REFERENCE):
        written = ending(copy, *check)
        assert written.returncode == 0, written.stdout
