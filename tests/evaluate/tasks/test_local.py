"""Benchmarks in files: every format and layout, and one sentence for what cannot be read."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from rvdist.core.errors import BadInput
from rvdist.evaluate.tasks.local import LAYOUTS, SUFFIXES, MissingData, find, load, read

ROWS = [{"question": "1 + 1?", "answer": "Two.\n#### 2", "more": 3}, {"question": "é\u2028?", "answer": "#### 1"}]
FIELDS = ("question", "answer")
KEPT = [{field: row[field] for field in FIELDS} for row in ROWS]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if ".parquet" in path.suffixes:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif ".jsonl" in path.suffixes:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    assert read(write(tmp_path / f"rows{suffix}", ROWS), FIELDS) == KEPT


def test_other_shapes_of_json(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"canary": "not a row", "examples": ROWS}))
    assert read(file, FIELDS) == KEPT
    file.write_text("\ufeff" + "\r\n\n".join(json.dumps(row) for row in ROWS))
    assert read(file, FIELDS) == KEPT
    file.write_text(json.dumps(ROWS[0]))
    assert read(file, FIELDS) == KEPT[:1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", b"", "holds no rows"),
        ("r.json", b'{"examples": []}', "holds no rows"),
        ("r.json", b'{"examples": {"question": "?"}}', "holds no rows"),
        ("r.json", b"3", "holds no rows"),
        ("r.jsonl", b'{"question": "?", "answer": "!"}\n\n{"question"\n', "line 3 is not JSON"),
        (
            "r.jsonl",
            b'{"question": "?", "answer": "!"}\n{"question": "?"}\n',
            "row 2 has no text in its field 'answer'",
        ),
        ("r.jsonl", b'{"question": "?", "answer": 3}', "row 1 has no text in its field 'answer'"),
        ("r.jsonl", b'["?", "!"]\n["?", "!"]', "row 1 has no text in its field 'question'"),
        ("r.json", b"[" * 100_000, "cannot be read"),
        ("r.jsonl", b"\xff\xfe", "cannot be read .'utf-8' codec"),
        ("r.jsonl.gz", b'{"question": "?", "answer": "!"}', "cannot be read .Not a gzipped file"),
        ("r.jsonl.gz", gzip.compress(b"{}" * 999)[:-9], "cannot be read"),
        ("r.parquet", b"PAR1", "cannot be read"),
        ("r.parquet", b'{"question": "?", "answer": "!"}', "cannot be read"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        read(tmp_path / name, FIELDS)
    assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)


def test_a_file_that_may_not_be_opened(tmp_path):
    with pytest.raises(BadInput, match="cannot be read .* is it a whole file"):
        read(tmp_path, FIELDS)


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_every_name_of_every_data_set_is_found(tmp_path, dataset):
    for k, name in enumerate(LAYOUTS[dataset].names):
        for j, suffix in enumerate(SUFFIXES):
            there = tmp_path / f"{k}-{j}"
            file = write(there / (name.format(subset="sub_set", split="test") + suffix), ROWS)
            assert find("task", there, dataset, "sub_set", "test") == file


def test_the_first_name_counts(tmp_path):
    for name in ("gsm8k/test.jsonl", "gsm8k_test.parquet", "gsm8k_test.json"):
        write(tmp_path / name, ROWS)
    assert find("gsm8k", tmp_path, "openai/gsm8k", "main", "test").name == "gsm8k_test.json"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        MissingData,
        match=r"benchmarks.data_dir: .* has no data for gsm8k's train split; looked for gsm8k_train, gsm8k/train, "
        r"grade_school_math/data/train, gsm8k/main/train-00000-of-00001, each as \.jsonl, \.json, \.parquet",
    ):
        find("gsm8k", tmp_path, "openai/gsm8k", "main", "train")


@pytest.mark.parametrize("part", ["../..", "/etc", "a/b", "..", "a\0"])
def test_no_name_leads_out_of_the_directory(tmp_path, part):
    for subset, split in ((part, "test"), ("main", part)):
        with pytest.raises(BadInput, match="is not a name of a subset or split"):
            find("mine", tmp_path, "SaylorTwift/bbh", subset, split)


def test_a_split_that_nothing_is_taken_from_may_be_absent(tmp_path):
    file = str(write(tmp_path / "rows.jsonl", ROWS))
    splits = load({"test": file, "train": None}, FIELDS, version=3.0, config_source="inline")
    assert list(splits["test"]) == KEPT and list(splits["train"]) == []
    assert splits["train"].column_names == splits["test"].column_names == list(FIELDS)
