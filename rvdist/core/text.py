"""Makes what strangers wrote fit to be shown: on a terminal, in a picture, in a spreadsheet."""

from __future__ import annotations

import re

LONGEST = 4000  # characters of what is shown in one line
_PART = r"\w([\w.-]{0,94}\w)?"
_REPOSITORY = re.compile(rf"(?![^@]*(--|\.\.|\.git(@|$))){_PART}/{_PART}(@\w[\w.-]*(/\w[\w.-]*)*)?", re.ASCII)


def cut(text: str, most: int = LONGEST) -> str:
    """`text` without its middle where it is longer than `most` characters."""
    if len(text) <= most:
        return text
    return f"{text[: most - most // 4]} … {text[-(most // 4) :]}"


def printable(text: str, most: int = LONGEST) -> str:
    """One line without control or bidirectional formatting characters, and not endless, for terminals and pictures."""
    text = cut(text, most)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c.isspace() else "�" for c in text)


def is_url(text: str) -> bool:
    """Whether it is one, such as s3://bucket/name: no path, though Path would make one of it."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def is_repository(text: str) -> bool:
    """Whether it may be the name of a Hub repository: `org/name`, perhaps with `@revision`, by the Hub's own rules."""
    return _REPOSITORY.fullmatch(text) is not None


def reason(error: object, most: int = 200) -> str:
    """What an error says, on one line of at most so many characters; where it says nothing, its type."""
    return printable(" ".join(str(error).split()))[:most] or type(error).__name__


_PROGRAM = re.compile(r"\s*(=|[-+@].*[()!|'\"&=])")  # a name such as +Vector is none


def cell(value: object) -> object:
    """A value for a CSV: of text one line, which no spreadsheet takes for a formula that does anything."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if _PROGRAM.match(text) else text
