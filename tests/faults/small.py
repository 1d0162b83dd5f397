"""What writes a little and lasts no time, so that it can be killed wherever it touches a file: `python -m small WHAT`.

output   an output of two weight files, as a merge stages, journals and commits it; what its journal claims stays
overwrite, overwrite-in-steps   the same in the place of another checkpoint; where nothing can be exchanged in one step
cache    the slices of two points into a sample cache, three at a time; what it has is not written again
memory   what is remembered in `cache.dir`: digests, the key, the rate of a merge
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import xxhash

from rvdist.core.errors import Failed
from rvdist.core.point import WeightPoint
from rvdist.weights.checkpoint.beside import carry_over
from rvdist.weights.checkpoint.digest import file_digest
from rvdist.weights.checkpoint.direct import File
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.journal import MANIFEST, Manifest, Written
from rvdist.weights.checkpoint.key import owner_key
from rvdist.weights.checkpoint.staging import Staging

UNIT = 3000
FILES = {f"model-{k}-of-2.safetensors": 2 * UNIT for k in (1, 2)}


def content(file: str, start: int) -> bytes:
    return (hashlib.sha256(f"{file}{start}".encode()).digest() * UNIT)[:UNIT]


def output(overwrite: bool) -> None:
    out = Path("out")
    if not overwrite and (out / MANIFEST).exists() and Manifest.read(out).plan == "plan":
        return
    staging = Staging(out, "plan", overwrite, owner_key(Path("cache")))
    for file, size in FILES.items():
        staging.allocate(file, b"", size)
    for file in FILES:
        done = []
        for start in (0, UNIT):
            claim = staging.claims.get((file, start, UNIT))
            data = content(file, start)
            try:
                if claim and claim.holds(staging.partial, staging.handle.opener):
                    continue
                written = File(staging.partial / file, False, staging.handle)
                written.write(memoryview(data), start)
                written.sync()
            except OSError as error:  # as a worker says it
                raise Failed(f"{error.filename}: {error.strerror}") from None
            done.append(Written(file, start, UNIT, xxhash.xxh3_128_hexdigest(data)))
        staging.journal(done)
    carry_over(Checkpoint(Path("base"), {}, {}, {}), staging, None)
    staging.write_text("README.md", "a card\n")
    staging.commit()


def cache() -> None:
    from rvdist.evaluate.cache import SampleCache
    from rvdist.evaluate.request import Answered, Completion

    keys = [hashlib.sha256(bytes([k])).hexdigest() for k in range(6)]
    samples = SampleCache(Path("cache"))
    known = samples.read(keys)
    lacking = [key for key in keys if key not in known]
    for first in range(0, len(lacking), 3):
        samples.write(
            [
                (key, WeightPoint("base").base, "task", Answered((Completion(key * 40, "stop", 1, 2),), 0, 0.5))
                for key in lacking[first : first + 3]
            ]
        )
    samples.close()


def memory() -> None:
    from rvdist.merge.placement import rates, remember_rate

    owner_key(Path("cache"))
    file_digest(Path("base/config.json"), Path("cache/digests"))
    remember_rate(rates(Path("cache")), "cpu", 1 << 30, 1.0, 1)


if __name__ == "__main__":
    os.umask(int(sys.argv[2]))
    if sys.argv[1] == "overwrite-in-steps":
        os.environ["FAULT_NO_EXCHANGE"] = os.environ["FAULT_NO_ALLOCATE"] = "1"
    what = {"output": lambda: output(False), "cache": cache, "memory": memory}
    what.get(sys.argv[1], lambda: output(True))()
