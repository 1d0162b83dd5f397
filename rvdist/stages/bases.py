"""What engines are started on. Where they cannot start on a point's base it is written as a checkpoint in the cache,
once: with the tokens of the point, in bfloat16 if it is quantised, as safetensors. From there they are swapped to the
point, which is read from its own sources, as to any other.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import xxhash

from rvdist.core.cluster import blind_nodes
from rvdist.core.errors import BadInput, Failed
from rvdist.core.point import WeightPoint
from rvdist.merge.plan import build_plan
from rvdist.stages.job import Prepared
from rvdist.stages.merge import are_merged_alone, merge_together
from rvdist.stages.warm import Warm
from rvdist.weights.checkpoint.beside import companions
from rvdist.weights.checkpoint.digest import file_digest
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.fp8 import Scaled, without_quantization
from rvdist.weights.checkpoint.journal import MANIFEST, is_complete
from rvdist.weights.checkpoint.remapped import Remapped
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.checkpoint.stacked import Stacked
from rvdist.weights.checkpoint.staging import Busy, is_being_written

_TICK = 0.5  # seconds between looks at what another run writes
_CARD = "The base of weight points, as a checkpoint that engines can start on. It may be deleted.\n"


class Bases:
    """The checkpoints that engines are started on."""

    def __init__(self, warm: Warm) -> None:
        self._warm = warm
        self._written: list[tuple[Checkpoint, Checkpoint]] = []  # as they are read and written

    def of(self, prepared: Prepared, point: WeightPoint) -> Checkpoint:
        """That of `point`, which is waited for where another run is writing it. Raises BadInput where not every node
        sees it, and what a merge raises."""
        base = prepared.sources[point.base]
        if point.vocabulary is None and (_is_startable(base) or prepared.settings.engine.replay is not None):
            return base
        for read, written in self._written:
            if read is base:
                return written
        self._written.append((base, _write(prepared, point, self._warm)))
        return self._written[-1][1]


def _is_startable(base: Checkpoint) -> bool:
    """Whether engines start on it as it is."""
    stored = all(name.endswith(".safetensors") for name in base.files)
    return stored and not isinstance(base, Scaled | Stacked)


def _write(prepared: Prepared, point: WeightPoint, warm: Warm) -> Checkpoint:
    unchanged = WeightPoint(point.base, vocabulary=point.vocabulary)
    base = prepared.sources[point.base]
    dtype = "bfloat16" if isinstance(base, Scaled) else None
    settings = replace(prepared.settings, dtype=dtype, max_shard_size=None, overwrite=False)
    plan = build_plan({Path(): unchanged}, prepared.sources, settings.output_format)
    directory = (prepared.cache / "bases" / plan.digests[0][0]).absolute()
    nodes = warm.resources().nodes  # while Ray is imported, it cannot be asked anything
    one = replace(prepared, settings=settings, written={directory: unchanged})
    while not directory.exists():
        if is_being_written(directory):
            prepared.say(f"{directory}: another run is writing it, for engines to start on; waiting for that")
            while is_being_written(directory):
                time.sleep(_TICK)
            continue
        try:
            merge_together([one], {unchanged: _CARD}, warm, are_merged_alone([one]))
        except (BadInput, Failed) as error:
            if isinstance(error, Busy) or directory.exists():  # another was a moment earlier
                time.sleep(_TICK)
                continue
            kind = BadInput if isinstance(error, BadInput) else Failed
            raise kind(str(error).replace("choose another output", "set cache.dir to another directory")) from None
        prepared.say(
            f"{directory}: a copy of {base.path} for engines to start on, {open_source(str(directory)).nbytes:,} bytes;"
            " it is kept for other runs, and may be deleted when none runs"
        )
    require_as_written(directory, plan.digests[0][0], base)
    if len(nodes) > 1 and (blind := blind_nodes(directory / "config.json")):
        raise BadInput(
            f"{directory}: engines start on it, and {', '.join(blind)} does not see it; set cache.dir to a directory "
            "that all nodes share"
        )
    return open_source(str(directory))


def require_as_written(directory: Path, plan: str, base: Checkpoint) -> None:
    """Raises BadInput where somebody has changed what this plan wrote there. Weights count by their size, for engines
    get others before they answer; what stands beside them says what is asked, and how."""
    if is_complete(directory, plan):
        written = open_source(str(directory))
        if _beside(written) == _beside(base) and written.config == without_quantization(base.config):
            return
    raise BadInput(f"{directory}: is not as it was written; delete it, and it is written again")


def _beside(checkpoint: Checkpoint) -> dict[str, str]:
    """Digests of what stands beside its weights, or is written there, but for its config."""
    files = {str(name): file_digest(path) for name, path in companions(checkpoint).items()}
    if isinstance(checkpoint, Remapped):
        anew = checkpoint.written_beside()
        files |= {name: xxhash.xxh3_128_hexdigest(text.encode()) for name, text in anew.items()}
    return {name: digest for name, digest in files.items() if name not in ("config.json", MANIFEST)}
