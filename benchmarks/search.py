"""The race against other ways to search, replayed on recorded grids of pocket families with resampled documents.

`python benchmarks/search.py` writes its table into benchmarks/README.md; `--record DIR` scores the family in DIR anew
and adds it to the grids. What a search found is judged on the whole resampled grid, of which it saw only its part.
Methods: successive halving, arXiv 1502.07943 (Jamieson & Talwalkar); empirical Bernstein and the bets on independent
documents, arXiv 2010.09686 (Waudby-Smith & Ramdas).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tables import write_table

from rvdist.report.statistics.race import Race

GRIDS = Path(__file__).parent.parent / "tests/report/statistics/grids.json"
ALPHAS = (-1, -0.75, -0.5, -0.25, 0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1, 1.25, 1.5, 1.75, 2)
TASKS = ("sums", "choice", "control")
CONFIDENCE = 0.95
ROUND = 64
FLIPS = 999

Floats = NDArray[np.float64]
Grid = Mapping[str, Floats]  # task → scores, [candidate, document]


# ---------------------------------------------------------------- recorded and made-up grids


def record(directory: Path) -> None:
    """Scores every α on every held-out document, with plain transformers in fp32, and adds that to the grids."""
    import torch

    from rvdist.pocket import heldout, measure

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
    grids["documents"] = {task: len(heldout.read(task)) for task in TASKS}
    grids["families"][f"seed {seed}"] = packed
    GRIDS.write_text(json.dumps(grids, indent=1, sort_keys=True) + "\n")


def recorded() -> dict[str, Grid]:
    grids = json.loads(GRIDS.read_text())

    def unpacked(row: str, count: int) -> Floats:
        return np.unpackbits(np.frombuffer(bytes.fromhex(row), np.uint8))[:count].astype(float)

    return {
        family: {task: np.array([unpacked(row, grids["documents"][task]) for row in packed[task]]) for task in TASKS}
        for family, packed in grids["families"].items()
    }


def made_up(spread: float) -> Grid:
    """One task of 1,300 documents whose score is a parabola in α: 0.60 at 1, and `spread` less at −1. A document is
    about as hard for every α: of neighbours on the grid one in nine documents tells one from the other."""
    random = np.random.default_rng(0)
    alphas = np.array(ALPHAS, float)
    easy = np.quantile(random.normal(size=10**5) * math.hypot(1, 0.25), 0.60 - spread * ((alphas - 1) / 2) ** 2)
    hard = random.normal(size=1300) + 0.25 * random.normal(size=(len(alphas), 1300))
    return {"made up": (hard < easy[:, None]).astype(float)}


def resampled(grid: Grid, random: np.random.Generator) -> Grid:
    return {task: x[:, random.integers(x.shape[1], size=x.shape[1])] for task, x in grid.items()}


# ---------------------------------------------------------------- ways to search: grid → what was chosen, samples

Search = Callable[[Grid, int], tuple[int, int]]


def race(tolerance: float, grid: Grid, seed: int) -> tuple[int, int]:
    count = len(next(iter(grid.values())))
    documents = {task: range(x.shape[1]) for task, x in grid.items()}
    contest = Race(range(count), documents, round_size=ROUND, confidence=CONFIDENCE, tolerance=tolerance, seed=seed)
    while asked := contest.next():
        shown, racing = asked
        contest.tell({one: [grid[task][one, document] for task, document in shown] for one in racing})
    return contest.outcome.best, contest.outcome.samples


def shuffled(grid: Grid, seed: int) -> Floats:
    """[candidate, document], drawn as the race draws them: by weight, without replacement."""
    weights = np.concatenate([np.full(x.shape[1], 1 / x.shape[1]) for x in grid.values()])
    order = np.argsort(np.random.default_rng([seed, 1]).exponential(size=len(weights)) / weights)
    return np.concatenate(list(grid.values()), axis=1)[:, order]


def independent_bets(differences: Floats, margin: float, error: float) -> NDArray[np.bool_]:
    """The race's evidence, but as if documents were drawn from an endless supply."""
    stakes = np.sin(np.pi * (np.arange(10) + 0.5) / 20) ** 2
    profit = (1 + differences) / (1 + margin) - 1
    wealth = [np.log1p(stake * profit).sum(-1) for stake in stakes]
    return np.logaddexp.reduce(wealth, 0) - math.log(len(stakes)) >= -math.log(error)


def empirical_bernstein(differences: Floats, margin: float, error: float) -> NDArray[np.bool_]:
    """The predictable plug-in empirical Bernstein sequence (theorem 2 there), one-sided, on (1 + y)/2."""
    z = (1 + differences) / 2
    steps = np.arange(1, z.shape[-1] + 1)
    mean = (0.5 + z.cumsum(-1)) / (steps + 1)
    variance = (0.25 + ((z - mean) ** 2).cumsum(-1)) / (steps + 1)
    earlier = np.concatenate([np.full((*z.shape[:-1], 1), 0.5), mean[..., :-1]], -1)
    spread = np.concatenate([np.full((*z.shape[:-1], 1), 0.25), variance[..., :-1]], -1)
    stake = np.minimum(np.sqrt(2 * -math.log(error) / (spread * steps * np.log1p(steps))), 0.75)
    loss = ((z - earlier) ** 2 * (-np.log1p(-stake) - stake)).sum(-1)
    low = ((stake * z).sum(-1) - loss + math.log(error)) / stake.sum(-1)
    return low > (1 + margin) / 2


def pairwise(
    shown: Callable[[Floats, float, float], NDArray[np.bool_]], tolerance: float, grid: Grid, seed: int
) -> tuple[int, int]:
    """A race against the leader by another bound; the chance to err is shared among the opponents."""
    x = shuffled(grid, seed)
    racing, samples, seen = np.arange(len(x)), 0, 0
    error = (1 - CONFIDENCE) / (len(x) - 1)
    while True:
        samples += len(racing) * (min(seen + ROUND, x.shape[1]) - seen)
        seen = min(seen + ROUND, x.shape[1])
        table = x[racing, :seen]
        leader = int(table.mean(1).argmax())
        differences = table[leader] - table
        within = shown(differences, -tolerance, error)
        within[leader] = True
        if within.all() or seen == x.shape[1]:
            return int(racing[leader]), samples
        racing = racing[~shown(differences, 0.0, error)]


def halving(share: float, grid: Grid, seed: int) -> tuple[int, int]:
    """Successive halving with this share of the full grid's samples; the best half goes on."""
    x = shuffled(grid, seed)
    racing, samples, seen = np.arange(len(x)), 0, 0
    rounds = math.ceil(math.log2(len(x)))
    for _ in range(rounds):
        size = min(int(share * x.size / rounds / len(racing)), x.shape[1] - seen)
        samples, seen = samples + size * len(racing), seen + size
        racing = racing[np.argsort(-x[racing, :seen].mean(1), kind="stable")[: math.ceil(len(racing) / 2)]]
    return int(racing[0]), samples


def everyone(share: float, grid: Grid, seed: int) -> tuple[int, int]:
    """Every candidate on the same share of the documents."""
    x = shuffled(grid, seed)
    seen = int(share * x.shape[1])
    return int(x[:, :seen].mean(1).argmax()), seen * len(x)


SEARCHES: dict[str, Search] = {
    "race, tolerance 0": partial(race, 0.0),
    "race, tolerance 0.01": partial(race, 0.01),
    "race, tolerance 0.02": partial(race, 0.02),
    "bets on independent documents, tolerance 0.01": partial(pairwise, independent_bets, 0.01),
    "empirical Bernstein, tolerance 0.01": partial(pairwise, empirical_bernstein, 0.01),
    "successive halving, half of the grid": partial(halving, 0.5),
    "successive halving, a quarter": partial(halving, 0.25),
    "everyone on half of the documents": partial(everyone, 0.5),
    "everyone on a quarter": partial(everyone, 0.25),
}


# ---------------------------------------------------------------- the verdict


@dataclass(frozen=True)
class Replay:
    """`loss`: how much less than the grid's best the chosen candidate scores on the whole resampled grid.
    `tied`: it is the best, or the grid cannot tell them apart at 5 %. `cost`: samples, as a share of the grid's."""

    loss: float
    tied: bool
    cost: float


def indistinguishable(better: Grid, one: int, other: int, random: np.random.Generator) -> bool:
    """McNemar's test with weights: the sign of every document's difference may as well be the other one."""
    changes = np.concatenate([(x[one] - x[other]) / x.shape[1] for x in better.values()])
    changes = changes[changes != 0]
    flipped = random.choice([-1.0, 1.0], (FLIPS, len(changes))) @ changes
    reached = int((np.abs(flipped) >= abs(changes.sum()) - 1e-12).sum())
    return (1 + reached) / (1 + FLIPS) >= 0.05


def replay(grid: Grid, search: Search, count: int) -> list[Replay]:
    """The same `count` resampled grids for every search."""
    found = []
    for seed in range(count):
        random = np.random.default_rng(seed)
        drawn = resampled(grid, random)
        chosen, samples = search(drawn, seed)
        means = np.mean([x.mean(1) for x in drawn.values()], axis=0)
        best = int(means.argmax())
        loss = float(means[best] - means[chosen])
        tied = loss < 1e-12 or indistinguishable(drawn, best, chosen, random)
        found.append(Replay(loss, tied, samples / sum(x.size for x in drawn.values())))
    return found


def lines(grids: Mapping[str, Grid], count: int) -> list[str]:
    table = ["| search | " + " | ".join(grids) + " |", "|---" * (len(grids) + 1) + "|"]
    for name, search in SEARCHES.items():
        cells = []
        for grid in grids.values():
            replays = replay(grid, search, count)
            costs = [one.cost for one in replays]
            cells.append(
                f"{np.mean([one.loss < 1e-12 for one in replays]):.1%}, {np.mean([one.tied for one in replays]):.1%}, "
                f"{max(one.loss for one in replays):.4f}; {np.median(costs):.2f}, {np.quantile(costs, 0.9):.2f}"
            )
        table.append(f"| {name} | " + " | ".join(cells) + " |")
        print(table[-1], flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, metavar="DIR", help="score the family in DIR anew")
    parser.add_argument("--replays", type=int, default=1000)
    options = parser.parse_args()
    if options.record:
        record(options.record)
        return
    grids = recorded() | {"made up, steep": made_up(0.30), "made up, flat": made_up(0.05)}
    write_table("search.py", lines(grids, options.replays))


if __name__ == "__main__":
    main()
