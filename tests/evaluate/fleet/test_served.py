"""Engines serve exactly the files that were opened, whatever lies beside them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from families import SETTINGS, Family, answers, shard, start
from safetensors.torch import load_file, save_file

from rvdist.core.errors import BadInput
from rvdist.core.point import WeightPoint
from rvdist.evaluate.cache import serving_digest
from rvdist.evaluate.fleet import private_vllm
from rvdist.evaluate.fleet import start as start_module
from rvdist.evaluate.fleet.arguments import further_arguments
from rvdist.evaluate.fleet.served import link_files
from rvdist.evaluate.request import Unusable
from rvdist.weights.checkpoint.directory import INDEX, open_checkpoint


def litter(directory: Path, other: Path) -> None:
    """Another model's weights under the names that vLLM looks for, and a configuration in Mistral's layout."""
    for name in ("consolidated.safetensors", "a-leftover.safetensors", "zz.safetensors", "pytorch_model.bin"):
        shutil.copyfile(next(other.glob("*.safetensors")), directory / name)
    (directory / "params.json").write_text(json.dumps({"dim": 64, "n_layers": 1, "vocab_size": 70}))
    (directory / "pytorch_model.bin.index.json").write_text("{}")


@pytest.mark.parametrize("kind", ["whole", "shards"])
def test_what_lies_beside_is_not_served(kind: str, families: dict[str, Family], tmp_path: Path) -> None:
    family = families["untied"]
    clean = family.target if kind == "whole" else shard(family, tmp_path).target
    expected = answers(start(WeightPoint(str(clean))))
    littered = shutil.copytree(clean, tmp_path / "littered")
    digest = serving_digest(littered)
    litter(littered, family.plus)
    engine = start(WeightPoint(str(littered)))
    assert answers(engine) == expected
    engine.swap(family.point(0.5))
    swapped = answers(engine)
    assert swapped != expected
    assert serving_digest(littered) == digest, "nor do they keep targets from sharing engines and answers"


def test_links_are_to_the_files_themselves_and_go_when_the_engine_is_up(
    families: dict[str, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the Hub's cache, where a snapshot is made of links."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    sharded = shard(families["untied"], tmp_path / "blobs").target
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in sharded.iterdir():
        (snapshot / file.name).symlink_to(Path("..") / file.relative_to(tmp_path))
    litter(snapshot, families["untied"].plus)
    checkpoint = open_checkpoint(snapshot)
    with link_files(checkpoint) as one, link_files(checkpoint) as other:
        assert one == other
        found = {file.name: file.resolve() for file in one.iterdir()}
        assert {name for name in found if name.endswith(".safetensors")} == set(checkpoint.files)
        assert all(found[name] == sharded / name for name in checkpoint.files)
        assert found.keys() - checkpoint.files == {
            file.name for file in sharded.iterdir() if not file.name.endswith(".safetensors")
        }
        index = json.loads((one / INDEX).read_text())["weight_map"]
        assert index == {name: spec.file for name, spec in checkpoint.tensors.items()}
    assert not any((one.parent).iterdir())


def test_an_engine_that_loaded_other_weights_is_found(
    families: dict[str, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were vLLM to choose files in a way we do not know."""
    family = families["tied"]
    moved = shutil.copytree(family.target, tmp_path / "moved")
    tensors = load_file(moved / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] += torch.randn_like(tensors["model.layers.1.mlp.down_proj.weight"])
    save_file(tensors, moved / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(start_module, "link_files", lambda checkpoint: link_files(open_checkpoint(moved)))
    with pytest.raises(RuntimeError, match="vLLM loaded other weights than those that were opened"):
        start(WeightPoint(str(family.target)))


@pytest.mark.parametrize("needed", ["IN_ENGINE", "IN_RANK"])
def test_a_vllm_that_is_not_as_we_know_it_is_unusable(
    needed: str, families: dict[str, Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_vllm, needed, ("vllm:LLM.enqueue", "vllm:LLM.gone"))
    with pytest.raises(Unusable, match="^vllm .*: has no vllm:LLM.gone any more, which rvdist takes "):
        start(WeightPoint(str(families["tied"].target)))


def test_where_ranks_may_be_on_other_nodes_stray_files_are_refused(families: dict[str, Family], tmp_path: Path) -> None:
    littered = shutil.copytree(families["tied"].target, tmp_path / "littered")
    litter(littered, families["tied"].plus)
    far = dataclasses.replace(SETTINGS, args=further_arguments({"distributed_executor_backend": "ray"}))
    with pytest.raises(BadInput, match=r"a-leftover\.safetensors: is no part of the checkpoint.*move it away"):
        start(WeightPoint(str(littered)), far)
