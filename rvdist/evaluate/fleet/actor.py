"""An engine as a Ray actor: a slice in, its answers out, and how far it is meanwhile. Imports no Ray itself."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence

from rvdist.core.errors import BadInput
from rvdist.evaluate.fleet.arguments import EngineSettings
from rvdist.evaluate.fleet.engine import Engine
from rvdist.evaluate.fleet.schedule import Slice
from rvdist.evaluate.request import Answered, Progress, Refused, Request, Unscorable


class EngineActor(Engine):
    """An engine as a Ray actor answers a whole slice in one call. Any class of these methods can be in its place; one
    that does not tell how far it is returns what this one yields last."""

    def __init__(self, base: str, settings: EngineSettings) -> None:
        # Ray sets it to num_cpus. A runtime environment would too, but takes a process and two seconds more
        os.environ["OMP_NUM_THREADS"] = str(settings.cpu_threads)
        super().__init__(base, settings)

    def answer(
        self, piece: Slice, requests: Sequence[Request]
    ) -> Iterator[Progress | tuple[Answered | Refused, float]]:
        """How far it is, now and then; last the answers, or why there are none at this point, and the seconds that the
        swap took (0: none was needed). Raises BadInput for a prompt that does not fit."""
        begin, truncated, moved = time.perf_counter(), self.truncated, not self.is_at(piece.point)
        swapped = begin
        try:
            self.swap(piece.point)
            swapped = time.perf_counter()
            answers = yield from self.answering(requests)
        except Unscorable as error:
            yield Refused(str(error)), (swapped - begin) * moved
            return
        except ValueError as error:
            raise BadInput(str(error)) from None
        cut, seconds = self.truncated - truncated, time.perf_counter() - swapped
        yield Answered(tuple(answers), cut, seconds, tuple(self.spoiled)), (swapped - begin) * moved
