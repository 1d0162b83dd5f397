"""The index and plan stages of one job: its sources opened and checked, its points named by what they are made of, and
everything refused that can be, before anything is written."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from rvdist import cluster, compat, config
from rvdist.checkpoint.directory import Checkpoint
from rvdist.checkpoint.journal import MANIFEST, Manifest
from rvdist.checkpoint.source import open_source
from rvdist.checkpoint.staging import companions, discards, require_free
from rvdist.errors import BadInput
from rvdist.merge.plan import Plan
from rvdist.merging import plan_of, vector_is_complete
from rvdist.point import Arm, Rename, Term, Vector, WeightPoint
from rvdist.recipe import read_recipe
from rvdist.run import Run


@dataclass
class Known:
    """What the jobs of a command find out or do once for all of them: who writes what, run directories that are begun
    and notes told of them, sources by name and renaming, and whether a point's vectors may be applied, whatever α."""

    promised: dict[Path, WeightPoint] = field(default_factory=dict)
    repositories: dict[Path, str] = field(default_factory=dict)
    begun: set[Path] = field(default_factory=set)
    told: set[tuple[Path, str]] = field(default_factory=set)
    _opened: dict[tuple[str, Rename], Checkpoint] = field(default_factory=dict)
    _reports: dict[tuple[WeightPoint, bool, bool], compat.Compatibility] = field(default_factory=dict)

    def open(self, source: str, rename: Rename = ()) -> Checkpoint:
        if (source, rename) not in self._opened:
            self._opened[source, rename] = open_source(source, rename)
        return self._opened[source, rename]

    def check(self, run: Run, point: WeightPoint) -> compat.Compatibility:
        """Raises BadInput where the point must not be computed."""
        settings = run.settings
        line = WeightPoint(point.base, tuple(replace(term, alpha=1.0) for term in point.terms))
        key = (line, settings.compat.force, config.keeps_extra_rows(settings))
        if key not in self._reports:
            self._reports[key] = compat.check(line, run.sources, *key[1:])
        return self._reports[key]


def prepare(run: Run, known: Known) -> None:
    """Index and plan, which write nothing. What other jobs have promised to write is not written again."""
    recipe = _recipe(run, run.settings.recipe, known) if run.settings.recipe else None
    settings = run.settings
    stages = config.stages(settings)
    merges = settings.output and {"plan", "merge"} & set(stages)
    written = run.written or (config.outputs(settings, recipe) if merges else {})
    arms = run.arms or (config.arms(settings, recipe) if "evaluate" in stages else [])
    saved = config.saved(settings)
    examined = config.examined(settings) if "analyze" in stages else {}
    lines = config.lines(settings) if examined and settings.analyze.text else {}
    if stages != ["plan"]:
        _require_kept(run, written, saved)
    if "publish" in stages:
        from rvdist.publish import require

        repositories = config.published(settings, recipe)
        require(run, repositories, known.repositories)
        known.repositories |= repositories
    with run.timing.phase("index"):
        vector = _index_vector(run, saved, written) if saved and "merge" in stages else None
        on_lines = [arm.point for line in lines.values() for arm in line]
        _index(run, [*written.values(), *(arm.point for arm in arms), *examined.values(), *on_lines], known)
        written = {output: compat.settle(point, run.sources) for output, point in written.items()}
        if "publish" in stages:
            run.published = written | ({saved.directory: vector} if saved and vector else {})
        run.examined = {name: compat.settle(point, run.sources) for name, point in examined.items()}
        run.arms = [_settled(run, arm) for arm in arms]
        used = {source for point in run.notes for source in point.sources()} | set(vector.sources() if vector else ())
        run.sources = {name: source for name, source in run.sources.items() if name in used}
    with run.timing.phase("plan"):
        config.require_resources(settings)
        plan = plan_of([run], written)
        if complete := _complete(run, plan) | _promised_already(written, known.promised):
            written = {output: point for output, point in written.items() if output not in complete}
            plan = plan_of([run], written)
        require_no_source(run, written, run.sources)
        for output in {output for output in written if not discards(output)}:
            require_free(output, settings.overwrite)
            _require_place(output)
            companions(run.sources[written[output].base])
    if saved and vector:
        require_no_source(run, [saved.directory], run.sources)
        if not vector_is_complete(run, saved, vector):
            require_free(saved.directory, settings.overwrite)
            _require_place(saved.directory)
            run.saved = saved, vector
    if run.arms or lines:
        with run.timing.phase("digest"):
            _digest(run)
    if lines:
        from rvdist.connectivity import reader

        run.reader = reader(run, {name: [_settled(run, arm) for arm in line] for name, line in lines.items()})
    run.written = written
    if "merge" in stages:
        known.promised |= written


def _recipe(run: Run, file: str, known: Known) -> WeightPoint:
    """What a mergekit recipe asks for; its base is the target, its dtype that of the output if `dtype` is not set."""
    run.asked = settings = run.settings
    config.require_recipe_alone(settings)
    found = read_recipe(Path(file).expanduser(), lambda base: known.open(base).tensors, settings.merge.seed)
    run.settings = replace(settings, target=found.point.base, dtype=settings.dtype or found.dtype)
    return found.point


def _settled(run: Run, arm: Arm) -> Arm:
    return replace(arm, point=compat.settle(arm.point, run.sources))


def _index(run: Run, points: Sequence[WeightPoint], known: Known) -> None:
    renames: dict[str, Rename] = {}
    for point in dict.fromkeys(points):
        for source, rename in point.renames():
            if renames.setdefault(source, rename) != rename:
                raise BadInput(
                    f"vector.rename: {source} is a source both with it and without, or with another; give one of them "
                    "another path, such as a symbolic link"
                )
            if source not in run.sources:
                run.sources[source] = known.open(source, rename)
        report = known.check(run, point)
        run.notes[compat.settle(point, run.sources)] = (*report.refusals, *report.exceptions, *_zeros(run, point))
    for note in dict.fromkeys(note for notes in run.notes.values() for note in notes):
        if (run.directory, note) not in known.told:
            run.note(note)
            known.told.add((run.directory, note))


def _zeros(run: Run, point: WeightPoint) -> list[str]:
    """A sentence for each vector whose donors are the same to the byte."""
    pairs = dict.fromkeys((term.vector.plus, term.vector.minus) for term in point.active_terms)
    return [
        f"{plus} and {minus} hold the same weights: their vector is zero, and adding it changes nothing"
        for plus, minus in pairs
        if minus and run.sources[plus].holds_the_same_as(run.sources[minus])
    ]


def _index_vector(run: Run, saved: config.Saved, outputs: Collection[Path]) -> Vector:
    """The vector to be stored, named by what it is computed from."""
    if saved.directory in outputs:
        raise BadInput(f"vector.save: {saved.directory} is an output of the merge too; choose another directory")
    run.sources |= {source: open_source(source, saved.vector.rename) for source in saved.vector.sources()}
    alone = WeightPoint(saved.vector.plus, (Term(1.0, saved.vector),))
    for note in (*compat.check_vector(saved.vector, run.sources), *_zeros(run, alone)):
        run.note(note)
    return compat.settle_vector(saved.vector, run.sources)


def _digest(run: Run) -> None:
    """Names every point by what it is made of; reads all sources once and remembers."""
    from rvdist.checkpoint.digest import checkpoint_digest

    contents = {name: checkpoint_digest(source, run.cache / "digests") for name, source in run.sources.items()}
    run.digests |= {point: point.digest(contents) for point in run.notes}


def _complete(run: Run, plan: Plan) -> set[Path]:
    """The outputs that an earlier run of the same plan has finished; overwriting does them again."""
    found = set()
    for output, digests in zip(plan.outputs, plan.digests, strict=True):
        for directory, digest in zip(output.directories, digests, strict=True):
            manifest = directory / MANIFEST
            if not run.settings.overwrite and manifest.exists() and Manifest.read(directory).plan == digest:
                run.say(f"{directory}: already complete")
                found.add(directory)
    return found


def _promised_already(written: Mapping[Path, WeightPoint], promised: Mapping[Path, WeightPoint]) -> set[Path]:
    shared = {output for output in written if output in promised and not discards(output)}
    for output in shared:
        if written[output] != promised[output]:
            raise BadInput(f"output: several jobs would write {output}; put {config.PLACEHOLDERS} into it")
    return shared


def _require_kept(run: Run, outputs: Collection[Path], saved: config.Saved | None) -> None:
    """Nothing is written where Ray deletes it."""
    places = [("output", output) for output in outputs] + ([("vector.save", saved.directory)] if saved else [])
    for key, path in [*places, ("hydra.run.dir (with -m hydra.sweep.dir)", run.directory)]:
        if cluster.is_temporary(path):
            raise BadInput(
                f"{key}: {path} is in the working directory of a Ray job and deleted with it; give an absolute path"
            )


def require_no_source(run: Run, outputs: Collection[Path], sources: Mapping[str, Checkpoint]) -> None:
    """Overwriting must never replace what is being read, be it by another job."""
    for (name, source), output in product(sources.items(), outputs if run.settings.overwrite else ()):
        path = source.path.resolve()
        if output.resolve() in (path, *path.parents):
            raise BadInput(
                f"output: {output} is or holds the source {name}, which would be lost; choose another output"
            )


def _require_place(output: Path) -> None:
    """Raises BadInput where no directory can be made, which would be found only when all outputs are begun."""
    above = next(path for path in output.parents if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise BadInput(
            f"{output}: cannot be created, since {above} is no directory that we may write to; choose another"
        )
