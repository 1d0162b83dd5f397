"""Signals while a command loads its modules."""

import signal
import subprocess
import sys

import pytest

# in place of a module that all of them import: sends the signal, and is that module if this was ignored
IN_PLACE = """
import os, signal, sys, time
os.kill(os.getpid(), signal.{0})
sys.path.pop(0), sys.modules.pop(__name__)
import shlex, argparse
"""


def load(place, door, sent, **options):
    for name in ("shlex", "argparse"):
        (place / f"{name}.py").write_text(IN_PLACE.format(sent))
    command = [sys.executable, "-m", f"rvdist.{door}", "nowhere"]
    ended = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=60, **options)
    return ended.returncode, ended.stdout, ended.stderr


@pytest.mark.parametrize("door", ["launch", "verify", "inspect"])
def test_a_signal_while_modules_load_is_one_sentence_and_its_status(tmp_path, door):
    assert load(tmp_path, door, "SIGINT") == (130, "", "rvdist: interrupted\n")
    assert load(tmp_path, door, "SIGTERM") == (143, "", "rvdist: terminated (SIGTERM)\n")


def test_one_that_is_ignored_stays_so(tmp_path):
    """As nohup, or a shell that begins a command in the background, wants it."""
    status, _, said = load(
        tmp_path, "verify", "SIGHUP", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    assert status == 2 and "nowhere" in said


WHOEVER_IMPORTS = """
import signal
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
import rvdist.launch, rvdist.verify, rvdist.inspect, rvdist.api
assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
"""


def test_whoever_imports_the_doors_keeps_their_signals():
    subprocess.run([sys.executable, "-c", WHOEVER_IMPORTS], check=True, timeout=60)
