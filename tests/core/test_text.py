"""What strangers wrote does nothing where it is shown: terminals, logs, spreadsheets."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import tensors, write_checkpoint

from rvdist.core.errors import BadInput, Failed
from rvdist.core.text import cell, is_repository, printable, reason

HOSTILE = "\x1b[2J\x1b]0;title\x07a\nrvdist: all is well\r\u202egnp\u2066\u2028\x9b31m\ud800"


@pytest.mark.parametrize("kind", [BadInput, Failed])
def test_a_sentence_is_one_line_that_does_nothing_and_ends(kind: type[Exception]) -> None:
    said = str(kind(f"file: {HOSTILE}; download it again"))
    assert said.isprintable() and said.encode() and said.endswith("; download it again")
    said = str(kind(f"file: {'x' * 4_000_000}; download it again"))
    assert len(said) < 4100 and said.startswith("file: x") and said.endswith("; download it again")


@pytest.mark.parametrize(
    "name",
    ["org/name", "_o/_n", "o/n.1", "9o/n", "org/-name", "org/name-", "org/.name", "a--b/c", "a/b..c", "a/b/c", "a b/c",
     "é/name", "../name", "./name", "org/", f"o/{'n' * 96}", f"o/{'n' * 97}", "org/name.git", "o/٣"],
)  # fmt: skip
def test_a_repository_is_what_the_hub_takes_for_one(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        taken = name.isascii() and all(len(part) <= 96 for part in name.split("/"))
    except HFValidationError:
        taken = False
    assert is_repository(name) == taken
    assert is_repository(f"{name}@refs/pr/1") == taken and not is_repository(f"{name}@../x")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("=1+1", "'=1+1"), (" =cmd|' /C calc'!A0", "' =cmd|' /C calc'!A0"), ("+cmd|'x'!A0", "'+cmd|'x'!A0"),
        ("@SUM(A1)", "'@SUM(A1)"), ("-2+3&x", "'-2+3&x"), ("\t=1", "' =1"), ("+Vector", "+Vector"), ("-0.5", "-0.5"),
        ("a\nb", "a b"), ("α=0.5", "α=0.5"), ("", ""),
    ],
)  # fmt: skip
def test_a_cell_is_no_formula(text: str, shown: str) -> None:
    assert cell(text) == shown


def test_the_reason_of_an_error_is_one_short_line() -> None:
    assert reason(ValueError("a\n  b\x1b[31m \u202ec")) == "a b�[31m �c"
    assert reason(KeyError()) == "KeyError" and len(reason(ValueError("x" * 999), 300)) == 300


def test_numbers_stay_numbers() -> None:
    assert [cell(value) for value in (-1, 0.5, None, True)] == [-1, 0.5, None, True]


@pytest.mark.parametrize("module", ["rvdist.verify", "rvdist.inspect"])
def test_names_of_tensors_do_nothing_to_a_terminal(module: str, tmp_path: Path) -> None:
    name = HOSTILE.replace("\ud800", "")
    path = write_checkpoint(tmp_path / "model", tensors(0) | {name: torch.full((2,), float("nan"))})
    done = subprocess.run([sys.executable, "-m", module, str(path)], capture_output=True, text=True, timeout=120)
    shown = (done.stdout + done.stderr).splitlines()
    assert shown and all(line.isprintable() for line in shown) and "rvdist: all is well" in done.stdout
    assert not any(line.startswith("rvdist: all is well") for line in shown)


def test_a_refusal_of_a_stranger_s_file_does_nothing_to_a_terminal(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", tensors(0), shards=2)
    index = path / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    index.write_text(json.dumps(said | {"weight_map": said["weight_map"] | {HOSTILE[:-1]: HOSTILE[:-1]}}))
    for module in ("rvdist.verify", "rvdist.inspect"):
        done = subprocess.run([sys.executable, "-m", module, str(path)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and not done.stdout
        assert len(done.stderr.splitlines()) == 1 and done.stderr.rstrip("\n").isprintable()


def test_the_log_shows_one_line_and_keeps_what_was_said() -> None:
    script = f"from rvdist.core.log import Log; log = Log(); log.say('note', {HOSTILE!r}); log.fail({HOSTILE!r}, 2)"
    wide = os.environ | {"COLUMNS": "200", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", timeout=60, env=wide)
    assert done.returncode == 0, done.stderr
    assert [len(text.splitlines()) for text in (done.stdout, done.stderr)] == [1, 1]
    assert (done.stdout.rstrip("\n") + done.stderr.rstrip("\n")).isprintable()
    assert printable(HOSTILE).strip() in done.stderr


def test_the_summary_as_csv_holds_no_formula(tmp_path: Path) -> None:
    from rvdist.report.summary import Row, write_summary

    arm = '=HYPERLINK("http://x")\n'
    row = Row(
        arm=arm, point="p", alpha=None, prompt="plain", task="@SUM(1)", metric="m", filter="none", primary=True,
        higher_is_better=True, seed=0, value=0.5, stderr=None, ci_low=None, ci_high=None, n=1,
    )  # fmt: skip
    write_summary(tmp_path / "summary.json", [row])
    with open(tmp_path / "summary.csv", newline="") as file:
        (found,) = csv.DictReader(file)
    assert found["arm"] == "'" + arm.replace("\n", " ") and found["task"] == "'@SUM(1)"
    assert json.loads((tmp_path / "summary.json").read_text())[0]["arm"] == arm
