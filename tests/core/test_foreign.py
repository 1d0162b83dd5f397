"""YAML and other text of strangers: taken, or refused in one sentence, in time and in memory."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow.parquet
import pytest
from checkpoints import tensors, write_checkpoint
from hostile import outcomes, recipe, refused

from rvdist.core.errors import BadInput, Failed
from rvdist.core.foreign import parse_json, parse_yaml
from rvdist.evaluate.tasks.local import read
from rvdist.evaluate.tokenizer import load_tokenizer
from rvdist.merge.placement import remember_rate, remembered_rate
from rvdist.report.card.metadata import licence_of
from rvdist.weights.checkpoint.digest import file_digest

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 12))
YAML = {
    "laughs": LAUGHS + "merge_method: *a11\n",
    "itself": "merge_method: &a [*a]\n",
    "depth": "merge_method: " + "[" * 5000 + "]" * 5000,
    "long": "merge_method: linear # " + "x" * 300_000,
    "a date": "merge_method: 2024-13-45\n",
    "a number": "merge_method: 0b\n",
    "a tag": "merge_method: !!bool maybe\n",
    "a timestamp": "merge_method: !!timestamp x\n",
    "an object": "merge_method: !!python/object/apply:os.system [x]\n",
    "digits": f"merge_method: linear\nmodels: []\nparameters: {{weight: {'9' * 100_000}}}\n",
    "a key": "? [a, b]\n: 1\n",
    "a surrogate": 'merge_method: "\\ud800"\n',
    "two": "--- a\n--- b\n",
    "nothing": "",
    "control": "merge_method: \x07\n",
}


@pytest.mark.parametrize("kind", YAML)
def test_a_recipe_that_is_dear_or_none_is_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "r.yml").write_text(YAML[kind])
    said = refused("hostile.recipe", tmp_path / "r.yml")
    assert said.startswith(f"{tmp_path}/r.yml: ") and said.isprintable()


def test_anchors_that_stand_for_little_are_taken() -> None:
    assert parse_yaml(b"a: &x {weight: 1}\nb: *x\nc: [*x, *x]\n") == {
        "a": {"weight": 1}, "b": {"weight": 1}, "c": [{"weight": 1}] * 2,
    }  # fmt: skip


@pytest.mark.parametrize("character", [b"\\ud83d\\ude00", "😀".encode()])
def test_one_wide_character_makes_all_others_of_a_text_wide(character: bytes) -> None:
    with pytest.raises(ValueError, match="too much memory"):
        parse_json(b'"' + b"x" * (90 << 20) + character + b'"')
    assert parse_json(b'"' + b"x" * 100 + character + b'"') == "x" * 100 + "😀"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_only_files_are_read(make: object, tmp_path: Path) -> None:
    assert callable(make)
    for name in ("r.yml", "README.md", "rows.json"):
        make(tmp_path / name)
    with pytest.raises(BadInput, match=r"r.yml: cannot be read"):
        recipe(tmp_path / "r.yml")
    with pytest.raises(BadInput, match=r"rows.json: cannot be read"):
        read(tmp_path / "rows.json", ["a"])
    assert licence_of(tmp_path) is None


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["gzip", "parquet", "rows"])
def test_what_unpacks_to_more_than_any_benchmark_is_refused(kind: str, tmp_path: Path) -> None:
    name = {"gzip": "rows.jsonl.gz", "parquet": "rows.parquet", "rows": "rows.jsonl"}[kind]
    if kind == "gzip":
        with gzip.open(tmp_path / name, "wb", compresslevel=1) as file:
            for _ in range(300):
                file.write(bytes(1 << 20))
    elif kind == "rows":
        (tmp_path / name).write_bytes(b"{}\n" * 3_000_000)
    else:  # a value that stands once, in every row
        value = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 9000, "int32"), pyarrow.array(["x" * 60_000]))
        pyarrow.parquet.write_table(pyarrow.table({"a": value.cast("string")}), tmp_path / name)
        assert (tmp_path / name).stat().st_size < 1 << 20
    assert "unpacks to more than" in refused("hostile.rows", tmp_path / name)


@pytest.mark.heavy
def test_columns_that_nobody_asked_for_are_not_read(tmp_path: Path) -> None:
    """Two hundred million values of nothing take a little file, and would take gigabytes."""
    false = pyarrow.array([False] * 200_000)
    table = pyarrow.table({"a": pyarrow.array(["x"] * 200_000)} | {f"b{k}": false for k in range(1000)})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    ((said, seconds),) = outcomes("hostile.rows", tmp_path / "rows.parquet", [tmp_path / "rows.parquet"])
    assert said is None and seconds < 5
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "rows.parquet")
    assert "row 1 has no text in its field 'a'" in refused("hostile.rows", tmp_path / "rows.parquet")


@pytest.mark.parametrize("content", [b"", b"x" * 32, b"\xff" * 32, b"../../etc", b"0" * 33, b"A" * 32])
def test_a_remembered_digest_that_is_none_is_computed_again(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    right = file_digest(tmp_path / "file", tmp_path / "digests")
    (row,) = (tmp_path / "digests").iterdir()
    row.write_bytes(content)
    assert file_digest(tmp_path / "file", tmp_path / "digests") == right and row.read_text() == right


@pytest.mark.parametrize(
    "rate",
    ["x", None, [], {"bytes_per_second": "x", "anonymous_bytes": 1}, {"bytes_per_second": 0, "anonymous_bytes": 1},
     {"bytes_per_second": 1e999, "anonymous_bytes": 1}, {"bytes_per_second": True, "anonymous_bytes": 1}],
)  # fmt: skip
def test_a_rate_that_is_none_is_forgotten(rate: object, tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_text(json.dumps({"cpu": rate}))
    assert remembered_rate(tmp_path / "rates.json", "cpu") is None
    remember_rate(tmp_path / "rates.json", "cpu", 1 << 40, 2.0, 5)
    found = remembered_rate(tmp_path / "rates.json", "cpu")
    assert found and found.anonymous_bytes == 5


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{}"), ("tokenizer.json", "[" * 5000), ("tokenizer.json", '{"model": 3}'),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": ["a"]}}'),
        ("tokenizer_config.json", "[]"), ("tokenizer_config.json", '{"tokenizer_class": 3}'),
        ("tokenizer_config.json", '{"tokenizer_class": "\\ud800"}'), ("special_tokens_map.json", "[3]"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_is_none_is_one_sentence(file: str, content: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", tensors(0))
    if file != "tokenizer.json":
        (path / "tokenizer.json").write_text("{}")
    (path / file).write_text(content)
    with pytest.raises((BadInput, Failed), match="has a tokenizer that cannot be loaded") as caught:
        load_tokenizer(path, chat=False)
    assert str(caught.value).isprintable()
