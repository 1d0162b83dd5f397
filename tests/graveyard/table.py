"""Writes docs/graveyard.md from the situations: `python tests/graveyard/table.py`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from catalogue import SITUATIONS
from situations import Situation

PAGE = Path(__file__).resolve().parents[2] / "docs" / "graveyard.md"

HEAD = """# The graveyard

Situations in which tools that merge, serve or score models go wrong, each made again from a model of a few kB by a
script in `tests/graveyard/`. Either what comes out is right, or it is refused in one sentence that says why, and
nothing is written: nothing is silent. `tests/graveyard/test_graveyard.py` runs all of them, and this page is made of
its list by `python tests/graveyard/table.py`.

**Right** is judged against the tensors of the inputs, taken whole, in fp64 and rounded once: equal to the bit, but for
bf16 and fp16 one unit in the last place in one element of a thousand. Every other file of the target must be there byte
for byte, the index must list what the files hold, and what is said must be what is expected and no more.
**Refused** is exit status 2, one line that names what is wrong, and not a file more than before.

A report is a public issue or pull request about the same situation, or one close to it, in some tool: people meet with
it. Where we have none to name, it says so. What mergekit and peft do with the same inputs is in
[the benchmarks](../benchmarks/README.md).
"""


def link(report: str) -> str:
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)#(\d+)", report)
    return f"[{report}](https://github.com/{found[1]}/issues/{found[2]})" if found else report


def row(situation: Situation) -> str:
    kind = "right" if situation.right else "refused"
    todo = " (not yet so)" if situation.todo else ""
    cells = (situation.what, link(situation.report), f"**{kind}**: {situation.right or situation.refused}{todo}")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page() -> str:
    groups = dict.fromkeys(situation.group for situation in SITUATIONS)
    parts = [HEAD]
    for group in groups:
        rows = "\n".join(row(situation) for situation in SITUATIONS if situation.group == group)
        parts.append(
            f"## {group[0].upper()}{group[1:]}\n| situation | public report | what we do |\n|---|---|---|\n{rows}\n"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
