"""The report stage: what was found, on the terminal and as files of a run directory.

    alpha.png .pdf          every benchmark along α              changes.png .pdf       the paper's table as a picture
    paper.csv               the paper's table                    robustness.csv .png .pdf   edited questions
    seeds.csv               the spread between seeds             race.png .pdf          how the arms were chosen
    cost.png .pdf           scores against tokens
    report.html             all of it in one page

Those for which there is something to say. Computes nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from rvdist.report.claims import spread_sentences
from rvdist.report.findings import Anatomy, Findings, Making
from rvdist.report.page.page import write_page
from rvdist.report.paper import write_paper_table
from rvdist.report.pictures.alpha import alpha_figure
from rvdist.report.pictures.cost import cost_figure
from rvdist.report.pictures.drawing import render
from rvdist.report.pictures.forest import changes_figure, robustness_figure
from rvdist.report.pictures.race import race_figure
from rvdist.report.statistics.robustness import write_robustness
from rvdist.report.statistics.seeds import write_seeds
from rvdist.report.terminal import print_paper_table, print_robustness, print_scores, say


def print_findings(findings: Findings, console: Console | None = None) -> None:
    """Claims, every score, edited questions, the spread between seeds, and where changes were reported or something
    could not be asked the paper's table."""
    console = console or Console()
    if not findings.rows:
        return
    print_scores(findings.claims, findings.benchmarks, findings.footnotes, console, findings.dissent)
    if findings.edited:
        console.print()
        print_robustness(findings.edited, findings.scales, findings.baseline, console)
    if findings.spreads:
        console.print()
        for sentence in spread_sentences(findings.spreads, findings.scales):
            say(sentence, console, "")
    if findings.reported or findings.lacking:
        console.print()
        print_paper_table(findings.lines, console)


def write_report(directory: Path, findings: Findings, making: Making, anatomy: Anatomy | None = None) -> None:
    """Writes the files. Names are fixed; what was there under them is replaced."""
    wanted: dict[str, Callable[[], Figure | None]] = {}
    if findings.benchmarks:
        wanted = {
            "alpha": lambda: alpha_figure(findings.benchmarks, not findings.runners),
            "changes": lambda: changes_figure(findings.lines),
            "cost": lambda: cost_figure(findings.benchmarks),
        }
        write_paper_table(directory / "paper.csv", findings.lines)
    if findings.runners:
        wanted["race"] = lambda: race_figure(findings.runners)
    if findings.edited:
        wanted["robustness"] = lambda: robustness_figure(findings.edited, findings.scales)
        write_robustness(directory / "robustness.csv", findings.edited)
    if findings.spreads:
        write_seeds(directory / "seeds.csv", findings.spreads)
    pictures = {name: found for name, draw in wanted.items() if (found := render(draw, "png", "pdf"))}
    for name, (png, pdf) in pictures.items():
        (directory / f"{name}.png").write_bytes(png)
        (directory / f"{name}.pdf").write_bytes(pdf)
    shown = {name: png for name, (png, _) in pictures.items()}
    write_page(directory / "report.html", findings, making, shown, anatomy)
