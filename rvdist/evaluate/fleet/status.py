"""What a fleet tells of itself: what its engines did, and how far they are now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rvdist.core.point import WeightPoint


@dataclass
class FleetStats:
    """What the engines did in one call of `answer`, summed over them; seconds. `lifetimes` count from when each was
    up."""

    swap: float = 0.0
    generate: float = 0.0
    lifetimes: float = 0.0
    swaps: int = 0
    requests: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cpu_seconds: float = 0.0
    bytes_read: int = 0
    deaths: int = 0
    by_engine: dict[int, int] = field(default_factory=dict)  # requests

    @property
    def utilisation(self) -> float:
        """The share of the engines' time in which they swapped or answered."""
        return (self.swap + self.generate) / self.lifetimes if self.lifetimes else 0.0


@dataclass(frozen=True)
class EngineStatus:
    """One engine now: whether it is up, what point it works at, its requests a second, and the slices that wait at
    this point."""

    number: int
    up: bool
    point: WeightPoint | None
    rate: float
    left: int


@dataclass(frozen=True)
class Status:
    """The fleet now: what is done of this call's work, that within slices included, and how long the rest should take
    (None: unknown). `prompt_tokens` are those read, `tokens` those made or scored. What is `in_flight`, requests of
    slices that are not finished, would be asked again if all ended now; `finished` are those of slices that are.
    `failures` has a sentence for each engine that failed."""

    engines: tuple[EngineStatus, ...]
    requests: int
    tokens: int
    seconds_left: float | None
    prompt_tokens: int = 0
    in_flight: int = 0
    finished: int = 0
    failures: Sequence[str] = ()
