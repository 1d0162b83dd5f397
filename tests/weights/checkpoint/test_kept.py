"""Sources that are opened again and again: kept as long as nothing in their directory changes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint

from rvdist.core.errors import BadInput
from rvdist.weights.checkpoint.kept import KeptSources

TENSORS = {"a": torch.ones(4, 2), "b": torch.zeros(3)}


def test_what_did_not_change_is_not_read_again(tmp_path: Path) -> None:
    path, sources = str(write_checkpoint(tmp_path / "one", TENSORS)), KeptSources()
    first = sources.open(path)
    assert sources.open(path) is first
    renamed = sources.open(path, (("^a$", "c"),))
    assert renamed is sources.open(path, (("^a$", "c"),)) and set(renamed.tensors) == {"c", "b"}
    assert sources.open(path) is first


def touch_weights(path: Path) -> None:
    shutil.rmtree(path)
    write_checkpoint(path, {"a": torch.zeros(4, 2), "b": torch.zeros(3)})


def add_a_config(path: Path) -> None:
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))


def rewrite_in_place(path: Path) -> None:
    file = path / "model.safetensors"
    with open(file, "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\1")


@pytest.mark.parametrize("change", [touch_weights, add_a_config, rewrite_in_place])
def test_what_changed_is_read_again(tmp_path: Path, change: Callable[[Path], None]) -> None:
    path, sources = write_checkpoint(tmp_path / "one", TENSORS), KeptSources()
    first = sources.open(str(path))
    change(path)
    again = sources.open(str(path))
    assert again is not first and again == KeptSources().open(str(path))
    assert sources.open(str(path)) is again


def test_what_is_gone_is_refused(tmp_path: Path) -> None:
    path, sources = write_checkpoint(tmp_path / "one", TENSORS), KeptSources()
    sources.open(str(path))
    path.rename(tmp_path / "two")
    with pytest.raises(BadInput, match="one"):
        sources.open(str(path))
