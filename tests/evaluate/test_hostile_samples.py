"""Whatever stands in place of a value in a file of samples: it is taken or refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hostile import mutants

from rvdist.core.errors import BadInput
from rvdist.core.record import read_records
from rvdist.evaluate.replay import Recording

OURS = {
    "arm": "a", "point": "p", "alpha": 0.5, "prompt": "plain", "task": "t", "filter": "none", "seed": 0, "doc_id": 1,
    "doc": "h", "metrics": {"m": 1.0}, "prompt_text": "p", "target": "x", "response": "r", "filtered": "f",
}  # fmt: skip
LOGGED = {
    "doc_id": 0, "doc": {"q": "x"}, "target": "1", "resps": [["a"]], "filtered_resps": ["a"], "filter": "none",
    "arguments": {"gen_args_0": {"arg_0": "p", "arg_1": {"until": ["x"]}}}, "metrics": ["m"], "doc_hash": "h",
    "prompt_hash": "h", "target_hash": "h", "m": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(("name", "sample"), [("t.jsonl", OURS), ("samples_t_2024-01-01T00-00-00.000.jsonl", LOGGED)])
def test_no_value_is_anything_but_taken_or_refused(name: str, sample: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(json.dumps(sample) + "\n")
    assert Recording(file) and (sample is LOGGED or list(read_records(file)))
    seen = refused = 0
    for mutant in mutants(sample):
        file.write_text(json.dumps(mutant) + "\n")
        for read in (Recording, lambda path: list(read_records(path))):
            seen += 1
            try:
                read(file)
            except BadInput as error:
                refused += 1
                assert str(error).isprintable()
    assert seen > 500 and refused > seen / 4
