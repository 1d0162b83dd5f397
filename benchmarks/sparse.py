"""Vectors whose donors agree on most elements: what is stored, read, and spent, beside the two donors.

    python benchmarks/sparse.py [--elements N] [--place DIRECTORY] [--family NAME TARGET PLUS MINUS]
    python benchmarks/sparse.py --cold [--elements N] [--place DIRECTORY] [--rounds N]

Made of random bf16 checkpoints of which a share of elements is equal; beside them the pocket family's donors, and those
that `--family` names. Seconds are processor time of one thread that reads a point and computes it, from the page
cache: as a merge does (chunk after chunk, into the same memory) and as a swap does (whole tensors). Nothing is written
meanwhile. Donors and the stored vector take turns; of each the best of `--rounds`.

With `--cold` no file is in the page cache when a run begins, and seconds are those that pass: of the same merges and
swaps, and of the merge stage of whole commands into /dev/null. Medians go to benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from rvdist.core.config import Storage
from rvdist.core.point import Mask, Term, Vector, WeightPoint
from rvdist.weights.arithmetic.method import warm_up
from rvdist.weights.checkpoint.difference import Difference
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.reader import open_point
from rvdist.weights.store import save

sys.path.insert(0, str(Path(__file__).parent))
from commands import evict
from merge import measure as run
from tables import write_table

SHARES = (0.0, 0.7, 0.9, 0.99)
POCKET = Path(__file__).resolve().parent.parent / "rvdist" / "pocket"
ALPHA = 0.7


@dataclass
class Row:
    """A target, two vectors that are to be the same (donors, and stored), and how large the stored one is, of plus."""

    name: str
    target: str
    vectors: tuple[Vector, Vector]
    size: float
    forms: str

    @property
    def numel(self) -> int:
        return sum(spec.numel for spec in open_source(self.target).tensors.values())

    def files(self, vector: Vector) -> list[Path]:
        return [file for one in (self.target, *vector.sources()) for file in sorted(Path(one).glob("*.safetensors"))]


def write_donors(place: Path, share: float, numel: int) -> dict[str, str]:
    """Target, plus and minus, of three tensors or more."""
    generator, count = torch.Generator().manual_seed(0), max(3, numel >> 24)
    written: dict[str, dict[str, torch.Tensor]] = {name: {} for name in ("target", "plus", "minus")}
    for k in range(count):
        target = torch.randn(numel // count, generator=generator).bfloat16()
        minus = target + torch.randn(numel // count, generator=generator).bfloat16() / 8
        moved = torch.rand(numel // count, generator=generator) >= share
        tensors = {"target": target, "minus": minus, "plus": torch.where(moved, minus + 1, minus)}
        for name, tensor in tensors.items():
            written[name][f"model.layers.{k}.weight"] = tensor
    for name, checkpoint in written.items():
        (place / name).mkdir(parents=True)
        save_file(checkpoint, place / name / "model.safetensors", {"format": "pt"})
        (place / name / "config.json").write_text('{"model_type": "none"}')
    return {name: str(place / name) for name in written}


def store(name: str, paths: Mapping[str, str], place: Path) -> Row:
    """Stores plus − minus as `place`."""
    donors = Vector(paths["plus"], paths["minus"])
    save(donors, {source: open_source(source) for source in donors.sources()}, place, Storage(), say=lambda text: None)
    sizes = [sum(file.stat().st_size for file in Path(one).glob("*.safetensors")) for one in (place, paths["plus"])]
    opened = open_source(str(place))
    assert isinstance(opened, Difference)
    forms = sorted({type(form).__name__.lower() for form in opened.forms.values()})
    return Row(name, paths["target"], (donors, Vector(str(place))), sizes[0] / sizes[1], " ".join(forms))


def once(row: Row, vector: Vector, out: torch.Tensor | None, cold: bool) -> tuple[float, int]:
    """Seconds and bytes read of target + ALPHA · v: as a swap reads it into `out`, as a merge does without."""
    reader = open_point(WeightPoint(row.target, (Term(ALPHA, vector, Mask()),)))
    if cold:
        evict(row.files(vector))
    clock: Callable[[], float] = time.perf_counter if cold else time.process_time
    begun = clock()
    for name, spec in reader.base.tensors.items():
        if out is not None:
            reader.fill(name, 0, out[: spec.numel])
        else:
            for _ in reader.chunks(name, 0, spec.numel):
                pass
    seconds, nbytes = clock() - begun, reader.bytes_read
    reader.close()
    return seconds, nbytes


def command(row: Row, vector: Vector, place: Path) -> float:
    """Seconds of the merge stage of a whole command into /dev/null."""
    said = [f"vector.plus={vector.plus}", f"vector.minus={vector.minus}"]
    said = said if vector.minus else [f"vector.path={vector.plus}"]
    line = [sys.executable, "-m", "rvdist.launch", f"target={row.target}", *said, f"alpha={ALPHA}", "output=/dev/null"]
    evict(row.files(vector))
    run([*line, f"hydra.run.dir={place}"])
    return float(json.loads((place / "timing.json").read_text())["phases"]["merge"])


Runs = tuple[list[float], list[float]]  # seconds with donors, and with the stored vector


def measure(row: Row, rounds: int, cold: bool) -> tuple[Runs, Runs, tuple[int, int]]:
    """Of merges and of swaps; and the bytes that are read."""
    most = max(spec.numel for spec in open_source(row.target).tensors.values())
    out, merge, swap, nbytes = torch.zeros(most, dtype=torch.bfloat16), ([], []), ([], []), [0, 0]  # type: ignore[var-annotated]
    for _ in range(rounds + (not cold)):  # the first compiles
        for k, vector in enumerate(row.vectors):
            seconds, nbytes[k] = once(row, vector, None, cold)
            merge[k].append(seconds)
            swap[k].append(once(row, vector, out, cold)[0])
    return merge, swap, (nbytes[0], nbytes[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int)
    parser.add_argument("--place", type=Path)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--family", nargs=4, action="append", default=[], metavar=("NAME", "TARGET", "PLUS", "MINUS"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warm_up()
    numel = arguments.elements or (512 << 20 if arguments.cold else 48 << 20)
    rounds = arguments.rounds or (5 if arguments.cold else 9)
    lines = []
    print(COLD[0] if arguments.cold else WARM, flush=True)
    for share in arguments.shares:
        with tempfile.TemporaryDirectory(dir=arguments.place) as folder:
            place = Path(folder)
            row = store(f"{share:.0%}", write_donors(place, share, numel), place / "v")
            if arguments.cold:
                lines.append(show_cold(row, rounds, place))
            else:
                show(row, rounds)
    if arguments.cold:
        about = (
            f"Checkpoints of {2 * numel / 1e9:.2f} GB, bf16; {rounds} rounds in turn, of commands {rounds // 2 + 1}, "
            f"medians (min to max); "
            f"{os.cpu_count()} cores at a load of {os.getloadavg()[2]:.0f}, page cache cold."
        )
        write_table("sparse.py, cold", [about, "", *COLD, *lines])
        return
    pocket = "pocket family", *(str(POCKET / name) for name in ("target", "grpo", "sft"))
    for name, *family in (pocket, *arguments.family):
        with tempfile.TemporaryDirectory() as folder:
            show(store(name, dict(zip(("target", "plus", "minus"), family, strict=True)), Path(folder) / "v"), rounds)


WARM = "equal elements   file / checkpoint   bytes / donors'   merge / donors'   swap / donors'   form   ns of each"
COLD = (
    "| equal elements | bytes / donors' | merge / donors' | swap / donors' | merge stage / donors' | merge, s: donors "
    "| vector | swap, s: donors | vector | merge stage of a command, s: donors | vector |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)


def show(row: Row, rounds: int) -> None:
    """A row of the table, from the page cache."""
    runs = measure(row, rounds, cold=False)
    merge, swap = ([min(seconds) for seconds in one] for one in runs[:2])
    spent, nbytes = " ".join(f"{seconds / row.numel * 1e9:.2f}" for seconds in (*merge, *swap)), runs[2]
    print(
        f"{row.name:>14}   {row.size:17.3f}   {nbytes[1] / nbytes[0]:15.3f}   {merge[1] / merge[0]:15.2f}   "
        f"{swap[1] / swap[0]:14.2f}   {row.forms}   {spent}",
        flush=True,
    )


def show_cold(row: Row, rounds: int, place: Path) -> str:
    """A row of the table, from the disk."""
    os.sync()  # what is not written yet stays in the page cache
    merge, swap, nbytes = measure(row, rounds, cold=True)
    stage: Runs = ([], [])
    for _ in range(rounds // 2 + 1):
        for k, vector in enumerate(row.vectors):
            stage[k].append(command(row, vector, place / "run"))
    runs = merge, swap, stage
    ratios = [f"{statistics.median(vector) / statistics.median(donors):.2f}" for donors, vector in runs]
    line = f"| {row.name} | {nbytes[1] / nbytes[0]:.3f} | {' | '.join(ratios)} | "
    line += " | ".join(f"{statistics.median(s):.2f} ({min(s):.2f} to {max(s):.2f})" for one in runs for s in one) + " |"
    print(line, flush=True)
    return line


if __name__ == "__main__":
    main()
