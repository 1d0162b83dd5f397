"""The evaluate stage: runs × arms × tasks → records, through the sample cache and the warm fleet."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any

from rvdist import config
from rvdist.checkpoint.directory import Checkpoint
from rvdist.cluster import Resources
from rvdist.errors import BadInput
from rvdist.fleet.cache import FILE, SampleCache, serving_digest, slice_keys
from rvdist.fleet.engine import EngineSettings, further_arguments, identity
from rvdist.fleet.harness import Document, Suite
from rvdist.fleet.replay import Recording, ReplayActor
from rvdist.fleet.request import Answer, Answered, Generate, Request
from rvdist.fleet.schedule import Slice, cut
from rvdist.fleet.scheduler import Fleet, device_kind
from rvdist.fleet.view import FleetView
from rvdist.point import Arm, WeightPoint, name_of
from rvdist.record import Record, TaskInfo, write_records
from rvdist.report.summary import GroupInfo, Outline, write_summary
from rvdist.run import Run, Scores
from rvdist.warm import Warm

Requests = Mapping[str, Sequence[Request]]

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True, eq=False)
class Asking:
    """What arms of one prompt style are asked, through one tokenizer and template, of engines that serve alike.

    `serving` is a digest of what engines read of a checkpoint besides its weights; `tensors` are those it has; `whole`
    is what is asked of all documents, where these are some of them."""

    serving: str
    tensors: str
    suite: Suite
    tokenizer: Any
    requests: Requests
    whole: Asking | None = None

    @cached_property
    def documents(self) -> dict[str, list[Document]]:
        """The requests by document."""
        return self.suite.asked(self.tokenizer)

    def restricted(self, documents: Mapping[str, Sequence[int]]) -> Asking:
        """The same, of these documents alone."""
        suite = self.suite.restricted(documents)
        return replace(self, suite=suite, requests=suite.requests(self.tokenizer), whole=self)

    @cached_property
    def places(self) -> dict[str, dict[tuple[Request, int], int]]:
        """Where each request of a task is, the first of equal ones; repeats of one are told apart."""
        found: dict[str, dict[tuple[Request, int], int]] = {task: {} for task in self.requests}
        for task, requests in self.requests.items():
            for place, request in enumerate(requests):
                found[task].setdefault(_repeat(request), place)
        return found


Answers = dict[Slice, Answered]
Scored = tuple[dict[str, Any], list[Record]]
Known = dict[tuple[Arm, str, Asking], Future[Scored]]  # what lm-eval finds, by the point's digest


class Examination:
    """The arms of some runs, what each is asked, and the warm fleet that answers."""

    def __init__(self, warm: Warm) -> None:
        self._warm = warm
        self._askings: dict[str, Asking] = {}
        self._of: dict[tuple[Run, str], Asking] = {}
        self._recordings: dict[Path, Recording] = {}

    def join(self, run: Run) -> None:
        """Makes ready what the run's arms are asked; what is asked already is shared. Raises BadInput for tasks that
        cannot be loaded, checkpoints that cannot be asked and a recording that lacks answers."""
        settings = run.settings
        _engine_settings(run)
        asked = [asdict(part) for part in (settings.benchmarks, settings.engine, settings.cache)]
        for arm in run.arms:
            source = run.sources[arm.point.base]
            serving = serving_digest(source.path, run.cache / "digests")
            tensors = json.dumps(sorted([spec.name, spec.dtype, spec.shape] for spec in source.tensors.values()))
            prompt = settings.prompts[arm.prompt]
            key = json.dumps([serving, tensors, prompt, *asked])
            if key not in self._askings:
                if not self._askings:
                    self._expect(run, source, serving, tensors)
                with run.timing.phase("tasks"):
                    suite = _suite(run, prompt)
                self._warm.resources()  # importing transformers beside it, Ray takes half as long again to start
                with run.timing.phase("tasks"):
                    tokenizer = _tokenizer(source.path, settings.benchmarks.apply_chat_template)
                with run.timing.phase("requests"):
                    self._askings[key] = Asking(serving, tensors, suite, tokenizer, suite.requests(tokenizer))
            self._of[run, arm.name] = self._askings[key]
        for sentence in self.asking(run, run.arms[0]).suite.lacking.values():
            run.notes[run.arms[0].point] += (f"left out: {sentence}",)
            run.say(f"left out: {sentence}")
        if settings.engine.replay is not None:
            self._join_replay(run)
        else:
            resources = self._warm.resources()
            identity(_engine_settings(run), device_kind(resources.gpus > 0))
            config.engines(settings, resources.cpus, resources.gpus)

    def _join_replay(self, run: Run) -> None:
        recording = self._recording(run)
        if recording.logged and len(run.arms) > 1:
            raise BadInput(
                f"engine.replay: {recording.path} has samples of lm-eval's, which are of one model, and there are "
                f"{len(run.arms)} arms; leave out vector, arms and sweep.alphas"
            )
        reworded = 0
        for arm in run.arms:
            _, own = self._recorded(self.asking(run, arm), run, arm)
            reworded += own
        run.engine |= {"replay": str(recording.path), "replay digest": recording.digest}
        if reworded:
            sentence = f"{reworded} documents were asked with another prompt when they were recorded"
            run.notes[run.arms[0].point] += (sentence,)
            run.note(sentence)

    def _recording(self, run: Run) -> Recording:
        path = _path(run.settings.engine.replay)
        if not path:
            raise BadInput("engine.replay is not set; give a run directory of ours, or one of lm-eval's samples")
        if path not in self._recordings:
            with run.timing.phase("replay"):
                self._recordings[path] = Recording(path)
        return self._recordings[path]

    def _recorded(self, asking: Asking, run: Run, arm: Arm) -> tuple[dict[str, list[Answer]], int]:
        seed = run.settings.engine.seed
        with run.timing.phase("replay"):
            return self._recording(run).answers(asking.documents, run.digests[arm.point], seed, arm.name)

    def asking(self, run: Run, arm: Arm) -> Asking:
        """What the arm is asked."""
        return self._of[run, arm.name]

    def evaluate(self, runs: Sequence[Run], last: bool = False) -> None:
        """Scores every arm of these runs, as one plan, the `last` that needs what is warm."""
        arms: dict[Asking, list[tuple[Run, Arm]]] = {}
        for run in runs:
            for arm in run.arms:
                arms.setdefault(self.asking(run, arm), []).append((run, arm))
        answered: dict[Asking, Answers] = {}
        known: Known = {}
        with ThreadPoolExecutor(1) as scorer:  # while engines answer; lm-eval's tasks are for one thread at a time
            scorer.submit(import_module, "rvdist.report.report")

            def complete(asking: Asking, point: WeightPoint, answers: Answers) -> None:
                for run, arm in arms[asking]:
                    key = (arm, run.digests[arm.point], asking)
                    if key not in known and _located(run, arm) == point:
                        known[key] = scorer.submit(_scored, run, arm, asking, answers)

            for asking in sorted(arms, key=lambda asking: (asking.serving, asking.tensors)):  # a fleet after the other
                answered[asking] = self.answer(asking, arms[asking], partial(complete, asking))
            if last:
                self._warm.finish()
            for run in runs:
                asked = [(arm, self.asking(run, arm)) for arm in run.arms if arm.name not in run.unscored]
                if asked:
                    score(run, [(arm, asking, answered[asking]) for arm, asking in asked], known)

    def answer(
        self,
        asking: Asking,
        arms: Sequence[tuple[Run, Arm]],
        complete: Callable[[WeightPoint, Answers], None] = lambda point, answers: None,
    ) -> Answers:
        """The requests, answered at the point of every arm; each point once, and what the cache has not at all.
        `complete` is told of each point that is answered, and of all that is so far. Arms without answers are left out
        of their runs."""
        run = arms[0][0]
        resources, timing, requests = self._warm.resources(), run.timing, asking.requests
        names: dict[WeightPoint, str] = {}
        digests: dict[WeightPoint, str] = {}
        several = len({other.settings.target for other, _ in arms}) > 1
        for owner, one in arms:
            point = _located(owner, one)
            digests[point] = owner.digests[one.point]
            names[point] = f"{name_of(owner.settings.target)} {one.name}" if several else one.name
        slices = [piece for point in digests for piece in cut(point, requests, run.settings.engine.slice_size)]
        cache = None
        if not run.settings.engine.replay:
            served_by = identity(_engine_settings(run), device_kind(resources.gpus > 0)) | {"serving": asking.serving}
            for other, _ in arms:
                other.engine["device"] = served_by["device"]
            cache = SampleCache(run.cache) if run.settings.cache.samples else None
        keys: dict[Slice, str] = {}
        answered: dict[Slice, Answered] = {}
        if cache:
            with timing.phase("cache"):
                keys = slice_keys(slices, requests, digests, asking.suite.versions, served_by)
                known = cache.read(list(keys.values()))
                answered = {piece: known[key] for piece, key in keys.items() if key in known}
                if asking.whole:
                    lacking = [piece for piece in slices if piece not in answered]
                    size = run.settings.engine.slice_size
                    answered |= _from_whole(asking.whole, lacking, requests, size, digests, served_by, cache)

        todo = [piece for piece in slices if piece not in answered]
        left = Counter(piece.point for piece in todo)

        def keep(piece: Slice, found: Answered) -> None:
            if cache:
                cache.write(keys[piece], digests[piece.point], piece.task, found)
            answered[piece] = found
            left[piece.point] -= 1
            if not left[piece.point]:
                complete(piece.point, answered)

        for point in digests:
            if not left[point]:
                complete(point, answered)
        cached = sum(piece.end - piece.begin for piece in answered)
        total = sum(piece.end - piece.begin for piece in slices)
        timing.count("requests", total - cached)
        timing.count("cached", cached)
        try:
            with timing.phase("evaluate"):
                if todo:
                    fleet = self._fleet(asking, arms)
                    was_up = fleet.first_up is not None
                    with FleetView(total, cached, names, run.log, str(run.cache / FILE) if cache else None) as view:
                        fleet.answer(todo, requests, keep, view.show)
                    _note(arms, fleet, 0.0 if was_up else fleet.first_up or 0.0)
                    spoiled = {piece.point: found.spoiled for piece, found in answered.items() if found.spoiled}
                    for owner, one in arms:
                        if reason := fleet.refused.get(_located(owner, one)):
                            owner.leave_out(one, reason)
                        if tensors := spoiled.get(_located(owner, one)):
                            sentence = f"{one.name} is scored although {', '.join(tensors[:3])} hold infinities or NaNs"
                            owner.notes[one.point] += (sentence,)
                            owner.note(sentence)
                else:
                    for phase in ("engine_start", "swap", "generate"):
                        timing.add(phase, 0.0)
                    for other, _ in arms:
                        if "mode" not in other.engine:
                            other.engine["samples"] = "all from the cache: no engine was started"
                    run.say(f"evaluate: all {cached} requests were answered before: no engine is needed")
        except BaseException:
            self._warm.cool()
            raise
        finally:
            if cache:
                cache.close()
        return answered

    def _fleet(self, asking: Asking, arms: Sequence[tuple[Run, Arm]]) -> Fleet:
        """The warm fleet, if its engines serve what these would; weights do not matter, they are swapped. Of a replay,
        one that has the answers."""
        run, arm = arms[0]
        base, patience = str(run.sources[arm.point.base].path.absolute()), run.settings.cluster.timeout
        if run.settings.engine.replay:
            answers = {
                (_located(owner, one), task): own
                for owner, one in arms
                for task, own in self._recorded(asking, owner, one)[0].items()
            }
            return self._warm.fleet(
                object(), lambda: Fleet(base, answers, 1, cpus=0.0, patience=patience, actor=ReplayActor)
            )
        for source in {source.path: source for other, _ in arms for source in other.sources.values()}.values():
            if source.hub:
                from rvdist.checkpoint.hub import download_weights

                download_weights(source)
        return self._warm.fleet(*self._wanted(run, base, asking.serving, asking.tensors, self._warm.resources()))

    def _wanted(
        self, run: Run, base: str, serving: str, tensors: str, resources: Resources
    ) -> tuple[Hashable, Callable[[], Fleet]]:
        """The key of the fleet that a run needs, and how it is started."""
        settings, patience = _engine_settings(run), run.settings.cluster.timeout
        count, need = config.engines(run.settings, resources.cpus, resources.gpus)
        key = (serving, tensors, settings, count, need)
        return key, lambda: Fleet(base, settings, count, *need, patience=patience)

    def _expect(self, run: Run, source: Checkpoint, serving: str, tensors: str) -> None:
        """Lets engines start while tasks are loaded, where they are sure to be needed and nothing else needs the cores
        or the network first."""
        if run.settings.engine.replay or run.written or any(one.hub for one in run.sources.values()):
            return
        if run.settings.cache.samples and (run.cache / FILE).exists():
            with closing(SampleCache(run.cache)) as cache:
                if all(cache.knows(run.digests[arm.point]) for arm in run.arms):
                    return
        self._warm.expect(partial(self._wanted, run, str(source.path.absolute()), serving, tensors))


def _repeat(request: Request) -> tuple[Request, int]:
    return request, request.repeat if isinstance(request, Generate) else 0


def _from_whole(
    whole: Asking,
    lacking: Sequence[Slice],
    requests: Requests,
    slice_size: int,
    digests: Mapping[WeightPoint, str],
    served_by: Mapping[str, Any],
    cache: SampleCache,
) -> Answers:
    """Those of the `lacking` slices, of some documents, whose every request was answered in a slice of all documents,
    as an evaluation of the same point left it in the cache. A slice is taken from there whole or not at all."""
    found: Answers = {}
    for point in dict.fromkeys(piece.point for piece in lacking):
        pieces = cut(point, whole.requests, slice_size)
        keys = slice_keys(pieces, whole.requests, digests, whole.suite.versions, served_by)
        known = cache.read(list(keys.values()))
        answers = {
            (piece.task, piece.begin + place): answer
            for piece, key in keys.items()
            if key in known and not known[key].truncated  # of which one does not know whose they are
            for place, answer in enumerate(known[key].answers)
        }
        for piece in lacking if answers else ():
            if piece.point == point:
                asked = requests[piece.task][piece.begin : piece.end]
                own = [answers.get((piece.task, whole.places[piece.task].get(_repeat(one), -1))) for one in asked]
                if all(own):
                    found[piece] = Answered(tuple(filter(None, own)), 0, 0.0)
    return found


def _scored(run: Run, arm: Arm, asking: Asking, answered: Answers) -> Scored:
    answers, _ = answers_of(run, arm, asking.requests, answered)
    with run.timing.phase("score"):
        return asking.suite.score(
            arm, run.digests[arm.point], asking.tokenizer, asking.requests, answers, run.settings.engine.seed
        )


def score(run: Run, arms: Sequence[tuple[Arm, Asking, Answers]], known: Known) -> None:
    """What some arms of a run answered, the baseline first, scored and compared, in the files of its directory. What is
    `known` is not scored again."""
    from lm_eval.utils import handle_non_serializable

    from rvdist.report.statistics import summarise

    records: list[Record] = []
    reported: dict[Asking, dict[str, Any]] = {}
    truncated = 0
    with run.timing.phase("records"):
        for part in ("results", "samples"):
            (run.directory / part).mkdir(exist_ok=True)
        for arm, asking, answered in arms:
            truncated += answers_of(run, arm, asking.requests, answered)[1]
            found = known.get((arm, run.digests[arm.point], asking))
            results, scored = found.result() if found else _scored(run, arm, asking, answered)
            reported.setdefault(asking, results)
            text = json.dumps(results, indent=2, default=handle_non_serializable)
            (run.directory / "results" / f"{arm.name}.json").write_text(text)
            write_records(run.directory / "samples" / f"{arm.name}.jsonl", scored)
            records += scored
        first, asking, _ = arms[0]
        if truncated:
            run.notes[first.point] += (f"{truncated} prompts did not fit and were cut from the left",)
        tasks = asking.suite.infos([record for record in records if record.arm == first.name])
        run.notes[first.point] += tuple(asking.suite.left_out(reported[asking], tasks))
        scored_arms = [arm for arm, _, _ in arms]
        groups = _groups(asking.suite, tasks)
        baseline = None if run.arms[0].name in run.unscored else first.name
        rows = summarise(scored_arms, records, tasks, baseline, groups)
        write_summary(run.directory / "summary.json", rows)
        run.scores = Scores(scored_arms, rows, records, tasks, groups, asking.suite.lacking)


def _groups(suite: Suite, tasks: Sequence[TaskInfo]) -> list[GroupInfo]:
    """The groups that lm-eval scores, by the metrics that it puts together and that their records have."""
    known = {task.name: task for task in tasks}
    found = []
    for name, (group, members) in suite.groups.items():
        shared = [pair for pair in known[members[0]].metrics if all(pair in known[task].metrics for task in members)]
        together = {
            (metric, filtered): one
            for one in group.aggregate_metric_list
            for metric, filtered in shared
            if metric == one.metric and (one.filter_list is None or filtered in one.filter_list)
        }
        if together:
            counts = known[members[0]].primary[1]
            metrics = tuple(sorted((pair for pair in shared if pair in together), key=lambda pair: pair[1] != counts))
            found.append(GroupInfo(name, tuple(members), metrics, bool(together[metrics[0]].weight_by_size)))
    return found


def answers_of(
    run: Run, arm: Arm, requests: Requests, answered: Mapping[Slice, Answered]
) -> tuple[dict[str, list[Any]], int]:
    """One arm's answers by task, in the order of the requests, and how many prompts were cut to fit."""
    answers: dict[str, list[Any]] = {task: [] for task in requests}
    truncated = 0
    for piece in cut(_located(run, arm), requests, run.settings.engine.slice_size):
        answers[piece.task] += answered[piece].answers
        truncated += answered[piece].truncated
    return answers, truncated


def objective(scores: Scores) -> float | None:
    """What a sweeper maximises: the mean score over benchmarks (less it where less is better), of the arms other than
    the baseline if any. A group is one benchmark; edited questions are none."""
    primary = Outline([task.name for task in scores.tasks], scores.groups).benchmarks(scores.rows)
    values = [
        row.value if row.higher_is_better else -row.value
        for row in [row for row in primary if row.delta is not None] or primary
    ]
    return sum(values) / len(values) if values else None


def _located(run: Run, arm: Arm) -> WeightPoint:
    """The point with paths that hold wherever an engine runs."""
    return arm.point.relocated({name: str(source.path.absolute()) for name, source in run.sources.items()})


def _suite(run: Run, prompt: str) -> Suite:
    benchmarks = run.settings.benchmarks
    return Suite.load(
        benchmarks.tasks,
        _path(benchmarks.include_path),
        benchmarks.limit,
        benchmarks.num_fewshot,
        benchmarks.apply_chat_template,
        config.code_sandbox(run.settings),
        _path(benchmarks.data_dir),
        benchmarks.allow_missing,
        prompt,
        benchmarks.primary,
    )


def _path(text: str | None) -> Path | None:
    return Path(text).expanduser().absolute() if text else None


def _tokenizer(path: Path, chat: bool) -> Any:
    """The checkpoint's tokenizer. Raises BadInput where it has none, or no chat template and one is asked for."""
    from transformers import AutoTokenizer

    if not any((path / name).exists() for name in _TOKENIZERS):  # transformers would make up an empty one
        raise BadInput(f"{path}: has no tokenizer, and scoring needs one; copy the tokenizer's files there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises what it likes for files it cannot use
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"{path}: has a tokenizer that cannot be loaded ({reason})") from None
    if chat and not tokenizer.chat_template:
        raise BadInput(f"{path}: has no chat template; set benchmarks.apply_chat_template=false")
    return tokenizer


def _engine_settings(run: Run) -> EngineSettings:
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
        allow_nonfinite=run.settings.allow_nonfinite,
        args=further_arguments(engine.args),
    )


def _note(arms: Sequence[tuple[Run, Arm]], fleet: Fleet, start: float) -> None:
    """What the fleet did in this call, for the timing, the report and the reader of the log; after `start` seconds it
    had an engine."""
    run, stats = arms[0][0], fleet.stats
    timing = run.timing
    timing.add("engine_start", start)
    timing.add("swap", stats.swap)
    timing.add("generate", stats.generate)
    timing.count("swaps", stats.swaps)
    timing.count("deaths", stats.deaths)
    timing.count("engine_seconds", stats.lifetimes)
    timing.fleet["engines"] = max(timing.fleet.get("engines", 0), fleet.started)
    timing.fleet["utilisation"] = (timing.phases["swap"] + timing.phases["generate"]) / timing.fleet["engine_seconds"]
    info = next(iter(fleet.info()), {})
    timing.cpu_seconds += stats.cpu_seconds
    timing.bytes_read += stats.bytes_read
    for other, _ in arms:
        other.engine.pop("samples", None)
        other.engine |= {key: str(info[key]) for key in ("dtype", "mode", "probe") if key in info}
        other.engine["utilisation"] = f"{timing.fleet['utilisation']:.0%}"
    run.say(
        f"fleet: {fleet.started} of {fleet.size} engines worked, {stats.utilisation:.0%} of their time; {stats.swaps} "
        f"swaps, {stats.deaths} engines died"
    )
    for number, reason in fleet.empty.items():
        run.note(f"engine {number} could not start: {reason}")
