"""A weight point of a family of checkpoints, and one that is read whole."""

from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import torch

from rvdist.core.point import Term, Vector, WeightPoint
from rvdist.weights.reader import open_point


def shifted(paths: Mapping[str, Path], *alphas: float) -> WeightPoint:
    """The target with a term of plus − minus for each α: one of 0.7 where none is given."""
    vector = Vector(str(paths["plus"]), str(paths["minus"]))
    return WeightPoint(str(paths["target"]), tuple(Term(alpha, vector) for alpha in alphas or (0.7,)))


def read_point(point: WeightPoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Every (name, tensor) of a point, in the base's stored dtypes: what a merge of it would write."""
    with closing(open_point(point)) as reader:
        for name, spec in reader.base.tensors.items():
            tensor = torch.empty(spec.numel, dtype=reader.output_dtype(spec))
            reader.fill(name, 0, tensor)
            yield name, tensor.view(spec.shape)
