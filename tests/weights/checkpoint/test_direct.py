import errno
import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from rvdist.weights.checkpoint import direct
from rvdist.weights.checkpoint.direct import BLOCK, File, RangeWriter

SIZE = 300_000


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture(params=[True, False], ids=["direct", "cached"])
def file(request, tmp_path):
    (tmp_path / "f").write_bytes(bytes(SIZE))
    file = File(tmp_path / "f", request.param)
    yield file
    file.close()


def ranges(rng, count):
    """Ranges that meet but do not overlap, at any offset, in any order."""
    ends = sorted(rng.sample(range(1, SIZE), count - 1))
    found = list(zip([0, *ends], [*ends, SIZE], strict=True))
    rng.shuffle(found)
    return found


@pytest.mark.parametrize("count", [1, 2, 40, 3000])
def test_every_byte_of_any_ranges_arrives(file, tmp_path, pool, monkeypatch, count):
    monkeypatch.setattr(direct, "_BUFFER", 3 * BLOCK)
    rng = random.Random(count)
    data = rng.randbytes(SIZE)
    writers = [RangeWriter(pool), RangeWriter(pool, 2)]
    for number, (start, stop) in enumerate(ranges(rng, count)):
        writer = writers[number % 2]
        writer.begin(file, start)
        while start < stop:
            step = min(stop - start, rng.choice([1, 100, BLOCK, 20_000]))
            writer.write(memoryview(data)[start : start + step])
            start += step
        writer.end()
    for writer in writers:
        writer.wait()
    file.sync()
    assert (tmp_path / "f").read_bytes() == data


def test_long_ranges_go_past_the_page_cache_where_the_file_system_can(file, tmp_path, pool, monkeypatch):
    moved = {}
    pwrite = os.pwrite

    def counting(descriptor, view, offset):
        moved[descriptor] = moved.get(descriptor, 0) + len(view)
        return pwrite(descriptor, view, offset)

    monkeypatch.setattr(os, "pwrite", counting)
    writer = RangeWriter(pool)
    writer.begin(file, 100)
    writer.write(memoryview(bytes(200_000)))
    writer.end()
    writer.wait()
    cached = moved.pop(file.cached, 0)
    assert (cached < 2 * BLOCK) == file.is_direct and cached + sum(moved.values()) == 200_000


def test_a_file_system_that_turns_out_to_have_no_direct_io_gets_it_all_the_same(tmp_path, pool, monkeypatch):
    (tmp_path / "f").write_bytes(bytes(SIZE))
    file = File(tmp_path / "f")
    pwrite = os.pwrite

    def refusing(descriptor, view, offset):
        if descriptor != file.cached:
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(descriptor, view, offset)

    monkeypatch.setattr(os, "pwrite", refusing)
    monkeypatch.setattr(direct, "_BUFFER", 2 * BLOCK)
    data = random.Random(0).randbytes(SIZE)
    writer = RangeWriter(pool)
    writer.begin(file, 0)
    for start in range(0, SIZE, 1000):
        writer.write(memoryview(data)[start : start + 1000])
    writer.end()
    writer.wait()
    assert not file.is_direct and (tmp_path / "f").read_bytes() == data


def test_what_goes_wrong_in_the_background_is_raised(tmp_path, pool, monkeypatch):
    (tmp_path / "f").write_bytes(bytes(SIZE))
    file = File(tmp_path / "f")
    if not file.is_direct:
        pytest.skip("this file system has no direct I/O")

    def full(descriptor, view, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = RangeWriter(pool)
    writer.begin(file, 0)
    monkeypatch.setattr(os, "pwrite", full)
    writer.write(memoryview(bytes(BLOCK)))
    writer.end()
    with pytest.raises(OSError, match="No space left.*/f'"):
        writer.wait()
