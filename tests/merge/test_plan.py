from collections import defaultdict
from dataclasses import replace

import alone
import pytest
import torch
from checkpoints import near, tensors, write_checkpoint
from points import shifted

from rvdist.core.config import OutputFormat
from rvdist.core.method import MethodSpec
from rvdist.core.point import Term, Vector, WeightPoint
from rvdist.merge import driver
from rvdist.merge import plan as planning
from rvdist.merge.plan import build_plan
from rvdist.weights.checkpoint.directory import open_checkpoint
from rvdist.weights.checkpoint.journal import Written


def planned(tmp_path, shards=1, **options):
    path = write_checkpoint(tmp_path / "t", tensors(0), shards)
    sources = {s: open_checkpoint(path) for s in ("t", "p", "m")}
    points = tuple(WeightPoint("t", (Term(a, Vector("p", "m")),)) for a in (1.0, 2.0))
    return sources["t"], build_plan(
        dict(zip((tmp_path / "a", tmp_path / "b"), points, strict=True)), sources, **options
    )


@pytest.mark.parametrize("unit_bytes", [64, 1000, 1 << 25])
@pytest.mark.parametrize("shards", [1, 3])
def test_units_cover_every_byte_once(tmp_path, monkeypatch, unit_bytes, shards):
    monkeypatch.setattr(planning, "UNIT_BYTES", unit_bytes)
    base, plan = planned(tmp_path, shards)
    covered = defaultdict(list)
    for unit in plan.units:
        assert unit.nbytes <= unit_bytes
        assert unit.nbytes == sum((s.stop - s.start) * 2 for s in unit.segments)
        for segment in unit.segments:
            covered[unit.file].append((segment.offset, segment.offset + (segment.stop - segment.start) * 2))
    (layout,) = plan.layouts
    for file, (header, size) in layout.files.items():
        end = len(header)
        for begin, stop in sorted(covered[file]):
            assert begin == end
            end = stop
        assert end == size
    assert plan.bytes_read == 3 * base.nbytes, "two points over one base read it once"


def test_sharding_follows_the_base_unless_a_size_is_set(tmp_path):
    base, plan = planned(tmp_path, shards=3)
    assert list(plan.layouts[0].files) == base.files
    limit = 20_000
    plan = build_plan(
        {tmp_path / "a": plan.outputs[0].points[0]},
        {"t": base, "p": base, "m": base},
        OutputFormat(max_shard_size=limit),
    )
    (layout,) = plan.layouts
    names = list(layout.files)
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors" and len(names) > 1
    for file in names:
        specs = [spec for spec in layout.tensors.values() if spec.file == file]
        assert len(specs) == 1 or sum(spec.nbytes for spec in specs) <= limit


def test_output_dtype_changes_floating_point_tensors_alone(tmp_path):
    weights = tensors(0) | {"ids": torch.arange(5)}
    base = open_checkpoint(write_checkpoint(tmp_path / "t", weights))
    plan = build_plan({tmp_path / "o": WeightPoint("t")}, {"t": base}, OutputFormat("F32"))
    dtypes = {spec.name: spec.dtype for spec in plan.layouts[0].tensors.values()}
    assert dtypes.pop("ids") == "I64" and set(dtypes.values()) == {"F32"}


def test_what_was_begun_in_other_units_is_claimed_only_where_they_are_alike(tmp_path, monkeypatch):
    """As by a version that computed a stack of matrices as one unit: a manifest speaks of every byte once."""
    base = {"experts": torch.randn(3, 8, 9), "w": torch.randn(8, 9)}
    paths = {
        name: write_checkpoint(tmp_path / name, near(base, k)) for k, name in enumerate(("target", "plus", "minus"))
    }
    point = replace(shifted(paths), method=MethodSpec("iso_c"))
    monkeypatch.setattr(planning, "UNIT_BYTES", 300)
    now, _ = alone.planned({tmp_path / "out": point})
    monkeypatch.setattr(planning, "_matrices", lambda *given: {})
    before, _ = alone.planned({tmp_path / "out": point})
    assert (len(before.units), len(now.units)) == (2, 4) and before.digests == now.digests
    ((staging,),) = driver._stage(before, False, b"", print)
    staging.journal(Written(unit.file, unit.start, unit.nbytes, "ab") for unit in before.units)
    staging.release()
    ((staging,),) = driver._stage(now, False, b"", print)
    both = {(unit.file, unit.start, unit.nbytes) for unit in now.units} & {*staging.claims}
    assert {*staging.claims} == both and len(both) == 1
    staging.release()
