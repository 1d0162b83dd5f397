"""Faults of the file system and ends at every operation on files, by tests/faults/shim.c."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

CHANGES = ("create", "write", "sync", "rename", "remove", "mkdir", "mode", "size")  # what leaves something behind
_STATE = struct.Struct("4q16s")


def build(place: Path) -> Path:
    """The library. Skips the test where there is no compiler."""
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("there is no C compiler (cc) to make the library of faults with")
    library = place / "faults.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return library


@dataclass(frozen=True)
class Fault:
    """What is counted below a directory, and what happens at which of them; its state and log lie in `place`."""

    place: Path
    under: Path
    operations: Sequence[str] = CHANGES
    action: str = "kill"
    role: str = ""

    def __post_init__(self) -> None:
        self.at(-1)

    def at(self, number: int, onwards: bool = False) -> Fault:
        """Counts anew; it happens at this one (-1: never), or from there on."""
        self._file.touch()
        with open(self._file, "r+b") as file:  # processes may have it mapped
            file.write(_STATE.pack(0, number, 0, onwards, self.action.encode()))
        self._log.write_text("")
        return self

    @property
    def environment(self) -> dict[str, str]:
        """Of who is to meet it, beside LD_PRELOAD."""
        found = {
            "FAULT_STATE": str(self._file),
            "FAULT_LOG": str(self._log),
            "FAULT_UNDER": str(self.under),
            "FAULT_OPS": ",".join(self.operations),
        }
        return found | ({"FAULT_ROLE": self.role} if self.role else {})

    @property
    def count(self) -> int:
        """How many operations there were."""
        return int(_STATE.unpack(self._file.read_bytes())[0])

    @property
    def happened(self) -> bool:
        return bool(_STATE.unpack(self._file.read_bytes())[2])

    @property
    def told(self) -> list[str]:
        """A line an operation."""
        return self._log.read_text().splitlines()

    @property
    def _file(self) -> Path:
        return self.place / "fault.state"

    @property
    def _log(self) -> Path:
        return self.place / "fault.log"
