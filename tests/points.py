"""A weight point, read whole."""

from collections.abc import Iterator
from contextlib import closing

import torch

from rvdist.core.point import WeightPoint
from rvdist.weights.reader import open_point


def read_point(point: WeightPoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Every (name, tensor) of a point, in the base's stored dtypes: what a merge of it would write."""
    with closing(open_point(point)) as reader:
        for name, spec in reader.base.tensors.items():
            tensor = torch.empty(spec.numel, dtype=reader.output_dtype(spec))
            reader.fill(name, 0, tensor)
            yield name, tensor.view(spec.shape)
