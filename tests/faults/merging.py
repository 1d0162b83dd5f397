"""Merges on a Ray of its own, one after the other: each line of standard input is an output, each line of standard
output is how its merge ended. Started with tests/faults/shim.c before everything, so that Ray's workers meet faults."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import ray
from checkpoints import POCKET

from rvdist.core import cluster, private_ray
from rvdist.core.config import OutputFormat
from rvdist.core.errors import Failed
from rvdist.core.point import Term, Vector, WeightPoint
from rvdist.merge import accounts, plan
from rvdist.merge.actor import WorkerSettings
from rvdist.merge.driver import merge
from rvdist.weights.checkpoint.source import open_source

SILENCE = 4.0  # seconds after which a worker that is stopped is replaced


def left() -> list[str]:
    """What Ray still holds of a merge that has ended."""
    groups = ray.util.placement_group_table().values()
    return [f"group {one['placement_group_id']}" for one in groups if one["state"] != "REMOVED"]


def main() -> None:
    plan.UNIT_BYTES, accounts.SYNC_BYTES = 128 << 10, 256 << 10
    heard: list[str] = []
    private_ray.hear = heard.append
    cluster.connect("local", namespace="merging")
    for line in sys.stdin:
        said: list[str] = []
        heard.clear()
        point = WeightPoint(str(POCKET / "target"), (Term(1.0, Vector(str(POCKET / "grpo"), str(POCKET / "sft"))),))
        sources = {source: open_source(source) for source in point.sources()}
        built = plan.build_plan({Path(line.strip()): point}, sources, OutputFormat(max_shard_size=400_000))
        settings = WorkerSettings(1, timeout=60, silence=SILENCE)
        try:
            merge(built, sources, defaultdict(str), settings, say=said.append)
            failed = ""
        except Failed as error:
            failed = str(error)
        print(json.dumps({"failed": failed, "said": said, "heard": heard, "left": left()}), flush=True)
    cluster.disconnect()


if __name__ == "__main__":
    main()
