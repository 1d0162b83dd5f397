"""The roster of a merge: which node owns which file, which unit comes next, and what a death frees. Only decides.

A node owns the files it began, since pages that two nodes write in part would be lost on a network file system.
It takes the largest file that is left whenever it has nothing to do, so that a slow node takes fewer. Knows no Ray.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from rvdist.merge.plan import OutputFile, Plan, Unit

ATTEMPTS = 3  # of a unit whose worker died
Need: TypeAlias = tuple[str, str]  # a file of a source: (source, name)


@dataclass(frozen=True)
class Unreadable:
    """Why no node can write an output file: a source file that none of them can read (`together` is false), or that
    none can read together with all else that `file` is made of."""

    need: Need
    file: str
    together: bool


class Roster:
    """The units of `plan`, and who has them. Nodes are known by their ids."""

    def __init__(self, plan: Plan) -> None:
        self.needs: list[Need] = sorted({need for file in plan.files for need in file.needs})
        self._files = [file for file in plan.files if file.units]  # that no node has taken yet, largest first
        self._needed_by = {(u.output, u.file): frozenset(file.needs) for file in plan.files for u in file.units}
        self._queues: dict[str, deque[Unit]] = {}  # of each node, units of the files it has taken
        self._blind: dict[str, frozenset[Need]] = {}  # of each node that ever had a worker, what it cannot read
        # Of workers over a unit (output, file, start); 0 where one died that may have been at another
        self._deaths: Counter[tuple[int, str, int]] = Counter()

    @property
    def is_left(self) -> bool:
        """Whether there are units that nobody was given."""
        return bool(self._files) or any(self._queues.values())

    @property
    def has_met_a_node(self) -> bool:
        """Whether any worker has said what it can read."""
        return bool(self._blind)

    def meet(self, node: str, unreadable: frozenset[Need]) -> None:
        """A worker of `node` has spoken: it cannot read these."""
        self._blind[node] = unreadable
        self._queues.setdefault(node, deque())

    def unreadable(self) -> Unreadable | None:
        """A file that is left and that no node met so far can write, and why; None where there is none."""
        for file in self._files:
            blind = [unreadable & file.needs.keys() for unreadable in self._blind.values()]
            if all(blind):
                everywhere = set.intersection(*map(set, blind))
                return Unreadable(min(everywhere or blind[0]), file.units[0].file, together=not everywhere)
        return None

    def missing(self, unreadable: frozenset[Need]) -> Need | None:
        """What a worker that cannot read these lacks of the largest file that nobody owns."""
        return min(unreadable & self._files[0].needs.keys(), default=None) if self._files else None

    def take(
        self, node: str, unreadable: frozenset[Need], others: Mapping[str, frozenset[Need]], idle: bool = True
    ) -> Unit | None:
        """The next unit of a worker on `node` that cannot read these; None where there is nothing for it, or nothing
        unless it is `idle`. `others` are the other nodes that have workers, and what they cannot read."""
        queue = self._queues[node]
        if not queue and (file := self._own(unreadable, others)):
            queue.extend(file.units)
        return queue.popleft() if queue and (idle or not self.is_suspect(queue[0])) else None

    def is_suspect(self, unit: Unit) -> bool:
        """Whether a worker died that may have been at this: the next is given it alone, so that it is known."""
        return _place(unit) in self._deaths

    def _own(self, unreadable: frozenset[Need], others: Mapping[str, frozenset[Need]]) -> OutputFile | None:
        """The largest file left of which everything can be read; of those, one that fewest other nodes can read."""
        readable = [file for file in self._files if not unreadable & file.needs.keys()]
        if not readable:
            return None
        file = min(readable, key=lambda f: sum(not blind & f.needs.keys() for blind in others.values()))
        self._files.remove(file)
        return file

    def count_deaths(self, units: Iterable[Unit], known: bool = True) -> Unit | None:
        """A worker died while it was at these, or, where that is not `known`, at some of them; returns one of them over
        which workers died again and again."""
        for unit in units:
            self._deaths[_place(unit)] += known
            if self._deaths[_place(unit)] == ATTEMPTS:
                return unit
        return None

    def give_back(self, node: str, units: Sequence[Unit]) -> None:
        """A worker of `node` will not do these; they come first, so that what killed it is soon known to, or not."""
        self._queues[node].extendleft(reversed(units))

    def orphans(self, here: Collection[str | None]) -> list[str]:
        """Nodes that own units and are not `here`."""
        return [node for node, queue in self._queues.items() if queue and node not in here]

    def free(self, node: str) -> None:
        """What is left of the node's files is free for other nodes."""
        by_file: dict[tuple[int, str], list[Unit]] = {}
        for unit in self._queues[node]:
            by_file.setdefault((unit.output, unit.file), []).append(unit)
        self._queues[node].clear()
        for key, units in by_file.items():
            self._files.append(OutputFile(tuple(units), dict.fromkeys(self._needed_by[key], 0), 0))


def _place(unit: Unit) -> tuple[int, str, int]:
    return unit.output, unit.file, unit.start
