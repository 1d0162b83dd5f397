"""The tables of benchmarks/README.md, each between two comments that name what wrote it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_README = Path(__file__).with_name("README.md")


def write_table(name: str, lines: Sequence[str]) -> None:
    """Puts `lines` in the place of what stands between `<!-- name -->` and `<!-- /name -->`; ValueError where there is
    no such place."""
    text = _README.read_text(encoding="utf-8")
    before, begin, rest = text.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not (begin and end):
        raise ValueError(f"{_README}: there is no place for {name}")
    _README.write_text("".join([before, begin, *(f"{line}\n" for line in lines), end, after]), encoding="utf-8")
