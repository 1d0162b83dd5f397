"""Several readers of one point in threads, as one: the parts of a large tensor are shared out among them.

Each has a reader's memory, and no more. A tensor of which a method must see all before it computes any is one's alone.
Knows nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, partial

import torch

from rvdist.core.point import Rename, WeightPoint
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.header import TensorSpec
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.checkpoint.vocabulary import Open, remap
from rvdist.weights.lanes import CHUNK
from rvdist.weights.reader import PointReader, open_point

_Fill = Callable[[PointReader, int, int], None]  # the elements, or the rows, from one to another


class Readers:
    """At most `count` readers of `point`, each made when there is something for it, of sources that are looked up once.
    Their arithmetic is the `device`'s; a card's is done for one of them. The bytes are those of one, on the CPU. Raises
    BadInput where a source cannot be read, or there is no such device."""

    def __init__(
        self,
        point: WeightPoint,
        count: int = 1,
        look_up: Callable[[str, Rename], Checkpoint] = open_source,
        device: str = "cpu",
        remap: Callable[[WeightPoint, Mapping[str, Checkpoint], Open], Mapping[str, Checkpoint]] = remap,
    ) -> None:
        self._open = partial(open_point, point, cache(look_up), device, remap)
        self._all = [self._open()]
        facts = [point.method.facts for point in self._all[0].points]
        alone = device != "cpu" or any(one.whole_tensors or one.whole_matrices for one in facts)
        self._count = 1 if alone else count
        self._pool = ThreadPoolExecutor(self._count - 1) if self._count > 1 else None

    @property
    def base(self) -> Checkpoint:
        return self._all[0].base

    @property
    def spoiled(self) -> list[str]:
        """The tensors that were found to hold infinities or NaNs."""
        return [name for name in self.base.tensors if any(name in reader.spoiled for reader in self._all)]

    @property
    def bytes_read(self) -> int:
        return sum(reader.bytes_read for reader in self._all)

    def output_dtype(self, spec: TensorSpec) -> torch.dtype:
        return self._all[0].output_dtype(spec)

    def blame(self, name: str) -> str:
        return self._all[0].blame(name)

    def fill(self, name: str, start: int, out: torch.Tensor) -> None:
        """As `PointReader.fill`."""
        shape = self.base.tensors[name].shape

        def part(reader: PointReader, begin: int, end: int) -> None:
            reader.fill(name, start + begin, out[begin:end])

        self._share(out.numel(), shape[-1] if len(shape) > 1 else 1, part)

    def fill_columns(self, name: str, rows: range, columns: range, out: torch.Tensor) -> None:
        """As `PointReader.fill_columns`."""
        width = len(columns)

        def part(reader: PointReader, begin: int, end: int) -> None:
            own = rows[begin // width : end // width]
            reader.fill_columns(name, own, columns, out[begin:end])

        self._share(out.numel(), width, part)

    def _share(self, numel: int, row: int, part: _Fill) -> None:
        """Has each reader do whole rows of what `numel` elements there are, at least a chunk of them."""
        rows = numel // max(1, row)
        count = max(1, min(self._count, numel // CHUNK, rows))
        while len(self._all) < count:
            self._all.append(self._open())
        cuts = [rows * k // count * row for k in range(count)] + [numel]
        others = [self._pool.submit(part, self._all[k], cuts[k], cuts[k + 1]) for k in range(1, count) if self._pool]
        try:
            part(self._all[0], cuts[0], cuts[1])
        finally:
            wait(others)  # they write into memory that is the caller's
        for other in others:
            other.result()

    def close(self) -> None:
        """Ends the threads and closes the files."""
        if self._pool:
            self._pool.shutdown()
        for reader in self._all:
            reader.close()
