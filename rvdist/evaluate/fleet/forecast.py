"""The forecast: how long the rest of the work takes, from the lengths and the speed that were seen so far.

A slice costs a·(prompt tokens) + b·(tokens made) + c·(steps), since a step takes its time however few are answered in
it. The costs are fitted to what engines tell. Unanswered requests count as long as the answered ones of their task.
Where little is known they are taken to be long: what is left then falls sooner than was said, and does not grow. It is
told what happens and when, and decides nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from rvdist.evaluate.fleet.schedule import CHARACTERS_PER_TOKEN, Part, Slice
from rvdist.evaluate.request import Answered, Completion, Progress, Request

Floats = NDArray[np.float64]

_KINDS = 3  # of cost: prompt tokens, tokens made, steps
_MUCH = 1.5  # times as long as was said: it is said
_FEW = 4  # answers of a task tell too little of its lengths, unless there are no more
_REPORTS = 8  # fewer tell too little of the costs, unless they are of whole slices
_RIDGE = np.array([1e-3, 3e-3, 1e-3])  # what cannot be told apart is put down to steps rather than to tokens


@dataclass
class _Size:
    """Of some requests: how many, in how many slices, their characters, the most tokens that they may be answered
    with, and the longest of each slice."""

    slices: int = 0
    requests: int = 0
    characters: int = 0
    tokens: int = 0
    longest: int = 0

    def add(self, other: _Size, sign: int = 1) -> None:
        self.slices += sign * other.slices
        self.requests += sign * other.requests
        self.characters += sign * other.characters
        self.tokens += sign * other.tokens
        self.longest += sign * other.longest


@dataclass
class _Work:
    """A slice at which an engine works, and what it has told."""

    size: _Size
    begun: float
    heard: float | None = None
    progress: Progress = field(default_factory=Progress)
    seconds: float = 0.0  # between the first and the last that was heard
    costs: Floats = field(default_factory=lambda: np.zeros(_KINDS))  # what was done meanwhile


@dataclass
class _Task:
    """What is known of a task's lengths: of its slices that are finished so many tokens and steps, and the `works` of
    those that are being answered."""

    waiting: _Size = field(default_factory=_Size)
    finished: _Size = field(default_factory=_Size)
    works: dict[Slice, _Work] = field(default_factory=dict)
    prompt_tokens: int = 0
    tokens: int = 0
    steps: int = 0

    def known(self) -> tuple[_Size, int, int, int]:
        """Of the slices that told anything: their size, their prompt tokens, requests that are answered, and the tokens
        made."""
        size, prompts, answered, tokens = _Size(), self.prompt_tokens, self.finished.requests, self.tokens
        size.add(self.finished)
        for work in self.works.values():
            if work.progress.prompt_tokens:
                size.add(work.size)
                prompts += work.progress.prompt_tokens
                answered += min(work.progress.requests, work.size.requests)
                tokens += work.progress.tokens
        return size, prompts, answered, tokens


class Forecast:
    """Of these slices of `requests`."""

    def __init__(self, slices: Iterable[Slice], requests: Mapping[str, Sequence[Request]]) -> None:
        self._sizes: dict[tuple[Part, ...], _Size] = {}
        self._tasks: dict[str, _Task] = defaultdict(_Task)
        self._squares, self._products = np.zeros((_KINDS, _KINDS)), np.zeros(_KINDS)  # of the least squares
        self._costs, self._seconds, self._heard = np.zeros(_KINDS), 0.0, 0
        self._said: float | None = None
        self._held, self._answering = 0.0, 0.0  # by finished slices: with their swaps and on the way, and without
        for piece in slices:
            if piece.parts not in self._sizes:
                self._sizes[piece.parts] = _size(piece.take(requests))
            self._tasks[piece.kind].waiting.add(self._sizes[piece.parts])

    def begin(self, piece: Slice, now: float) -> None:
        """An engine works at a slice."""
        task, size = self._tasks[piece.kind], self._sizes[piece.parts]
        task.waiting.add(size, -1)
        task.works[piece] = _Work(size, now)

    def drop(self, piece: Slice) -> None:
        """The engine is gone."""
        task = self._tasks[piece.kind]
        task.waiting.add(task.works.pop(piece).size)

    def refuse(self, piece: Slice, waiting: Iterable[Slice]) -> None:
        """A slice has no answers, and those that wait at its point are not asked."""
        del self._tasks[piece.kind].works[piece]
        for other in waiting:
            self._tasks[other.kind].waiting.add(self._sizes[other.parts], -1)

    def hear(self, piece: Slice, progress: Progress, now: float) -> None:
        """How far a slice is."""
        work = self._tasks[piece.kind].works[piece]
        done = _costs(progress) - _costs(work.progress)
        if not done.any():
            return
        if work.heard is not None:
            self._learn(done, now - work.heard)
            work.seconds += now - work.heard
            work.costs += done
        work.heard, work.progress = now, progress

    def finish(self, piece: Slice, answered: Answered, now: float) -> None:
        """A slice is answered."""
        task = self._tasks[piece.kind]
        work = task.works.pop(piece)
        progress = work.progress
        if work.heard is None:
            prompts = sum(one.prompt_tokens for one in answered.answers if isinstance(one, Completion))
            prompts = prompts or work.size.characters // CHARACTERS_PER_TOKEN
            made = sum(one.tokens for one in answered.answers if isinstance(one, Completion))
            progress = Progress(work.size.requests, prompts, prompts, made or work.size.requests, 0)
        self._learn(_costs(progress) - work.costs, max(0.0, answered.seconds - work.seconds))
        self._held += now - work.begun
        self._answering += answered.seconds
        task.finished.add(work.size)
        task.prompt_tokens += progress.prompt_tokens
        task.tokens += progress.tokens
        task.steps += progress.steps

    def seconds_left(self, now: float, engines: int) -> float | None:
        """What is still to be done, shared by so many engines; None where nothing is known yet. It stays as it was said
        rather than grow a little, since that is noise or a slice's last and slowest answers."""
        estimate = self._estimate(now, engines)
        if estimate is None:
            return None
        if self._said is not None and self._said < estimate < _MUCH * self._said:
            estimate = self._said
        self._said = estimate
        return estimate

    def _estimate(self, now: float, engines: int) -> float | None:
        price = self._price()
        if price is None or not engines:
            return None
        waiting, slices = 0.0, 0
        running = []
        for task in self._tasks.values():
            if not (task.waiting.slices or task.works):
                continue
            length = self._length(task)
            if length is None:
                return None
            slices += task.waiting.slices
            per_character = self._tokens_per_character(task)
            left = [_remaining(task, work, length, per_character) for work in task.works.values()]
            steps = _steps(task, [steps for _, steps in left])
            costs = np.array(
                [
                    task.waiting.characters * per_character,
                    min(task.waiting.requests * length, task.waiting.tokens),
                    task.waiting.slices * steps,
                ]
            )
            waiting += float(price @ costs)
            for work, (costs, _) in zip(task.works.values(), left, strict=True):
                since = 0.0 if work.heard is None else now - work.heard
                running.append(max(0.0, float(price @ costs) - since))
        shared = (waiting + sum(running)) / max(1, min(engines, slices + len(running)))
        return max([shared, *running])

    def _length(self, task: _Task) -> float | None:
        """The mean number of tokens of an answer: those made, for each that is finished; in a task of which none is,
        the share of what it may be that other tasks have."""
        size, _, answered, tokens = task.known()
        if answered >= min(_FEW, size.requests) > 0:
            return tokens / answered
        most = made = 0.0
        for other in self._tasks.values():
            size, _, answered, tokens = other.known()
            if answered >= min(_FEW, size.requests) > 0:
                most += size.tokens / size.requests * answered
                made += tokens
        sizes = [task.waiting, *(work.size for work in task.works.values())]
        mean = sum(one.tokens for one in sizes) / sum(one.requests for one in sizes)
        if mean == 1:
            return 1.0
        return mean * min(1.0, made / most) if most else None

    def _tokens_per_character(self, task: _Task) -> float:
        for tasks in ([task], self._tasks.values()):
            seen = [one.known() for one in tasks]
            if characters := sum(size.characters for size, *_ in seen):
                return sum(prompts for _, prompts, *_ in seen) / characters
        return 1 / CHARACTERS_PER_TOKEN

    def _learn(self, costs: Floats, seconds: float) -> None:
        self._squares += np.outer(costs, costs)
        self._products += costs * seconds
        self._costs += costs
        self._heard += 1
        self._seconds += seconds

    def _price(self) -> Floats | None:
        """Seconds for each kind of cost, none below 0: least squares, exact for all together, with what swaps and the
        way to engines took of finished slices."""
        scale = np.sqrt(np.diag(self._squares))
        present = [kind for kind in range(_KINDS) if scale[kind] > 0]
        if not present or not self._seconds or (self._heard < _REPORTS and not self._answering):
            return None
        scale[scale == 0] = 1.0
        squares = self._squares / np.outer(scale, scale)
        products = self._products / scale / np.linalg.norm(self._products / scale)
        best, least = np.zeros(_KINDS), math.inf
        for size in range(1, len(present) + 1):
            for chosen in map(list, combinations(present, size)):
                ridged = squares[np.ix_(chosen, chosen)] + np.diag(_RIDGE[chosen])
                prices = np.linalg.solve(ridged, products[chosen])
                loss = float(prices @ ridged @ prices - 2 * products[chosen] @ prices)
                if (prices >= 0).all() and loss < least:
                    best, least = np.zeros(_KINDS), loss
                    best[chosen] = prices
        price: Floats = best / scale
        together = float(price @ self._costs)
        overhead = max(1.0, self._held / self._answering) if self._answering else 1.0
        return price * self._seconds / together * overhead if together else None


def _costs(progress: Progress) -> Floats:
    return np.array([progress.read, progress.tokens, progress.steps], float)


def _size(requests: Sequence[Request]) -> _Size:
    most = [request.max_tokens for request in requests]
    return _Size(1, len(requests), sum(len(request.text) for request in requests), sum(most), max(most))


def _remaining(task: _Task, work: _Work, length: float, per_character: float) -> tuple[Floats, float]:
    """What a slice that is being answered still costs, and how many steps it takes in all."""
    progress, size = work.progress, work.size
    prompts = (progress.prompt_tokens or size.characters * per_character) - progress.read
    made = min(size.requests * length, size.tokens) - progress.tokens
    if task.finished.slices:
        steps = task.steps / task.finished.slices - progress.steps
    else:
        unanswered = 1 - min(progress.requests, size.requests) / size.requests
        steps = (size.longest - progress.steps) * math.sqrt(unanswered)
    costs = np.maximum([prompts, made, steps], 0.0)
    return costs, progress.steps + float(costs[2])


def _steps(task: _Task, running: Sequence[float]) -> float:
    """How many steps a waiting slice of a task takes, given those of each that is `running`."""
    if task.finished.slices:
        return task.steps / task.finished.slices
    heard = [steps for work, steps in zip(task.works.values(), running, strict=True) if work.heard is not None]
    return max(heard) if heard else task.waiting.longest / max(1, task.waiting.slices)
