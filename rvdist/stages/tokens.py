"""What engines are started on where a point has other tokens than its base: the base with these, as a checkpoint in the
cache, which is written once. There engines have as many rows as the point, and are swapped to it as to any other.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rvdist.core.cluster import blind_nodes
from rvdist.core.errors import BadInput
from rvdist.core.point import WeightPoint
from rvdist.merge.plan import build_plan
from rvdist.stages.job import Prepared
from rvdist.stages.merge import are_merged_alone, merge_together
from rvdist.stages.warm import Warm
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.journal import is_complete
from rvdist.weights.checkpoint.source import open_source

_CARD = "The base of a merge by token, with the tokens of the merge: what engines start on. It may be deleted.\n"


class Bases:
    """The checkpoints that engines are started on."""

    def __init__(self, warm: Warm) -> None:
        self._warm = warm
        self._written: list[tuple[Checkpoint, Checkpoint]] = []  # those with other tokens, as they are read and written

    def of(self, prepared: Prepared, point: WeightPoint) -> Checkpoint:
        """That of `point`. Raises BadInput where not every node sees it, and what a merge raises."""
        base = prepared.sources[point.base]
        if point.vocabulary is None:
            return base
        for read, written in self._written:
            if read is base:
                return written
        self._written.append((base, _write(prepared, point, self._warm)))
        return self._written[-1][1]


def _write(prepared: Prepared, point: WeightPoint, warm: Warm) -> Checkpoint:
    unchanged = WeightPoint(point.base, vocabulary=point.vocabulary)
    settings = replace(prepared.settings, dtype=None, max_shard_size=None, overwrite=False)
    plan = build_plan({Path(): unchanged}, prepared.sources, settings.output_format)
    directory = (prepared.cache / "tokens" / plan.digests[0][0]).absolute()
    nodes = warm.resources().nodes  # while Ray is imported, it cannot be asked anything
    if not is_complete(directory, plan.digests[0][0]):
        one = replace(prepared, settings=settings, written={directory: unchanged})
        merge_together([one], {unchanged: _CARD}, warm, are_merged_alone([one]))
    if len(nodes) > 1 and (blind := blind_nodes(directory / "config.json")):
        raise BadInput(
            f"{directory}: engines start on it, and {', '.join(blind)} does not see it; set cache.dir to a directory "
            "that all nodes share"
        )
    return open_source(str(directory))
