"""Strangers' checkpoints in formats other than plain safetensors, made by hand and by chance: each is read, or refused
in one sentence, in time and in memory."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import SECONDS, VALUES, damage, numbers, outcomes
from safetensors.torch import save_file

from rvdist.core.errors import BadInput
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.header import TensorSpec
from rvdist.weights.checkpoint.layouts import groups

pytestmark = pytest.mark.heavy
MUTATIONS = int(os.environ.get("RVDIST_MUTATIONS", "5"))  # of each kind; the long run is in benchmarks/README.md
DCP = "torch.distributed.checkpoint.metadata"
TENSORS = "torch.distributed.tensor"


@dataclass(frozen=True, eq=False)
class Of:
    """An object, as pickles make one: of a class, by arguments, with a state."""

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None


def program(value: Any) -> bytes:
    """The opcodes of a value."""
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return b"\x8a\x10" + value.to_bytes(16, "little", signed=True)
        case str():
            raw = value.encode("utf-8", "surrogatepass")
            return b"X" + struct.pack("<I", len(raw)) + raw
        case type():
            return b"ctorch\n" + value.__name__.encode() + b"\n"
        case dict():
            return b"}(" + b"".join(program(part) for item in value.items() for part in item) + b"u"
        case list():
            return b"](" + b"".join(map(program, value)) + b"e"
        case tuple():
            return b"(" + b"".join(map(program, value)) + b"t"
        case Of("storage"):
            return program(value.args) + b"Q"
        case Of():
            module, _, name = value.name.rpartition(".")
            found = f"c{module}\n{name}\n".encode()
            if value.args is not None:
                found += program(value.args) + b"R"
            return found + (program(value.state) + b"b" if value.state is not None else b"")
    raise AssertionError(value)


def pickled(value: Any) -> bytes:
    return b"\x80\x02" + program(value) + b"."


def archive(value: Any, storage: bytes = bytes(64)) -> bytes:
    """A file of torch.save's with one storage."""
    into = io.BytesIO()
    with zipfile.ZipFile(into, "w") as file:
        file.writestr("a/data.pkl", pickled(value))
        file.writestr("a/data/0", storage)
    return into.getvalue()


def tensor(count: int = 4, kind: str = "torch.FloatStorage") -> Of:
    storage = Of("storage", ("storage", Of(kind, None), "0", "cpu", count))
    return Of("torch._utils._rebuild_tensor_v2", (storage, 0, (count,), (1,), False, {}))


def distributed(path: Path, file: str = "a.distcp", chunks: Any = None, twice: bool = False) -> Path:
    """A distributed checkpoint of one tensor of eight elements in two pieces."""
    path.mkdir()
    raw = archive(tensor())
    (path / "a.distcp").write_bytes(raw + raw)
    about = {
        "properties": Of(f"{DCP}.TensorProperties", (), {"dtype": Of("torch.float32", None)}),
        "size": (8,),
        "chunks": [Of(f"{DCP}.ChunkStorageMetadata", (), {"offsets": (k,), "sizes": (4,)}) for k in (0, 4)],
    }
    if chunks is not None:
        about["chunks"] = chunks
    places = {
        Of(f"{DCP}.MetadataIndex", (), {"fqn": "w", "offset": (k,)}): Of(
            "torch.distributed.checkpoint.filesystem._StorageInfo",
            (),
            {"relative_path": file, "offset": 0 if twice else len(raw) * (k // 4), "length": len(raw)},
        )
        for k in (0, 4)
    }
    said = {"state_dict_metadata": {"w": Of(f"{DCP}.TensorStorageMetadata", (), about)}, "storage_data": places}
    (path / ".metadata").write_bytes(pickled(Of(f"{DCP}.Metadata", (), said)))
    return path


def shard(path: Path, inner: Any, axes: Any = None) -> Path:
    """The only shard of a rank, of a distributed tensor."""
    flat = {"shape": 1, "stride": 1}
    mesh = {
        "_rank_map": tensor(1, "torch.LongStorage"),
        "_layout": Of("torch.distributed._mesh_layout._MeshLayout", (), {"axes": axes} if axes else flat),
    }
    spec = {
        "mesh": Of("torch.distributed.device_mesh.DeviceMesh", (), mesh),
        "placements": (Of(f"{TENSORS}.placement_types.Replicate"),),
    }
    state = {"_local_tensor": tensor(), "_spec": Of(f"{TENSORS}._dtensor_spec.DTensorSpec", (), spec)}
    subclass = Of("torch._utils._rebuild_wrapper_subclass", None)
    made = Of("torch._tensor._rebuild_from_type_v2", (subclass, Of(f"{TENSORS}.DTensor", None), inner, state))
    path.mkdir()
    (path / "model_world_size_1_rank_0.pt").write_bytes(archive({"w": made}))
    return path


def pickle_of(path: Path, value: bytes) -> Path:
    path.mkdir()
    into = io.BytesIO()
    with zipfile.ZipFile(into, "w") as file:
        file.writestr("a/data.pkl", value)
    (path / "pytorch_model.bin").write_bytes(into.getvalue())
    return path


def quantised(path: Path, how: dict[str, Any], weights: dict[str, torch.Tensor]) -> Path:
    path.mkdir()
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({"quantization_config": how}))
    return path


def compressed(form: str = "int-quantized", **scheme: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True} | scheme
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": {"weights": weights}}}


def fp8(columns: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "weight_block_size": [1, columns]}


CODES = {"a.weight": torch.ones(4, 8, dtype=torch.int8), "a.weight_scale": torch.ones(4, 1)}
PACKED = {
    "a.weight_packed": torch.zeros(4, 1, dtype=torch.int32), "a.weight_scale": torch.ones(4, 1),
    "a.weight_shape": torch.tensor([4, 8]),
}  # fmt: skip
FP8 = {"w": torch.ones(4, 8).to(torch.float8_e4m3fn), "w_scale_inv": torch.ones(4, 1)}
MXFP4 = {
    "e.down_proj_blocks": torch.zeros(2, 4, 1, 16, dtype=torch.uint8),
    "e.down_proj_scales": torch.full((2, 4, 1), 127, dtype=torch.uint8),
}  # fmt: skip


def with_a_long_shape(path: Path) -> Path:
    """Its weight_shape has 640 MB, which nobody has stored."""
    quantised(path, compressed(), CODES | {"a.weight_shape": torch.tensor([4, 8])})
    raw = (path / "model.safetensors").read_bytes()
    (size,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + size])
    first = 80_000_000 * 8
    ordered = {name: entry for name, entry in header.items() if name != "a.weight_shape"}
    at = 0
    for entry in (entry for entry in ordered.values() if "data_offsets" in entry):
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = [at, at := at + end - begin]
    ordered["a.weight_shape"] = {"dtype": "I64", "shape": [80_000_000], "data_offsets": [at, at + first]}
    said = json.dumps(ordered).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(said)) + said)
    os.truncate(path / "model.safetensors", 8 + len(said) + at + first)
    return path


def stored_vector(path: Path, shape: list[Any]) -> Path:
    path.mkdir()
    save_file({"w": torch.ones(4)}, path / "model.safetensors", {"rvdist": "vector"})
    described = {"version": 1, "tensors": {"w": {"form": "dense", "shape": shape}}}
    (path / "vector.json").write_text(json.dumps(described))
    return path


def strangers(place: Path) -> dict[str, tuple[Path, str | None]]:
    """Each with a part of what is said of it; None: nothing, it is read."""
    colliding = b"".join(program(k * ((1 << 61) - 1)) + b"N" for k in range(1, 200_001))  # keys of one hash
    axis = Of("torch.distributed._mesh_layout._FlatLayout", (), {"shape": 1 << 61, "stride": 1})
    sound = (None, (4,), 0)
    return {
        "pieces": (distributed(place / "1"), None),
        "chunks that are a number": (distributed(place / "2", chunks=5), "damaged"),
        "half a surrogate for a file": (distributed(place / "3", file="\ud800.distcp"), "surrogates"),
        "the same bytes twice": (distributed(place / "4", twice=True), "overlap"),
        "a shard": (shard(place / "5", (None, None, (4,))), None),
        "a shard of no shape": (shard(place / "6", (None,)), "too few parts"),
        "a shard of no parts": (shard(place / "7", "x"), "too few parts"),
        "a mesh of 100,000 dimensions": (shard(place / "8", (*sound[:1], None, (4,)), (axis,) * 100_000), "too many"),
        "keys of one hash": (pickle_of(place / "9", b"\x80\x02}(" + colliding + b"u."), "a number of 64 bits"),
        "int8": (quantised(place / "10", compressed(), CODES), None),
        "a group that is text": (
            quantised(place / "21", compressed() | {"config_groups": {"a": "b"}}, CODES),
            "without config_groups",
        ),
        "a list of bits": (quantised(place / "11", compressed(num_bits=[8]), CODES), "is quantised by"),
        "a shape of 640 MB": (with_a_long_shape(place / "12"), "weight_shape"),
        "int4": (quantised(place / "13", compressed("pack-quantized", num_bits=4), PACKED), None),
        "int4 and a tensor of its name": (
            quantised(place / "14", compressed("pack-quantized", num_bits=4), PACKED | {"a.weight": torch.ones(4, 8)}),
            "has a.weight beside a.weight_packed",
        ),
        "blocks of 10**9 columns": (quantised(place / "15", fp8(10**9), FP8), None),
        "blocks of 10**30 columns": (quantised(place / "16", fp8(10**30), FP8), None),
        "mxfp4": (quantised(place / "17", {"quant_method": "mxfp4"}, MXFP4), None),
        "mxfp4 and a tensor of its name": (
            quantised(place / "18", {"quant_method": "mxfp4"}, MXFP4 | {"e.down_proj": torch.ones(2)}),
            "has e.down_proj beside e.down_proj_blocks",
        ),
        "a vector": (stored_vector(place / "19", [4]), None),
        "a vector of 3 million dimensions": (stored_vector(place / "20", [999_999_999_999] * 3_000_000), "impossible"),
    }  # fmt: skip


def test_strangers_are_read_or_refused_in_time_and_in_memory(tmp_path: Path) -> None:
    cases = strangers(tmp_path)
    found = outcomes("hostile.numbers", cases["pieces"][0], [path for path, _ in cases.values()])
    for (name, (_, expected)), (said, seconds) in zip(cases.items(), found, strict=True):
        assert seconds < SECONDS, f"{name}: {seconds:.1f} s"
        if expected is None:
            assert said is None, f"{name}: {said}"
        else:
            assert said and expected in said and not said.startswith("NOT OURS"), f"{name}: {said}"
            assert "\n" not in said and len(said) < 2000, f"{name}: {said}"


def test_experts_of_no_size_are_no_group() -> None:
    """Empty tensors cost nothing, and could claim a number of experts that takes for ever to count."""
    shapes = {"e.experts.gate_up_proj": (1 << 50, 0, 0), "e.experts.down_proj": (1 << 50, 0, 0)}
    specs = {name: TensorSpec(name, "BF16", shape, "a", 0) for name, shape in shapes.items()}
    assert not groups(Checkpoint(Path(), specs, {}, {}))


# --- by chance


def changed_pickle(raw: bytes, chance: random.Random) -> bytes:
    """Values exchanged for others, opcodes left out, put in and swapped."""
    ops = [at for _, _, at in pickletools.genops(raw)] + [len(raw)]
    parts = [raw[first:last] for first, last in itertools.pairwise(ops)]
    values = [
        program(value) for value in (None, True, 0, 1, -1, 1 << 62, "", "a", "\ud800", "../x", "x" * 5000, {}, [], ())
    ]
    values += [b"K\x01K\x02\x86", b"h\x00", b"}K\x01K\x02s"]
    plain = [
        k for k, part in enumerate(parts) if part[:1] in (b"N", b"K", b"M", b"X", b"\x8c", b"h", b"j", b")", b"\x8a")
    ]
    for _ in range(chance.choice((1, 1, 2, 3))):
        at = chance.randrange(1, len(parts) - 1)
        match chance.randrange(6):
            case 0:
                parts[at] = b""
            case 1:
                parts[at] += chance.choice(values)
            case 2:
                other = chance.randrange(1, len(parts) - 1)
                parts[at], parts[other] = parts[other], parts[at]
            case _:
                parts[chance.choice(plain)] = chance.choice(values)
    return b"".join(parts)


def changed_json(document: Any, chance: random.Random) -> Any:
    """A copy in which something is something else."""
    changed = json.loads(json.dumps(document))
    at, inner = None, changed
    while isinstance(inner, dict | list) and inner and (at is None or chance.random() < 0.8):
        key: Any = chance.choice(list(inner)) if isinstance(inner, dict) else chance.randrange(len(inner))
        at, inner = (inner, key), inner[key]
    assert at
    at[0][at[1]] = chance.choice([*VALUES, 128, 10**9, 10**30, [1, 10**9], ["a"]])
    return changed


def changed_header(raw: bytes, chance: random.Random) -> bytes:
    """A tensor of another dtype or shape of as many bytes, or another name."""
    (size,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + size])
    name = chance.choice([name for name in header if name != "__metadata__"])
    match chance.randrange(3):
        case 0:
            header[name]["dtype"] = chance.choice(
                ["U8", "I8", "BOOL", "F8_E4M3", "F8_E5M2", "BF16", "F16", "F32", "I32", "I64"]
            )
        case 1:
            shape = header[name]["shape"]
            header[name]["shape"] = chance.choice([shape[::-1], [1, *shape], [*shape, 1], [0], [0, 1 << 40]])
        case _:
            suffix = chance.choice(
                ["", "_blocks", "_scales", "_scale_inv", "_packed", "_scale", "_shape", "_zero_point"]
            )
            header[chance.choice(["a.weight", "w", "e.down_proj", name]) + suffix] = header.pop(name)
    said = json.dumps(header).encode()
    return struct.pack("<Q", len(said)) + said + raw[8 + size :]


def test_mutations_are_read_or_refused(tmp_path: Path) -> None:
    chance = random.Random(int(os.environ.get("RVDIST_SEED", "0")))
    sound = {name: path for name, (path, said) in strangers(tmp_path).items() if said is None}
    targets: list[tuple[Path, Path, Callable[[bytes], bytes]]] = []

    def within(raw: bytes) -> bytes:
        into = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(into, "w") as new:
            for name in old.namelist():
                one = old.read(name)
                new.writestr(name, changed_pickle(one, chance) if name.endswith("data.pkl") else one)
        return into.getvalue()

    for path in sound.values():
        for file in sorted(path.iterdir()):
            if file.suffix == ".json":
                targets.append((path, file, lambda raw: json.dumps(changed_json(json.loads(raw), chance)).encode()))
            elif file.suffix == ".safetensors":
                targets.append((path, file, lambda raw: changed_header(raw, chance)))
            elif file.suffix == ".pt":
                targets.append((path, file, within))
            elif file.name == ".metadata":
                targets.append((path, file, lambda raw: changed_pickle(raw, chance)))
            targets.append((path, file, lambda raw: damage(raw, chance, (4000, 4000))))
    read = 0
    for path, file, change in targets:
        raw = file.read_bytes()
        for _ in range(MUTATIONS):
            file.write_bytes(change(raw))
            try:
                numbers(path)
                read += 1
            except BadInput as error:
                assert "\n" not in str(error)
        file.write_bytes(raw)
    print(f"{MUTATIONS * len(targets):,} mutations: {read:,} were read, the others refused")
    assert 0 < read < MUTATIONS * len(targets)
