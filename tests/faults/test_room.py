"""Outputs on a file system that sets no room aside, as NFS before 4.2: nothing is written to make some, and what would
not fit is refused before anything is merged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from shim import build

SCRIPT = """
import os
from pathlib import Path
from rvdist.core.errors import Failed
from rvdist.weights.checkpoint.staging import Staging

most = os.statvfs(".").f_bavail * os.statvfs(".").f_frsize * 6 // 10
one, other = Staging(Path("one"), "plan"), Staging(Path("other"), "plan")
one.allocate("a", b"head", most)
print(os.stat("one.partial/a").st_size == most, os.stat("one.partial/a").st_blocks < 100)
for staging in (one, other):
    try:
        staging.allocate("b", b"head", most)
    except Failed as error:
        print(error)
one.allocate("c", b"head", 1000)
one.release()
other.allocate("b", b"head", most)
other.abandon()
Path("one.partial/a").unlink()
"""


def test_room_is_promised_once(tmp_path: Path) -> None:
    environment = os.environ | {"LD_PRELOAD": str(build(tmp_path)), "FAULT_NO_ALLOCATE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    seen, *refused = done.stdout.splitlines()
    assert seen == "True True"
    assert [line.partition(":")[0] for line in refused] == ["one.partial/b", "other.partial/b"]
    assert all("bytes can be had there (No space left on device)" in line for line in refused)
