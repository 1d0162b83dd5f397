"""A batch: the merges that its entries stand for, each a run that may fail alone, and what became of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from glob import glob, has_magic
from itertools import product
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from rvdist import config
from rvdist.config import BatchConfig, Config, DonorsConfig, VectorConfig, WeightedVectorConfig
from rvdist.errors import BadInput, Failed
from rvdist.point import WeightPoint
from rvdist.run import Run

FILE = "batch.json"


@dataclass(frozen=True)
class Part:
    """One merge of a batch: where it goes and what it is made of, as far as that is known, and the run that does it or
    why there is none."""

    output: Path | None
    alpha: float | None
    vector: str
    target: str
    run: Run | BadInput


def is_batch(settings: Config) -> bool:
    """Whether a configuration asks for several merges: by `batch`, or by a pattern as its target."""
    return bool(settings.batch) or _is_pattern(settings.target)


def parts(run: Run) -> list[Part]:
    """Every merge of the batch `run`, in order, each output once. Raises BadInput for what concerns all of them."""
    settings = run.settings
    if settings.recipe:
        config.require_recipe_alone(settings)
    config.saved(settings)
    config.method(settings.merge)
    if set(config.stages(settings)) - {"plan", "merge"}:
        raise BadInput(
            "batch: a batch only merges; leave benchmarks out, and stages other than plan and merge, and score what it "
            "wrote by arms=[…]"
        )
    found: list[Part] = []
    for number, entry in enumerate(settings.batch or [BatchConfig()]):
        key = f"batch[{number}]." if settings.batch else ""
        try:
            found += _entry(run, entry, key)
        except BadInput as error:
            target = settings.target if entry.target is None else str(entry.target)
            found.append(Part(None, None, "", target, BadInput(f"{key}{error}")))
    return _distinct(found)


def _entry(run: Run, entry: BatchConfig, key: str) -> Iterator[Part]:
    """The targets, each with every vector, each with every α."""
    settings = run.settings
    targets = _targets(settings.target if entry.target is None else entry.target)
    alphas = config.alphas(settings.alpha if entry.alpha is None else entry.alpha)
    output = entry.output or settings.output
    if not output:
        raise BadInput("output is not set, nor is output; set one of them")
    for listed, own in product(targets, _vectors(settings, entry)):
        try:
            for target, vector, alpha in product(_matching(listed, "target"), own.matching(), alphas):
                named = replace(
                    settings,
                    batch=[],
                    target=target,
                    vector=vector,
                    vectors=own.added,
                    alpha=alpha,
                    output=output.replace("{vector}", own.name) if own.name else output,
                )
                ((directory, point),) = config.outputs(named).items()
                job = Run(named, run.directory, run.command, run.timing, run.log, asked=settings)
                job.written = {directory: point}
                yield Part(directory, alpha, own.name or config.called(point), target, job)
        except BadInput as error:
            yield Part(None, None, own.name or "", listed, BadInput(f"{key}{error}"))


@dataclass(frozen=True)
class _Own:
    """A vector of an entry, or several that are `added`; `name` stands for `{vector}`, None for that of its donors."""

    name: str | None
    vector: DonorsConfig
    added: list[WeightedVectorConfig]

    def matching(self) -> list[VectorConfig]:
        """The vectors that it stands for: more than one where its plus or path is a pattern."""
        own = {field.name: getattr(self.vector, field.name) for field in fields(DonorsConfig)}
        which = "path" if self.vector.path else "plus"
        found = [own[which]] if own[which] is None else _matching(own[which], f"vector.{which}")
        return [VectorConfig(**own | {which: source}) for source in found]


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


def _matching(text: str, key: str) -> list[str]:
    """The directories that a pattern stands for, in order, but for unfinished outputs; else the text itself."""
    if not _is_pattern(text):
        return [text]
    found = [path for path in glob(os.path.expanduser(text)) if os.path.isdir(path) and not path.endswith(".partial")]
    if not found:
        raise BadInput(f"{key}: no directory matches {text}; check the pattern")
    return sorted(found)


def _distinct(found: Sequence[Part]) -> list[Part]:
    """Without what is asked for twice; none of several that would be written to one place."""
    points: dict[Path, dict[WeightPoint, Part]] = {}
    for part in found:
        if part.output is not None and isinstance(part.run, Run):
            points.setdefault(part.output, {}).setdefault(part.run.written[part.output], part)
    kept = []
    for part in found:
        alike = points.get(part.output, {}) if part.output else {}
        if len(alike) > 1:
            sentence = f"output: several points would be written to {part.output}; put {config.PLACEHOLDERS} into it"
            part = replace(part, run=BadInput(sentence))
        if not alike or part in alike.values() or len(alike) > 1:
            kept.append(part)
    return kept


def conclude(run: Run, made: Sequence[Part], failed: Mapping[Run, Exception]) -> None:
    """Prints what became of every merge and writes it to FILE. Raises Failed where some failed, BadInput where all did,
    of what they were given: then nothing is written."""
    table = Table("output", "α", "vector", "target", "status", box=None)
    rows: list[dict[str, Any]] = []
    errors: list[Exception] = []
    for part in made:
        error = failed.get(part.run) if isinstance(part.run, Run) else part.run
        errors += [error] if error else []
        status, reason = _status(part, error), _sentence(error) if error else None
        output = str(part.output) if part.output else None
        alpha = "" if part.alpha is None else config.spell(part.alpha)
        table.add_row(*map(Text, (_short(part.output), alpha, part.vector, Path(part.target).name, status)))
        rows.append(
            {
                "output": output,
                "alpha": part.alpha,
                "vector": part.vector,
                "target": part.target,
                "status": status,
                "reason": reason,
            }
        )
    refused = len(errors) == len(made) and all(isinstance(error, BadInput) for error in errors)
    run.console.print(table)
    for part, row in zip(made, rows, strict=True):
        if row["reason"]:
            run.say(f"failed: {_short(part.output) or part.target}: {row['reason']}")
    if not refused and "merge" in config.stages(run.settings):
        (run.directory / FILE).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if refused:
        more = f" (and {len(errors) - 1} more, above)" if len(errors) > 1 else ""
        raise BadInput(f"{errors[0]}{more}") from errors[0]
    if errors:
        raise Failed(
            f"batch: {len(errors)} of {len(made)} failed, the others are done; the first: {_sentence(errors[0])}"
        ) from errors[0]


def _status(part: Part, error: Exception | None) -> str:
    if error or not isinstance(part.run, Run):
        return "failed"
    if "merge" not in config.stages(part.run.settings):
        return "planned"
    return "written" if part.output in part.run.written else "already complete"


def _short(path: Path | None) -> str:
    """As seen from here, where it is below."""
    if path is None:
        return ""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _sentence(error: Exception) -> str:
    if isinstance(error, BadInput | Failed):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
