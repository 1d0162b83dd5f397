"""A node on which Ray sees less than the job was given there."""

import pytest

from rvdist.core import cluster
from rvdist.core.errors import BadInput


def node(name, labels, **resources):
    return {"NodeManagerHostname": name, "Labels": labels, "Resources": resources}


@pytest.mark.parametrize(
    ("labels", "sees", "reason"),
    [
        ({}, {"CPU": 1.0}, ""),
        ({"rvdist-cores": "64", "rvdist-gpus": "8"}, {"CPU": 64.0, "GPU": 8.0}, ""),
        ({"rvdist-cores": "64", "rvdist-gpus": "0"}, {"CPU": 32.0}, ""),
        ({"rvdist-cores": "", "rvdist-gpus": ""}, {"CPU": 2.0}, ""),
        (
            {"rvdist-cores": "64", "rvdist-gpus": "8"},
            {"CPU": 64.0, "GPU": 7.0},
            "n2: .* 8 GPUs there and Ray sees 7; see",
        ),
        (
            {"rvdist-cores": "64", "rvdist-gpus": "8"},
            {"CPU": 64.0},
            "n2: .* 8 GPUs there and Ray sees 0; see what nvidia",
        ),
        (
            {"rvdist-cores": "64", "rvdist-gpus": "0"},
            {"CPU": 1.0},
            "n2: .* 64 cores there and Ray sees 1; let its steps",
        ),
    ],
)
def test_what_a_node_was_given(labels, sees, reason):
    nodes = [node("n1", {"rvdist-gpus": "1"}, GPU=1.0), node("n2", labels, **sees)]
    if reason:
        with pytest.raises(BadInput, match=reason):
            cluster._require_given(nodes)
    else:
        cluster._require_given(nodes)
