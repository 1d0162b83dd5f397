"""Whatever a stranger writes in place of a value in the JSON beside weights: it is taken or refused in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from adapters import factors, write_adapter
from checkpoints import near, tensors, write_checkpoint
from hostile import mutants, refused

from rvdist.core.errors import BadInput
from rvdist.core.foreign import require_light
from rvdist.core.point import Vector
from rvdist.inspect import inspect, tree
from rvdist.verify import verify
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.store import Storage, save

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint in two files with a manifest, an adapter, and a stored vector."""
    place = tmp_path_factory.mktemp("family")
    base = {name: tensor for name, tensor in tensors(0).items() if "layers.1" not in name and "layers.2" not in name}
    plus = write_checkpoint(place / "plus", near(base, 1))
    checkpoint = write_checkpoint(place / "checkpoint", base, shards=2)
    vector = Vector(str(plus), str(checkpoint))
    for name, storage in (
        ("dense", Storage()),
        ("rank", Storage("BF16", rank=2)),
        ("sparse", Storage("BF16", density=0.1)),
    ):
        save(vector, {source: open_source(source) for source in vector.sources()}, place / name, storage)
    shutil.copy(place / "dense" / "rvdist.json", checkpoint)
    adapter = write_adapter(place / "adapter", factors(), rank_pattern={})
    return {"checkpoint": checkpoint, "adapter": adapter} | {name: place / name for name in ("dense", "rank", "sparse")}


@pytest.mark.parametrize(
    ("what", "file"),
    [
        ("checkpoint", "model.safetensors.index.json"), ("checkpoint", "config.json"), ("checkpoint", "rvdist.json"),
        ("adapter", "adapter_config.json"), ("dense", "vector.json"), ("rank", "vector.json"),
        ("sparse", "vector.json"),
    ],
)  # fmt: skip
def test_no_value_is_anything_but_taken_or_refused(
    what: str, file: str, family: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / what
    shutil.copytree(family[what], path)
    document = json.loads((path / file).read_text())
    seen = taken = 0
    for mutant in mutants(document):
        (path / file).write_text(json.dumps(mutant))
        seen += 1
        try:
            found = open_source(str(path))
            assert found.config is not None
            if what == "checkpoint":
                verify(path)
            tree(inspect(str(path)))
            taken += 1
        except BadInput as error:
            assert "\n" not in str(error) and len(str(error)) < 4100, str(error)[:300]
        except Exception as error:
            raise AssertionError(f"{file}: {json.dumps(mutant)[:300]}") from error
    assert seen > 100 and taken < seen


BOMBS = {
    "lists": b'{"a":[' + b"[]," * 6_000_000 + b"1]}",
    "maps": b'{"a":[' + b'{"a":1},' * 4_000_000 + b"1]}",
    "wide": b'{"a":"' + b"x" * 60_000_000 + "\U0001f600".encode() + b'"}',
    "depth": b'{"a":' * 900 + b"1" + b"}" * 900,
    "digits": b'{"a":' + b"9" * 3_000_000 + b"}",
    "surrogate": b'{"\\ud800":1}',
    "utf-16": '{"a":1}'.encode("utf-16"),
    "nothing": b"",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_json_that_is_dear_or_no_json_is_refused_in_time_and_in_memory(kind: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(BOMBS[kind])
    assert "x.json: " in refused("rvdist.weights.checkpoint.directory.read_json", tmp_path / "x.json")


def test_a_vocabulary_as_large_as_gemma_s_is_read() -> None:
    merges = b'      [\n        "a\xe2\x96\x81",\n        "bcdefgh"\n      ],\n' * 514_906
    tokens = "".join(f'      "▁tok{k}😀": {k},\n' for k in range(262_144)).encode()
    content = b'{"merges":[\n' + merges + b'[]],"vocab":{\n' + tokens + b'"":0}}'
    assert len(content) > 33_384_568 and content.count(b",") > 1_291_000  # the bytes of what Google publishes
    require_light(content)


def test_json_beyond_any_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate(1 << 40)
    assert "at most" in refused("rvdist.weights.checkpoint.directory.read_json", tmp_path / "x.json")
