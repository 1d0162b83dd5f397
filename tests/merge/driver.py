"""A process of its own that merges on a cluster: `driver.py '{"address": …, "jobs": [{…}]}'`.

Prints a line for every batch that is journalled, and one of JSON for every job. Its workers keep a record in the
directory `log`: a file named for each worker's process, holding its node, and `units.jsonl`, who began which unit.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from rvdist.core import cluster
from rvdist.core.errors import BadInput, Failed
from rvdist.core.point import Term, Vector, WeightPoint
from rvdist.merge import accounts, crew, driver
from rvdist.merge import plan as planning
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.checkpoint.staging import Staging

OPTIONS = json.loads(sys.argv[1])
_journal = Staging.journal


class Recording(crew.WorkerActor):
    """A worker that keeps a record, takes at least `pace` seconds for a unit, and does the first only once as many
    as the job says are `together`; the first `hold` units of all are done, the others once there is a file `go`."""

    def hello(self, *given: Any) -> Any:
        import ray

        said = super().hello(*given)
        self._met = False
        self._node = ray.get_runtime_context().get_node_id()
        (Path(OPTIONS["log"]) / str(os.getpid())).write_text(self._node)
        return said

    def run(self, unit: Any, claims: Any) -> Any:
        line = json.dumps([self._node, os.getpid(), unit.file, unit.start]) + "\n"
        with open(Path(OPTIONS["log"]) / "units.jsonl", "a+") as record:
            record.write(line)
            record.seek(0)
            number = len(record.readlines())
        while number > OPTIONS["hold"] and not (Path(OPTIONS["log"]) / "go").exists():
            time.sleep(0.02)
        time.sleep(OPTIONS["pace"])
        while not self._met and self._present() < OPTIONS["together"]:
            time.sleep(0.05)
        self._met = True
        return super().run(unit, claims)

    def _present(self) -> int:
        return sum(name.isdigit() and os.path.exists(f"/proc/{name}") for name in os.listdir(OPTIONS["log"]))


def journal(self: Staging, written: Any) -> None:
    _journal(self, written)
    print("journalled", flush=True)


def run(job: dict[str, Any]) -> dict[str, Any]:
    OPTIONS["together"] = job.get("together", 0)
    point = WeightPoint(job["target"], (Term(1.0, Vector(job["plus"], job["minus"])),))
    sources = {source: open_source(source) for source in point.sources()}
    plan = planning.build_plan({Path(job["out"]): point}, sources)
    if "lose" in job:
        Path(job["lose"]).unlink()
    settings = crew.WorkerSettings(job["workers"], timeout=job.get("timeout", 60))
    said: list[str] = []
    try:
        stats = driver.merge(plan, sources, defaultdict(str), settings, say=said.append)
    except (BadInput, Failed) as error:
        return {"error": type(error).__name__, "sentence": str(error), "said": said}
    return {"nodes": stats.nodes, "written": stats.bytes_written, "said": said}


if __name__ == "__main__":
    planning.UNIT_BYTES = OPTIONS["unit_bytes"]
    accounts.SYNC_BYTES = OPTIONS["sync_bytes"]
    crew.WorkerActor = Recording  # type: ignore[misc]
    Staging.journal = journal  # type: ignore[method-assign]
    cluster.connect(OPTIONS["address"])
    for job in OPTIONS["jobs"]:
        print(json.dumps(run(job)), flush=True)
