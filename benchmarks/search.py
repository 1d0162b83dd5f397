"""Recorded grids of pocket families. `--record DIR` scores the family in DIR anew."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

GRIDS = Path(__file__).parent.parent / "tests/fleet/grids.json"
ALPHAS = (-1, -0.75, -0.5, -0.25, 0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1, 1.25, 1.5, 1.75, 2)
TASKS = ("sums", "choice", "control")


def record(directory: Path) -> None:
    """Scores every α on every held-out document, with plain transformers in fp32, and adds that to the grids."""
    import torch

    from rvdist.pocket import measure

    torch.set_num_threads(1)
    family = measure.Family(directory, torch.float32)
    seed = json.loads((directory / "training.json").read_text())["seed"]
    packed: dict[str, list[str]] = {task: [] for task in TASKS}
    for alpha in ALPHAS:
        model = family.at(alpha)
        for task in TASKS:
            correct = measure.SCORES[task](model, family.tokenizer, None)
            packed[task].append(np.packbits(correct).tobytes().hex())
            print(f"seed {seed}, alpha {alpha:g}, {task}: {np.mean(correct):.3f}", flush=True)
    grids = json.loads(GRIDS.read_text()) if GRIDS.exists() else {"families": {}}
    grids["alphas"] = ALPHAS
    grids["documents"] = {task: len(measure.heldout.read(task)) for task in TASKS}
    grids["families"][f"seed {seed}"] = packed
    GRIDS.write_text(json.dumps(grids, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, metavar="DIR", help="score the family in DIR anew")
    options = parser.parse_args()
    record(options.record)


if __name__ == "__main__":
    main()
