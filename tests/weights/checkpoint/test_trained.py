"""Pickled weights, distributed checkpoints and shards of ranks: opened as they are, without running what they hold."""

from __future__ import annotations

import json
import math
import pickle
import random
import re
import struct
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import factors, write_adapter
from checkpoints import near, tensors, write_checkpoint
from hostile import SECONDS, damage, outcomes
from safetensors.torch import save_file

from rvdist.core.errors import BadInput
from rvdist.weights.checkpoint.header import TensorSpec
from rvdist.weights.checkpoint.pieces import Piece, assembled, read_pieces
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.operand import open_operand

BIN = "pytorch_model.bin"


def write_bin(path: Path, state: object, **how: bool) -> Path:
    path.mkdir()
    torch.save(state, path / BIN, **how)
    return path


def read_all(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_source(str(path))
    operand = open_operand(checkpoint)
    found = {}
    for name, spec in checkpoint.tensors.items():
        buffer = torch.empty(spec.numel * 8, dtype=torch.uint8)
        found[name] = operand.read(name, 0, spec.numel, buffer).clone().view(spec.shape)
    operand.close()
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8)), name


def test_pickled_weights_are_read_to_the_bit_in_every_dtype_and_wrapping(tmp_path):
    base = tensors(0)
    shared = torch.arange(60, dtype=torch.float32).view(6, 10)
    state = OrderedDict(
        base
        | {"f16": torch.ones(3, 5).half(), "f64": torch.rand(2, 2).double(), "i64": torch.arange(7)}
        | {"b": torch.ones(3).bool()}
        | {"u8": torch.arange(9).to(torch.uint8), "u16": torch.arange(5).to(torch.uint16)}
        | {"parameter": torch.nn.Parameter(torch.rand(3, 3)), "rows": shared[2:4], "tied": shared}
        | {"one": shared[3, 4:5]}
        | {"thin": torch.rand(5, 1).t()}
    )  # fmt: skip
    expected = {name: tensor.detach() for name, tensor in state.items()}
    assert_same(read_all(write_bin(tmp_path / "plain", state)), expected)
    assert_same(read_all(write_bin(tmp_path / "nested", {"state_dict": dict(state), "epoch": 3})), expected)


def test_shards_of_pickled_weights_are_read_by_their_index(tmp_path):
    base = tensors(0)
    names = sorted(base)
    path = tmp_path / "shards"
    path.mkdir()
    listed = {}
    for k in range(2):
        file = f"pytorch_model-0000{k + 1}-of-00002.bin"
        torch.save({name: base[name] for name in names[k::2]}, path / file)
        listed |= dict.fromkeys(names[k::2], file)
    (path / f"{BIN}.index.json").write_text(json.dumps({"weight_map": listed}))
    assert_same(read_all(path), base)
    listed["ghost"] = file
    (path / f"{BIN}.index.json").write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(BadInput, match="says tensor ghost"):
        open_source(str(path))


def test_a_whole_file_beside_shards_is_refused_and_beside_the_index_of_gone_ones_it_counts(tmp_path):
    base, path = tensors(0), write_bin(tmp_path / "both", tensors(1))
    shard = path / "pytorch_model-00001-of-00001.bin"
    torch.save(base, shard)
    (path / f"{BIN}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(base, shard.name)}))
    with pytest.raises(BadInput, match=r"lists pytorch_model-00001-of-00001.bin and .* delete what is stale"):
        open_source(str(path))
    shard.unlink()
    assert_same(read_all(path), tensors(1))


@pytest.mark.parametrize("adapter", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("model", ["model.safetensors", "model.safetensors.index.json", BIN, f"{BIN}.index.json"])
def test_a_model_and_an_adapter_in_one_directory_are_refused(tmp_path, model, adapter):
    """transformers reads the adapter on its own base, vLLM the model."""
    path = write_adapter(tmp_path / "one", factors())
    if adapter.endswith(".bin"):
        torch.save(factors(), path / adapter)
        (path / "adapter_model.safetensors").unlink()
    file = path / model.replace(".index.json", "")
    torch.save(tensors(0), file) if ".bin" in model else save_file(tensors(0), file)
    if model.endswith(".json"):
        (path / model).write_text(json.dumps({"weight_map": dict.fromkeys(tensors(0), file.name)}))
        file.rename(path / f"other-{file.name}")
        (path / model).write_text((path / model).read_text().replace(file.name, f"other-{file.name}"))
    with pytest.raises(BadInput, match=rf"holds a model \({model}\) and an adapter \({adapter}\)") as refused:
        open_source(str(path))
    assert "\n" not in str(refused.value)
    (path / adapter).unlink()
    assert_same(read_all(path), tensors(0))


@pytest.mark.parametrize(
    ("files", "named", "said"),
    [
        (["zero_to_fp32.py", "global_step10/mp_rank_00_model_states.pt"], ".", "'{}/zero_to_fp32.py' '{}' OUT"),
        (["zero_to_fp32.py", "s/mp_rank_00_model_states.pt"], "s", "'{}/s/../zero_to_fp32.py' '{}/s/..' OUT"),
        (["s/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"], "s", "'{}/s/../zero_to_fp32.py' '{}/s/..' OUT"),
        (["data.pt", "actor/model_world_size_1_rank_0.pt", "critic/x.pt"], ".", "name one of them, as {}/actor"),
        (["actor/dist_ckpt/common.pt"], "actor", "--backend megatron --local_dir '{}/actor' --target_dir"),
        (
            [f"dist_ckpt/{file}" for file in ("common.pt", "metadata.json", ".metadata", "__0_0.distcp")],
            "dist_ckpt",
            "--backend megatron --local_dir '{}' --target_dir",
        ),
        (["config.json", "optimizer.pt", "rng_state_0.pth", "training_args.bin"], ".", "has no safetensors weights"),
    ],
)
def test_what_has_to_be_named_or_converted_is_said(tmp_path, files, named, said):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"{}")
    with pytest.raises(BadInput, match=re.escape(said.replace("{}", str(tmp_path)))):
        open_source(str(tmp_path / named))


def test_a_pickled_adapter_is_the_adapter(tmp_path):
    weights = factors()
    one, other = (write_adapter(tmp_path / kind, weights) for kind in ("safetensors", "pickled"))
    torch.save(weights, other / "adapter_model.bin")
    (other / "adapter_model.safetensors").unlink()
    assert_same(read_all(other), read_all(one))


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"w": torch.rand(4, 6).t()}, "not stored row by row; save it again after contiguous"),
        ({"w": torch.rand(4, 6)[:, :3]}, "not stored row by row"),
        ({"w": torch.rand(1).expand(5)}, "not stored row by row"),
        ({"w": torch.rand(3), "step": 3}, "something else than a whole tensor under the name step"),
        ({"w": {"v": torch.rand(3)}}, "no model's tensors|something else"),
        ([torch.rand(3)], "no model's tensors by name"),
        ({3: torch.rand(3)}, "without a name"),
        ({"w": torch.rand(3).to_sparse()}, "asks for torch._utils._rebuild_sparse_tensor"),
    ],
)
def test_what_is_no_plain_tensor_is_named(tmp_path, state, said):
    with pytest.raises(BadInput, match=said) as caught:
        open_source(str(write_bin(tmp_path / "c", state)))
    assert BIN in str(caught.value) and "save_pretrained" in str(caught.value)


def test_the_format_before_archives_is_refused(tmp_path):
    path = write_bin(tmp_path / "c", tensors(0), _use_new_zipfile_serialization=False)
    with pytest.raises(BadInput, match="no whole archive of torch.save.*save_pretrained"):
        open_source(str(path))


# --- pieces


def grid(shape: tuple[int, ...], cuts: tuple[tuple[int, ...], ...]) -> tuple[np.ndarray, list[Piece], bytes]:
    """A tensor of int16, cut along each dimension into pieces of these sizes, and the bytes of all of them."""
    whole = np.arange(math.prod(shape), dtype=np.int16).reshape(shape)
    pieces, stored = [], b""
    for place in np.ndindex(*(len(sizes) for sizes in cuts)):
        begin = tuple(sum(sizes[:k]) for sizes, k in zip(cuts, place, strict=True))
        size = tuple(sizes[k] for sizes, k in zip(cuts, place, strict=True))
        part = whole[tuple(slice(b, b + s) for b, s in zip(begin, size, strict=True))]
        pieces.append(Piece(begin, size, "f", len(stored)))
        stored += np.ascontiguousarray(part).tobytes()
    return whole, pieces, stored


@pytest.mark.parametrize(
    ("shape", "cuts"),
    [
        ((10,), ((3, 3, 3, 1),)),
        ((10, 7), ((3, 3, 4), (7,))),
        ((6, 9), ((6,), (4, 5))),
        ((6, 9), ((2, 4), (1, 8))),
        ((4, 5, 6), ((4,), (2, 3), (6,))),
        ((4, 5, 6), ((4,), (5,), (1, 5))),
        ((4, 3, 5, 6), ((1, 3), (1, 2), (2, 3), (4, 2))),
    ],
)
def test_every_range_of_a_tensor_in_pieces_is_read(shape, cuts):
    whole, pieces, stored = grid(shape, cuts)
    random.Random(0).shuffle(pieces)
    spec = assembled("w", "I16", shape, pieces)

    def read(file: str, offset: int, memory: memoryview) -> None:
        memory[:] = stored[offset : offset + len(memory)]

    flat = whole.reshape(-1)
    for begin in range(0, len(flat), 1 + len(flat) // 80):
        for end in range(begin + 1, len(flat) + 1, 1 + len(flat) // 90):
            out = bytearray(2 * (end - begin))
            read_pieces(spec, begin, end, memoryview(out), read)
            assert out == flat[begin:end].tobytes(), (begin, end)


def test_pieces_that_do_not_make_the_tensor_are_refused():
    _, pieces, _ = grid((6, 9), ((2, 4), (4, 5)))
    assert type(assembled("w", "I16", (6, 9), grid((6, 9), ((6,), (9,)))[1])) is TensorSpec
    for wrong in (pieces[1:], [*pieces, pieces[0]], [*pieces[:3], Piece((2, 4), (4, 4), "f", 0)]):
        with pytest.raises(ValueError, match="pieces of tensor w"):
            assembled("w", "I16", (6, 9), wrong)
    for wrong in ((6, 10), (7, 9)):
        with pytest.raises(ValueError, match="do not make its shape"):
            assembled("w", "I16", wrong, pieces)


# --- a training's directory


@pytest.mark.parametrize(
    "files",
    [
        ["latest_checkpointed_iteration.txt", "iter_0000100/mp_rank_00/model_optim_rng.pt"],
        ["mp_rank_00/model_optim_rng.pt", "mp_rank_01_003/model_optim_rng.pt"],
        ["model_optim_rng.pt"],
        ["common.pt", "metadata.json", ".metadata", "__0_0.distcp"],
    ],
)
def test_what_megatron_saved_is_refused_with_what_exports_it(tmp_path, files):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"\x80\x02}.")
    with pytest.raises(BadInput, match=r"is a checkpoint of Megatron.*AutoBridge.*--backend megatron"):
        open_source(str(tmp_path))


def test_strided_shards_are_refused_with_what_converts_them(tmp_path):
    """As FSDP2 cuts what tensor parallelism has cut along the same dimension."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.placement_types import _StridedShard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
        saved = {}
        for name, first in (("strided", _StridedShard(0, split_factor=2)), ("plain", Shard(0))):
            saved[name] = tmp_path / name
            saved[name].mkdir()
            cut = [first, Shard(0)]
            tensor = DTensor.from_local(torch.ones(1, 3), mesh, cut, run_check=False, shape=(4, 3), stride=(3, 1))
            for rank in range(4):
                torch.save({"x.weight": tensor}, saved[name] / f"model_world_size_4_rank_{rank}.pt")
    finally:
        dist.destroy_process_group()
    assert torch.equal(read_all(saved["plain"])["x.weight"], torch.ones(4, 3))
    with pytest.raises(BadInput, match=r"rank_0\.pt: cannot be read.*strided shards.*verl\.model_merger"):
        open_source(str(saved["strided"]))


def test_the_model_is_found_in_whatever_a_training_saved_beside_it(tmp_path):
    from torch.distributed import checkpoint as dcp

    model = {"model.a.weight": torch.rand(3, 5), "lm_head.weight": torch.rand(4, 3)}
    body, head = model.values()
    state = {name: {"exp_avg": torch.rand(2), "step": torch.tensor(7.0)} for name in model}
    optimizer = {"state": state, "param_groups": [{"lr": torch.tensor(0.1), "params": list(model)}]}
    saved = {
        "as torch's recipe": {"app": {"model": model, "optim": optimizer}},
        "as torchtitan": model | {"optimizer": optimizer, "train_state": {"step": torch.tensor(7)}},
        "flat": model,
        "in parts": {"model": model, "optimizer": optimizer, "epoch": torch.tensor(3)},
        "by modules": {"module": {"model": {"a": {"weight": body}}, "lm_head": {"weight": head}}},
    }
    for name, parts in saved.items():
        dcp.save(parts, checkpoint_id=tmp_path / name, no_dist=True)
        assert_same(read_all(tmp_path / name), model)


def test_a_directory_of_checkpoints_wants_one_of_them_named(tmp_path):
    for step in (50, 100, 1000):
        write_checkpoint(tmp_path / f"checkpoint-{step}", near(tensors(0), step))
    (tmp_path / "checkpoint-1000/trainer_state.json").write_text(
        '{"best_model_checkpoint": "/elsewhere/checkpoint-50"}'
    )
    with pytest.raises(BadInput) as caught:
        open_source(str(tmp_path))
    said = str(caught.value)
    assert "checkpoint-50, checkpoint-100, checkpoint-1000" in said and "checkpoint-1000 is its last" in said
    assert "checkpoint-50 is its best" in said and "\n" not in said
    assert len(open_source(str(tmp_path / "checkpoint-50")).tensors) == len(tensors(0))
    write_checkpoint(tmp_path / "own", tensors(0))
    (tmp_path / "own/model.safetensors").rename(tmp_path / "model.safetensors")
    assert len(open_source(str(tmp_path)).tensors) == len(tensors(0)), (
        "what was saved at the end is the directory's own"
    )


# --- strangers


def archive(path: Path, program: bytes, storage: bytes = bytes(64), how: int = zipfile.ZIP_STORED) -> Path:
    path.mkdir()
    with zipfile.ZipFile(path / BIN, "w", how) as file:
        file.writestr("a/data.pkl", program)
        file.writestr("a/data/0", storage)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def one_tensor(
    shape: bytes = b"K\x04\x85", stride: bytes = b"K\x01\x85", offset: bytes = b"K\x00", count: bytes = b"K\x10"
) -> bytes:
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + count + b"tQ"
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + shape + stride + b"\x89})" + b"tR"
    return b"\x80\x02}(" + text("w") + made + b"u."


PROGRAMS = {
    "os.system": b"\x80\x02cos\nsystem\n" + text("touch /tmp/owned") + b"\x85R.",
    "eval by STACK_GLOBAL": b"\x80\x04" + text("builtins") + text("eval") + b"\x93" + text("1") + b"\x85R.",
    "INST": b"(" + text("x") + b"ios\nsystem\n.",
    "OBJ": b"(cos\nsystem\n" + text("x") + b"o.",
    "a class's own reducer": pickle.dumps(zipfile.ZipFile),
    "copyreg": b"\x80\x02ccopyreg\n_reconstructor\n(cbuiltins\nobject\ncbuiltins\nobject\nNtR.",
    "an extension": b"\x80\x02\x82\x01.",
    "text of protocol 0": b"Vx\n.",
    "calls a tensor": one_tensor()[:-1] + text("x") + b"\x85R.",
    "a far memo": b"\x80\x02}r\xff\xff\xff\xff" + text("w") + b"j\xfe\xff\xff\xff.",
    "many memos": b"\x80\x02}" + b"".join(b"r" + struct.pack("<I", k) for k in range(4_000_000)) + b".",
    "memos with gaps": b"\x80\x02}r" + struct.pack("<I", 7) + b".",
    "deep tuples": b"\x80\x02)" + b"\x85" * 2_000_000 + b".",
    "deep tuples for a key": b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns.",
    "deep lists": b"\x80\x02" + b"]" * 1_000_000 + b"a" * 999_999 + b".",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "laughs": b"\x80\x02]q\x00("
    + b"".join(b"](" + bytes([104, k]) * 100 + bytes([101, 113, k + 1]) for k in range(60))
    + b"e.",
    "many dictionaries": b"\x80\x02](" + b"}" * 3_900_000 + b"e.",
    "many small dictionaries": b"\x80\x02](" + b"}K\x01K\x02s" * 900_000 + b"e.",
    "steps without end": b"\x80\x02" + b"N(t" * 5_000_000 + b".",
    "a text of 4 GB": b"\x80\x02X\xff\xff\xff\xff.",
    "a long of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "a long of 255 bytes": b"\x80\x02\x8a\xff" + bytes(255) + b".",
    "no end": b"\x80\x02}",
    "nothing": b"",
    "only an end": b".",
    "marks alone": b"(" * 1000 + b".",
    "a mark in a tuple": b"\x80\x02(\x85.",
    "too little": b"\x80\x02\x86.",
    "half a surrogate": b"\x80\x02}X\x03\x00\x00\x00\xed\xa0\x80Ns.",
    "another protocol": b"\x80\x7f}.",
    "a shape beyond any file": one_tensor(shape=b"\x8a\x08" + b"\xff" * 7 + b"\x3f" + b"\x85"),
    "a product beyond any file": one_tensor(b"(" + b"J\xff\xff\xff\x7f" * 31 + b"t", b"(" + b"K\x01" * 31 + b"t"),
    "a negative shape": one_tensor(shape=b"J\xff\xff\xff\xff\x85"),
    "a fractional shape": one_tensor(shape=b"G\x40\x00\x00\x00\x00\x00\x00\x00\x85"),
    "40 dimensions": one_tensor(shape=b"(" + b"K\x01" * 40 + b"t", stride=b"(" + b"K\x01" * 40 + b"t"),
    "more strides than sizes": one_tensor(stride=b"K\x01K\x01\x86"),
    "more than its storage": one_tensor(shape=b"K\x11\x85"),
    "past its storage": one_tensor(offset=b"K\x0d"),
    "a storage larger than its bytes": one_tensor(count=b"J\xff\xff\xff\x7f"),
    "an offset before": one_tensor(offset=b"J\xff\xff\xff\xff"),
}  # fmt: skip


def edited(path: Path, old: bytes, new: bytes, count: int = -1) -> None:
    raw = (path / BIN).read_bytes()
    assert old in raw
    (path / BIN).write_bytes(raw.replace(old, new, count))


def archives(place: Path) -> dict[str, Path]:
    """Archives that torch.save does not write, around a tensor that it might."""
    program = one_tensor()
    found = {
        "compressed": archive(place / "compressed", program, how=zipfile.ZIP_DEFLATED),
        "a bomb": archive(place / "bomb", program, bytes(100 << 20), zipfile.ZIP_DEFLATED),
        "a pickle of 70 MB": archive(place / "long", b"N" * (70 << 20)),
    }
    for name, old, new in (
        ("an absolute name", b"a/data/0", b"/etc/pas"),
        ("a name above", b"a/data/0", b"../../.."),
        ("another name in the directory", b"a/data/0PK", b"a/data/1PK"),
        ("two of a name", b"a/data/0", b"a/data.p"),
        ("encrypted", b"PK\1\2\x14\x03\x14\x00\x00\x00", b"PK\1\2\x14\x03\x14\x00\x01\x00"),
    ):
        found[name] = archive(place / name.replace(" ", "-"), program)
        edited(found[name], old, new)
    raw = (archive(place / "sound", program) / BIN).read_bytes()
    end = raw.rindex(b"PK\5\6")
    central = struct.unpack_from("<I", raw, end + 16)[0]
    second = raw.index(b"PK\1\2", central + 1)
    for name, at, form, value in (
        ("overlapping members", second + 42, "<I", 0),
        ("a member from the middle of another", second + 42, "<I", 20),
        ("a member behind the archive", second + 42, "<I", len(raw)),
        ("a member of 2 GB", second + 20, "<II", (1 << 31, 1 << 31)),
        ("65,535 members", end + 8, "<HH", (0xFFFF, 0xFFFF)),
        ("60,000 members", end + 8, "<HH", (60_000, 60_000)),
        ("a directory of 4 GB", end + 12, "<I", 0xFFFFFFFF),
        ("a directory elsewhere", end + 16, "<I", 1),
        ("a second disk", end + 4, "<H", 1),
        ("a comment", end + 20, "<H", 9),
    ):
        changed = bytearray(raw)
        struct.pack_into(form, changed, at, *(value if isinstance(value, tuple) else (value,)))
        found[name] = place / name.replace(" ", "-")
        found[name].mkdir()
        (found[name] / BIN).write_bytes(changed)
    for size in (0, 1, 21, 22, 60, central, end, len(raw) - 1):
        found[f"{size} bytes of it"] = place / f"cut-{size}"
        found[f"{size} bytes of it"].mkdir()
        (found[f"{size} bytes of it"] / BIN).write_bytes(raw[:size])
    return found


@pytest.mark.heavy
def test_hostile_files_are_refused_in_one_sentence_in_time_and_in_memory(tmp_path):
    sound = archive(tmp_path / "fine", one_tensor())
    others = {name: archive(tmp_path / f"program-{k}", program) for k, (name, program) in enumerate(PROGRAMS.items())}
    others |= archives(tmp_path)
    for (name, path), (said, seconds) in zip(
        others.items(),
        outcomes("rvdist.weights.checkpoint.trained.open_trained", sound, list(others.values())),
        strict=True,
    ):
        assert said is not None, f"{name}: accepted"
        assert not said.startswith("NOT OURS"), f"{name}: {said}"
        assert "\n" not in said and len(said) < 2000 and str(path) in said, f"{name}: {said}"
        assert seconds < SECONDS, f"{name}: {seconds:.1f} s"
    assert not Path("/tmp/owned").exists()


@pytest.mark.heavy
def test_random_damage_is_refused_or_changes_nothing_but_numbers(tmp_path):
    path = write_bin(tmp_path / "c", tensors(0))
    raw, chance = (path / BIN).read_bytes(), random.Random(0)
    for _ in range(800):
        (path / BIN).write_bytes(damage(raw, chance, (6000, 3000)))
        with suppress(BadInput):
            read_all(path)
