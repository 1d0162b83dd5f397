"""Benchmarks as files in a directory: under which names they may lie, and how their rows are read.

What a file says is data alone: no script is run, nothing is fetched, and no name in a file is a path. Knows nothing
of how lm-eval asks or scores.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rvdist.core.errors import BadInput
from rvdist.core.foreign import require_light
from rvdist.core.regular import read_regular
from rvdist.core.text import reason

SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz", ".parquet.gz")
_MOST = 256 << 20  # bytes of a file, packed and unpacked
_ROWS, _BATCH = 1_000_000, 256
_HALF = re.compile("[\ud800-\udfff]")
_TOO_MUCH = f"it has more than {_ROWS:,} rows, or unpacks to more than {_MOST:,} bytes"
_HUB = "-00000-of-00001"  # how the Hub names the only file of a split


class MissingData(BadInput):
    """There is no file for a task."""


@dataclass(frozen=True)
class Layout:
    """`fields` of a row make the document, in the Hub's order. A file is the first of `names`, which know {split} and
    {subset}, that exists with one of SUFFIXES."""

    fields: tuple[str, ...]
    names: tuple[str, ...]


LAYOUTS: Mapping[str, Layout] = {
    "openai/gsm8k": Layout(
        ("question", "answer"),
        ("gsm8k_{split}", "gsm8k/{split}", "grade_school_math/data/{split}", f"gsm8k/{{subset}}/{{split}}{_HUB}"),
    ),
    "openai/openai_humaneval": Layout(
        ("task_id", "prompt", "canonical_solution", "test", "entry_point"),
        ("humaneval", "HumanEval", "data/HumanEval", f"openai_humaneval/openai_humaneval/{{split}}{_HUB}"),
    ),
    "evalplus/humanevalplus": Layout(
        ("task_id", "prompt", "canonical_solution", "entry_point", "test"),
        ("humaneval_plus", "HumanEvalPlus", "HumanEvalPlus-OriginFmt", f"humanevalplus/data/{{split}}{_HUB}"),
    ),
    "allenai/sciq": Layout(
        ("question", "distractor3", "distractor1", "distractor2", "correct_answer", "support"),
        ("sciq_{split}", "sciq/{split}", "SciQ dataset-2 3/{split}", f"sciq/data/{{split}}{_HUB}"),
    ),
    "SaylorTwift/bbh": Layout(
        ("input", "target"), ("bbh/{subset}", "BIG-Bench-Hard/bbh/{subset}", f"bbh/{{subset}}/{{split}}{_HUB}")
    ),
    "madrylab/gsm8k-platinum": Layout(
        ("question", "answer"), ("gsm8k_platinum_{split}", f"gsm8k-platinum/{{subset}}/{{split}}{_HUB}")
    ),
    "qintongli/GSM-Plus": Layout(
        ("question", "solution", "answer"), ("gsm_plus_{split}", f"GSM-Plus/data/{{split}}{_HUB}")
    ),
    "HuggingFaceH4/MATH-500": Layout(("problem", "solution", "answer"), ("math500_{split}", "MATH-500/{split}")),
}


def find(task: str, data_dir: Path, dataset: str, subset: str | None, split: str) -> Path:
    """The file of a split of a data set in LAYOUTS. Raises MissingData with the names looked for, BadInput where the
    subset or the split has a name that could lead out of `data_dir`."""
    for part in (subset or "", split):
        if not re.fullmatch(r"[\w-]*", part):
            raise BadInput(f"task {task}: {part!r} is not a name of a subset or split; use letters, digits, - and _")
    names = [name.format(subset=subset, split=split) for name in LAYOUTS[dataset].names]
    for name in names:
        for suffix in SUFFIXES:
            if (path := data_dir / (name + suffix)).is_file():
                return path
    raise MissingData(
        f"benchmarks.data_dir: {data_dir} has no data for {task}'s {split} split; looked for {', '.join(names)}, "
        "each as .jsonl, .json, .parquet or one of these with .gz (docs/benchmarks.md)"
    )


def load(files: Mapping[str, str | None], fields: Sequence[str], **_: object) -> dict[str, Any]:
    """lm-eval's `custom_dataset`: a `datasets.Dataset` of `fields` for each split, empty where there is no file."""
    from datasets import Dataset

    found = {}
    for split, path in files.items():
        rows = read(Path(path), fields) if path else []
        found[split] = Dataset.from_dict({field: [row[field] for row in rows] for field in fields})
    return found


def paragraphs(path: str, **_: object) -> dict[str, Any]:
    """A `custom_dataset` of lm-eval's: the paragraphs of a text file, in UTF-8, as its test split. Raises BadInput."""
    from datasets import Dataset

    try:
        text = read_regular(Path(path), _MOST).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read as a text in UTF-8 ({error})") from None
    found = [paragraph for paragraph in (part.strip("\n") for part in re.split(r"\n\s*\n", text)) if paragraph.strip()]
    if not found:
        raise BadInput(f"{path}: holds no text")
    return {"test": Dataset.from_dict({"text": found})}


def read(path: Path, fields: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a file, with these fields alone. Raises BadInput where it cannot be read or has no such rows."""
    try:
        content = read_regular(path, _MOST)
        if path.suffix == ".gz":
            with gzip.open(io.BytesIO(content)) as unpacked:
                content = unpacked.read(_MOST + 1)
            if len(content) > _MOST:
                raise ValueError(_TOO_MUCH)
        rows = _parquet(content, fields) if ".parquet" in path.suffixes else _json(content)
    except MemoryError:
        raise BadInput(f"{path}: unpacks to more than there is memory for; is it another benchmark's file?") from None
    except (OSError, EOFError, ValueError, TypeError, LookupError, RuntimeError, zlib.error) as error:
        raise BadInput(f"{path}: cannot be read ({reason(error)}); is it a whole file, named for its format?") from None
    if not isinstance(rows, list) or not rows:
        raise BadInput(f"{path}: holds no rows; one JSON object a line, or a list of them, is expected")
    for number, row in enumerate(rows, 1):
        for field in fields:
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise BadInput(
                    f"{path}: row {number} has no text in its field {field!r}; is it another benchmark's file?"
                )
            if not row[field].isascii() and _HALF.search(row[field]):
                raise BadInput(f"{path}: row {number} has half a surrogate pair in {field!r}; write it as UTF-8")
    return [{field: row[field] for field in fields} for row in rows]


def _json(content: bytes) -> object:
    """A list of rows, an object that holds it as `examples` (BIG-Bench-Hard), or one row a line."""
    if content.count(b"{") > _ROWS:
        raise ValueError(_TOO_MUCH)
    require_light(content)
    text = content.decode("utf-8-sig")
    try:
        document = json.loads(text)
    except ValueError:
        return [_line(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return document.get("examples", [document]) if isinstance(document, dict) else document


def _line(number: int, line: str) -> object:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} is not JSON: {error}") from None


def _parquet(content: bytes, fields: Sequence[str]) -> object:
    """The rows, of these fields alone: of what else there is, a little file can hold very much."""
    import pyarrow.parquet  # type: ignore[import-untyped]

    file = pyarrow.parquet.ParquetFile(io.BytesIO(content))
    claimed = sum(file.metadata.row_group(k).total_byte_size for k in range(file.metadata.num_row_groups))
    if claimed > _MOST or file.metadata.num_rows > _ROWS:
        raise ValueError(_TOO_MUCH)
    names = [
        one.name
        for one in file.schema_arrow
        if pyarrow.types.is_string(one.type) or pyarrow.types.is_large_string(one.type)
    ]
    rows: list[object] = []
    seen = 0
    columns = [name for name in fields if name in names]
    for batch in file.iter_batches(batch_size=_BATCH, columns=columns, use_threads=False):  # which would read ahead
        seen += batch.nbytes
        if seen > _MOST:  # a value that stands once in the file may stand in every row
            raise ValueError(_TOO_MUCH)
        rows += batch.to_pylist()
    return rows
