"""The index and plan stages of one job: its sources opened and checked, its points named by what they are made of, and
everything refused that can be, before anything is written."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from rvdist.core import cluster, config
from rvdist.core.config import Config, OutputFormat
from rvdist.core.errors import BadInput
from rvdist.core.method import LINEAR
from rvdist.core.point import Rename, Term, Vector, WeightPoint
from rvdist.core.recipe import read_recipe
from rvdist.core.vocabulary import Vocabulary
from rvdist.merge.plan import Plan, build_plan
from rvdist.stages.job import Job, Prepared
from rvdist.weights import compat
from rvdist.weights.checkpoint.beside import companions
from rvdist.weights.checkpoint.bound import settle, settle_vector
from rvdist.weights.checkpoint.difference import is_adapter
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.elements import hold_the_same
from rvdist.weights.checkpoint.fp8 import Scaled
from rvdist.weights.checkpoint.journal import is_complete
from rvdist.weights.checkpoint.layouts import lay_out, layout_of
from rvdist.weights.checkpoint.remapped import map_of
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.checkpoint.staging import discards, require_free
from rvdist.weights.checkpoint.vocabulary import remap
from rvdist.weights.rows import require_low_rank, require_memory

if TYPE_CHECKING:
    from rvdist.weights.interference import Interference


_WRITE = "write the output first (stages=[merge]), and name that where a checkpoint is asked for"
_READ = (
    "score it along α instead (benchmarks.tasks=[text:FILE] sweep.alphas=[0,0.5,1]), from the target or target=MINUS"
)


@dataclass
class Known:
    """What the jobs of a command find out or do once for all of them: who writes what, run directories that are begun
    and notes told of them, sources by name and renaming, and whether a point's vectors may be applied, whatever α."""

    promised: dict[Path, tuple[WeightPoint, OutputFormat]] = field(default_factory=dict)
    repositories: dict[Path, str] = field(default_factory=dict)
    begun: set[Path] = field(default_factory=set)
    told: set[tuple[Path, str]] = field(default_factory=set)
    _opened: dict[tuple[str, Rename], Checkpoint] = field(default_factory=dict)
    _reports: dict[tuple[WeightPoint, bool, bool], compat.Compatibility] = field(default_factory=dict)
    _interferences: dict[WeightPoint, Interference] = field(default_factory=dict)

    def open(self, source: str, rename: Rename = ()) -> Checkpoint:
        """The source, opened once for all jobs. Raises BadInput."""
        if (source, rename) not in self._opened:
            self._opened[source, rename] = open_source(source, rename)
        return self._opened[source, rename]

    def check(self, settings: Config, sources: Mapping[str, Checkpoint], point: WeightPoint) -> compat.Compatibility:
        """Raises BadInput where the point must not be computed."""
        line = replace(point, terms=tuple(replace(term, alpha=1.0) for term in point.terms))
        key = (line, settings.compat.force, settings.compat.extra_rows == "keep")
        if key not in self._reports:
            self._reports[key] = compat.check(line, sources, *key[1:])
        return self._reports[key]

    def interference(self, point: WeightPoint, sources: Mapping[str, Checkpoint]) -> Interference:
        """How the vectors of a settled point get into each other's way; what several points have alike is read once."""
        from rvdist.weights.interference import measure_interference  # torch takes a while to import

        key = replace(point, method=LINEAR)
        if key not in self._interferences:
            self._interferences[key] = measure_interference(point, sources)
        return self._interferences[key]


def prepare(job: Job, known: Known) -> Prepared:
    """Index and plan, which write nothing. What other jobs have promised to write is not written again."""
    settings, recipe = _with_recipe(job, known)
    stages = config.stages(settings)
    merges = settings.output and {"plan", "merge"} & set(stages)
    asked = job.outputs or (config.outputs(settings, recipe) if merges else {})
    listed = job.arms or (config.arms(settings, recipe) if "evaluate" in stages else [])
    foreseen = listed
    if "plan" in stages and not listed and settings.benchmarks.tasks:
        foreseen = config.arms(settings, recipe)
    stored = config.vector_to_save(settings)
    examined = config.vector_points(settings) if "analyze" in stages else {}
    lines = config.lines(settings) if examined and settings.analyze.text else {}
    if stages != ["plan"]:
        _require_kept(job, asked, stored)
    if "publish" in stages:
        from rvdist.stages.publish import require

        repositories = config.repositories(settings, recipe)
        require(job, repositories, known.repositories)
        known.repositories |= repositories
    with job.timing.phase("index"):
        on_lines = [arm.point for line in lines.values() for arm in line]
        index = _Index(job, settings, known)
        vector = index.add_vector(stored, asked) if stored and "merge" in stages else None
        index.add([*asked.values(), *(arm.point for arm in foreseen), *examined.values()])
        if lines and any(index.settle(point).vocabulary for point in examined.values()):
            raise BadInput(f"tokenizer: is set, and analyze.text reads donors with their own tokens; {_READ}")
        index.add(on_lines)
        outputs = {output: index.settle(point) for output, point in asked.items()}
        for base in {index.settle(point).base for point in [*(arm.point for arm in foreseen), *on_lines]}:
            _require_plain(index.sources[base], settings)
        used = {source for point in index.notes for source in point.sources()} | set(vector.sources() if vector else ())
        sources = {name: source for name, source in index.sources.items() if name in used}
    _require_apart(job.directory, sources, [*outputs, *([stored.directory] if stored else [])])
    with job.timing.phase("plan"):
        config.require_resources(settings)
        written = _to_write(job, settings, sources, outputs, known)
        require_no_source(settings, written, sources)
        for output in {output for output in written if not discards(output)}:
            require_free(output, settings.overwrite)
            _require_place(output)
            companions(sources[written[output].base])
    saved = None
    if stored and vector:
        from rvdist.weights.store import is_saved

        require_no_source(settings, [stored.directory], sources)
        with job.timing.phase("digest"):
            digested = config.cache_directory(settings) / "digests"
            complete = is_saved(vector, sources, stored.directory, stored.storage, digested)
        if complete and not settings.overwrite:
            job.say(f"{stored.directory}: already complete")
        else:
            require_free(stored.directory, settings.overwrite)
            _require_place(stored.directory)
            saved = stored, vector
    digests: dict[WeightPoint, str] = {}
    if listed or lines:
        with job.timing.phase("digest"):
            digests = _digests(settings, sources, index.notes)
    if "merge" in stages:
        known.promised |= {_real(output): (point, settings.output_format) for output, point in written.items()}
    return Prepared(
        job=job,
        settings=settings,
        sources=sources,
        notes=index.notes,
        digests=digests,
        written=written,
        saved=saved,
        published=outputs | ({stored.directory: vector} if stored and vector else {}) if "publish" in stages else {},
        arms=[replace(arm, point=index.settle(arm.point)) for arm in listed],
        foreseen=[replace(arm, point=index.settle(arm.point)) for arm in foreseen if "plan" in stages],
        examined={name: index.settle(point) for name, point in examined.items()},
        lines={name: [replace(arm, point=index.settle(arm.point)) for arm in line] for name, line in lines.items()},
        interference=partial(known.interference, sources=sources),
    )


def _require_plain(base: Checkpoint, settings: Config) -> None:
    """Raises BadInput for a quantised base whose points would be scored as nothing writes them."""
    if isinstance(base, Scaled) and settings.engine.replay is None and settings.output_format.dtype != "BF16":
        raise BadInput(
            f"{base.path}: is quantised, and engines serve plain weights; set dtype=bfloat16, and points are scored as "
            "a merge writes them then"
        )


def _with_recipe(job: Job, known: Known) -> tuple[Config, WeightPoint | None]:
    """The settings, and what a mergekit recipe asks for, if there is one: its base is the target, its dtype that of the
    output if `dtype` is not set."""
    settings = job.settings
    if not settings.recipe:
        return settings, None
    config.require_recipe_alone(settings)
    file = Path(settings.recipe).expanduser()
    recipe = read_recipe(file, lambda base: known.open(base).tensors, settings.merge.seed)
    return replace(settings, target=recipe.point.base, dtype=settings.dtype or recipe.dtype), recipe.point


class _Index:
    """The sources of a job, by name, and what is said of each of its points, as it is settled."""

    def __init__(self, job: Job, settings: Config, known: Known) -> None:
        self._job, self._settings, self._known = job, settings, known
        self.sources: dict[str, Checkpoint] = {}
        self.notes: dict[WeightPoint, tuple[str, ...]] = {}
        self._compared: set[tuple[str, str]] = set()  # donors and bases whose layouts of experts were compared
        self._laid_out: dict[str, Checkpoint] = {}  # what donors became for their first base
        self._plain: dict[str, Checkpoint] = {}  # sources with their own tokens
        self._became: dict[str, Checkpoint] = {}  # and with those of the output
        self._maps: dict[tuple[Vocabulary, tuple[str, ...]], Mapping[str, Checkpoint]] = {}

    def settle(self, point: WeightPoint) -> WeightPoint:
        """The point as what its sources are decides it."""
        return settle(point, self.sources)

    def add(self, points: Sequence[WeightPoint]) -> None:
        """Opens the sources of these points. Raises BadInput for what cannot be opened or must not be computed."""
        job, renames, bases = self._job, dict[str, Rename](), {point.base for point in points}
        for point in dict.fromkeys(points):
            for source, rename in point.renames():
                if renames.setdefault(source, rename) != rename:
                    raise BadInput(
                        f"vector.rename: {source} is a source both with it and without, or with another; give one of "
                        "them another path, such as a symbolic link"
                    )
                if source not in self.sources:
                    self.sources[source] = self._known.open(source, rename)
            self._lay_out(point, bases)
            self._remap(point)
            report = self._known.check(self._settings, self.sources, point)
            require_low_rank(self.settle(point), self.sources)
            require_memory(point, self.sources, self._settings.matrix_memory, self._settings.output_format.dtype)
            notes = (*report.refusals, *report.exceptions, *self._zeros(point), *self._interference(point))
            self.notes[self.settle(point)] = notes
        for note in dict.fromkeys(note for notes in self.notes.values() for note in notes):
            if (job.directory, note) not in self._known.told:
                job.note(note)
                self._known.told.add((job.directory, note))

    def _lay_out(self, point: WeightPoint, bases: set[str]) -> None:
        """Gives the experts of the point's donors the layout of its base. Raises BadInput for a donor that another base
        wants otherwise: it is one source."""
        base = self.sources[point.base]
        for source, rename in point.renames():
            if (source, point.base) in self._compared:
                continue
            self._compared.add((source, point.base))
            laid_out = lay_out(self._known.open(source, rename), base)
            first = self._laid_out.setdefault(source, laid_out)
            if layout_of(first) != layout_of(laid_out) or (layout_of(first) and source in bases | {point.base}):
                raise BadInput(
                    f"{source}: is wanted as it is, and in another layout, or with other rows, for {point.base}, or in "
                    "two; run what wants it so by itself"
                )
            self.sources[source] = first

    def _remap(self, point: WeightPoint) -> None:
        """Gives the point's sources the tokens of its output. Raises BadInput for one that another point wants
        otherwise: it is one source."""
        plain = {name: self._plain.setdefault(name, self.sources[name]) for name in point.sources()}
        new: Mapping[str, Checkpoint] = {}
        if point.vocabulary is not None:
            key = point.vocabulary, tuple(plain)
            if key not in self._maps:
                self._maps[key] = remap(point, plain, self._known.open)
            new = self._maps[key]
        for name, own in plain.items():
            wanted = new.get(name, own)
            self.sources[name] = self._became.setdefault(name, wanted)
            if map_of(self.sources[name]) != map_of(wanted):
                raise BadInput(f"{name}: is wanted with different tokens, its own or those of a merge; {_WRITE}")

    def add_vector(self, saved: config.Saved, outputs: Collection[Path]) -> Vector:
        """The vector to be stored, named by what it is computed from."""
        if saved.directory in outputs:
            raise BadInput(f"vector.save: {saved.directory} is an output of the merge too; choose another directory")
        donors = {source: open_source(source, saved.vector.rename) for source in saved.vector.sources()}
        plus, minus = saved.vector.plus, saved.vector.minus
        if minus:
            own, base = (plus, minus) if is_adapter(donors[plus]) else (minus, plus)
            donors[own] = lay_out(donors[own], donors[base])
        self.sources |= donors
        self._laid_out |= donors  # the vector is stored as they are
        alone = WeightPoint(saved.vector.plus, (Term(1.0, saved.vector),))
        judged = compat.check_donors(saved.vector, self.sources, self._settings.compat.force)
        for note in (*judged, *self._zeros(alone)):
            self._job.note(note)
        return settle_vector(saved.vector, self.sources)

    def _interference(self, point: WeightPoint) -> list[str]:
        """What to say of vectors that are simply added and get into each other's way."""
        terms = point.active_terms
        repeated = len({(term.vector, term.mask) for term in terms}) < len(terms)
        several = repeated or len({term.vector for term in terms}) > 1
        if self._settings.recipe or not several or point.method.name not in ("linear", "dare"):
            return []
        return self._known.interference(self.settle(point), self.sources).warnings()

    def _zeros(self, point: WeightPoint) -> list[str]:
        """A sentence for each vector whose donors are the same to the byte."""
        pairs = dict.fromkeys((term.vector.plus, term.vector.minus) for term in point.active_terms)
        return [
            f"{plus} and {minus} hold the same weights: their vector is zero, and adding it changes nothing"
            for plus, minus in pairs
            if minus and hold_the_same(self.sources[plus], self.sources[minus])
        ]


def _digests(
    settings: Config, sources: Mapping[str, Checkpoint], points: Iterable[WeightPoint]
) -> dict[WeightPoint, str]:
    """Names every point by what it is made of; reads all sources once and remembers."""
    from rvdist.weights.checkpoint.digest import checkpoint_digest

    cache = config.cache_directory(settings) / "digests"
    contents = {name: checkpoint_digest(source, cache) for name, source in sources.items()}
    return {point: point.digest(contents) for point in points}


def _to_write(
    job: Job,
    settings: Config,
    sources: Mapping[str, Checkpoint],
    outputs: Mapping[Path, WeightPoint],
    known: Known,
) -> dict[Path, WeightPoint]:
    """What of the outputs is still to be written: not what an earlier run of the same plan has finished, nor what
    another job has promised."""
    plan = build_plan(outputs, sources, settings.output_format)
    asked = {output: (point, settings.output_format) for output, point in outputs.items()}
    done = _finished_before(job, settings, plan) | _promised_by_others(asked, known.promised)
    return {output: point for output, point in outputs.items() if output not in done}


def _finished_before(job: Job, settings: Config, plan: Plan) -> set[Path]:
    """The outputs that an earlier run of the same plan has finished; overwriting does them again."""
    finished = set()
    for output, digests in zip(plan.outputs, plan.digests, strict=True):
        for directory, digest in zip(output.directories, digests, strict=True):
            if not settings.overwrite and is_complete(directory, digest):
                job.say(f"{directory}: already complete")
                finished.add(directory)
    return finished


def _promised_by_others(
    written: Mapping[Path, tuple[WeightPoint, OutputFormat]], promised: Mapping[Path, tuple[WeightPoint, OutputFormat]]
) -> set[Path]:
    shared = {output for output in written if _real(output) in promised and not discards(output)}
    for output in shared:
        if written[output] != promised[_real(output)]:
            raise BadInput(f"output: several jobs would write {output}; put {config.PLACEHOLDERS} into it")
    return shared


def _require_kept(job: Job, outputs: Collection[Path], saved: config.Saved | None) -> None:
    """Nothing is written where Ray deletes it."""
    places = [("output", output) for output in outputs] + ([("vector.save", saved.directory)] if saved else [])
    for key, path in [*places, ("hydra.run.dir (with -m hydra.sweep.dir)", job.directory)]:
        if cluster.is_temporary(path):
            raise BadInput(
                f"{key}: {path} is in the working directory of a Ray job and deleted with it; give an absolute path"
            )


def _require_apart(run: Path, sources: Mapping[str, Checkpoint], outputs: Iterable[Path]) -> None:
    """What a run writes of itself is no part of a model: its config.yaml would go into outputs with the target's. A
    directory within a source's is none of its files: a command may be given where a model lies."""
    within = {_real(run), *_real(run).parents}
    for name, source in sources.items():
        if _real(run) in _places(source):
            raise BadInput(f"hydra.run.dir: {run} is the directory of the source {name}; choose another")
    for output in outputs:
        if not discards(output) and _real(output) in within:
            raise BadInput(
                f"hydra.run.dir: {run} is in the output {output}, or is it, and that appears whole or not at all; "
                "choose one outside of it"
            )


def _places(source: Checkpoint) -> set[Path]:
    """The directories where it lies."""
    return {_real(source.path), *(_real((source.path / file).parent) for file in source.files)}


def require_no_source(settings: Config, outputs: Collection[Path], sources: Mapping[str, Checkpoint]) -> None:
    """Overwriting must never replace what is being read, be it by another job."""
    for (name, source), output in product(sources.items(), outputs if settings.overwrite else ()):
        if any(_real(output) in (path, *path.parents) for path in _places(source)):
            raise BadInput(
                f"output: {output} is or holds the source {name}, which would be lost; choose another output"
            )


def _real(path: Path) -> Path:
    """Where a path leads; links that lead to themselves stay as they are."""
    return Path(os.path.realpath(path))


def _require_place(output: Path) -> None:
    """Raises BadInput where no directory can be made, which would be found only when all outputs are begun."""
    try:
        os.lstat(output.with_name(f"{output.name}.partial"))
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise BadInput(f"{output}: cannot be created ({error.strerror}); choose another output") from None
    above = next(path for path in output.parents if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise BadInput(
            f"{output}: cannot be created, since {above} is no directory that we may write to; choose another"
        )
