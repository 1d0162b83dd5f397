"""Lanes: where the operands of a chunk wait in host memory, are combined, and become results in host memory.

On the CPU there is one, which combines in place and at once. On a card there are two: while the chunk of one is copied
in, combined and copied out, the CPU reads the next chunk into the other. Knows nothing of files and weight points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from rvdist.core.errors import BadInput
from rvdist.weights.arithmetic.method import Count, Scratch

CHUNK = 256 * 1024  # elements on the CPU: little enough for a core's cache, enough that Python's share is small
CARD_CHUNK = 4 << 20  # elements on a card, at most: some ten launches and a wait are little beside copying them
PINNED = 256 << 20  # bytes of page-locked host memory in all lanes of a card, at most
WIDEST = 8  # bytes of an element, at most

Compute = Callable[[Mapping[str, torch.Tensor], list[torch.Tensor], Scratch], list[Count]]


class Lane(Protocol):
    """Holds one chunk at a time: fill `buffer`s, `launch`, `wait`; then the next. `chunk`: its elements, at most."""

    chunk: int

    def buffer(self, key: str) -> torch.Tensor:
        """Host memory for one operand or result: 1-d uint8, the same at every call."""

    def launch(
        self,
        operands: Mapping[str, torch.Tensor],
        results: int,
        numel: int,
        dtype: torch.dtype,
        compute: Compute,
        into: Sequence[torch.Tensor] = (),
    ) -> None:
        """Starts `compute`: it is given the operands on the device, as many results of `numel` elements of `dtype` to
        fill, and says how many elements of each are not finite. An operand that is not in a `buffer` of this lane is
        no longer needed when this returns. Results go `into` memory of the device, where that is given."""

    def wait(self) -> tuple[list[torch.Tensor], list[int]]:
        """The results, in host memory, which `launch` fills anew, or where they went, and how many elements of each are
        not finite."""


def open_lanes(device: str, buffers: int) -> list[Lane]:
    """The lanes of `cpu` or `cuda`, for so many operands and results of a chunk. Raises BadInput without a card."""
    if device == "cpu":
        return [HostLane()]
    if not torch.cuda.is_available():
        raise BadInput("device=cuda: torch finds no CUDA device here; install a CUDA build of it, or set device=cpu")
    card = Card(card_chunk(buffers))
    return [CardLane(card), CardLane(card)]


def card_chunk(buffers: int) -> int:
    """Elements of a chunk on a card: a power of two, since torch rounds page-locked memory up to one."""
    return min(CARD_CHUNK, 1 << (PINNED // (2 * buffers * WIDEST)).bit_length() - 1)


class HostLane:
    """Computes where the operands were read to, before `launch` returns."""

    def __init__(self, chunk: int = CHUNK) -> None:
        self.chunk = chunk
        self._buffers: dict[str, torch.Tensor] = {}
        self._scratch = Scratch(chunk)
        self._done: tuple[list[torch.Tensor], list[int]] = ([], [])

    def buffer(self, key: str) -> torch.Tensor:
        if key not in self._buffers:
            self._buffers[key] = torch.empty(self.chunk * WIDEST, dtype=torch.uint8)
        return self._buffers[key]

    def launch(
        self,
        operands: Mapping[str, torch.Tensor],
        results: int,
        numel: int,
        dtype: torch.dtype,
        compute: Compute,
        into: Sequence[torch.Tensor] = (),
    ) -> None:
        outs = list(into) or [part(self.buffer(f"out {k}"), numel, dtype) for k in range(results)]
        self._done = outs, [int(count) for count in compute(operands, outs, self._scratch)]

    def wait(self) -> tuple[list[torch.Tensor], list[int]]:
        return self._done


class Card:
    """The three streams of a card, which its lanes share: copies in, arithmetic and copies out are each done in order,
    and all three at once."""

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk
        self.inbound = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.compute = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.outbound = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.scratch = Scratch(chunk, "cuda")  # one for all lanes: `compute` does one chunk after the other


class CardLane:
    """Computes on a card. `wait` returns after everything that `launch` started, so a lane that is filled again has
    nothing on its way, and events only have to order its three steps."""

    def __init__(self, card: Card) -> None:
        self.chunk = card.chunk
        self._streams = card
        self._host: dict[str, torch.Tensor] = {}
        self._card: dict[str, torch.Tensor] = {}
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._combined = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._left = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # waiting leaves the core free
        self._results: list[torch.Tensor] = []
        self._counts = torch.empty(0, dtype=torch.int64)

    def buffer(self, key: str) -> torch.Tensor:
        return self._pinned_memory(key, self.chunk * WIDEST)

    def launch(
        self,
        operands: Mapping[str, torch.Tensor],
        results: int,
        numel: int,
        dtype: torch.dtype,
        compute: Compute,
        into: Sequence[torch.Tensor] = (),
    ) -> None:
        inbound, arithmetic, outbound = self._streams.inbound, self._streams.compute, self._streams.outbound
        if into:  # what was done with that memory before
            arithmetic.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(inbound):
            there = {key: self._copy_in(key, operand) for key, operand in operands.items()}
            outs = list(into) or [
                part(self._on_card(f"out {k}", self.chunk * WIDEST), numel, dtype) for k in range(results)
            ]
            counts = self._on_card(f"{results} counts", results * 8).view(torch.int64)
            self._arrived.record(inbound)
        with torch.cuda.stream(arithmetic):
            arithmetic.wait_event(self._arrived)
            for k, count in enumerate(compute(there, outs, self._streams.scratch)):
                counts[k] = count
            self._combined.record(arithmetic)
        with torch.cuda.stream(outbound):
            outbound.wait_event(self._combined)
            self._results = list(into) or [
                part(self.buffer(f"out {k}"), numel, dtype).copy_(out, non_blocking=True) for k, out in enumerate(outs)
            ]
            self._counts = self._pinned_memory(f"{results} counts", results * 8).view(torch.int64)
            self._counts.copy_(counts, non_blocking=True)
            self._left.record(outbound)

    def wait(self) -> tuple[list[torch.Tensor], list[int]]:
        self._left.synchronize()
        return self._results, self._counts.tolist()

    def _copy_in(self, key: str, operand: torch.Tensor) -> torch.Tensor:
        """Memory that is not page-locked is safe too: CUDA has taken its bytes when the call returns."""
        there = part(self._on_card(key, self.chunk * WIDEST), operand.numel(), operand.dtype)
        return there.copy_(operand, non_blocking=True)

    def _pinned_memory(self, key: str, nbytes: int) -> torch.Tensor:
        if key not in self._host:
            self._host[key] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        return self._host[key]

    def _on_card(self, key: str, nbytes: int) -> torch.Tensor:
        """Memory of the card. Called under the inbound stream, whose memory torch's allocator gives to no other: what
        the compute stream has let go of may still be in use when the inbound one writes."""
        if key not in self._card:
            self._card[key] = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        return self._card[key]


def part(buffer: torch.Tensor, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """The first `numel` elements of a buffer taken as `dtype`."""
    return buffer[: numel * dtype.itemsize].view(dtype)
