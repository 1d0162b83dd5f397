"""The log: the same events as text or as JSON Lines, and kept in the run directory."""

import io
import json
import math
import re
import shutil
import time

import pytest
from checkpoints import launch
from rich.console import Console

from rvdist.core import progress
from rvdist.core.log import FILE, Log, LoggedTiming
from rvdist.core.progress import Bar

VECTOR = ("vector.plus=family/grpo", "vector.minus=family/sft")
RUN_ID = r"\d{8}T\d{6}Z-[0-9a-f]{6}"
HOSTILE = "a\nb\r\x1b[31mred\x1b[0m\x9b2J\x07 \u2028\udcff [bold]:smile:"


def events(text):
    return [json.loads(line) for line in text.splitlines()]


def test_events_are_told_in_json_and_kept(tmp_path, capsys):
    log = Log(as_json=True)
    log.say("message", HOSTILE, path=HOSTILE, score=math.nan)
    log.record("end", "done", objective=0.5)
    log.keep(tmp_path)
    log.keep(tmp_path)
    log.fail("no such file", 2)
    printed, failed = capsys.readouterr()
    first, second = events(printed)
    assert first["message"] == first["path"] == HOSTILE and first["score"] is None
    assert second | {"time": ""} == {
        "time": "", "run": log.run, "level": "info", "event": "end", "message": "done", "objective": 0.5,
    }  # fmt: skip
    (third,) = events(failed)
    assert (third["event"], third["level"], third["status"]) == ("failed", "error", 2)
    assert events((tmp_path / FILE).read_text()) == [first, second, third]
    assert (printed + failed).isascii() and "\x1b" not in printed + failed
    assert re.fullmatch(RUN_ID, log.run) and Log().run != log.run
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])


def test_text_is_for_people_and_the_lines_are_kept_all_the_same(tmp_path, capsys):
    log = Log()
    log.keep(tmp_path)
    log.say("message", "wrote [bold]:smile:")
    log.record("end", "done")
    log.fail("no such file", 2)
    assert capsys.readouterr() == ("wrote [bold]:smile:\n", "rvdist: no such file\n")
    assert [event["event"] for event in events((tmp_path / FILE).read_text())] == ["message", "end", "failed"]


def test_what_is_released_is_told_no_more(tmp_path):
    log = Log()
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        log.record("begin", name)
        log.keep(tmp_path / name)
        log.release()
    shutil.rmtree(tmp_path / "first")
    log.record("end", "done")
    assert [event["message"] for event in events((tmp_path / "second" / FILE).read_text())] == ["second"]


def test_of_several_jobs_each_keeps_its_own_lines_and_one_file_has_all(tmp_path):
    """What 10,000 jobs write grows with their number, not with its square."""
    log = Log()
    log.gather(tmp_path)
    directories = [tmp_path / name for name in ("first", "second")]
    for directory in directories:
        log.record("begin", directory.name, directory=str(directory))
    log.record("phase_begin", "index begins")
    assert not (tmp_path / FILE).exists(), "nothing is written as long as all may be refused"
    for directory in directories:
        directory.mkdir()
        log.keep(directory)
        log.keep(directory)
    log.record("phase_end", "index took 1 s")
    for directory in directories:
        log.record("end", f"{directory.name} done", directory=str(directory))
    log.release()
    log.record("phase_end", "report took 1 s")
    kept = [[event["message"] for event in events((where / FILE).read_text())] for where in (tmp_path, *directories)]
    begin, end = ["first", "second", "index begins"], ["index took 1 s", "first done", "second done"]
    assert kept == [begin + end, ["first", "first done"], ["second", "second done"]]


def test_phases_are_told(tmp_path, capsys):
    log = Log(as_json=True)
    timing = LoggedTiming(log)
    with timing.phase("index"):
        time.sleep(0.01)
    timing.add("swap", 0.25)
    told = [(event["event"], event["phase"], event.get("seconds")) for event in events(capsys.readouterr().out)]
    seconds = timing.phases["index"]
    assert told == [
        ("phase_begin", "index", None),
        ("phase_end", "index", round(seconds, 6)),
        ("phase_end", "swap", 0.25),
    ]
    timing.write(tmp_path / "timing.json")
    assert json.loads((tmp_path / "timing.json").read_text())["run"] == log.run


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_on_a_terminal_and_lines_elsewhere(terminal, as_json, monkeypatch, capsys, tmp_path):
    """A person sees the bar or the lines, not both; nothing is drawn beside JSON."""
    now = [100.0]
    monkeypatch.setattr("rvdist.core.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "_LINE_EVERY", 0.0)
    drawn = io.StringIO()
    log = Log(as_json, Console(file=drawn, force_terminal=terminal, width=120))
    log.keep(tmp_path)
    with Bar("merge", 4000, log) as bar:
        for nbytes in (1000, 3000):
            now[0] += 0.25
            bar.advance(nbytes)
    text, kept = drawn.getvalue(), (tmp_path / FILE).read_text()
    assert [event["bytes"] for event in events(kept)] == [1000, 4000, 4000]
    first, *_, last = events(kept)
    assert first["total"] == 4000 and first["seconds_left"] > 0 and last["seconds_left"] == 0
    assert (first["seconds"], first["bytes_per_second"]) == (0.25, 4000)
    assert capsys.readouterr().out == (kept if as_json else "")
    if as_json:
        assert text == ""
    elif terminal:
        assert "━" in text and "4.0/4.0 kB" in text and "merge: " not in text
    else:
        assert re.search(r"merge: 1.0 kB of 4.0 kB in 0.\d s, .*/s, 1 s left", text) and "━" not in text


@pytest.mark.heavy
def test_a_merge_told_in_json(place):
    run = place / "run"
    done = launch("target=family/target", *VECTOR, "output=out", "hydra.run.dir=run", "log=json", cwd=place)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    told = events(done.stdout)
    assert told == events((run / FILE).read_text())
    (run_id,) = {event["run"] for event in told}
    assert json.loads((run / "timing.json").read_text())["run"] == run_id
    assert all({"time", "level", "message"} <= event.keys() for event in told)
    order = [(event["event"], event.get("phase")) for event in told]
    ordered = [
        ("phase_end", "imports"), ("begin", None), ("phase_begin", "index"), ("phase_end", "index"),
        ("phase_end", "plan"), ("progress", "merge"), ("phase_end", "merge"), ("message", None), ("end", None),
    ]  # fmt: skip
    places = [order.index(event) for event in ordered]
    assert places == sorted(places)
    *_, progressed = [event for event in told if event["event"] == "progress"]
    assert progressed["bytes"] == progressed["total"] and progressed["seconds_left"] == 0
    assert f"wrote {place / 'out'}" in [event["message"] for event in told]


def test_ray_knows_whose_its_actors_are(ray_local):
    """`ray list actors --detail` shows the namespace."""
    import ray

    assert ray.get_runtime_context().namespace == "rvdist-tests"


@pytest.mark.heavy
def test_bad_input_told_in_json(place):
    before = sorted(place.rglob("*"))
    for wrong, said in (("alhpa=1", "did you mean alpha?"), ("alpha=nan", "nan is not a finite number")):
        done = launch("target=family/target", *VECTOR, "output=out", wrong, "log=json", cwd=place)
        assert done.returncode == 2
        (failed,) = events(done.stderr)
        assert failed["event"] == "failed" and failed["status"] == 2 and said in failed["message"]
        events(done.stdout)
    assert sorted(place.rglob("*")) == before


def test_a_form_there_is_not(place):
    done = launch("target=family/target", *VECTOR, "output=out", "log=xml", cwd=place)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "rvdist: log: 'xml' is not one of text, json\n"


@pytest.mark.slow
def test_a_sweep_told_in_json(place):
    """No table is drawn; each job says how it ended, in its own directory too."""
    swept = ("alpha=0.5,nan", "output=out/{alpha}", "hydra.sweep.dir=sweep", "log=json")
    done = launch("-m", "target=family/target", *VECTOR, *swept, cwd=place)
    assert done.returncode == 1
    told = events(done.stdout)
    ends = [event for event in told if event["event"] == "end"]
    assert [(event["directory"], event["message"]) for event in ends] == [
        (str(place / "sweep/0"), "done"),
        (str(place / "sweep/1"), "failed: BadInput: alpha: nan is not a finite number"),
    ]
    (failed,) = events(done.stderr)
    assert failed["message"].startswith("job 1 (alpha=nan): alpha: nan") and failed["run"] == told[0]["run"]
    assert events((place / "sweep" / FILE).read_text())[-1] == ends[-1]
    assert events((place / "sweep/0" / FILE).read_text())[-1] == ends[0] and not (place / "sweep/1").exists()


def test_the_rate_of_a_bar_leaves_out_what_was_waited_before_it_began(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("rvdist.core.progress.time.monotonic", lambda: now[0])
    with Bar("merge", 2_000_000, Log()) as bar:
        now[0] += 30
        bar.advance(0)
        now[0] += 10
        bar.advance(2_000_000)
    assert "merge: 2.0 MB of 2.0 MB in 10.0 s, 200.0 kB/s" in capsys.readouterr().out
