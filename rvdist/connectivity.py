"""Linear mode connectivity: the perplexity of a text along the straight lines between donors and from the target.

Models of one origin should be joined by a line on which the loss does not rise above its worse end by much
(arXiv 1912.05671, Frankle et al.; the paper's reason why a vector can be moved at all, arXiv 2509.01363).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rvdist import config
from rvdist.config import BenchmarksConfig
from rvdist.evaluation import Examination
from rvdist.point import Arm
from rvdist.report.connectivity import connectivity_plot
from rvdist.run import Run

FILE = "connectivity.json"


@dataclass(frozen=True)
class Line:
    """`bits`: bits a byte of the whole text at each of `shares` of the way. `barrier`: the most by which they lie above
    the straight line between both ends, and `rise`: above the worse end; neither is below 0."""

    name: str
    shares: tuple[float, ...]
    bits: tuple[float, ...]

    @property
    def barrier(self) -> float:
        first, last = self.bits[0], self.bits[-1]
        return max(b - (first + s * (last - first)) for s, b in zip(self.shares, self.bits, strict=True))

    @property
    def rise(self) -> float:
        return max(self.bits) - max(self.bits[0], self.bits[-1])

    def sentence(self) -> str:
        where = "between the donors" if self.name == "donors" else "from the target along the vector"
        return (
            f"Along the line {where} the text costs {self.bits[0]:.4f} to {self.bits[-1]:.4f} bits a byte; the barrier "
            f"is {self.barrier:.4f}, and it rises {self.rise:.4f} above the worse end."
        )


def reader(run: Run, lines: dict[str, list[Arm]]) -> Run:
    """A run of its own, below the directory of the first, whose arms read the text at every point of the lines. It
    shares what the first has found out of its sources."""
    text = Path(run.settings.analyze.text or "").expanduser().absolute()
    asked = BenchmarksConfig(tasks=[f"text:{text}"], apply_chat_template=False)
    settings = replace(run.settings, benchmarks=asked, arms=[], search=config.SearchConfig())
    arms = [arm for line in lines.values() for arm in line]
    own = run.directory / "connectivity"
    return replace(run, settings=settings, directory=own, arms=arms, examined={}, written={}, engine={}, unscored={})


def measure(examination: Examination, run: Run) -> None:
    """Reads the text at every point, and adds what is found to the anatomy of the run. Writes FILE."""
    assert run.reader is not None
    lines: dict[str, list[Arm]] = {}
    for arm in run.reader.arms:
        lines.setdefault(arm.name.partition(" ")[0], []).append(arm)
    run.reader.directory.mkdir(exist_ok=True)
    with run.timing.phase("connectivity"):
        examination.evaluate([run.reader])
    run.reader.require_scores()
    found = [Line(name, _shares(arms), _bits(run.reader, arms)) for name, arms in lines.items()]
    account = [asdict(line) | {"barrier": line.barrier, "rise": line.rise} for line in found]
    (run.directory / FILE).write_text(json.dumps(account, indent=2) + "\n")
    run.figures["connectivity"] = connectivity_plot([(line.name, line.shares, line.bits) for line in found])
    (run.directory / "anatomy-connectivity.png").write_bytes(run.figures["connectivity"])
    for line in found:
        run.say(line.sentence())
    run.anatomy = [*run.anatomy, *(line.sentence() for line in found)]


def _shares(arms: Sequence[Arm]) -> tuple[float, ...]:
    return tuple(step / (len(arms) - 1) for step in range(len(arms)))


def _bits(run: Run, arms: Sequence[Arm]) -> tuple[float, ...]:
    """lm-eval's own number, of all bytes together."""
    (task,) = run.settings.benchmarks.tasks
    files = [run.directory / "results" / f"{arm.name}.json" for arm in arms]
    return tuple(json.loads(file.read_text())["results"][task]["bits_per_byte,none"] for file in files)
