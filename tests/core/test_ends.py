"""Ends that are not ours, beside those of a merge (tests/merge/test_faults.py): of a sweep, of Ray's start."""

import contextlib
import json
import os
import re
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import SCORING, launch

from rvdist.core import cluster, ends, private_ray
from rvdist.core.ends import KEPT
from rvdist.core.errors import Failed


def children(pid):
    """The processes that one has begun, or was given."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has ended
            yield from map(int, (task / "children").read_text().split())


def descendants(pid):
    """The same by name."""
    found = {}
    for child in children(pid):
        with contextlib.suppress(OSError):  # one that has ended
            found[Path(f"/proc/{child}/comm").read_text().strip()] = child
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
        ("gcs_server SIGSTOP", 1, r"the Ray cluster is lost: its GCS \(process \d+\) has been stopped for 10 s"),
        ("raylet SIGSTOP", 1, r"the Ray cluster is lost: its raylet \(process \d+\) has been stopped for 10 s"),
        (None, 143, r"terminated \(SIGTERM\)"),
    ],
)
def test_a_sweep_ends_with_our_sentence_and_goes_on(place, victim, status, sentence):
    arguments = ["target=family/target", "vector.plus=family/grpo", "vector.minus=family/sft", *SCORING]
    arguments += ["sweep.alphas=[0.5,1,2,3,4,5]", "engine.slice_size=8", "hydra.run.dir=run"]
    command = [sys.executable, "-m", "rvdist.launch", *arguments]
    running = subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (place / "cache/samples.sqlite").exists() and (place / "run/log.jsonl").exists())
    began = time.monotonic()
    what, _, stopped = (victim or "").partition(" ")
    if stopped:  # so that nothing is done before Ray is lost, and it is still needed then
        wait_for(lambda: has_answers(place / "cache/samples.sqlite"))
        os.kill(engine_below(running.pid), signal.SIGSTOP)
        began = time.monotonic()
    if what:
        os.kill(descendants(running.pid)[what], signal.SIGSTOP if stopped else signal.SIGKILL)
    else:
        running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=60)
    assert time.monotonic() - began < (25 if stopped else 10)
    assert running.returncode == status and re.fullmatch(f"rvdist: {sentence}; {KEPT}\n", errors), errors
    told = [json.loads(line) for line in (place / "run/log.jsonl").read_text().splitlines()]
    assert [line["status"] for line in told if line["event"] == "failed"] == [status]  # phases may end after it
    again = launch(*arguments, cwd=place)
    assert again.returncode == 0, again.stderr
    assert (place / "run/summary.json").exists()


def has_answers(cache):
    with contextlib.suppress(sqlite3.OperationalError), sqlite3.connect(f"file:{cache}?mode=ro", uri=True) as known:
        return known.execute("SELECT count(*) FROM slices").fetchone()[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["engine", "driver"])
def test_a_sweep_of_which_a_process_stands_still_goes_on(place, victim):
    """An engine that is stopped is replaced once `engine.timeout` is over; the driver goes on when it is continued,
    though its engine was silent meanwhile for longer than that."""
    arguments = ["target=family/target", "vector.plus=family/grpo", "vector.minus=family/sft", *SCORING]
    arguments += ["sweep.alphas=[0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1]", "engine.timeout=20"]
    arguments += ["benchmarks.limit=200", "engine.slice_size=8"]  # so that there is more to come after the first
    undisturbed = launch(*arguments, "hydra.run.dir=undisturbed", "cache.dir=another", cwd=place)
    assert undisturbed.returncode == 0, undisturbed.stderr
    command = [sys.executable, "-m", "rvdist.launch", *arguments, "hydra.run.dir=run"]
    running = subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: has_answers(place / "cache/samples.sqlite"))
    stopped = running.pid
    if victim == "engine":
        stopped = engine_below(running.pid)
    os.kill(stopped, signal.SIGSTOP)
    if victim == "driver":
        time.sleep(25)
        os.kill(stopped, signal.SIGCONT)
    _, errors = running.communicate(timeout=400)
    assert running.returncode == 0, errors
    assert (place / "run/summary.json").read_bytes() == (place / "undisturbed/summary.json").read_bytes()
    assert not Path(f"/proc/{stopped}").exists()
    deaths = json.loads((place / "run/timing.json").read_text())["fleet"]["deaths"]
    assert deaths == (1 if victim == "engine" else 0)


@pytest.mark.slow
def test_what_ray_says_of_an_engine_that_died_stands_in_the_log_alone(place):
    """Standard output is for what the command says."""
    arguments = ["target=family/target", "vector.plus=family/grpo", "vector.minus=family/sft", *SCORING]
    arguments += ["sweep.alphas=[0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1]", "hydra.run.dir=run"]
    arguments += ["benchmarks.limit=100", "engine.slice_size=8"]  # so that there is more to come after the first
    command = [sys.executable, "-m", "rvdist.launch", *arguments]
    with subprocess.Popen(command, cwd=place, stdout=-1, stderr=-1, text=True) as running:
        wait_for(lambda: has_answers(place / "cache/samples.sqlite"))
        os.kill(engine_below(running.pid), signal.SIGKILL)
        output, errors = running.communicate(timeout=400)
    assert running.returncode == 0, errors
    told = [json.loads(line) for line in (place / "run/log.jsonl").read_text().splitlines()]
    words = [(line["level"], line["message"]) for line in told if line["event"] == "ray"]
    assert words and {level for level, _ in words} == {"warning"} and "worker died" in words[0][1], words
    assert not any(said in output + errors for _, said in words if said.strip())


def engine_below(driver):
    """The only engine of the Ray that it has started."""
    raylet = descendants(driver)["raylet"]
    (found,) = (pid for pid in children(raylet) if b"EngineActor" in Path(f"/proc/{pid}/cmdline").read_bytes())
    return found


WATCHED = """
import subprocess, sys, time
from rvdist.core import cluster, ends, private_ray
from rvdist.core.private_ray import Vital
vital = subprocess.Popen(["sleep", "600"])
cluster.vital = lambda: Vital(((vital.pid, "raylet"),), None)
ends._STOPPED = 1.0
ends.Watch(lambda sentence, status: print(sentence, status, file=sys.stderr)).begin()
print(vital.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.heavy
def test_a_part_of_ray_that_stands_still_ends_the_command():
    with subprocess.Popen([sys.executable, "-c", WATCHED], stdout=-1, stderr=-1, text=True) as running:
        vital = int(running.stdout.readline())
        os.kill(vital, signal.SIGSTOP)
        _, errors = running.communicate(timeout=30)
    assert running.returncode == 1
    assert errors == f"the Ray cluster is lost: its raylet (process {vital}) has been stopped for 1 s; {KEPT} 1\n"
    assert not Path(f"/proc/{vital}").exists()


def test_a_part_of_ray_that_stands_still_for_a_moment_ends_nothing(monkeypatch):
    """Nor two moments; nor one of all of us, as a terminal may stop all: of what passes between looks a second
    counts."""

    def look(seconds, stopped):
        monkeypatch.setattr(ends, "_is_stopped", lambda pid: stopped)
        monkeypatch.setattr("rvdist.core.ends.time.monotonic", lambda: now[0])
        now[0] += seconds
        watch._look_for_stopped()
        monkeypatch.undo()

    now, lost = [0.0], []
    watch = ends.Watch(lambda *told: None)
    watch._looked, watch._vital, watch._is_ours_to_miss, watch._lose = (
        0.0,
        {0: (1, "raylet")},
        lambda: True,
        lost.append,
    )
    for stopped in (True, False, True):
        for _ in range(99):
            look(0.1, stopped)
    look(3600.0, False)
    look(3600.0, True)
    assert not lost
    for _ in range(99):
        look(0.1, True)
    assert lost[0] == "raylet (process 1) has been stopped for 10 s"


@pytest.mark.slow
def test_a_gcs_that_is_killed_while_ray_starts_ends_the_command(place):
    """Ray itself would wait for a minute and then end the process with words of its own."""
    arguments = ["target=family/target", "vector.plus=family/grpo", "vector.minus=family/sft", "output=out"]
    arguments.append("merge.workers=1")  # on Ray, which so small a merge else does not start
    command = [sys.executable, "-m", "rvdist.launch", *arguments]
    running = subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: "gcs_server" in descendants(running.pid))
    time.sleep(0.5)
    os.kill(descendants(running.pid)["gcs_server"], signal.SIGKILL)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == 1
    assert re.fullmatch(rf"rvdist: the Ray cluster is lost: its GCS \(process \d+\) ended; {KEPT}\n", errors), errors
    again = launch(*arguments, cwd=place)
    assert again.returncode == 0, again.stderr


def test_a_gcs_that_died_before_it_was_seen_is_missed(tmp_path):
    """Imports may hold up who looks, and a GCS of ours live for less than that."""
    before = private_ray.gcs_servers()
    shutil.copy("/bin/true", tmp_path / "gcs_server")
    with subprocess.Popen([tmp_path / "gcs_server"]) as gcs:
        os.waitid(os.P_PID, gcs.pid, os.WEXITED | os.WNOWAIT)
        assert private_ray.starting(before) == private_ray.Vital(((gcs.pid, "GCS"),), None)
        alive = os.pidfd_open(gcs.pid)
        assert select.select([alive], [], [], 0)[0]
        os.close(alive)


STANDING_STILL_AT_THE_END = """
import os, signal
from rvdist import launch
from rvdist.core import private_ray

def stop_and_shut_down(then=private_ray.shut_down):
    (gcs,) = private_ray.gcs_servers()
    os.kill(gcs, signal.SIGSTOP)
    then()

private_ray.shut_down = stop_and_shut_down
launch.main()
"""


@pytest.mark.slow
def test_a_ray_that_stands_still_when_all_is_done_is_killed(place):
    """Ray would wait for it without end."""
    arguments = ["target=family/target", "vector.plus=family/grpo", "vector.minus=family/sft", "output=out"]
    command = [sys.executable, "-c", STANDING_STILL_AT_THE_END, *arguments, "merge.workers=1"]
    ended = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and ended.stderr == "", ended.stderr
    assert (place / "out/model.safetensors").exists()


def threads(pid):
    """The names of the threads of a process."""
    found = set()
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found.add((thread / "comm").read_text().strip())
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "status", "sentence"),
    [(signal.SIGTERM, 143, r"terminated \(SIGTERM\)"), (signal.SIGINT, 130, "interrupted")],
)
@pytest.mark.parametrize("thread", ["gcs_client_io_s", "worker.io"])
def test_a_signal_while_ray_starts_ends_in_our_sentence_alone(place, sent, status, sentence, thread):
    """Before its processes are there, and as its core begins in ours, which takes the signals then."""
    arguments = ["target=family/target", "vector.plus=family/grpo", "vector.minus=family/sft", "output=out"]
    arguments.append("merge.workers=1")  # on Ray, which so small a merge else does not start
    command = [sys.executable, "-m", "rvdist.launch", *arguments]
    running = subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while thread not in threads(running.pid):
        time.sleep(0.001)
    running.send_signal(sent)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == status and re.fullmatch(f"rvdist: {sentence}; {KEPT}\n", errors), errors


AT_A_MOMENT = """
import atexit, signal, sys
from rvdist import launch
from rvdist.stages import multirun

def at(owner, name, number):
    real = getattr(owner, name)
    setattr(owner, name, lambda *given: (signal.raise_signal(number), real(*given))[1])

def wait_for_ray(*given):
    try:
        signal.raise_signal(number)
    except KeyboardInterrupt:
        raise KeyboardInterrupt from None  # as Ray's core does, of whatever a handler raises while it waits

moment, number = sys.argv.pop(1), int(sys.argv.pop(1))
if moment == "begin":
    at(launch, "_quote", number)
if moment in ("close", "twice"):
    at(multirun.RayLauncher, "close", number)
if moment == "twice":
    at(launch, "run", signal.SIGTERM)
if moment == "after":
    atexit.register(signal.raise_signal, number)
if moment == "waiting":
    launch.run = wait_for_ray
launch.main()
"""


@pytest.mark.parametrize(
    ("moment", "sent", "status", "sentence"),
    [
        ("begin", signal.SIGINT, 130, "interrupted"),
        ("begin", signal.SIGTERM, 143, "terminated (SIGTERM)"),
        ("close", signal.SIGHUP, 129, "ended with its terminal (SIGHUP)"),
        ("twice", signal.SIGINT, 143, "terminated (SIGTERM)"),
        ("waiting", signal.SIGTERM, 143, "terminated (SIGTERM)"),
        ("after", signal.SIGINT, 0, ""),
        ("after", signal.SIGTERM, 0, ""),
    ],
)
def test_a_signal_at_any_moment_ends_in_one_sentence_and_none_ends_what_is_done(place, moment, sent, status, sentence):
    """Before the configuration is read, when everything ends, in the wake of another, and when all is done."""
    arguments = ["target=family/target", "vector.plus=family/grpo", "vector.minus=family/sft", "output=out"]
    command = [sys.executable, "-c", AT_A_MOMENT, moment, str(int(sent)), *arguments]
    ended = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=120)
    said = f"rvdist: {sentence}; {KEPT}\n" if sentence else ""
    assert (ended.returncode, ended.stderr) == (status, said)
    assert (place / "out").exists() == (moment in ("close", "after"))


HANDLING = """
import ctypes, signal
from rvdist.core import cluster
get = ctypes.pythonapi.PyOS_getsig
get.restype = ctypes.c_void_p
signal.signal(signal.SIGTERM, handler := lambda *given: print("ours", flush=True))
before = get(signal.SIGTERM)
cluster.connect("local")
assert signal.getsignal(signal.SIGTERM) is handler and get(signal.SIGTERM) == before
signal.raise_signal(signal.SIGTERM)
cluster.disconnect()
"""


@pytest.mark.slow
def test_who_handles_sigterm_goes_on_to_when_ray_has_started():
    done = subprocess.run([sys.executable, "-c", HANDLING], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ours\n", "")


STARTING = """
from rvdist.core import cluster
cluster.connect("local")
cluster.disconnect()
"""


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_raylet_that_dies_or_is_slow_while_ray_starts(sent):
    """One that dies is made up for at once, for which Ray waited half a minute; one that is slow is waited for longer
    than that."""
    with subprocess.Popen([sys.executable, "-c", STARTING], stdout=-1, stderr=-1, text=True) as running:
        wait_for(lambda: "raylet" in descendants(running.pid))
        raylet, began = descendants(running.pid)["raylet"], time.monotonic()
        os.kill(raylet, sent)
        if sent == signal.SIGSTOP:
            time.sleep(40)
            assert descendants(running.pid)["raylet"] == raylet
            os.kill(raylet, signal.SIGCONT)
        else:
            wait_for(lambda: descendants(running.pid).get("raylet", raylet) != raylet)
            assert time.monotonic() - began < 20
        _, errors = running.communicate(timeout=240)
    assert running.returncode == 0, errors


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
