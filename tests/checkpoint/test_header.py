import json
import random

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from rvdist.checkpoint.header import build_header, read_header
from rvdist.errors import BadInput


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(1,), begin=0, end=4):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_reads_what_safetensors_writes(tmp_path):
    weights = {"b": torch.ones(3, 2, dtype=torch.bfloat16), "a": torch.tensor(1.5), "empty": torch.empty(0, 4)}
    save_file(weights, tmp_path / "x.safetensors", metadata={"format": "pt"})
    specs, metadata, stamp = read_header(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt"}
    assert {s.name: (s.dtype, s.shape) for s in specs} == {
        "b": ("BF16", (3, 2)),
        "a": ("F32", ()),
        "empty": ("F32", (0, 4)),
    }
    assert stamp.size == (tmp_path / "x.safetensors").stat().st_size


def test_writes_what_safetensors_reads(tmp_path):
    header, specs = build_header([("b", "BF16", (3, 2)), ("naïve", "F32", ())], "x", {"format": "pt"})
    assert len(header) % 8 == 0
    data = torch.arange(6).bfloat16().view(torch.uint8).numpy().tobytes() + torch.tensor(2.5).numpy().tobytes()
    (tmp_path / "x.safetensors").write_bytes(header + data)
    loaded = load_file(tmp_path / "x.safetensors")
    assert torch.equal(loaded["b"], torch.arange(6).bfloat16().view(3, 2)) and loaded["naïve"] == 2.5
    assert specs[0].offset == len(header)


def test_metadata_that_is_null_is_none_as_the_library_has_it(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw({"__metadata__": None, "a": entry()}, b"1234"))
    with safe_open(path, "pt") as library:
        assert list(library.keys()) == ["a"] and not library.metadata()
    specs, metadata, _ = read_header(path)
    assert [spec.name for spec in specs] == ["a"] and metadata == {}
    for other in ("text", 3, [], False):
        path.write_bytes(raw({"__metadata__": other, "a": entry()}, b"1234"))
        with pytest.raises(SafetensorError):
            safe_open(path, "pt").__enter__()
        with pytest.raises(BadInput, match="metadata|damaged"):
            read_header(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a whole"),
        (b"\x10\0\0\0\0\0\0\0{}", "not a whole"),
        (raw(b"{}", length=1 << 40), "not a whole"),
        (raw(b"[]"), "damaged"),
        (raw(b"not json"), "damaged"),
        (raw(b"[" * 50_000), "damaged"),
        (raw(b'{"a":1,"a":1}'), "twice"),
        (raw({"a": entry(dtype="F99")}, b"1234"), "unknown dtype"),
        (raw({"a": entry(shape=(-1,))}, b"1234"), "negative"),
        (raw({"a": entry(shape=(1.5,))}, b"1234"), "negative or fractional"),
        (raw({"a": entry(shape=(True,))}, b"1234"), "negative or fractional"),
        (raw({"a": entry(end=8)}, b"12345678"), "has 8 bytes"),
        (raw({"a": entry(shape=(2**62, 4))}, b"1234"), "has 4 bytes"),
        (raw({"a": entry(), "b": entry(begin=2, end=6)}, b"123456"), "overlaps"),
        (raw({"a": entry(), "b": entry(begin=8, end=12)}, b"123456789012"), "hole"),
        (raw({"a": entry(begin=4, end=8)}, b"12345678"), "hole"),
        (raw({"a": entry()}, b"12"), "truncated"),
        (raw({"a": entry()}, b"123456"), "unknown bytes"),
        (raw({"__metadata__": {"k": 1}, "a": entry()}, b"1234"), "metadata"),
        (raw({"a": 3}), "damaged"),
    ],
)
def test_refuses_what_the_specification_forbids(tmp_path, content, reason):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=reason) as caught:
        read_header(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_no_mutation_gets_past_as_anything_but_bad_input(tmp_path):
    save_file({"a": torch.ones(4), "b": torch.ones(2, 3)}, tmp_path / "x.safetensors")
    good = (tmp_path / "x.safetensors").read_bytes()
    random_bytes = random.Random(0)
    path = tmp_path / "y.safetensors"
    refused = 0
    for _ in range(2000):
        mutated = bytearray(good)
        for _ in range(random_bytes.randint(1, 4)):
            mutated[random_bytes.randrange(len(mutated) - 40)] = random_bytes.randrange(256)
        if random_bytes.random() < 0.2:
            del mutated[random_bytes.randrange(len(mutated)) :]
        path.write_bytes(mutated)
        try:
            specs, _, stamp = read_header(path)
            assert all(s.offset > 0 and s.offset + s.nbytes <= stamp.size for s in specs)
        except BadInput:
            refused += 1
    assert refused > 1000
