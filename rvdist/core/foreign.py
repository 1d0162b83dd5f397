"""What strangers wrote, parsed within bounds: of memory, of depth, and of what a value may be.

Whoever reads a file takes no more of it than it may have (core.regular), and says which file it was.
"""

from __future__ import annotations

import json
import re
from typing import Any

from rvdist.core.text import reason

_DEAREST = 400 << 20  # bytes that what is parsed may take
_DEEPEST = 64  # levels
_TOO_DEEP = f"it nests more than {_DEEPEST} levels"
_WIDE, _CONTINUED = re.compile(rb"[\xf0-\xff]"), bytes(range(0x80, 0xC0))  # bytes of UTF-8
_WIDE_ESCAPED = re.compile(rb"\\u[dD][89abAB]")  # half of a character
_SHORT = 64 << 10  # bytes of which little can be made
_LONGEST_YAML, _MOST_YAML = 256 << 10, 100_000  # bytes; values, once aliases are followed


def parse_json(content: bytes) -> Any:
    """What JSON in UTF-8 says. Raises ValueError, before much memory is taken, also for what could not be written
    again: values nested too deep, and halves of surrogates."""
    require_light(content)
    try:
        value = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if _depth(value) > _DEEPEST:
        raise ValueError(_TOO_DEEP)
    if b"\\ud" in content or b"\\uD" in content:
        json.dumps(value, ensure_ascii=False).encode()  # raises for half a surrogate
    return value


def parse_line(line: bytes) -> Any:
    """What a line of JSON Lines says, of which there may be very many. Raises ValueError."""
    if len(line) > _SHORT:
        return parse_json(line)
    try:
        return json.loads(line.decode("utf-8"))
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def require_light(content: bytes) -> None:
    """Raises ValueError for JSON that takes much memory, once parsed."""
    width = 1 if content.isascii() else 4 if _WIDE.search(content) else 2  # bytes of a character, at most
    escaped = 1 if b"\\u" not in content else 4 if _WIDE_ESCAPED.search(content) else 2
    text = (width + max(width, escaped)) * len(content.translate(None, _CONTINUED))  # whole, and in its values
    values = 60 * content.count(b",") + 80 * content.count(b"[") + 250 * content.count(b"{")
    if len(content) + text + values > _DEAREST:
        raise ValueError("reading it would take too much memory")


def parse_yaml(content: bytes) -> Any:
    """What YAML in UTF-8 says. Raises ValueError, in one line, also where aliases make much of little."""
    import yaml

    if len(content) > _LONGEST_YAML:
        raise ValueError(f"it has {len(content):,} bytes, and at most {_LONGEST_YAML:,} are read")
    try:
        text = content.decode("utf-8-sig")
        _require_small(text)
        return yaml.safe_load(text)
    except Exception as error:  # PyYAML raises what it likes for a value that is none of its tag
        raise ValueError(reason(error, 500)) from None


def _require_small(text: str) -> None:
    """Raises ValueError where it nests too deep, or stands for too many values."""
    import yaml

    sizes: dict[str, int] = {}  # of what has an anchor
    open_: list[tuple[str | None, int]] = []  # collections: their anchors, and the values before them
    count = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError("it has an alias for what it stands in, or for nothing")
            count += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, count))
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor is not None:
                sizes[anchor] = count - before
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            event.value.encode()  # raises for half a surrogate
            if event.anchor is not None:
                sizes[event.anchor] = 1
        if count > _MOST_YAML:
            raise ValueError(f"it stands for more than {_MOST_YAML:,} values")
        if len(open_) > _DEEPEST:
            raise ValueError(_TOO_DEEP)


def _depth(value: Any) -> int:
    """How many objects and lists are in each other, counted without recursion; no further than matters."""
    depth, level = 0, [value] if isinstance(value, dict | list) else []
    while level and depth <= _DEEPEST:
        depth += 1
        inner = [part for outer in level for part in (outer.values() if isinstance(outer, dict) else outer)]
        level = [part for part in inner if isinstance(part, dict | list)]
    return depth
