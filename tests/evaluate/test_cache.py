"""The sample cache: what hits, what misses, what survives."""

import dataclasses
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import POCKET

from rvdist.core.errors import Failed
from rvdist.core.point import Term, Vector, WeightPoint
from rvdist.evaluate.cache import FILE, SampleCache, serving_digest, slice_keys
from rvdist.evaluate.fleet import arguments
from rvdist.evaluate.fleet.arguments import EngineSettings, identity
from rvdist.evaluate.fleet.schedule import cut
from rvdist.evaluate.request import Answered, Choice, Completion, Generate, Loglikelihood, Rolling

POINT = WeightPoint("base")
OTHER = WeightPoint("base", (Term(0.5, Vector("plus", "minus")),))
REQUESTS = {
    "sums": [Generate(f"{k} + {k} =", 8, ("\n",)) for k in range(5)],
    "choice": [Choice(f"is it {k}?", answer) for k in range(3) for answer in (" yes", " no")],
}
KEYS = ["20e201dbe863df5581ed98a7e3dc729f", "925599d74db9dcaae10e9df3bbcd994c", "da98f79c36e72e4b0d4d76832460b787"]
DIGESTS = {POINT: "d0", OTHER: "d1"}
VERSIONS = {"sums": "1.0", "choice": "2.0", "more": "1.0"}
ENGINE = identity(EngineSettings(), "some processor")
COMPLETIONS = Answered(
    (Completion("line\nand “quotes” \u2028 \U0001f600\x00", "stop", 3, 9), Completion("", "length", 1, 0)), 1, 0.25
)
SCORES = Answered((Loglikelihood(-0.1234567890123456789, True, 2), Loglikelihood(float("-inf"), False, 1)), 0, 0.5)


def keys(requests=REQUESTS, digests=DIGESTS, versions=VERSIONS, engine=ENGINE, size=2):
    slices = [piece for point in digests for piece in cut(point, requests, size)]
    return set(slice_keys(slices, requests, digests, versions, engine).values())


def test_keys_are_those_of_before():
    """An earlier version's answers are found, of every kind of request."""
    asked = {"sums": REQUESTS["sums"][:1], "choice": REQUESTS["choice"][:1], "more": [Rolling("text")]}
    assert sorted(keys(asked, {POINT: "d0"}, engine={"engine": "e"}, size=1)) == KEYS


def test_what_was_written_is_read_to_the_bit(tmp_path):
    SampleCache(tmp_path / "new/place").write([("a", "point", "task", COMPLETIONS)])
    cache = SampleCache(tmp_path / "new/place")
    cache.write([("b", "point", "task", SCORES)])
    assert cache.read(["a", "b", "c"]) == {"a": COMPLETIONS, "b": SCORES}
    many = [str(k) for k in range(2000)]
    assert cache.read([*many, "a"]) == {"a": COMPLETIONS}


def test_the_first_of_two_is_kept(tmp_path):
    one, two = SampleCache(tmp_path), SampleCache(tmp_path)
    one.write([("k", "p", "t", COMPLETIONS)])
    two.write([("k", "p", "t", SCORES)])
    assert two.read(["k"]) == {"k": COMPLETIONS}


def test_another_point_or_task_adds_cells_and_leaves_the_others():
    assert len(keys()) == 2 * (3 + 3)
    assert keys(digests={POINT: "d0"}) < keys()
    assert keys(requests={"choice": REQUESTS["choice"]}) < keys()
    assert keys(requests={"more": [Generate("?", 8)] * 2} | REQUESTS) > keys()
    shared = keys(requests={"more": [Generate("?", 8)]} | REQUESTS)
    assert len(keys() - shared) == len(shared - keys()) == 2, "what is left of both is one batch now"
    versions = VERSIONS | {"more": "1.1"}
    assert len(shared - keys(requests={"more": [Generate("?", 8)]} | REQUESTS, versions=versions)) == 2
    longer = REQUESTS | {"sums": [*REQUESTS["sums"], Generate("6 + 6 =", 8, ("\n",))]}
    assert len(keys(requests=longer) & keys()) == 2 * (2 + 3), "a larger limit: the last slice of a task grows"


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "0 + 0 ="}, {"max_tokens": 9}, {"stop": ()}, {"temperature": 0.5}, {"top_p": 0.9}, {"top_k": 3},
        {"min_p": 0.1}, {"repetition_penalty": 1.1}, {"seed": 1}, {"repeat": 1},
    ],
)  # fmt: skip
def test_a_changed_request_misses_with_its_slice_and_no_other(change):
    asked = [*REQUESTS["sums"]]
    asked[4] = dataclasses.replace(asked[4], **change)
    assert len(keys() - keys(requests=REQUESTS | {"sums": asked})) == 2


def test_a_text_is_no_choice():
    assert not keys(requests={"more": [Choice("", "text")]}) & keys(requests={"more": [Rolling("text")]})


def test_every_other_ingredient_misses():
    everything = keys()
    assert not everything & keys(digests={POINT: "x", OTHER: "y"})
    assert not everything & keys(size=50), "another batch may give other text"
    assert len(everything - keys(versions=VERSIONS | {"sums": "1.1"})) == 2 * 3
    for name, value in ENGINE.items():
        changed = (value or 0) + 1 if isinstance(value, int | float | None) else value + "x"
        assert not everything & keys(engine=ENGINE | {name: changed}), name
    assert {
        "engine",
        "device",
        "vllm",
        "torch",
        "transformers",
        "enforce_eager",
        "tensor_parallel_size",
    } < ENGINE.keys()
    assert {"dtype", "truncate", "max_model_len", "seed", "max_num_seqs", "args"} < ENGINE.keys()


@pytest.mark.parametrize("file", ["tokenizer.json", "chat_template.jinja", "generation_config.json", "config.json"])
def test_what_an_engine_reads_beside_weights_counts(file, tmp_path):
    copy = shutil.copytree(POCKET / "target", tmp_path / "elsewhere")
    before = serving_digest(copy)
    assert before == serving_digest(POCKET / "target")
    (copy / "README.md").write_text("hello")
    assert serving_digest(copy) == before
    (copy / file).write_text((copy / file).read_text() + " ")
    assert serving_digest(copy) != before


def test_a_new_version_of_what_the_engine_does_misses(monkeypatch):
    monkeypatch.setattr(arguments, "VERSION", -1)
    assert not keys() & keys(engine=identity(EngineSettings(), "some processor"))


@pytest.mark.parametrize("version", [1, 2])
def test_no_row_survives_of_engines_that_let_points_spoil_each_other(version, monkeypatch):
    monkeypatch.setattr(arguments, "VERSION", version)
    assert not keys() & keys(engine=identity(EngineSettings(), "some processor"))


WRITER = """
import sys
from pathlib import Path
from rvdist.evaluate.cache import SampleCache
from rvdist.evaluate.request import Answered, Completion
cache = SampleCache(Path(sys.argv[1]))
for k in range(int(sys.argv[3])):
    cache.write([(f"{sys.argv[2]}-{k}", "p", "t", Answered((Completion("x" * 5000, "stop", 1, k),), 0, 0.0))])
    print(k, flush=True)
"""


def writer(directory, name, count):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(directory), name, str(count)], stdout=subprocess.PIPE, text=True
    )


def test_two_processes_write_at_once(tmp_path):
    """Both make the file, too."""
    writers = [writer(tmp_path, name, 100) for name in "ab"]
    for process in writers:
        process.communicate(timeout=120)
        assert process.returncode == 0
    found = SampleCache(tmp_path).read([f"{name}-{k}" for name in "ab" for k in range(100)])
    assert [found[f"b-{k}"].answers[0].tokens for k in range(100)] == list(range(100)) and len(found) == 200


def test_slices_that_come_together_are_one_transaction(tmp_path):
    cache, said = SampleCache(tmp_path), []
    cache._connection.set_trace_callback(said.append)
    cache.write((str(k), "p", "t", COMPLETIONS) for k in range(8))
    assert [line.split()[0] for line in said if not line.startswith("INSERT")] == ["BEGIN", "COMMIT"]
    assert len(cache.read([str(k) for k in range(8)])) == 8


def test_what_was_written_survives_a_kill(tmp_path):
    """Killed while it writes, five times over; all it had said it wrote is there, and the file is sound."""
    for turn in range(5):
        process = writer(tmp_path, f"turn{turn}", 10**6)
        said = [process.stdout.readline() for _ in range(10 + 7 * turn)]
        os.kill(process.pid, signal.SIGKILL)
        said += process.stdout.readlines()
        process.wait()
        written = [f"turn{turn}-{line.strip()}" for line in said if line.endswith("\n")]
        cache = SampleCache(tmp_path)
        assert cache.read(written).keys() == set(written)
        cache.write([(f"after {turn}", "p", "t", SCORES)])
        cache.close()
    assert sqlite3.connect(tmp_path / FILE).execute("PRAGMA integrity_check").fetchone() == ("ok",)


def spoil_header(path):
    path.write_bytes(b"not a database at all" * 100)


def spoil_pages(path):
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)


def cut_off(path):
    os.truncate(path, 5000)


def put_another_in_its_place(path):
    path.unlink()
    sqlite3.connect(path).execute("CREATE TABLE theirs (x)")


def age(path):
    sqlite3.connect(path).execute("PRAGMA user_version = 99")


def add_a_view(path):
    """Another's program in the place of the table: it would run for ever."""
    with sqlite3.connect(path) as connection:
        connection.execute("ALTER TABLE slices RENAME TO other")
        connection.execute(
            "CREATE VIEW slices AS WITH RECURSIVE n(k) AS (SELECT 1 UNION ALL SELECT k + 1 FROM n) "
            "SELECT 'x' || k AS key, '' AS point, '' AS task, '[]' AS answers, 0 AS truncated, 0 AS seconds FROM n"
        )


def add_a_trigger(path):
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TRIGGER t AFTER INSERT ON slices BEGIN DELETE FROM slices; END")


@pytest.mark.parametrize(
    "spoil", [spoil_header, spoil_pages, cut_off, put_another_in_its_place, age, add_a_view, add_a_trigger]
)
def test_a_file_that_cannot_be_used_is_one_sentence(spoil, tmp_path):
    cache = SampleCache(tmp_path)
    for k in range(20):
        cache.write([(str(k), "p", "t", COMPLETIONS)])
    cache.close()
    spoil(tmp_path / FILE)
    with pytest.raises(
        Failed, match=r"samples.sqlite: the sample cache cannot be used \(.+\); move it away, or set"
    ) as one:
        SampleCache(tmp_path).read([str(k) for k in range(20)])
    assert "\n" not in str(one.value)


def test_a_full_disk_costs_nothing_that_is_there_and_is_not_said_to_be_the_files_fault(tmp_path):
    cache, some = SampleCache(tmp_path), Answered((Completion("x" * 9000, "stop", 1, 2),), 0, 0.5)
    cache.write([("one", "point", "task", some)])
    (pages,) = cache._connection.execute("PRAGMA page_count").fetchone()
    cache._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(Failed, match="disk is full.; make room there, and the same command goes on, or set cache.dir"):
        cache.write([("two", "point", "task", some)])
    cache._connection.execute("PRAGMA max_page_count = 1000")
    cache.write([("three", "point", "task", some)])
    assert cache.read(["one", "two", "three"]) == {"one": some, "three": some}


def test_a_link_to_nothing_is_not_followed(tmp_path):
    """One to a file is: somebody keeps it elsewhere."""
    cache, elsewhere = tmp_path / "cache?mode=memory", tmp_path / "elsewhere"
    cache.mkdir()
    (cache / FILE).symlink_to(elsewhere)
    with pytest.raises(Failed, match=r"samples.sqlite: .* \(it is a link to a file that is not there\); move it away"):
        SampleCache(cache)
    assert not elsewhere.exists()
    elsewhere.touch()
    SampleCache(cache).write([("0", "p", "t", COMPLETIONS)])
    assert elsewhere.stat().st_size and not (tmp_path / "cache").exists()
    journal = cache / "other" / f"{FILE}-journal"
    journal.parent.mkdir()
    journal.symlink_to(tmp_path / "victim")
    with pytest.raises(Failed, match="samples.sqlite: the sample cache cannot be used"):
        SampleCache(journal.parent)
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize(
    "change",
    [
        "answers = '[[]]'", "answers = '[3]'", "answers = '{}'", "answers = NULL", "answers = x'ff'", "answers = 'x'",
        "answers = CAST(x'5b5b22ff225d5d' AS TEXT)", "answers = '[[\"a\", \"stop\", 1]]'", "answers = '[]'",
        "answers = '[[\"a\", \"stop\", 1, -1], [\"a\", \"stop\", 1, 1]]'", "answers = substr(answers, 2)",
        "answers = '[[\"\\ud800\", \"stop\", 1, 1], [\"a\", \"stop\", 1, 1]]'",
        "answers = '[[\"a\", \"stop\", 1, true], [\"a\", \"stop\", 1, 1]]'",
        "answers = '[[NaN, true, 1], [0.5, true, 1]]'", "answers = '[[0.5, true, 1], [0.5, true, 1]]'",
        "truncated = 'x'", "truncated = NULL", "seconds = 'x'", "seconds = -1", "seconds = 9e999",
        "answers = replace(hex(zeroblob(20000)), '0', '[')",
    ],
)  # fmt: skip
def test_a_row_that_is_no_answer_is_a_miss_and_is_replaced(change, tmp_path):
    cache = SampleCache(tmp_path)
    for key in "ab":
        cache.write([(key, "p", "t", COMPLETIONS)])
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute(f"UPDATE slices SET {change} WHERE key = 'a'")
    asked = {key: [Generate("x", 1)] * len(COMPLETIONS.answers) for key in "ab"}
    cache = SampleCache(tmp_path)
    assert cache.read(["a", "b"], asked) == {"b": COMPLETIONS} and cache.damaged == {"a"}
    cache.write([("a", "p", "t", COMPLETIONS)])
    assert cache.read(["a", "b"], asked) == {"a": COMPLETIONS, "b": COMPLETIONS} and not cache.damaged
    assert cache.read(["a"], {"a": [Choice("a", "b")] * 2}) == {} and cache.damaged == {"a"}


def test_a_pipe_in_its_place_is_no_cache(tmp_path):
    os.mkfifo(tmp_path / FILE)
    with pytest.raises(Failed, match="it is no file"):
        SampleCache(tmp_path)


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Failed, match="the sample cache cannot be used"):
        SampleCache(tmp_path / "file")


def test_a_file_that_another_run_holds_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("rvdist.evaluate.cache._PATIENCE", 0.1)
    cache = SampleCache(tmp_path)
    other = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(Failed, match="locked"):
        cache.write([("k", "p", "t", SCORES)])
    other.execute("COMMIT")
    cache.write([("k", "p", "t", SCORES)])
    assert cache.read(["k"]) == {"k": SCORES}


def test_people_can_ask_it(tmp_path):
    SampleCache(tmp_path).write([("k", "digest", "sums", COMPLETIONS)])
    row = sqlite3.connect(Path(tmp_path) / FILE).execute("SELECT point, task, json_array_length(answers) FROM slices")
    assert row.fetchone() == ("digest", "sums", 2)


def test_a_directory_in_which_nothing_can_be_written_is_named(disk):
    """On a disk that became read-only for errors, while the cache was open; what was kept is read there, too."""
    cache = SampleCache(disk.place / "cache")
    cache.write([("one", "point", "task", COMPLETIONS)])
    disk.stop()
    said = r"the sample cache cannot be used \({}: no file can be made there \(Read-only file system\)\); mend that, "
    with pytest.raises(Failed, match=said.format(disk.place / "cache")):
        cache.write([("other", "point", "task", COMPLETIONS)])
    assert cache.read(["one", "other"]) == {"one": COMPLETIONS}
    with pytest.raises(Failed, match=said.format(disk.place)):
        SampleCache(disk.place / "new")
