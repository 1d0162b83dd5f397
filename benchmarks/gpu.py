"""The merge's arithmetic on a card: that it gives the CPU's bytes, and how near it comes to what the machine can copy.

    python benchmarks/gpu.py [--gib 4] [--rounds 5] [--work DIR] [--device cuda]

Needs torch, numpy and this repository, no installation. Makes three bf16 checkpoints, of so many GiB together, in a
temporary directory. First it compares digests: three points, in two output dtypes, on the CPU and on the card. Then it
times reading, copies in each direction, arithmetic, and the whole path from file to host memory, all with one CPU
thread and a warm page cache, and prints medians. Exit status: 0, 1 where digests differ, 2 without a card.
`--device cpu` runs the same code without one.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rvdist.core.point import Mask, Term, Vector, WeightPoint
from rvdist.weights.arithmetic.linear import Linear
from rvdist.weights.arithmetic.method import Scratch, combine
from rvdist.weights.checkpoint.header import build_header
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.checkpoint.stream import write_exactly
from rvdist.weights.lanes import CHUNK, card_chunk
from rvdist.weights.operand import open_operand
from rvdist.weights.reader import PointReader, buffers_of

NAMES = ("target", "plus", "minus")
LARGE = 1 << 25  # elements of a layer's matrix, at most
IN, OUT = 6, 2  # bytes an element: three operands and a result in bf16


def write_checkpoints(directory: Path, nbytes: int) -> dict[str, str]:
    """Siblings: layers of one matrix and one norm. In the first norm there are an infinity and a NaN."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(min(LARGE, nbytes // IN), generator=generator) * 0.02
    size = block.numel() - 77  # no multiple of anything
    layers = max(1, nbytes // IN // block.numel())
    paths = {}
    for seed, name in enumerate(NAMES):
        weights = (block + 0.002 * bool(seed) * torch.randn(block.shape, generator=generator)).bfloat16()
        shapes = {f"model.layers.{k}.{part}": (n,) for k in range(layers) for part, n in (("mlp", size), ("norm", 77))}
        header, specs = build_header([(n, "BF16", s) for n, s in shapes.items()], "model.safetensors", {"format": "pt"})
        (directory / name).mkdir()
        (directory / name / "config.json").write_text("{}")
        with open(directory / name / "model.safetensors", "wb") as file:
            file.write(header)
            file.flush()
            for spec in specs:
                written = weights[: spec.numel].clone()
                if spec.name == "model.layers.0.norm":
                    written[seed], written[10] = float("inf"), float("nan")
                write_exactly(file.fileno(), spec.offset, written)
        paths[name] = str(directory / name)
    return paths


def points(paths: dict[str, str]) -> list[WeightPoint]:
    vector = Vector(paths["plus"], paths["minus"])
    masked = Term(-0.6, vector, Mask(exclude=(".*norm",), depth=(0.5, 1.5)))
    return [
        WeightPoint(paths["target"], terms)
        for terms in ((Term(0.7, vector),), (Term(1.0, vector), masked), (Term(0.0, vector),))
    ]


def reader_of(points: list[WeightPoint], device: str, dtype: torch.dtype | None = None) -> PointReader:
    sources = {source: open_source(source) for point in points for source in point.sources()}
    return PointReader(points, sources, dtype, device)


def stream(reader: PointReader) -> Iterator[list[torch.Tensor]]:
    for name, spec in reader.base.tensors.items():
        for _, results in reader.chunks(name, 0, spec.numel):
            yield results


def drain(reader: PointReader) -> None:
    for _ in stream(reader):
        pass


def digests(reader: PointReader) -> tuple[list[str], list[int]]:
    """Of every point's bytes, and how many of its elements are not finite."""
    try:
        from xxhash import xxh3_128 as make
    except ModuleNotFoundError:
        make = hashlib.blake2b
    found = [make() for _ in reader.points]
    for results in stream(reader):
        for digest, result in zip(found, results, strict=True):
            digest.update(result.view(torch.uint8).numpy().data)
    reader.close()
    return [digest.hexdigest() for digest in found], reader.nonfinite


def wall(act: Callable[[], object], rounds: int) -> float:
    """The median of its seconds, after one call that counts for nothing."""
    act()
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        act()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def on_card(act: Callable[[], object], rounds: int, repeat: int = 10) -> float:
    """The median of seconds by the card's own clock, of `repeat` calls in a row."""
    act()
    found = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeat):
            act()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1000 / repeat)
    return statistics.median(found)


def seconds_of_reading(one: list[WeightPoint], chunk: int, rounds: int) -> float:
    """Every input, in the chunks of the path that is measured, and nothing else."""
    sources = [open_source(source) for source in one[0].sources()]
    operands = [open_operand(source) for source in sources]
    buffers = [torch.empty(chunk * 8, dtype=torch.uint8) for _ in operands]

    def read() -> None:
        for spec in sources[0].tensors.values():
            for begin in range(0, spec.numel, chunk):
                for operand, buffer in zip(operands, buffers, strict=True):
                    operand.read(spec.name, begin, min(begin + chunk, spec.numel), buffer)

    return wall(read, rounds)


def seconds_of_arithmetic(device: str, numel: int, rounds: int) -> float:
    """An element: one term in bf16, with operands and result on the device already."""
    base, plus, minus, out = (torch.randn(numel, device=device).bfloat16() for _ in range(4))
    scratch = Scratch(numel, device)
    measure = on_card if device == "cuda" else wall
    return measure(lambda: combine(Linear(), base, [(0.7, plus, minus)], out, scratch), rounds) / numel


def copies(nbytes: int, rounds: int) -> dict[str, float]:
    """GB/s of copies that do nothing else, in page-locked memory. On the card, bytes read and written count."""
    host, there, other = (
        torch.empty(nbytes, dtype=torch.uint8, **where)
        for where in ({"pin_memory": True}, {"device": "cuda"}, {"device": "cuda"})
    )
    return {
        "copy to the card": nbytes / on_card(lambda: there.copy_(host, non_blocking=True), rounds) / 1e9,
        "copy from the card": nbytes / on_card(lambda: host.copy_(there, non_blocking=True), rounds) / 1e9,
        "copy on the card": 2 * nbytes / on_card(lambda: other.copy_(there), rounds) / 1e9,
    }


def measure(paths: dict[str, str], device: str, rounds: int) -> None:
    one = points(paths)[:1]
    chunk = card_chunk(buffers_of(one)) if device == "cuda" else CHUNK
    readers = {where: reader_of(one, where) for where in dict.fromkeys(("cpu", device))}
    elements = sum(spec.numel for spec in readers["cpu"].base.tensors.values())
    moved = elements * (IN + OUT) / 1e9

    reading = seconds_of_reading(one, chunk, rounds)
    arithmetic = seconds_of_arithmetic(device, chunk, rounds)
    whole = {where: wall(lambda reader=reader: drain(reader), rounds) for where, reader in readers.items()}
    rows = [("read the inputs, page cache warm", elements * IN / 1e9 / reading)]
    limits = {"reading": reading, "arithmetic": arithmetic * elements}
    if device == "cuda":
        limit = copies(min(256 << 20, chunk * 8), rounds)
        rows += list(limit.items())
        limits["copying in"] = elements * IN / 1e9 / limit["copy to the card"]
        limits["copying out"] = elements * OUT / 1e9 / limit["copy from the card"]
        in_bulk = seconds_of_arithmetic(device, 8 * chunk, rounds)
        rows.append(("arithmetic alone, so much at a time that launches cost nothing", (IN + OUT) / in_bulk / 1e9))
    rows.append((f"arithmetic alone, {device}, a chunk at a time", (IN + OUT) / arithmetic / 1e9))
    rows += [(f"whole path, {where}: in and out", moved / seconds) for where, seconds in whole.items()]
    print("| what | GB/s | × whole path, cpu |\n|---|---|---|")
    for what, rate in rows:
        print(f"| {what} | {rate:.2f} | {rate * whole['cpu'] / moved:.2f} |")

    print(f"\nSeconds for {elements:,} elements: whole path, {device} {whole[device]:.3f};", end=" ")
    print(", ".join(f"{what} alone {seconds:.3f}" for what, seconds in limits.items()) + ".")
    slowest = max(limits, key=lambda what: limits[what])
    print(f"The slowest of them is {slowest}; the whole path takes {whole[device] / limits[slowest]:.2f} × as long.")
    if device == "cuda":
        link = max(limits["copying in"], limits["copying out"])
        print(
            f"Arithmetic takes {limits['arithmetic'] / link:.2f} × the copies: below 1 it hides behind them, "
            "and one fused kernel would save nothing."
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0, help="all inputs together")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="where the temporary directory is made")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    device: str = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        print("torch finds no CUDA device here; --device cpu runs the same code without one", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if device == "cuda" else "no card"
    print(f"{name}, torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}\n", flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.work) as directory:
        paths = write_checkpoints(Path(directory), int(arguments.gib * 2**30))
        for dtype in (None, torch.float32):
            expected, found = (digests(reader_of(points(paths), where, dtype)) for where in ("cpu", device))
            what = f"{len(found[0])} points in {dtype or 'the stored dtypes'}: {found[1]} elements not finite"
            if found != expected:
                print(f"{what}: {device} gives {found}, the CPU {expected}", file=sys.stderr)
                return 1
            print(f"{what}: digests of {device} and CPU agree", flush=True)
        print()
        measure(paths, device, arguments.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
