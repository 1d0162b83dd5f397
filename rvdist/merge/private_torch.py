"""What we take from torch beyond its public interface: the names of its libraries."""

from __future__ import annotations

import ctypes
import os
from importlib.util import find_spec
from pathlib import Path

LIBRARIES = ("libtorch_global_deps.so", os.RTLD_GLOBAL), ("libtorch_python.so", os.RTLD_LOCAL)  # as torch loads them


def load() -> None:
    """Has the system load torch's libraries, which is a fifth of what importing torch takes and needs no Python: other
    threads go on beside it. What cannot be loaded so is left to torch."""
    found = find_spec("torch")  # imports nothing
    if found is None or found.origin is None:
        return
    dlopen = ctypes.CDLL(None).dlopen  # ctypes' own keeps Python waiting
    dlopen.argtypes, dlopen.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
    for name, scope in LIBRARIES:
        dlopen(os.fsencode(Path(found.origin).parent / "lib" / name), os.RTLD_NOW | scope)
