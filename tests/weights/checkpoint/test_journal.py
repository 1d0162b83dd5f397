import pytest
import xxhash

from rvdist.core.errors import BadInput
from rvdist.core.regular import Handle
from rvdist.weights.checkpoint.journal import JOURNAL, MANIFEST, Journal, Manifest, Written, read_journal

ONE, TWO = Written("a.safetensors", 8, 100, "0" * 32), Written("b.safetensors", 8, 7, "1" * 32)


def journal(path, *written):
    opened = Journal(Handle(path), "plan", [])
    for entry in written:
        opened.add([entry])
    opened.close()
    return path / JOURNAL


def test_what_is_written_is_claimed_for_the_same_plan_alone(tmp_path):
    journal(tmp_path, ONE, TWO)
    assert list(read_journal(tmp_path, "plan")) == [ONE, TWO]
    assert list(read_journal(tmp_path, "other")) == []
    assert list(read_journal(tmp_path / "nowhere", "plan")) == []


def test_every_torn_end_and_every_changed_byte_loses_only_what_it_touches(tmp_path):
    path = journal(tmp_path, ONE, TWO)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        claims = list(read_journal(tmp_path, "plan"))
        assert claims == [ONE, TWO][: max(0, sum(end <= length for end in ends) - 1)]
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        claims = list(read_journal(tmp_path, "plan"))
        assert claims == [ONE, TWO][: len(claims)] and len(claims) < 2


def test_a_claim_is_checked_against_the_bytes(tmp_path):
    (tmp_path / "w").write_bytes(b"headerDATA")
    good = Written("w", 6, 4, xxhash.xxh3_128_hexdigest(b"DATA"))
    assert good.holds(tmp_path)
    assert not Written("w", 5, 4, good.digest).holds(tmp_path)
    assert not Written("w", 6, 5, xxhash.xxh3_128_hexdigest(b"DATA")).holds(tmp_path), "the file is too short"


def test_the_manifest_round_trips(tmp_path):
    manifest = Manifest("plan", (ONE, TWO))
    (tmp_path / MANIFEST).write_text(manifest.to_json())
    assert Manifest.read(tmp_path) == manifest
    for damaged in ("{}", "[]", '{"version": 1, "plan": "p", "ranges": [1]}', '{"version": 9}'):
        (tmp_path / MANIFEST).write_text(damaged)
        with pytest.raises(BadInput, match=r"rvdist\.json"):
            Manifest.read(tmp_path)
