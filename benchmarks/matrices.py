"""What methods that see matrices take for one, by one core.

    python benchmarks/matrices.py ROWS COLUMNS [METHOD …]

Two vectors of random numbers in bf16, by chunks as a worker reads them; the factors of two adapters of rank 64; and
LAPACK's singular values of one such matrix in fp32, which is what the papers' code asks for at least once. Each in a
process of its own, which is forked, so that what it uses of libraries counts, too. Prints rows of the table in
benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
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
DENSE, FACTORED, SVD = ("iso_c", "tsv_m"), ("core_space", "core_space_iso"), "svd"


def resident(what: str) -> int:
    """Bytes: VmRSS now, VmHWM at most."""
    return int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]


def measured(work: Callable[[], object]) -> tuple[str, int]:
    """Seconds of CPU and of the clock, and the most resident memory beyond what there was, in bytes."""
    before, cpu, began = resident("VmRSS"), time.process_time(), time.perf_counter()
    work()
    seconds = f"{time.process_time() - cpu:.1f} | {time.perf_counter() - began:.1f}"
    return seconds, resident("VmHWM") - before


def main(rows: int, columns: int, wanted: Sequence[str]) -> None:
    """Prints a row for each method, and one for LAPACK."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(rows * columns, generator=generator).bfloat16() for _ in range(2)]
    factors = [[torch.randn(shape, generator=generator) for shape in ((rows, RANK), (RANK, columns))] for _ in range(2)]
    place = Place("w", rows * columns, shape=(rows, columns), alphas=(1.0, 1.0))

    def chunks(start: int = 0, stop: int = rows * columns) -> Iterator[list[torch.Tensor]]:
        for begin in range(start, stop, AT_ONCE):
            yield [vector[begin : min(begin + AT_ONCE, stop)].float() for vector in vectors]

    def low_rank(number: int) -> Iterator[list[torch.Tensor]]:
        for pair in factors:
            yield [side.double() for side in pair]

    def row(name: str, rank: int = 0) -> None:
        method, read = build(MethodSpec(name)), [0]
        assert isinstance(method, Matrices)

        def counted(start: int = 0, stop: int = place.numel) -> Iterator[list[torch.Tensor]]:
            read[0] += stop - start
            return chunks(start, stop)

        def add_all() -> None:
            method.survey(place, low_rank if rank else counted)
            for start in range(0, place.numel, AT_ONCE):
                total = torch.zeros(min(AT_ONCE, place.numel - start))
                method.add(total, place.alphas, [], replace(place, start=start))

        seconds, nbytes = measured(add_all)
        told = method.bytes_held(place.shape, rank, 4)
        memory = f"{nbytes >> 20} MiB | {told >> 20} MiB | {read[0] / place.numel:.0f}"
        print(f"| {rows} × {columns} | `{name}` | {seconds} | {memory} |", flush=True)

    def whole() -> None:
        seconds, nbytes = measured(lambda: torch.linalg.svd(vectors[0].float().view(rows, columns), False))
        memory = f"{nbytes >> 20} MiB"
        print(f"| {rows} × {columns} | one `torch.linalg.svd`, fp32 | {seconds} | {memory} | | 1 |", flush=True)

    works = {name: partial(row, name) for name in DENSE}
    works |= {name: partial(row, name, 2 * RANK) for name in FACTORED}
    works[SVD] = whole
    for name in wanted or works:
        child = get_context("fork").Process(target=works[name])
        child.start()
        child.join()
        if child.exitcode:
            raise SystemExit(f"{name} ended with status {child.exitcode}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int)
    parser.add_argument("columns", type=int)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join((*DENSE, *FACTORED, SVD))}; all")
    given = parser.parse_args()
    if unknown := set(given.methods).difference((*DENSE, *FACTORED, SVD)):
        parser.error(f"not measured here: {', '.join(sorted(unknown))}")
    main(given.rows, given.columns, given.methods)
