"""The Python API: what the command does, called from a program.

Weight points are given as such, not described by keys. Everything else is the command's: stages, checks, cache, errors.
Importing this loads neither torch nor Ray.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from rich.console import Console

from rvdist.core import config
from rvdist.core.config import (
    BenchmarksConfig,
    CacheConfig,
    ClusterConfig,
    CompatConfig,
    Config,
    EngineConfig,
    MergeConfig,
)
from rvdist.core.errors import BadInput, Failed
from rvdist.core.foreign import parse_json
from rvdist.core.log import Log, LoggedTiming
from rvdist.core.method import MethodSpec
from rvdist.core.point import Arm, Mask, Term, Vector, WeightPoint
from rvdist.core.record import Record, read_records
from rvdist.core.regular import read_regular
from rvdist.core.text import reason
from rvdist.core.timing import Timing
from rvdist.report.summary import Row
from rvdist.stages.job import Ended, Job

__all__ = [
    "BadInput",
    "BenchmarksConfig",
    "CacheConfig",
    "ClusterConfig",
    "CompatConfig",
    "Config",
    "EngineConfig",
    "Evaluation",
    "Failed",
    "Mask",
    "MergeConfig",
    "Merged",
    "MethodSpec",
    "Record",
    "Row",
    "Term",
    "Timing",
    "Vector",
    "WeightPoint",
    "evaluate",
    "load_records",
    "merge",
]

Place = TypeVar("Place", str, Path)
_Part = TypeVar("_Part", BenchmarksConfig, ClusterConfig, EngineConfig, MergeConfig)

POINTS = "points.json"
_one_at_a_time = threading.Lock()  # a process has one connection to Ray, and lm-eval's tasks are for one thread


@dataclass(frozen=True)
class Merged:
    """What a merge did. `directories` are absolute, in the order of the points; `notes` say what applied only in part,
    one sentence each; `timing` has wall seconds by phase, bytes read and written, CPU seconds of all workers, and bytes
    of anonymous memory of the largest."""

    directories: tuple[Path, ...]
    notes: tuple[str, ...]
    timing: Timing


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: the rows of summary.json, every scored sample (both in the order of the points),
    `notes` on what applied or was asked only in part, and the directory with the files, if one was asked for."""

    rows: list[Row]
    records: list[Record]
    notes: tuple[str, ...]
    timing: Timing
    directory: Path | None


def merge(
    points: Mapping[Place, WeightPoint],
    *,
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
    workers: int | None = None,
    device: str | None = None,
    overwrite: bool | None = None,
    address: str | None = None,
    console: Console | None = None,
    settings: Config | None = None,
) -> Merged:
    """Writes each point as a checkpoint to its directory, all of them in one pass over their sources.

    Every output appears whole or not at all; one that is complete already is left alone, and after a failure the same
    call goes on where it was.

    `dtype`: of floating-point tensors, bfloat16, float16 or float32 (default, and target: the base's own).
    `max_shard_size`: bytes, or a text such as 5GB (default: the base's own files). `workers`: default as many as there
    are cores or GPUs; of up to 64 GiB these are threads of this process (docs/merge.md), a number has them on Ray.
    `device`: cpu or cuda. `address`: of a Ray cluster; "local", the default, starts one for this call where one is
    needed, unless the process is connected to one already: then that is used and left as it is. `console`: where
    progress is shown (default: nowhere). `settings`: every other key, as docs/configuration.md has them; what is given
    here goes before them, and keys that describe points are not looked at.

    Raises BadInput for what cannot be merged, before anything is written; Failed where the merge could not be finished.
    """
    given = _given(points, settings)
    outputs: dict[Path, WeightPoint] = {}
    for place, point in points.items():
        directory = Path(place).absolute()
        if directory in outputs:
            raise BadInput(f"points: two of them would be written to {directory}; give each its own directory")
        outputs[directory] = _check(point, place)
    if not outputs:
        raise BadInput("points is empty; give at least one directory and its weight point")
    with TemporaryDirectory(prefix="rvdist-") as place_of_run:
        job = _job(
            replace(
                _without_points(given),
                stages=["merge"],
                output=str(next(iter(outputs))),
                dtype=dtype or given.dtype,
                max_shard_size=given.max_shard_size if max_shard_size is None else max_shard_size,
                merge=_with(given.merge, workers=workers),
                device=device or given.device,
                overwrite=given.overwrite if overwrite is None else overwrite,
                cluster=_with(given.cluster, address=address),
            ),
            Path(place_of_run),
            console,
        )
        ended = _do(replace(job, outputs=outputs))
    return Merged(tuple(outputs), ended.notes, job.timing)


def evaluate(
    points: Mapping[str, WeightPoint],
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    include_path: str | Path | None = None,
    engines: int | None = None,
    max_model_len: int | None = None,
    address: str | None = None,
    directory: str | Path | None = None,
    console: Console | None = None,
    settings: Config | None = None,
) -> Evaluation:
    """Scores each point on lm-eval's tasks, in place on live vLLM engines; nothing is merged to disk. The first point
    is the baseline: the others are compared with it, on the same documents.

    Answers come from the sample cache (`settings.cache`) where they were given before, to the command or to a call.

    `limit`: documents of each task. `include_path`: a directory with tasks of your own. `engines`: default as many as
    there are cores or GPUs. `max_model_len`: tokens. `directory` gets the files of a run directory (summary.json,
    samples/, report.html, …), and the points as points.json. `address`, `console`, `settings` are as in `merge`.

    Raises BadInput for points, tasks and settings that cannot be used. Raises Failed where engines die again and again;
    then the same call goes on with what was answered; and where a point has no score, since its weights or answers are
    not numbers: `directory` has the others' by then.
    """
    given = _given(points, settings)
    if isinstance(tasks, str):
        raise BadInput(f"tasks: {tasks!r} is one name, and a list of names is asked for; give [{tasks!r}]")
    if not points:
        raise BadInput("points is empty; give at least one name and its weight point")
    for name in points:
        config.require_name(name, "points")
    arms = _arms({name: _check(point, name) for name, point in points.items()})
    kept = Path(directory).absolute() if directory is not None else None
    if kept is not None and kept.exists() and not kept.is_dir():
        raise BadInput(f"directory: {kept} is a file; choose another")
    with TemporaryDirectory(prefix="rvdist-") as scratch:
        job = _job(
            replace(
                _without_points(given),
                stages=["evaluate", "report"] if kept else ["evaluate"],
                target=arms[0].point.base,
                benchmarks=_with(
                    given.benchmarks, tasks=list(tasks), limit=limit, include_path=include_path and str(include_path)
                ),
                engine=_with(given.engine, count=engines, max_model_len=max_model_len),
                cluster=_with(given.cluster, address=address),
            ),
            kept or Path(scratch),
            console,
        )
        ended = _do(replace(job, arms=arms))
    assert ended.findings is not None
    if kept:
        text = json.dumps({name: point.to_json() for name, point in points.items()}, indent=1)
        (kept / POINTS).write_text(text + "\n", encoding="utf-8")
    return Evaluation(list(ended.findings.rows), list(ended.findings.records), ended.notes, job.timing, kept)


def load_records(path: str | Path) -> list[Record]:
    """The scored samples of a run directory, the baseline first, or of one file of its samples/. Raises BadInput where
    there are none, and for a damaged line, which it names."""
    place = Path(path)
    files = [place / "samples" / f"{arm}.jsonl" for arm in _scored_arms(place)] if place.is_dir() else [place]
    return [record for file in files for record in read_records(file)]


def _scored_arms(directory: Path) -> list[str]:
    """The arms of a run by its summary: samples/ may have those of an earlier run, too."""
    file = directory / "summary.json"
    try:
        arms = list(dict.fromkeys(row["arm"] for row in parse_json(read_regular(file, 64 << 20))))
        for arm in arms:
            config.require_name(arm, "arm")
        return arms
    except OSError:
        raise BadInput(
            f"{directory}: has no summary.json; give the directory of a run that evaluated to its end, or one of its "
            "samples/*.jsonl"
        ) from None
    except (ValueError, TypeError, LookupError, RecursionError, BadInput) as error:
        raise BadInput(f"{file}: is not the summary of a run ({reason(error)}); evaluate again") from None


def _given(points: object, settings: Config | None) -> Config:
    """The settings, or those by default. Raises BadInput for what of both the types rule out."""
    if not isinstance(points, Mapping) or not all(isinstance(name, str | Path) for name in points):
        raise BadInput("points: give a dictionary, of each point by its directory or name: {NAME: WeightPoint(…)}")
    for name, point in points.items():
        terms = point.terms if isinstance(point, WeightPoint) else None
        if not isinstance(terms, tuple) or not all(isinstance(term, Term) for term in terms):
            raise BadInput(f"points: {name}: is no WeightPoint with a tuple of Terms: WeightPoint(BASE, (Term(…),))")
    if not isinstance(settings, Config | None):
        raise BadInput("settings: give a Config of rvdist.api, such as Config(engine=EngineConfig(count=1))")
    return settings or Config()


def _without_points(settings: Config) -> Config:
    """Without what says which points there are, and what is done with them."""
    return replace(
        Config(),
        max_shard_size=settings.max_shard_size,
        allow_nonfinite=settings.allow_nonfinite,
        prompts=settings.prompts,
        compat=settings.compat,
        cache=settings.cache,
    )


def _with(part: _Part, **given: Any) -> _Part:
    """A part of the configuration, with what was given in place of its own."""
    return replace(part, **{key: value for key, value in given.items() if value is not None})


def _job(settings: Config, directory: Path, console: Console | None) -> Job:
    log = Log(console=console or Console(quiet=True, force_terminal=False))
    return Job(settings, directory, "rvdist.api", LoggedTiming(log), log)


def _do(job: Job) -> Ended:
    """The stages of the command. Raises what they raise."""
    from rvdist.stages.jobs import run_jobs
    from rvdist.stages.warm import Warm

    try:
        with _one_at_a_time, closing(Warm()) as warm:
            (ended,) = run_jobs([job], warm, last=True)
    finally:
        job.log.release()
    if ended.error:
        raise ended.error
    return ended


def _check(point: WeightPoint, name: str | Path) -> WeightPoint:
    """Raises BadInput for what the type alone does not rule out."""
    for source in point.sources():
        if not isinstance(source, str):
            raise BadInput(f"points: {name}: {source!r} is not a text; name a source by str(path) or 'org/name'")
    method = point.method
    try:
        method.check()
    except ValueError as error:
        raise BadInput(f"points: {name}: method: {error}") from None
    if method.facts.one_vector and len(point.terms) != 1:
        raise BadInput(
            f"points: {name}: {method.name} goes from the base to one other model, and there are {len(point.terms)}"
        )
    return point


def _arms(points: Mapping[str, WeightPoint]) -> list[Arm]:
    """The first, as the baseline, and the others. An arm has an α where it is on the line from the baseline's base
    along one vector: that of the first point that has just one."""
    target = next(iter(points.values())).base
    along = [line for point in points.values() if point.base == target and (line := _line(point))]

    def alpha(point: WeightPoint) -> float | None:
        if point.base == target and not point.active_terms:
            return 0.0
        return point.terms[0].alpha if along and _line(point) == along[0] else None

    return [Arm(name, point, alpha=alpha(point)) for name, point in points.items()]


def _line(point: WeightPoint) -> WeightPoint | None:
    """Where α is 1 on the line of a point that has one vector."""
    return replace(point, terms=(replace(point.terms[0], alpha=1.0),)) if len(point.terms) == 1 else None
