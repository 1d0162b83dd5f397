"""Matches a stranger's regular expressions as peft does, in a process of its own that is ended when it takes too long:
Python's own engine, so that each means what it means to peft, can take for ever.

Source: peft's utils/other.py (`get_pattern_key`).
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence

_SECONDS, _BYTES = 2, 256 << 20  # of processor time, of memory
_AT_MOST = 60.0  # seconds, on a busy machine

_MATCH = """
import functools, json, re, resource, sys
seconds, nbytes = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_DATA, (nbytes, nbytes))
patterns, names = json.load(sys.stdin)
plain = re.compile(r"[A-Za-z0-9_.]*[A-Za-z0-9_]")
ends = [p.rpartition(".")[2] if plain.fullmatch(p) else "" for p in patterns]
compiled = functools.cache(lambda k: re.compile(rf"(.*\\.)?({patterns[k]})$"))
try:
    print(json.dumps([
        next((
            k for k, end in enumerate(ends)
            if (name.endswith(end) or name.endswith("\\n")) and compiled(k).match(name)
        ), None)
        for name in names
    ]))
except (re.error, OverflowError) as error:
    print(json.dumps(str(error)))
"""


def first_matches(patterns: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """For each name which pattern is the first that matches its end: from a dot, or all of it. Raises ValueError where
    one is no regular expression, or they are not done in time or in memory."""
    if not patterns:
        return [None] * len(names)
    command = [sys.executable, "-I", "-S", "-c", _MATCH, str(_SECONDS), str(_BYTES)]
    try:
        ended = subprocess.run(
            command, input=json.dumps([patterns, names]), capture_output=True, encoding="ascii", timeout=_AT_MOST
        )
    except subprocess.TimeoutExpired:
        ended = None
    if ended is None or ended.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise ValueError(f"matching it takes more than {_SECONDS} s")
    if ended.returncode:  # a MemoryError, a RecursionError
        raise ValueError(f"matching it fails: {(ended.stderr.splitlines() or ['it crashed'])[-1][:200]}")
    matches = json.loads(ended.stdout)
    if isinstance(matches, str):
        raise ValueError(matches[:200])
    return list(matches)
