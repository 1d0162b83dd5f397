"""A merge in this process, by one worker and without Ray."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from rvdist.core.config import OutputFormat
from rvdist.core.point import WeightPoint
from rvdist.merge import plan as planning
from rvdist.merge.plan import AS_THE_BASE, Plan, build_plan
from rvdist.merge.worker import MergeWorker
from rvdist.weights import compat, requantize
from rvdist.weights.checkpoint.bound import settle
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.layouts import lay_out
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.checkpoint.vocabulary import remap


def planned(points: Mapping[Path, WeightPoint], form: OutputFormat = AS_THE_BASE) -> tuple[Plan, dict[str, Checkpoint]]:
    """What a merge plans for each directory, and the sources that it opens."""
    sources: dict[str, Checkpoint] = {}
    for point in points.values():
        base = sources.setdefault(point.base, open_source(point.base))
        sources |= {name: lay_out(open_source(name), base) for name in point.sources() if name not in sources}
        sources |= remap(point, sources, open_source) if point.vocabulary else {}
    for point in points.values():
        compat.check(point, sources)
    points = {directory: settle(point, sources) for directory, point in points.items()}
    return build_plan(points, sources, form), sources


def write(points: Mapping[Path, WeightPoint], dtype: str | None = None, allow_nonfinite: bool = False) -> Plan:
    """What a merge does to each directory, in this process."""
    plan, sources = planned(points, OutputFormat(dtype))
    for output, layout in zip(plan.outputs, plan.layouts, strict=True):
        for directory in output.directories:
            directory.mkdir()
            for file, (header, size) in layout.files.items():
                (directory / file).write_bytes(header + bytes(size - len(header)))
    worker = MergeWorker(plan.outputs, sources, plan.dtype, direct_io=False)
    for unit in plan.units:
        done = worker.run(unit, (None,) * len(plan.outputs[unit.output].points))
        assert allow_nonfinite or not any(done.nonfinite)
    worker.sync()
    return plan


def write_and_cut(place: Path, point: WeightPoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """`place`/out, which is what comes out in units and parts of a few rows, too."""
    write({place / "out": point})
    monkeypatch.setattr(planning, "UNIT_BYTES", 700)
    monkeypatch.setattr(requantize, "_AT_ONCE", 700)
    write({place / "cut": point})
    files = sorted((place / "out").glob("*.safetensors"))
    assert files
    for file in files:
        assert file.read_bytes() == (place / "cut" / file.name).read_bytes()
