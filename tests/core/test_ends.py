"""Ends that are not ours, beside those of a merge (tests/merge/test_faults.py): of a sweep, of Ray's start."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import SCORING, launch

from rvdist.core import cluster
from rvdist.core.ends import KEPT
from rvdist.core.errors import Failed


def descendants(pid):
    """The processes below one, by name."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found |= {Path(f"/proc/{child}/comm").read_text().strip(): child}
    return found


def wait_for(condition, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "status", "sentence"),
    [
        ("gcs_server", 1, r"the Ray cluster is lost: its GCS \(process \d+\) ended"),
        ("raylet", 1, r"the Ray cluster is lost: its raylet \(process \d+\) ended"),
        (None, 143, r"terminated \(SIGTERM\)"),
    ],
)
def test_a_sweep_ends_with_our_sentence_and_goes_on(place, victim, status, sentence):
    arguments = ["target=family/target", "vector.plus=family/grpo", "vector.minus=family/sft", *SCORING]
    arguments += ["sweep.alphas=[0.5,1,2]", "hydra.run.dir=run"]
    command = [sys.executable, "-m", "rvdist.launch", *arguments]
    running = subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (place / "cache/samples.sqlite").exists() and (place / "run/log.jsonl").exists())
    began = time.monotonic()
    if victim:
        os.kill(descendants(running.pid)[victim], signal.SIGKILL)
    else:
        running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert running.returncode == status and re.fullmatch(f"rvdist: {sentence}; {KEPT}\n", errors), errors
    told = [json.loads(line) for line in (place / "run/log.jsonl").read_text().splitlines()]
    assert [line["status"] for line in told if line["event"] == "failed"] == [status]  # phases may end after it
    again = launch(*arguments, cwd=place)
    assert again.returncode == 0, again.stderr
    assert (place / "run/summary.json").exists()


@pytest.mark.heavy
def test_a_start_that_times_out_is_tried_again(monkeypatch):
    import ray

    starts = []

    def start(**settings):
        starts.append(settings)
        if len(starts) < failing:
            raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", start)
    failing = 2
    cluster._init("local", None)
    assert len(starts) == 2
    starts, failing = [], 3
    with pytest.raises(Failed, match=r"tried 2 times \(The current node timed out.*same command again"):
        cluster._init("local", None)
