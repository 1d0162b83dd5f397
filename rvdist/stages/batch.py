"""A batch: the merges that its entries stand for, each a job that may fail alone, their scores, and what became of
all of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from glob import glob, has_magic
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rvdist.core import config
from rvdist.core.config import BatchConfig, Config, DonorsConfig, VectorConfig, WeightedVectorConfig
from rvdist.core.errors import BadInput, Failed
from rvdist.core.point import Arm, WeightPoint, name_of
from rvdist.core.table import print_table
from rvdist.core.text import reason
from rvdist.stages.job import Job, Prepared

if TYPE_CHECKING:
    from rvdist.report.findings import Findings

FILE = "batch.json"
_MERGING, _SCORING = ("plan", "merge"), ("evaluate", "report")


@dataclass(frozen=True)
class BatchMerge:
    """One merge of a batch: where it goes and what it is made of, as far as that is known, and the job that does it or
    why there is none."""

    output: Path | None
    alpha: float | None
    vector: str
    target: str
    point: WeightPoint | None
    job: Job | BadInput


def is_batch(settings: Config) -> bool:
    """Whether a configuration asks for several merges: by `batch`, or by a pattern as its target."""
    return bool(settings.batch) or _is_pattern(settings.target)


class Batch:
    """What a job stands for. Raises BadInput for what concerns all of it."""

    def __init__(self, job: Job) -> None:
        self._job, settings = job, job.settings
        if settings.recipe:
            config.require_recipe_alone(settings)
        config.vector_to_save(settings)
        config.method(settings.merge)
        chosen = config.stages(settings)
        if others := [stage for stage in chosen if stage not in _MERGING + _SCORING]:
            raise BadInput(f"stages: {others[0]} is for one target, and batch is set; do it by a run of its own")
        if "evaluate" in chosen and (settings.arms or settings.sweep.alphas is not None or settings.search.method):
            raise BadInput("batch: what it makes of each target is scored; leave out arms, sweep.alphas and search")
        self._scored = [stage for stage in chosen if stage in _SCORING]
        self._merged = [stage for stage in chosen if stage in _MERGING]
        self._scorers: dict[str, Job] = {}
        self._arms: dict[WeightPoint, Arm] = {}
        parts: list[BatchMerge] = []
        for number, entry in enumerate(settings.batch or [BatchConfig()]):
            key = f"batch[{number}]." if settings.batch else ""
            try:
                parts += self._entry(entry, key)
            except BadInput as error:
                target = settings.target if entry.target is None else str(entry.target)
                parts.append(BatchMerge(None, None, "", target, None, BadInput(f"{key}{error}")))
        self.parts = _distinct(parts)

    @property
    def merges(self) -> list[Job]:
        """A job for every merge that there can be, in order, each output once."""
        return [part.job for part in self.parts if isinstance(part.job, Job)]

    def scorers(self, failed: Mapping[Job, Exception]) -> list[Job]:
        """A job for every target, below the directory of the batch: it scores the target as the baseline, and what the
        merges that have not `failed` make of it."""
        made: dict[str, list[BatchMerge]] = {}
        for part in self.parts if self._scored else []:
            if isinstance(part.job, Job) and part.job not in failed:
                made.setdefault(part.target, []).append(part)
        asked = self._job.settings
        alone = replace(asked, batch=[], vector=VectorConfig(), vectors=[], output=None, stages=self._scored)
        for name, (target, own) in zip(_apart(name_of(target) for target in made), made.items(), strict=True):
            self._arms |= (arms := _arms(own))
            baseline = next((point.unchanged for point in arms), WeightPoint(target))
            self._scorers[target] = replace(
                self._job,
                settings=replace(alone, target=target),
                directory=self._job.directory / name,
                asked=asked,
                arms=[Arm(config.BASELINE, baseline, alpha=0.0), *arms.values()],
            )
        return list(self._scorers.values())

    def refuse(self, failed: dict[Job, Exception]) -> None:
        """Where no target can be scored as it is asked for, nothing is merged either."""
        errors = [failed.get(scorer) for scorer in self._scorers.values()]
        if errors and all(isinstance(error, BadInput) for error in errors):
            failed |= {job: error for job in self.merges if job not in failed and (error := errors[0])}

    def _entry(self, entry: BatchConfig, key: str) -> Iterator[BatchMerge]:
        """The targets, each with every vector, each with every α."""
        settings = self._job.settings
        targets = _targets(settings.target if entry.target is None else entry.target)
        alphas = config.alphas(settings.alpha if entry.alpha is None else entry.alpha)
        output = entry.output or settings.output
        if not output:
            raise BadInput("output is not set, nor is output; set one of them")
        for listed, own in product(targets, _vectors(settings, entry)):
            try:
                for target, vector, alpha in product(_match_directories(listed, "target"), own.vectors(), alphas):
                    named = replace(
                        settings,
                        batch=[],
                        stages=self._merged,
                        target=target,
                        vector=vector,
                        vectors=own.added,
                        alpha=alpha,
                        output=output.replace("{vector}", own.name) if own.name else output,
                    )
                    ((directory, point),) = config.outputs(named).items()
                    job = replace(self._job, settings=named, asked=settings, outputs={directory: point})
                    yield BatchMerge(directory, alpha, own.name or config.vector_name(point), target, point, job)
            except BadInput as error:
                yield BatchMerge(None, None, own.name or "", listed, None, BadInput(f"{key}{error}"))

    def conclude(
        self, failed: Mapping[Job, Exception], prepared: Mapping[Job, Prepared], findings: Mapping[Job, Findings]
    ) -> None:
        """Prints what became of every merge and writes it to FILE. Raises Failed where some failed, BadInput where all
        did, of what they were given: then nothing is written."""
        rows, sentences = [], []
        errors: list[Exception] = []
        for part in self.parts:
            error = failed.get(part.job) if isinstance(part.job, Job) else part.job
            rows.append(self._row(part, error, prepared, findings))
            if error:
                errors.append(error)
                sentences.append(f"failed: {_short(part.output) or part.target}: {_sentence(error)}")
        refused = len(errors) == len(rows) and all(isinstance(error, BadInput) for error in errors)
        for target, scorer in self._scorers.items():
            if error := failed.get(scorer):
                errors.append(error)
                sentences.append(f"failed: {target} could not be scored: {_sentence(error)}")
        refused = refused and all(scorer in failed for scorer in self._scorers.values())
        self._print(rows)
        self._show_models(findings)
        for sentence in sentences:
            self._job.say(sentence)
        if not refused and {"merge", "evaluate"} & {*self._merged, *self._scored}:
            (self._job.directory / FILE).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        if refused:
            more = f" (and {len(errors) - 1} more, above)" if len(errors) > 1 else ""
            raise BadInput(f"{errors[0]}{more}") from errors[0]
        if errors:
            evaluations = f" and {len(self._scorers)} evaluations" if self._scorers else ""
            raise Failed(
                f"batch: of {len(rows)} merges{evaluations} {len(errors)} failed, the others are done; the first: "
                f"{_sentence(errors[0])}"
            ) from errors[0]

    def _show_models(self, findings: Mapping[Job, Findings]) -> None:
        """All targets that have scores as one page, in the batch's directory."""
        found = {target: own for target, job in self._scorers.items() if (own := findings.get(job)) and own.rows}
        if "report" not in self._scored or not found:
            return
        from rvdist.report.page.models import Model, write_models

        path, models = self._job.directory / "report.html", []
        for target, own in found.items():
            report = self._scorers[target].directory / path.name
            reports = (str(report.relative_to(path.parent)),) if report.exists() else ()
            models.append(Model(name_of(target), own.benchmarks, reports))
        write_models(path, "One target" if len(models) == 1 else f"{len(models)} targets", models)
        self._job.say(f"report: {path}")

    def _row(
        self,
        part: BatchMerge,
        error: Exception | None,
        prepared: Mapping[Job, Prepared],
        findings: Mapping[Job, Findings],
    ) -> dict[str, Any]:
        scorer = self._scorers.get(part.target)
        if error:
            status = "failed"
        elif "merge" in self._merged:
            one = prepared.get(part.job) if isinstance(part.job, Job) else None
            status = "written" if one and part.output in one.written else "already complete"
        else:
            status = "planned" if self._merged else "not written"
        row = {
            "output": str(part.output) if part.output else None,
            "alpha": part.alpha,
            "vector": part.vector,
            "target": part.target,
            "status": status,
            "reason": _sentence(error) if error else None,
        }
        if self._scored:
            row |= {"score": self._score(findings.get(scorer), part) if scorer else None}
        return row

    def _score(self, findings: Findings | None, part: BatchMerge) -> float | None:
        """The mean over benchmarks."""
        if findings is None or part.point not in self._arms:
            return None
        name = self._arms[part.point].name
        return replace(findings, rows=[row for row in findings.rows if row.arm == name]).objective

    def _print(self, rows: Sequence[Mapping[str, Any]]) -> None:
        scored = ["mean score"] if self._scored else []
        table = []
        for row in rows:
            alpha = "" if row["alpha"] is None else config.alpha_text(row["alpha"])
            score = "" if row.get("score") is None else f"{row['score']:.4f}"
            output = _short(Path(row["output"])) if row["output"] else ""
            own = [score] if scored else []
            table.append([output, alpha, row["vector"], name_of(row["target"]), *own, row["status"]])
        print_table(("output", "α", "vector", "target", *scored, "status"), table, self._job.console)


def _arms(made: Sequence[BatchMerge]) -> dict[WeightPoint, Arm]:
    """What a target is scored as beside itself; an arm has an α where all are along one vector."""
    points = {part.point: part for part in made if part.point and part.alpha}
    along = {(term.vector, term.mask) for point in points for term in point.terms}
    single = len(along) == 1 and all(len(point.terms) == 1 for point in points)
    names = _apart(f"{part.vector} alpha={config.alpha_text(part.alpha or 0.0)}" for part in points.values())
    return {
        point: Arm(name, point, alpha=point.terms[0].alpha if single else None)
        for name, point in zip(names, points, strict=True)
    }


def _apart(names: Iterable[str]) -> list[str]:
    """Names of files, each another."""
    apart: list[str] = []
    for name in names:
        name, count = name.lstrip(".")[:90] or "target", 1
        while (unique := name + (f" ({count})" if count > 1 else "")) in apart:
            count += 1
        apart.append(unique)
    return apart


@dataclass(frozen=True)
class _Own:
    """A vector of an entry, or several that are `added`; `name` stands for `{vector}`, None for that of its donors."""

    name: str | None
    vector: DonorsConfig
    added: list[WeightedVectorConfig]

    def vectors(self) -> list[VectorConfig]:
        """The vectors that it stands for: more than one where its plus or path is a pattern."""
        own = {field.name: getattr(self.vector, field.name) for field in fields(DonorsConfig)}
        which = "path" if self.vector.path else "plus"
        sources = [own[which]] if own[which] is None else _match_directories(own[which], f"vector.{which}")
        return [VectorConfig(**own | {which: source}) for source in sources]


def _vectors(settings: Config, entry: BatchConfig) -> list[_Own]:
    given = [key for key in ("vector", "vectors", "each") if getattr(entry, key) is not None]
    if len(given) > 1:
        raise BadInput(f"{given[0]} and {given[1]} are both set; set one of vector, vectors and each")
    if entry.each is not None:
        if not entry.each:
            raise BadInput("each is an empty list; give at least one vector")
        return [_Own(own.name, own, []) for own in entry.each]
    if entry.vectors is not None:
        return [_Own(None, VectorConfig(), entry.vectors)]
    if entry.vector is not None:
        return [_Own(None, entry.vector, [])]
    return [_Own(None, settings.vector, settings.vectors)]


def _targets(given: Any) -> list[str]:
    if not given:
        raise BadInput("target is not set, nor is target; set one of them")
    targets = [given] if isinstance(given, str) else given
    if not isinstance(targets, list) or not all(isinstance(target, str) and target for target in targets):
        raise BadInput(f"target: {given!r} is neither a checkpoint nor a list of them")
    return targets


def _is_pattern(text: str) -> bool:
    return has_magic(text) and not Path(text).expanduser().exists()


def _match_directories(text: str, key: str) -> list[str]:
    """The directories that a pattern stands for, in order, but for unfinished outputs; else the text itself."""
    if not _is_pattern(text):
        return [text]
    directories = [
        path for path in glob(os.path.expanduser(text)) if os.path.isdir(path) and not path.endswith(".partial")
    ]
    if not directories:
        raise BadInput(f"{key}: no directory matches {text}; check the pattern")
    return sorted(directories)


def _distinct(parts: Sequence[BatchMerge]) -> list[BatchMerge]:
    """Without what is asked for twice; none of several that would be written to one place."""
    points: dict[Path, dict[WeightPoint, BatchMerge]] = {}
    for part in parts:
        if part.output and part.point:
            points.setdefault(part.output, {}).setdefault(part.point, part)
    kept = []
    for part in parts:
        alike = points[part.output] if part.output else {}
        if len(alike) > 1:
            sentence = f"output: several points would be written to {part.output}; put {config.PLACEHOLDERS} into it"
            kept.append(replace(part, job=BadInput(sentence)))
        elif not alike or part in alike.values():
            kept.append(part)
    return kept


def _short(path: Path | None) -> str:
    """As seen from here, where it is below."""
    if path is None:
        return ""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _sentence(error: Exception) -> str:
    if isinstance(error, BadInput | Failed):
        return str(error)
    return f"{type(error).__name__}: {reason(error, 500)}"
