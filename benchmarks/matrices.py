"""python benchmarks/matrices.py ROWS COLUMNS: what the methods that see matrices take for one of them, by one core.

Two vectors of random numbers in bf16, by chunks as a worker reads them; and LAPACK's singular values of one such matrix
in fp32, which is what the papers' code asks for at least once. Prints rows of the table in benchmarks/README.md.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context

import torch

from rvdist.core.method import MethodSpec
from rvdist.core.timing import anonymous_bytes
from rvdist.weights.arithmetic.matrices import Matrices
from rvdist.weights.arithmetic.method import Place
from rvdist.weights.arithmetic.registry import build
from rvdist.weights.values import AT_ONCE


def measured(work: Callable[[], object]) -> tuple[float, int]:
    """Seconds of CPU, and the most anonymous memory beyond what there was, in bytes."""
    before, over = anonymous_bytes(), threading.Event()
    seen = [before]

    def watch() -> None:
        while not over.wait(0.02):
            seen.append(anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.process_time()
    work()
    seconds = time.process_time() - began
    over.set()
    watcher.join()
    return seconds, max(seen) - before


def main(rows: int, columns: int) -> None:
    """Prints a row for each method, and one for LAPACK."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(rows * columns, generator=generator).bfloat16() for _ in range(2)]
    place = Place("w", rows * columns, shape=(rows, columns), alphas=(1.0, 1.0))

    def chunks(start: int = 0, stop: int = rows * columns) -> Iterator[list[torch.Tensor]]:
        for begin in range(start, stop, AT_ONCE):
            yield [vector[begin : min(begin + AT_ONCE, stop)].float() for vector in vectors]

    def row(name: str) -> None:
        method = build(MethodSpec(name))
        assert isinstance(method, Matrices)
        seconds, nbytes = measured(lambda: method.survey(place, chunks))
        told = method.bytes_held(place.shape, 0, 4)
        print(f"| {rows} × {columns} | `{name}` | {seconds:.1f} | {nbytes >> 20} MiB | {told >> 20} MiB |", flush=True)

    def whole() -> None:
        seconds, nbytes = measured(lambda: torch.linalg.svd(vectors[0].float().view(rows, columns), False))
        print(
            f"| {rows} × {columns} | one `torch.linalg.svd`, fp32 | {seconds:.1f} | {nbytes >> 20} MiB | |", flush=True
        )

    for work in (partial(row, "iso_c"), partial(row, "tsv_m"), whole):  # each in a process of its own
        child = get_context("fork").Process(target=work)
        child.start()
        child.join()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
