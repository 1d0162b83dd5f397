"""python benchmarks/matrices.py ROWS COLUMNS: what the methods that see matrices take for one of them, by one core.

Two vectors of random numbers in bf16, by chunks as a worker reads them; two adapters of rank 64; and LAPACK's singular
values of one such matrix in fp32, which is what the papers' code asks for at least once. Prints rows of the table in
benchmarks/README.md.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from rvdist.core.method import MethodSpec
from rvdist.weights.arithmetic.matrices import Matrices
from rvdist.weights.arithmetic.method import Place
from rvdist.weights.arithmetic.registry import build
from rvdist.weights.values import AT_ONCE

RANK = 64  # of an adapter


def resident(what: str) -> int:
    """Bytes: VmRSS now, VmHWM at most."""
    return int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]


def measured(work: Callable[[], object]) -> tuple[float, int]:
    """Seconds of CPU, and the most resident memory beyond what there was, in bytes."""
    before, began = resident("VmRSS"), time.process_time()
    work()
    return time.process_time() - began, resident("VmHWM") - before


def main(rows: int, columns: int) -> None:
    """Prints a row for each method, and one for LAPACK."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(rows * columns, generator=generator).bfloat16() for _ in range(2)]
    factors = [[torch.randn(shape, generator=generator) for shape in ((rows, RANK), (RANK, columns))] for _ in range(2)]
    place = Place("w", rows * columns, shape=(rows, columns), alphas=(1.0, 1.0))

    def chunks(start: int = 0, stop: int = rows * columns) -> Iterator[list[torch.Tensor]]:
        for begin in range(start, stop, AT_ONCE):
            yield [vector[begin : min(begin + AT_ONCE, stop)].float() for vector in vectors]

    def low_rank(start: int = 0, stop: int = rows * columns) -> Iterator[list[torch.Tensor]]:
        """Of products of factors, which are computed by whole rows."""
        at_once = AT_ONCE // columns * columns or columns
        for begin in range(start, stop, at_once):
            end = min(begin + at_once, stop)
            own = slice(begin // columns, -(-end // columns))
            first = begin - own.start * columns
            yield [(left[own] @ right).view(-1)[first : first + end - begin] for left, right in factors]

    def row(name: str, chunks: Callable[..., Iterator[list[torch.Tensor]]], rank: int = 0) -> None:
        method = build(MethodSpec(name))
        assert isinstance(method, Matrices)
        seconds, nbytes = measured(lambda: method.survey(place, chunks))
        told = method.bytes_held(place.shape, rank, 4)
        print(f"| {rows} × {columns} | `{name}` | {seconds:.1f} | {nbytes >> 20} MiB | {told >> 20} MiB |", flush=True)

    def whole() -> None:
        seconds, nbytes = measured(lambda: torch.linalg.svd(vectors[0].float().view(rows, columns), False))
        print(
            f"| {rows} × {columns} | one `torch.linalg.svd`, fp32 | {seconds:.1f} | {nbytes >> 20} MiB | |", flush=True
        )

    core = [partial(row, name, low_rank, 2 * RANK) for name in ("core_space", "core_space_iso")]
    for work in (partial(row, "iso_c", chunks), partial(row, "tsv_m", chunks), *core, whole):  # a process each
        child = get_context("fork").Process(target=work)
        child.start()
        child.join()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
