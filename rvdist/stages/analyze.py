"""The analyze stage: what the vectors of a run look like, in files and pictures of its directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rvdist.core.progress import Bar
from rvdist.report.anatomy import anatomy_csv, anatomy_sentences, anatomy_tables
from rvdist.report.findings import Anatomy, Exhibit, Findings
from rvdist.report.pictures.anatomy import anatomy_plots
from rvdist.report.transfer import Line, outcome, transfer, transfer_facts
from rvdist.stages.job import Prepared
from rvdist.weights.anatomy.analyze import analyze
from rvdist.weights.anatomy.findings import Anatomy as Found
from rvdist.weights.checkpoint.hub import download_weights

FILE = "anatomy.json"


@dataclass(frozen=True)
class Analysis:
    """What was found of a job's vectors, what is shown of it, and what a text costs along `lines`."""

    found: Found
    shown: Anatomy
    lines: Sequence[Line] = ()

    def join(self, shown: Anatomy, lines: Sequence[Line]) -> Analysis:
        """With what was measured along lines."""
        sentences = [*self.shown.sentences, *shown.sentences]
        return replace(
            self,
            shown=replace(self.shown, sentences=sentences, exhibits=[*self.shown.exhibits, *shown.exhibits]),
            lines=lines,
        )


def analyse(prepared: Prepared) -> Analysis:
    """Measures every vector that the job examines beside its target, in one pass over their sources, and writes
    FILE, `anatomy.csv` and a picture for each of `anatomy_plots`."""
    vectors = {name: point.terms[0].vector for name, point in prepared.examined.items()}
    target = next(iter(prepared.examined.values())).base
    names = {target, *(source for vector in vectors.values() for source in vector.sources())}
    sources = {name: prepared.sources[name] for name in names}
    for source in sources.values():
        if source.hub:
            download_weights(source)

    def account(nbytes_read: int) -> None:
        prepared.timing.bytes_read += nbytes_read

    with prepared.timing.phase("analyze"), prepared.timing.count_cpu():
        with Bar("analyze", sources[target].nbytes, prepared.job.log) as bar:
            anatomy = analyze(vectors, target, sources, progress=bar.advance, account=account)
        (prepared.directory / FILE).write_text(json.dumps(anatomy.to_json(), indent=1) + "\n")
        (prepared.directory / "anatomy.csv").write_text(anatomy_csv(anatomy))
        pictures = anatomy_plots(anatomy)
        for name, picture in pictures.items():
            (prepared.directory / f"anatomy-{name}.png").write_bytes(picture)
    sentences = anatomy_sentences(anatomy)
    for sentence in sentences:
        prepared.say(sentence)
    prepared.say(f"vector: {prepared.directory / 'anatomy.csv'}")
    exhibits = [Exhibit(name, picture) for name, picture in pictures.items()]
    return Analysis(anatomy, Anatomy(sentences, exhibits, anatomy_tables(anatomy)))


def explain(prepared: Prepared, analysis: Analysis, findings: Findings) -> Anatomy:
    """Says why vectors do not help, or may not, by all that the job has found out, and writes it into FILE."""
    found = {
        name: transfer(analysis.found, name, outcome(point.terms[0].vector, findings), analysis.lines)
        for name, point in prepared.examined.items()
    }
    account = analysis.found.to_json() | {"transfer": {name: one.to_json() for name, one in found.items()}}
    (prepared.directory / FILE).write_text(json.dumps(account, indent=1) + "\n")
    facts, reasons = transfer_facts(found), [sentence for one in found.values() for sentence in one.sentences()]
    for sentence in [*facts, *reasons]:
        prepared.say(sentence)
    return replace(analysis.shown, sentences=[*analysis.shown.sentences, *facts], reasons=reasons)
