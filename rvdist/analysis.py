"""The analyze stage: what the vectors of a run look like, in files and pictures of its directory."""

from __future__ import annotations

import json

from rvdist.anatomy.analyze import analyze
from rvdist.checkpoint.hub import download_weights
from rvdist.progress import Bar
from rvdist.report.anatomy import anatomy_csv, anatomy_plots, anatomy_sentences, anatomy_tables
from rvdist.run import Run


def analyse(run: Run) -> None:
    """Measures every vector that the run examines beside its target, in one pass over their sources, and writes
    `anatomy.json`, `anatomy.csv` and a picture for each of `anatomy_plots`."""
    vectors = {name: point.terms[0].vector for name, point in run.examined.items()}
    target = next(iter(run.examined.values())).base
    names = {target, *(source for vector in vectors.values() for source in vector.sources())}
    sources = {name: run.sources[name] for name in names}
    for source in sources.values():
        if source.hub:
            download_weights(source)
    nbytes = sum(spec.nbytes for spec in sources[target].tensors.values())

    def account(nbytes_read: int) -> None:
        run.timing.bytes_read += nbytes_read

    with run.timing.phase("analyze"), run.timing.computing():
        with Bar("analyze", nbytes, run.log) as bar:
            anatomy = analyze(vectors, target, sources, progress=bar.advance, account=account)
        (run.directory / "anatomy.json").write_text(json.dumps(anatomy.to_json(), indent=1) + "\n")
        (run.directory / "anatomy.csv").write_text(anatomy_csv(anatomy))
        for name, picture in anatomy_plots(anatomy).items():
            (run.directory / f"anatomy-{name}.png").write_bytes(picture)
            run.figures[name] = picture
    run.anatomy = anatomy_sentences(anatomy)
    run.tables = [(table.title, table.head, table.rows) for table in anatomy_tables(anatomy)]
    for sentence in run.anatomy:
        run.say(sentence)
    run.say(f"vector: {run.directory / 'anatomy.csv'}")
