"""The analyze stage: what the vectors of a run look like, in files and pictures of its directory."""

from __future__ import annotations

import json

from rvdist.core.progress import Bar
from rvdist.report.anatomy import anatomy_csv, anatomy_sentences, anatomy_tables
from rvdist.report.findings import Anatomy, Exhibit
from rvdist.report.pictures.anatomy import anatomy_plots
from rvdist.stages.job import Prepared
from rvdist.weights.anatomy.analyze import analyze
from rvdist.weights.checkpoint.hub import download_weights


def analyse(prepared: Prepared) -> Anatomy:
    """Measures every vector that the job examines beside its target, in one pass over their sources, and writes
    `anatomy.json`, `anatomy.csv` and a picture for each of `anatomy_plots`."""
    vectors = {name: point.terms[0].vector for name, point in prepared.examined.items()}
    target = next(iter(prepared.examined.values())).base
    names = {target, *(source for vector in vectors.values() for source in vector.sources())}
    sources = {name: prepared.sources[name] for name in names}
    for source in sources.values():
        if source.hub:
            download_weights(source)
    nbytes = sum(spec.nbytes for spec in sources[target].tensors.values())

    def account(nbytes_read: int) -> None:
        prepared.timing.bytes_read += nbytes_read

    with prepared.timing.phase("analyze"), prepared.timing.count_cpu():
        with Bar("analyze", nbytes, prepared.job.log) as bar:
            anatomy = analyze(vectors, target, sources, progress=bar.advance, account=account)
        (prepared.directory / "anatomy.json").write_text(json.dumps(anatomy.to_json(), indent=1) + "\n")
        (prepared.directory / "anatomy.csv").write_text(anatomy_csv(anatomy))
        pictures = anatomy_plots(anatomy)
        for name, picture in pictures.items():
            (prepared.directory / f"anatomy-{name}.png").write_bytes(picture)
    sentences = anatomy_sentences(anatomy)
    for sentence in sentences:
        prepared.say(sentence)
    prepared.say(f"vector: {prepared.directory / 'anatomy.csv'}")
    return Anatomy(
        sentences,
        [Exhibit(name, picture) for name, picture in pictures.items()],
        [(table.title, table.head, table.rows) for table in anatomy_tables(anatomy)],
    )
