"""Vectors whose donors agree on most elements: what is stored, read, and spent, beside the two donors.

    python benchmarks/sparse.py [--elements N] [--place DIRECTORY] [--family NAME TARGET PLUS MINUS]

Made of random bf16 checkpoints of which a share of elements is equal; beside them the pocket family's donors, and those
that `--family` names. Seconds are processor time of one thread that reads a point and computes it, from the page
cache: as a merge does (chunk after chunk, into the same memory) and as a swap does (whole tensors). Nothing is written
meanwhile. Donors and the stored vector take turns; of each the best of `--rounds`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
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

SHARES = (0.0, 0.7, 0.9, 0.99)
POCKET = Path(__file__).resolve().parent.parent / "rvdist" / "pocket"


def write_donors(place: Path, share: float, numel: int) -> dict[str, str]:
    """Target, plus and minus, of three tensors."""
    generator = torch.Generator().manual_seed(0)
    written = {name: {} for name in ("target", "plus", "minus")}  # type: dict[str, dict[str, torch.Tensor]]
    for k in range(3):
        target, minus = (torch.randn(numel // 3, generator=generator).bfloat16() for _ in range(2))
        moved = torch.rand(numel // 3, generator=generator) >= share
        tensors = {"target": target, "minus": minus, "plus": torch.where(moved, minus + 1, minus)}
        for name, tensor in tensors.items():
            written[name][f"model.layers.{k}.weight"] = tensor
    for name, checkpoint in written.items():
        (place / name).mkdir(parents=True)
        save_file(checkpoint, place / name / "model.safetensors", {"format": "pt"})
        (place / name / "config.json").write_text('{"model_type": "none"}')
    return {name: str(place / name) for name in written}


def once(target: str, vector: Vector, out: torch.Tensor | None) -> tuple[float, int]:
    """Processor seconds and bytes read of target + 0.7 · v: as a swap reads it into `out`, as a merge does without."""
    reader = open_point(WeightPoint(target, (Term(0.7, vector, Mask()),)))
    begun = time.process_time()
    for name, spec in reader.base.tensors.items():
        if out is not None:
            reader.fill(name, 0, out[: spec.numel])
        else:
            for _ in reader.chunks(name, 0, spec.numel):
                pass
    seconds, nbytes = time.process_time() - begun, reader.bytes_read
    reader.close()
    return seconds, nbytes


def cost(target: str, vectors: tuple[Vector, Vector], rounds: int) -> tuple[list[float], list[float], list[int]]:
    """Of both vectors: seconds of a merge, seconds of a swap, and bytes that are read."""
    most = max(spec.numel for spec in open_source(target).tensors.values())
    out, merge, swap, nbytes = torch.zeros(most, dtype=torch.bfloat16), [9e9, 9e9], [9e9, 9e9], [0, 0]
    for _ in range(rounds + 1):  # the first compiles
        for k, vector in enumerate(vectors):
            seconds, nbytes[k] = once(target, vector, None)
            merge[k] = min(merge[k], seconds)
            swap[k] = min(swap[k], once(target, vector, out)[0])
    return merge, swap, nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--elements", type=int, default=48 << 20)
    parser.add_argument("--place", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--family", nargs=4, action="append", default=[], metavar=("NAME", "TARGET", "PLUS", "MINUS"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warm_up()
    print("equal elements   file / checkpoint   bytes / donors'   merge / donors'   swap / donors'   form   ns of each")
    for share in SHARES:
        with tempfile.TemporaryDirectory(dir=arguments.place) as name:
            show(f"{share:.0%}", write_donors(Path(name), share, arguments.elements), arguments.rounds)
    pocket = "pocket family", *(str(POCKET / name) for name in ("target", "grpo", "sft"))
    for name, *family in (pocket, *arguments.family):
        show(name, dict(zip(("target", "plus", "minus"), family, strict=True)), arguments.rounds)


def show(name: str, paths: dict[str, str], rounds: int) -> None:
    """A row of the table."""
    donors = Vector(paths["plus"], paths["minus"])
    sources = {source: open_source(source) for source in donors.sources()}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "v"
        save(donors, sources, place, Storage(), say=lambda text: None)
        stored = sum(file.stat().st_size for file in place.glob("*.safetensors"))
        whole = sum(file.stat().st_size for file in Path(paths["plus"]).glob("*.safetensors"))
        opened = open_source(str(place))
        assert isinstance(opened, Difference)
        forms = {type(form).__name__ for form in opened.forms.values()}
        merge, swap, nbytes = cost(paths["target"], (donors, Vector(str(place))), rounds)
        numel = sum(spec.numel for spec in open_source(paths["target"]).tensors.values())
    spent = " ".join(f"{seconds / numel * 1e9:.2f}" for seconds in (*merge, *swap))
    print(
        f"{name:>14}   {stored / whole:17.3f}   {nbytes[1] / nbytes[0]:15.3f}   {merge[1] / merge[0]:15.2f}   "
        f"{swap[1] / swap[0]:14.2f}   {' '.join(sorted(forms)).lower()}   {spent}",
        flush=True,
    )


if __name__ == "__main__":
    main()
