"""Donors as a training on four ranks leaves them: the merge has the bytes of that of their export."""

import random
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from alone import write
from checkpoints import POCKET, launch, load_checkpoint
from hostile import damage

from rvdist.core.errors import BadInput
from rvdist.core.point import Term, Vector, WeightPoint
from rvdist.inspect import inspect
from rvdist.weights.checkpoint.pieces import Assembled
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.operand import open_operand

pytestmark = pytest.mark.heavy
HELPER = Path(__file__).resolve().parent.parent / "save_sharded.py"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pocket donors, each as an export, as distributed checkpoints and as a shard a rank."""
    place = tmp_path_factory.mktemp("saved")
    pairs = [str(part) for member in ("sft", "grpo") for part in (POCKET / member, place / member)]
    subprocess.run([sys.executable, str(HELPER), "4", *pairs], check=True, timeout=300)
    return place


def merged(place: Path, saved: Path, plus: str, minus: str) -> bytes:
    output = place / f"out-{plus}-{minus}"
    ended = launch(
        f"target={POCKET / 'target'}", f"vector.plus={saved / 'grpo' / plus}", f"vector.minus={saved / 'sft' / minus}",
        "alpha=0.7", f"output={output}", cwd=place,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    return (output / "model.safetensors").read_bytes()


def test_donors_of_four_ranks_merge_as_their_export_does(saved, tmp_path):
    expected = merged(tmp_path, saved, "export", "export")
    for plus, minus in (("dcp", "trained"), ("verl", "dcp"), ("trained", "hsdp")):
        assert merged(tmp_path, saved, plus, minus) == expected, (plus, minus)


@pytest.mark.parametrize("kind", ["dcp", "trained", "verl", "hsdp", "accelerate"])
def test_every_tensor_of_four_ranks_is_its_exports(saved, tmp_path, kind):
    if kind == "accelerate":
        shutil.copytree(saved / "sft/dcp", tmp_path / "pytorch_model_fsdp_0")
        (tmp_path / "pytorch_model_fsdp_0/config.json").rename(tmp_path / "config.json")
    path = tmp_path if kind == "accelerate" else saved / "sft" / kind
    whole, parts = (open_operand(open_source(str(source))) for source in (saved / "sft/export", path))
    assert parts.checkpoint.tensors.keys() == whole.checkpoint.tensors.keys()
    assert parts.checkpoint.config == whole.checkpoint.config
    files = inspect(str(path))["files"]
    assert sum(file["bytes"] for file in files.values()) == whole.checkpoint.nbytes and len(files) >= 2
    for name, spec in whole.checkpoint.tensors.items():
        found = [
            operand.read(name, begin, end, torch.empty(spec.numel * 8, dtype=torch.uint8)).view(torch.int16)
            for operand in (whole, parts)
            for begin, end in ((0, spec.numel), (spec.numel // 3, spec.numel // 2 + 1))
        ]
        assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3]), name


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_one_rank_or_two_saved_is_read(tmp_path, ranks):
    """Their meshes have dimensions of one rank: (1,) and (1, 1), or (2,) and (2, 1)."""
    subprocess.run(
        [sys.executable, str(HELPER), str(ranks), str(POCKET / "sft"), str(tmp_path)], check=True, timeout=300
    )
    export = load_checkpoint(tmp_path / "export")
    for kind in ("dcp", "trained", "verl", "hsdp"):
        parts = open_operand(open_source(str(tmp_path / kind)))
        assert parts.checkpoint.tensors.keys() == export.keys()
        for name, tensor in export.items():
            found = parts.read(name, 0, tensor.numel(), torch.empty(tensor.numel() * 8, dtype=torch.uint8))
            assert torch.equal(found.view(tensor.shape), tensor), (kind, name)


def test_the_merge_of_one_worker_has_the_bytes_of_the_exports(saved, tmp_path):
    for plus, minus in (("export", "export"), ("dcp", "verl"), ("hsdp", "trained")):
        vector = Vector(str(saved / "grpo" / plus), str(saved / "sft" / minus))
        write({tmp_path / f"{plus}-{minus}": WeightPoint(str(POCKET / "target"), (Term(0.7, vector),))})
    one, *others = [path.read_bytes() for path in sorted(tmp_path.glob("*/model.safetensors"))]
    assert len(others) == 2 and all(other == one for other in others)


def test_random_damage_to_what_ranks_saved_is_refused_or_changes_numbers_alone(saved, tmp_path):
    chance = random.Random(0)
    for kind, file in (("dcp", ".metadata"), ("dcp", "__1_0.distcp"), ("verl", "model_world_size_4_rank_1.pt")):
        place = tmp_path / kind / file
        shutil.copytree(saved / "sft" / kind, place)
        raw = (place / file).read_bytes()
        for _ in range(200):
            (place / file).write_bytes(damage(raw, chance, (9000, 3000)))
            with suppress(BadInput):
                open_source(str(place))


def test_columns_of_tensors_in_pieces(saved):
    whole, parts = (open_operand(open_source(str(saved / "sft" / kind))) for kind in ("export", "verl"))
    checked = 0
    for name, spec in parts.checkpoint.tensors.items():
        if isinstance(spec, Assembled) and len(spec.shape) == 2:
            rows, columns = range(1, spec.shape[0]), range(spec.shape[1] // 3, spec.shape[1] - 1)
            found = [
                operand.read_columns(name, rows, columns, torch.empty(spec.numel * 8, dtype=torch.uint8))
                for operand in (whole, parts)
            ]
            assert torch.equal(*found)
            checked += 1
    assert checked > 5


def test_a_target_of_ranks_is_written_as_safetensors_with_what_stands_beside_it(saved, tmp_path):
    ended = launch(
        f"target={saved / 'sft/verl'}", f"vector.plus={saved / 'grpo/dcp'}", f"vector.minus={saved / 'sft/dcp'}",
        "alpha=0", "output=out", cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    expected = load_checkpoint(saved / "sft/export")
    found = load_checkpoint(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (tmp_path / "out/config.json").exists() and (tmp_path / "out/tokenizer.json").exists()


def test_a_missing_shard_is_named(saved, tmp_path):
    for file in (saved / "sft/verl").glob("*.pt"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model_world_size_4_rank_2.pt").unlink()
    ended = launch(
        f"target={POCKET / 'target'}", f"vector.plus={saved / 'grpo/dcp'}", f"vector.minus={tmp_path}",
        "output=out", cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 2 and "has 3 shards" in ended.stderr and "Traceback" not in ended.stderr
