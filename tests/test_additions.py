"""What is added by a file, or a file and a row, is known everywhere: tried on a copy of the package, by commands."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import POCKET, load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
FAMILY = (f"target={POCKET / 'target'}", f"vector.plus={POCKET / 'grpo'}", f"vector.minus={POCKET / 'sft'}")

SIGN = '''"""A step of the same size for every element: r = t + Σ α_k · density · sign(d_k)."""


class Sign:
    whole_tensors = False
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


@pytest.fixture
def copy(tmp_path):
    """A tree of its own with the package, its configuration and its docs."""
    for part in ("rvdist", "conf", "docs"):
        shutil.copytree(ROOT / part, tmp_path / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def run(copy, *line):
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *line], cwd=copy, env=environment, capture_output=True, text=True, timeout=300
    )


def ending(copy, file, name):
    """How a test of ours ends on the copy."""
    alone = ("-q", "--noconftest", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={copy}")
    return run(copy, "-m", "pytest", *alone, f"{ROOT / 'tests' / file}::{name}")


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

    chosen = ("merge.method=sign", "merge.density=0.25", "merge.workers=1", "alpha=-0.5", "output=out")
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
