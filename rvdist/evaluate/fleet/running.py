"""A batch under way: how far it is, now and then, and at the end what came of it."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

from rvdist.evaluate.request import Progress

T = TypeVar("T")
Running = Generator[Progress, None, T]  # what comes meanwhile, and at the end


def next_of(running: Running[T]) -> Progress | T:
    """What comes next; at last the end."""
    try:
        return next(running)
    except StopIteration as end:
        result: T = end.value
        return result


def finish(running: Running[T]) -> T:
    """What comes at the end."""
    while isinstance(came := next_of(running), Progress):
        pass
    return came
