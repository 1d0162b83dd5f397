"""Retrains a family from nothing with a seed that is not the shipped one (about six minutes)."""

import json

import pytest
import torch

from rvdist.pocket import HERE, measure
from rvdist.pocket.train import train_family

SEED = 5


@pytest.mark.slow
def test_another_seed_shows_the_same(tmp_path):
    assert json.loads((HERE / "training.json").read_text())["seed"] != SEED
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train_family(tmp_path, SEED)
        family = measure.Family(tmp_path, torch.float32)
        low, middle, high = (measure.sums(family.at(alpha), family.tokenizer) for alpha in (-1.0, 0.0, 1.0))
    finally:
        torch.set_num_threads(threads)
    assert len(middle) >= 500
    assert measure.interval(middle)[1] < measure.interval(high)[0]
    assert measure.interval(low)[1] < measure.interval(middle)[0]
