"""What engines fail of: what is said of it, and when no other engine is tried. Decides alone; knows no Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rvdist.core.errors import BadInput, Failed
from rvdist.evaluate.fleet.schedule import LETHAL, Slice
from rvdist.evaluate.request import Unusable

_SHOWN = 4  # slices in a sentence


class Failures:
    """The failures of one call of `Fleet.answer`, in the order they came. `told` has a sentence for each."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self._last: dict[Slice, str] = {}
        self._unusable: Counter[str] = Counter()

    def add(self, engine: int, reason: str, *pieces: Slice) -> None:
        """The engine of this number has failed; at work on one of `pieces`, or before it could be given any."""
        self._last |= dict.fromkeys(pieces, reason)
        at = f" at {' or '.join(piece.name for piece in pieces)}" if pieces else " as it started"
        self.told.append(f"engine {engine} failed{at}: {reason}")

    def require_usable(self, reason: str) -> None:
        """An engine says that it, and another like it, cannot serve. Raises Failed where it is not the first: what two
        of them say is true of all."""
        self._unusable[reason] += 1
        if self._unusable.total() > 1:
            raise Failed(reason)

    def explain_slices(self, lethal: Sequence[Slice]) -> Failed:
        """Why these slices are not answered."""
        some = ", ".join(piece.name for piece in lethal[:_SHOWN])
        more = f" and {len(lethal) - _SHOWN} more" if len(lethal) > _SHOWN else ""
        first = lethal[0].parts[0]
        return Failed(
            f"{LETHAL} engines failed on each of these slices of requests: {some}{more}; the last of "
            f"{first.task} {first.begin}: {self._last[lethal[0]]}; everything else is answered and need not "
            "be again; mend the cause, or lower engine.slice_size"
        )


class Starts:
    """Whether seats whose engines do not start are tried again: after each of `pauses` (seconds) once more, and for a
    reason that another engine would have too not at all."""

    def __init__(self, pauses: Sequence[float]) -> None:
        self._pauses = pauses
        self._failed: Counter[int] = Counter()  # by seat, in a row
        self._final: list[Exception] = []
        self.empty: dict[int, str] = {}  # seats that are not tried again, and why

    def succeed(self, seat: int) -> None:
        """An engine came up in the seat."""
        self._failed.pop(seat, None)

    def fail(self, seat: int, reason: str, cause: BaseException | None, started: int) -> float | None:
        """The pause before the seat is tried again, None where it stays empty. Raises what ends the run where the
        `cause` is everybody's: a second engine names one too, and none of the `started` shows that it can be done."""
        self._failed[seat] += 1
        final = isinstance(cause, BadInput | Unusable)
        if not final and self._failed[seat] <= len(self._pauses):
            return self._pauses[self._failed[seat] - 1]
        self.empty[seat] = reason
        if final:
            self._final.append(cause if isinstance(cause, BadInput) else Failed(reason))
            if len(self._final) > 1 and not started:
                raise self._final[0]
        return None

    def explain(self) -> Exception:
        """Why there is no engine at all."""
        if self._final:
            return self._final[0]
        why = next(iter(self.empty.values()))
        return Failed(f"no engine could start: {why}; mend the cause, and the same command goes on from there")
