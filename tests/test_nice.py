"""How nice workers are: no nicer than whoever asks for them, unless he says so."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

ASKING = """
import os, ray
from rvdist.core import cluster
cluster.connect("local")
print(ray.get(ray.remote(lambda: os.nice(0)).remote()) - os.nice(0))
"""


def test_workers_are_no_nicer_than_this_process(ray_local: None) -> None:
    import ray

    assert ray.get(ray.remote(num_cpus=0)(lambda: os.nice(0)).remote()) == os.nice(0)


@pytest.mark.slow
def test_a_niceness_of_ones_own_is_kept() -> None:
    asked = os.environ | {"RAY_worker_niceness": "3"}
    done = subprocess.run([sys.executable, "-c", ASKING], env=asked, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["3"], done.stderr
