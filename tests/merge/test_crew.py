"""How a crew's workers share the cores of nodes, without Ray."""

import pytest

from rvdist.merge.actor import WorkerSettings
from rvdist.merge.crew import share_cores


@pytest.mark.parametrize(
    ("nodes", "count", "settings", "each"),
    [
        ([(8, 0)], 4, {}, 1.0),
        ([(8, 0)], 4, {"threads": 4}, 2.0),
        ([(1, 0)] * 3, 4, {}, 0.5),
        ([(64, 0), (2, 8)], 8, {"gpus": 1.0}, 0.25),  # the cores of the node without GPUs are none of theirs
        ([(64, 1), (2, 7)], 8, {"gpus": 1.0}, 0.285),  # and one GPU takes no more than one of them
        ([(2, 2)], 4, {"gpus": 0.5}, 0.5),
        ([(64, 8)], 8, {"gpus": 1.0, "threads": 4}, 4.0),
    ],
)
def test_cores_of_each_worker(nodes, count, settings, each):
    resources = [{"CPU": float(cores), "GPU": float(cards)} for cores, cards in nodes]
    assert share_cores(resources, WorkerSettings(count, **settings), count) == each
