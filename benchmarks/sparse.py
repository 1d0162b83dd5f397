"""Vectors whose donors agree on most elements: what is stored, read, and spent, beside the two donors.

    python benchmarks/sparse.py [--elements N] [--place DIRECTORY]

Made of random bf16 checkpoints of which a share of elements is equal; beside them the pocket family's donors. Seconds
are processor time of one thread that reads a point and computes it, from the page cache; nothing is written meanwhile.
The best of five.
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


def cost(target: str, vector: Vector) -> tuple[float, int]:
    """Processor seconds and bytes read of target + 0.7 · v."""
    seconds, nbytes = [], 0
    for _ in range(5):
        reader = open_point(WeightPoint(target, (Term(0.7, vector, Mask()),)))
        begun = time.process_time()
        for name, spec in reader.base.tensors.items():
            for _ in reader.chunks(name, 0, spec.numel):
                pass
        seconds.append(time.process_time() - begun)
        nbytes = reader.bytes_read
        reader.close()
    return min(seconds), nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--elements", type=int, default=48 << 20)
    parser.add_argument("--place", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("equal elements   file / checkpoint   bytes read / from donors   seconds / from donors   form")
    for share in SHARES:
        with tempfile.TemporaryDirectory(dir=arguments.place) as name:
            show(f"{share:.0%}", write_donors(Path(name), share, arguments.elements))
    show(
        "pocket family", {"target": str(POCKET / "target"), "plus": str(POCKET / "grpo"), "minus": str(POCKET / "sft")}
    )


def show(name: str, paths: dict[str, str]) -> None:
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
        (slow, much), (fast, little) = cost(paths["target"], donors), cost(paths["target"], Vector(str(place)))
    print(
        f"{name:>14}   {stored / whole:17.3f}   {little / much:24.3f}   {fast / slow:21.2f}   "
        f"{' '.join(sorted(forms)).lower()}"
    )


if __name__ == "__main__":
    main()
