"""Loading torch's libraries ahead of its import."""

from __future__ import annotations

import subprocess
import sys

LOADING = """
import sys
from rvdist.merge import private_torch

def loaded():
    return {line.split()[-1].rpartition("/")[2] for line in open("/proc/self/maps") if ".so" in line}

names = {name for name, _ in private_torch.LIBRARIES}
assert not names & loaded() and "torch" not in sys.modules
private_torch.load()
assert names <= loaded() and "torch" not in sys.modules
before = loaded()
import torch
assert torch.ones(3).sum() == 3
assert not {name for name in loaded() - before if name.startswith("libtorch_cpu")}
"""


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_torchs_libraries_are_loaded_before_it_is_imported():
    done = run(LOADING)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_where_there_is_no_torch_nothing_is_loaded(monkeypatch):
    from rvdist.merge import private_torch

    for found in (
        None,
        type("Spec", (), {"origin": None})(),
        type("Spec", (), {"origin": "/nowhere/torch/__init__.py"})(),
    ):
        monkeypatch.setattr(private_torch, "find_spec", lambda name, found=found: found)
        private_torch.load()
