"""Linear mode connectivity: the perplexity of a text along the straight lines between donors and from the target.

Models of one origin should be joined by a line on which the loss does not rise above its worse end by much
(arXiv 1912.05671, Frankle et al.; the paper's reason why a vector can be moved at all, arXiv 2509.01363).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rvdist.core.config import BenchmarksConfig, SearchConfig
from rvdist.core.errors import BadInput
from rvdist.core.point import Arm
from rvdist.report.findings import Anatomy, Exhibit
from rvdist.report.pictures.connectivity import connectivity_plot
from rvdist.stages.evaluate import Evaluator
from rvdist.stages.job import Prepared
from rvdist.stages.score import Scoring
from rvdist.weights.checkpoint.directory import read_json

FILE = "connectivity.json"


@dataclass(frozen=True)
class Line:
    """`bits`: bits a byte of the whole text at each of `shares` of the way, the first 0 and the last 1."""

    name: str
    shares: tuple[float, ...]
    bits: tuple[float, ...]

    @property
    def barrier(self) -> float:
        """The most bits a byte that a point lies above the line between both ends (arXiv 1912.05671); at least 0."""
        first, last = self.bits[0], self.bits[-1]
        return max(b - (first + s * (last - first)) for s, b in zip(self.shares, self.bits, strict=True))

    @property
    def rise(self) -> float:
        """The most bits a byte that a point lies above the worse end; at least 0."""
        return max(self.bits) - max(self.bits[0], self.bits[-1])

    def sentence(self) -> str:
        """The same in words."""
        places = {"donors": "between the donors", "vectors": "from the target along the vectors together"}
        where = places.get(self.name, "from the target along the vector")
        return (
            f"Along the line {where} the text costs {self.bits[0]:.4f} to {self.bits[-1]:.4f} bits a byte; the barrier "
            f"is {self.barrier:.4f}, and it rises {self.rise:.4f} above the worse end."
        )


def reader(prepared: Prepared) -> Prepared:
    """A job of its own, below the directory of the first, whose arms read the text at every point of the lines. It
    shares what the first has found out of its sources."""
    text = Path(prepared.settings.analyze.text or "").expanduser().absolute()
    asked = BenchmarksConfig(tasks=[f"text:{text}"], apply_chat_template=False)
    settings = replace(prepared.settings, benchmarks=asked, arms=[], search=SearchConfig())
    arms = [arm for line in prepared.lines.values() for arm in line]
    job = replace(prepared.job, settings=settings, directory=prepared.directory / "connectivity")
    return replace(prepared, job=job, settings=settings, arms=arms, examined={}, written={}, saved=None, lines={})


def measure(evaluator: Evaluator, prepared: Prepared, reading: Scoring) -> tuple[Anatomy, list[Line]]:
    """Reads the text at every point of the job's lines. Writes FILE."""
    reading.prepared.directory.mkdir(exist_ok=True)
    with prepared.timing.phase("connectivity"):
        evaluator.evaluate([reading])
    reading.require_scores()
    lines = [Line(name, _shares(arms), _bits(reading.prepared, arms)) for name, arms in prepared.lines.items()]
    account = [asdict(line) | {"barrier": line.barrier, "rise": line.rise} for line in lines]
    (prepared.directory / FILE).write_text(json.dumps(account, indent=2) + "\n")
    picture = connectivity_plot([(line.name, line.shares, line.bits) for line in lines])
    (prepared.directory / "anatomy-connectivity.png").write_bytes(picture)
    sentences = [line.sentence() for line in lines]
    for sentence in sentences:
        prepared.say(sentence)
    return Anatomy(sentences, [Exhibit("connectivity", picture)]), lines


def _shares(arms: Sequence[Arm]) -> tuple[float, ...]:
    return tuple(step / (len(arms) - 1) for step in range(len(arms)))


def _bits(prepared: Prepared, arms: Sequence[Arm]) -> tuple[float, ...]:
    """lm-eval's own number, of all bytes together."""
    (task,) = prepared.settings.benchmarks.tasks
    return tuple(_score(prepared.directory / "results" / f"{arm.name}.json", task) for arm in arms)


def _score(file: Path, task: str) -> float:
    """Raises BadInput where the results say none."""
    try:
        return float(read_json(file)["results"][task]["bits_per_byte,none"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise BadInput(f"{file}: has no bits_per_byte of the text; run the analysis again") from None
