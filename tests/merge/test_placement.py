import json

import pytest
import torch
from checkpoints import write_checkpoint

from rvdist.core.point import WeightPoint
from rvdist.merge import placement
from rvdist.merge.placement import place, remember_rate, remembered_rate
from rvdist.merge.plan import build_plan
from rvdist.weights.checkpoint.directory import open_checkpoint


@pytest.fixture
def plan(tmp_path):
    """Seven files of very different sizes."""
    weights = {f"w{k}": torch.zeros(1000 * (k + 1) ** 2).bfloat16() for k in range(7)}
    base = open_checkpoint(write_checkpoint(tmp_path / "t", weights, shards=7))
    return build_plan({tmp_path / "out": WeightPoint("t")}, {"t": base})


def test_every_file_falls_to_one_node_and_none_is_much_later_than_the_others(plan):
    shares = place(plan, [("a", 1), ("b", 1), ("idle", 0)])
    assert [share.name for share in shares] == ["a", "b"]
    assert sum(share.files for share in shares) == 7
    assert sum(share.bytes_read for share in shares) == plan.bytes_read
    assert sum(share.bytes_written for share in shares) == plan.bytes_written
    loads = [share.bytes_moved for share in shares]
    optimum = max(sum(loads) / 2, max(file.bytes_read + file.bytes_written for file in plan.files))
    assert max(loads) <= (4 / 3 - 1 / 6) * optimum, "Graham's bound for the longest first on two nodes"


def test_a_node_with_more_workers_takes_more(plan):
    small, large = place(plan, [("small", 1), ("large", 3)])
    assert 2 < large.bytes_moved / small.bytes_moved < 4


def test_rates_are_remembered_by_device_and_only_of_merges_that_say_something(tmp_path, monkeypatch):
    path = tmp_path / "cache" / "rates.json"
    remember_rate(path, "cpu", 1000, 1.0, 5)
    assert not path.exists() and remembered_rate(path, "cpu") is None
    monkeypatch.setattr(placement, "_WORTH_REMEMBERING", 1000)
    remember_rate(path, "cpu", 1000, 2.0, 5)
    remember_rate(path, "cuda", 9000, 1.0, 7)
    remember_rate(path, "cpu", 4000, 2.0, 6)
    assert remembered_rate(path, "cpu") == placement.Rate(2000.0, 6)
    assert remembered_rate(path, "cuda") == placement.Rate(9000.0, 7)
    path.write_text(json.dumps({"cpu": 3}))
    assert remembered_rate(path, "cpu") is None, "a damaged file is no rate"
