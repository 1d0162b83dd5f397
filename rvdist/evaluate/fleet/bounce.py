"""Bounce buffers: the host memory by which elements that are read come to a card.

There are two, page-locked and used in turn: while one is copied the other is filled, and none is filled before it has
been copied. Knows nothing of points and of vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

BYTES = 32 << 20  # of each: some thirty reads of a reader's, and a copy of about a millisecond


class Event(Protocol):
    """torch.cuda.Event: of one that was never recorded, nothing is to be waited for."""

    def record(self) -> None:
        """Stands after all that was started on the current stream so far."""

    def synchronize(self) -> None:
        """Returns when that is done."""


class _Done:
    """Of copies that are done when they return."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


class BounceBuffers:
    """Two buffers of `nbytes`, made when they are first used; with `on_card=False` of ordinary memory. `event` makes
    what says when a copy is done. One thread at a time."""

    def __init__(self, on_card: bool = True, nbytes: int = BYTES, event: Callable[[], Event] | None = None) -> None:
        made = event or (torch.cuda.Event if on_card else _Done)
        self._on_card, self._nbytes = on_card, nbytes
        self._memory = [torch.empty(0, dtype=torch.uint8) for _ in range(2)]
        self._copied: list[Event] = [made() for _ in range(2)]
        self._turn = 0

    def copy(self, fill: Callable[[int, torch.Tensor], None], target: torch.Tensor, row: int = 1) -> None:
        """Starts to copy into `target`, 1-d, what `fill` writes from an element on into host memory, whole rows of
        `row` elements at a time. A row that is longer than a buffer makes it longer."""
        step = max(row, self._nbytes // target.itemsize // row * row)
        for start in range(0, target.numel(), step):
            part = target[start : start + step]
            self._turn = 1 - self._turn
            self._copied[self._turn].synchronize()
            buffer = self._buffer(part.nbytes).view(part.dtype)
            fill(start, buffer)
            part.copy_(buffer, non_blocking=True)
            self._copied[self._turn].record()

    def wait(self) -> None:
        """Returns when all is copied."""
        for copied in self._copied:
            copied.synchronize()

    def _buffer(self, nbytes: int) -> torch.Tensor:
        if self._memory[self._turn].numel() < nbytes:
            size = max(nbytes, self._nbytes)
            self._memory[self._turn] = torch.empty(size, dtype=torch.uint8, pin_memory=self._on_card)
        return self._memory[self._turn][:nbytes]


class Straight(BounceBuffers):
    """In their place where a reader writes to the card itself."""

    def __init__(self) -> None:
        super().__init__(on_card=False)

    def copy(self, fill: Callable[[int, torch.Tensor], None], target: torch.Tensor, row: int = 1) -> None:
        fill(0, target)
