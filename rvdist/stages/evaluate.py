"""The evaluate stage: jobs × arms × tasks → records, through the sample cache and the warm fleet."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path

from rvdist.core import config
from rvdist.core.cluster import blind_nodes
from rvdist.core.errors import BadInput
from rvdist.core.point import Arm, WeightPoint, name_of
from rvdist.evaluate.answers import Answering, Answers, Asked, Collected, answer
from rvdist.evaluate.asking import Asking
from rvdist.evaluate.cache import FILE, SampleCache, serving_digest
from rvdist.evaluate.fleet.arguments import GRAPHS, EngineSettings, build, further_arguments, identity
from rvdist.evaluate.fleet.device import device_kind
from rvdist.evaluate.fleet.fleet import Fleet
from rvdist.evaluate.fleet.served import companions
from rvdist.evaluate.foresight import Memory, mean_lengths
from rvdist.evaluate.replay import Recording, ReplayActor
from rvdist.evaluate.request import Answer
from rvdist.evaluate.resolved import name_of as name_of_engines
from rvdist.evaluate.resolved import recall, remember
from rvdist.evaluate.scorers import Scorers
from rvdist.evaluate.suite import Suite
from rvdist.evaluate.tokenizer import load_tokenizer
from rvdist.stages.bases import Bases
from rvdist.stages.job import Prepared
from rvdist.stages.score import Known, Scoring, score, score_arm
from rvdist.stages.warm import Warm
from rvdist.weights.checkpoint.digest import stamps_of
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.hub import download_weights

Arms = Sequence[tuple[Scoring, Arm]]
Recorded = tuple[dict[str, list[Answer]], int, int]  # answers by task; documents asked in other words, and cut


class Evaluator:
    """Asks the arms of some jobs, and scores what they answer: what is asked is made ready once for all of them, and
    the warm fleet answers."""

    def __init__(self, warm: Warm) -> None:
        self._warm = warm
        self._askings: dict[str, Asking] = {}
        self._recordings: dict[Path, Recording] = {}
        self._blind: dict[Path, list[str]] = {}  # nodes that do not see a directory of the Hub's cache
        self._named: set[Path] = set()  # directories with tasks whose code runs
        self._bases = Bases(warm)

    def join(self, prepared: Prepared) -> Scoring:
        """Makes ready what the job's arms are asked; what is asked already is shared. Raises BadInput for tasks that
        cannot be loaded, checkpoints that cannot be asked and a recording that lacks answers."""
        settings = prepared.settings
        further_arguments(settings.engine.args)
        asked = [asdict(part) for part in (settings.benchmarks, settings.engine, settings.cache)]
        askings: dict[str, Asking] = {}
        for arm in prepared.arms:
            source = self._bases.of(prepared, arm.point)
            stamps = stamps_of(companions(source.path))
            serving = serving_digest(source.path, prepared.cache / "digests")
            tensors = json.dumps(sorted([spec.name, spec.dtype, spec.shape] for spec in source.tensors.values()))
            prompt = settings.prompts[arm.prompt]
            key = json.dumps([serving, tensors, prompt, *asked])
            if key not in self._askings:
                if not self._askings:
                    self._expect(prepared, source, serving, tensors)
                with prepared.timing.phase("tasks"):
                    suite = suite_of(prepared, prompt)
                self._warm.resources()  # importing transformers beside it, Ray takes half as long again to start
                with prepared.timing.phase("tasks"):
                    tokenizer = load_tokenizer(source.path, settings.benchmarks.apply_chat_template)
                with prepared.timing.phase("requests"):
                    made_of = (serving, tensors, suite, tokenizer, suite.requests(tokenizer))
                    self._askings[key] = Asking(*made_of, served=source.path, stamps=stamps)
            askings[arm.name] = self._askings[key]
        folder = _path(settings.benchmarks.include_path)
        if folder and folder not in self._named:
            self._named.add(folder)
            prepared.say(f"benchmarks.include_path: you named {folder}; code of its tasks (!function) runs as you do")
        device = "cpu" if settings.engine.replay is not None else self._device(prepared)
        scoring = Scoring(prepared, askings, dict(prepared.notes), config.slice_size(settings, device))
        for sentence in askings[prepared.arms[0].name].suite.lacking.values():
            scoring.add_note(prepared.arms[0], f"left out: {sentence}")
            prepared.say(f"left out: {sentence}")
        if settings.engine.replay is not None:
            self._join_replay(scoring)
        else:
            resources = self._warm.resources()
            _identity(prepared, device)
            scoring.places = self._places(prepared, device)
            config.engines(settings, resources.counts)
        return scoring

    def _places(self, prepared: Prepared, device: str) -> dict[str, str]:
        """What engines call those Hub sources whose files not every node has: each node gets them for itself. Raises
        BadInput for an engine over several nodes, whose ranks read one directory."""
        places: dict[str, str] = {}
        for name, source in prepared.sources.items():
            if source.hub and len(self._warm.resources().nodes) > 1:
                if source.path not in self._blind:
                    small = next((path for path in sorted(source.path.glob("*.json")) if path.is_file()), None)
                    self._blind[source.path] = blind_nodes(small) if small else []
                if not (blind := self._blind[source.path]):
                    continue
                where = f"{source.hub}: its files are in HF_HOME here, which {', '.join(blind)} does not see"
                if device == "cuda" and config.over_nodes(prepared.settings):
                    raise BadInput(
                        f"{where}; an engine over several nodes needs one that they share: set HF_HOME to it"
                    )
                prepared.note(f"{where}; each node downloads them, or set HF_HOME to a directory that all share")
                places[name] = str(source.hub)
        return places

    def _device(self, prepared: Prepared) -> str:
        return config.engine_device(prepared.settings, self._warm.resources().gpus, build())

    def _join_replay(self, scoring: Scoring) -> None:
        recording = self._open_recording(scoring.prepared)
        if recording.logged and len(scoring.arms) > 1:
            raise BadInput(
                f"engine.replay: {recording.path} has samples of lm-eval's, which are of one model, and there are "
                f"{len(scoring.arms)} arms; leave out vector, arms and sweep.alphas"
            )
        reworded = shortened = 0
        for arm in scoring.arms:
            _, own, cut = self._recorded_answers(scoring.askings[arm.name], scoring, arm)
            reworded, shortened = reworded + own, shortened + cut
        scoring.engine |= {"replay": str(recording.path), "replay digest": recording.digest}
        for count, what in (
            (reworded, "documents were asked with another prompt when they were recorded"),
            (shortened, "recorded answers went on behind a stop string of their task and were cut there"),
        ):
            if count:
                scoring.note(scoring.arms[0], f"{count} {what}")

    def _open_recording(self, prepared: Prepared) -> Recording:
        path = _path(prepared.settings.engine.replay)
        assert path
        if path not in self._recordings:
            with prepared.timing.phase("replay"):
                self._recordings[path] = Recording(path)
        return self._recordings[path]

    def _recorded_answers(self, asking: Asking, scoring: Scoring, arm: Arm) -> Recorded:
        prepared = scoring.prepared
        with prepared.timing.phase("replay"):
            seed = prepared.settings.engine.seed
            return self._open_recording(prepared).answers(asking.documents, scoring.digest(arm), seed, arm.name)

    def evaluate(self, scorings: Sequence[Scoring], last: bool = False) -> None:
        """Scores every arm of these jobs, as one plan, the `last` that needs what is warm."""
        arms: dict[Asking, list[tuple[Scoring, Arm]]] = {}
        for scoring in scorings:
            for arm in scoring.arms:
                arms.setdefault(scoring.askings[arm.name], []).append((scoring, arm))
        answered: dict[Asking, Answers] = {}
        known: Known = {}
        count = sum(len(own) * sum(map(len, asking.requests.values())) for asking, own in arms.items())
        with Scorers(count) as scorers:  # while engines answer
            scorers.submit(import_module, "rvdist.report.report")
            for asking in arms:
                scorers.expect(asking)

            def complete(asking: Asking, point: WeightPoint, answers: Answers) -> None:
                for scoring, arm in arms[asking]:
                    key = (arm, scoring.digest(arm), asking)
                    if key not in known and scoring.locate(arm) == point:
                        known[key] = scorers.submit(score_arm, scoring, arm, asking, answers, scorers)

            for asking in sorted(arms, key=lambda asking: (asking.serving, asking.tensors)):  # a fleet after the other
                answered[asking] = self.answer(asking, arms[asking], partial(complete, asking))
            scorers.take_part()
            if last:
                self._warm.finish()
            for scoring in scorings:
                asked = [(arm, scoring.askings[arm.name]) for arm in scoring.scored_arms]
                if asked:
                    score(scoring, [(arm, asking, answered[asking]) for arm, asking in asked], known)

    def answer(
        self,
        asking: Asking,
        arms: Arms,
        complete: Callable[[WeightPoint, Answers], None] = lambda point, answers: None,
    ) -> Answers:
        """The requests, answered at the point of every arm. Arms without answers are left out of their jobs."""
        prepared = arms[0][0].prepared
        several = len({scoring.prepared.settings.target for scoring, _ in arms}) > 1
        points = {
            scoring.locate(arm): Asked(
                scoring.digest(arm),
                f"{name_of(scoring.prepared.settings.target)} {arm.name}" if several else arm.name,
                [scoring.prepared.sources[name] for name in arm.point.sources()],
            )
            for scoring, arm in arms
        }
        try:
            collected = answer(
                asking, points, self._make_answering(asking, arms), prepared.timing, prepared.job.log, complete
            )
            self._tell(arms, collected)
        except BaseException:
            self._warm.cool()
            raise
        return collected.answers

    def _make_answering(self, asking: Asking, arms: Arms) -> Answering:
        scoring, _ = arms[0]
        prepared, fleet = scoring.prepared, partial(self._fleet, asking, arms)
        if prepared.settings.engine.replay:
            return Answering(scoring.slice_size, fleet)
        device = self._device(prepared)
        served_by = _identity(prepared, device) | {"serving": asking.serving}
        for scoring, _ in arms:
            scoring.engine["device"] = served_by["device"]
        if not prepared.settings.cache.samples:
            return Answering(scoring.slice_size, fleet)
        cache, engines = prepared.cache, name_of_engines(served_by, asking.tensors)
        chosen = recall(cache, engines)
        return Answering(scoring.slice_size, fleet, cache, served_by, chosen, partial(remember, cache, engines))

    def _fleet(self, asking: Asking, arms: Arms) -> Fleet:
        """The warm fleet, if its engines serve what these would; weights do not matter, they are swapped. Of a replay,
        one that has the answers."""
        scoring, arm = arms[0]
        prepared = scoring.prepared
        base, patience = scoring.locate(arm).base, prepared.settings.cluster.timeout
        if prepared.settings.engine.replay:
            answers = {
                (owner.locate(own), task): recorded
                for owner, own in arms
                for task, recorded in self._recorded_answers(asking, owner, own)[0].items()
            }
            return self._warm.fleet(
                object(), lambda: Fleet(base, answers, 1, cpus=0.0, patience=patience, actor=ReplayActor)
            )
        everything = [(own, name, one) for own, _ in arms for name, one in own.prepared.sources.items()]
        for source in {one.path: one for own, name, one in everything if name not in own.places}.values():
            if source.hub:
                download_weights(source)
        source = self._bases.of(prepared, arm.point)
        if source is not prepared.sources[arm.point.base]:
            base = str(source.path.absolute())
        return self._warm.fleet(*self._needed_fleet(prepared, source, base, asking.serving, asking.tensors))

    def _needed_fleet(
        self, prepared: Prepared, source: Checkpoint, base: str, serving: str, tensors: str
    ) -> tuple[Hashable, Callable[[], Fleet]]:
        """The key of the fleet that a job needs, and how it is started."""
        device = self._device(prepared)
        settings, patience = _engine_settings(prepared, device), prepared.settings.cluster.timeout
        accelerator = prepared.settings.engine.accelerator_type if device == "cuda" else None
        count, need = config.engines(prepared.settings, self._warm.resources().counts)
        limits = config.engine_timeouts(prepared.settings, source.nbytes)
        engines = name_of_engines(_identity(prepared, device) | {"serving": serving}, tensors)
        key = (serving, tensors, settings, count, need, limits, accelerator)
        return key, lambda: Fleet(
            base,
            settings,
            count,
            *need,
            patience,
            timeout=limits[0],
            start_timeout=limits[1],
            accelerator_type=accelerator,
            resolved=recall(prepared.cache, engines) if prepared.settings.cache.samples else None,
            over_nodes=device == "cuda" and config.over_nodes(prepared.settings),
        )

    def _expect(self, prepared: Prepared, source: Checkpoint, serving: str, tensors: str) -> None:
        """Lets engines start while tasks are loaded, where they are sure to be needed and nothing else needs the cores
        or the network first."""
        if (
            prepared.settings.engine.replay
            or prepared.written
            or any(source.hub for source in prepared.sources.values())
        ):
            return
        if prepared.settings.cache.samples and (prepared.cache / FILE).exists():
            with closing(SampleCache(prepared.cache)) as cache:
                if all(cache.knows(prepared.digests[arm.point]) for arm in prepared.arms):
                    return
        self._warm.expect(partial(self._needed_fleet, prepared, source, str(source.path.absolute()), serving, tensors))

    def _remember(self, arms: Arms, collected: Collected) -> None:
        """How fast engines were and how long answers, for plans to come."""
        scoring, arm = arms[0]
        prepared, fleet = scoring.prepared, collected.fleet
        if fleet is not None and prepared.settings.engine.replay is None:
            nbytes = self._bases.of(prepared, arm.point).nbytes
            tokens, seconds = fleet.stats.prompt_tokens + fleet.stats.tokens, fleet.stats.generate
            kind, lengths = scoring.engine["device"], mean_lengths(collected.answers)
            Memory.read(prepared.cache).remember(prepared.cache, kind, nbytes, tokens, seconds, lengths)

    def _tell(self, arms: Arms, collected: Collected) -> None:
        """What became of some arms, for the timing, the report and the reader of the log."""
        prepared = arms[0][0].prepared
        fleet = collected.fleet
        if fleet is None:
            for phase in ("engine_start", "swap", "generate"):
                prepared.timing.add(phase, 0.0)
            for scoring, _ in arms:
                if "mode" not in scoring.engine:
                    scoring.engine["samples"] = "all from the cache: no engine was started"
            prepared.say(f"evaluate: all {collected.cached} requests were answered before: no engine is needed")
            return
        _note_fleet(arms, fleet, collected.start)
        self._remember(arms, collected)
        spoiled = {piece.point: found.spoiled for piece, found in collected.answers.items() if found.spoiled}
        for scoring, arm in arms:
            if reason := fleet.refused.get(scoring.locate(arm)):
                scoring.leave_out(arm, reason)
            if tensors := spoiled.get(scoring.locate(arm)):
                scoring.note(arm, f"{arm.name} is scored although {', '.join(tensors[:3])} hold infinities or NaNs")


def suite_of(prepared: Prepared, prompt: str) -> Suite:
    """The tasks that a job asks, in a style of `prompt`. Raises BadInput."""
    benchmarks = prepared.settings.benchmarks
    return Suite.load(
        benchmarks.tasks,
        _path(benchmarks.include_path),
        benchmarks.limit,
        benchmarks.num_fewshot,
        benchmarks.apply_chat_template,
        benchmarks.sandbox if benchmarks.allow_code_execution else None,
        _path(benchmarks.data_dir),
        benchmarks.allow_missing,
        prompt,
        benchmarks.primary,
    )


def _path(text: str | None) -> Path | None:
    return Path(text).expanduser().absolute() if text else None


def _identity(prepared: Prepared, device: str) -> dict[str, str]:
    """What of its engines decides a job's answers. Raises BadInput for a device that cannot be named."""
    kind = device_kind(device == "cuda", prepared.settings.engine.accelerator_type)
    return identity(_engine_settings(prepared, device), kind)


def _engine_settings(prepared: Prepared, device: str) -> EngineSettings:
    """How engines are started on the `device`. What the configuration leaves open is: on CPUs 1 GiB of KV cache and
    eager mode; on GPUs vLLM's own share of the card, CUDA graphs without compilation, and four threads that read."""
    engine, on_cpu = prepared.settings.engine, device == "cpu"
    graphs = engine.enforce_eager is None and not on_cpu
    return EngineSettings(
        tensor_parallel_size=engine.tensor_parallel_size,
        max_model_len=engine.max_model_len,
        max_num_seqs=engine.max_num_seqs,
        gpu_memory_utilization=engine.gpu_memory_utilization * engine.gpus,
        kv_cache_gib=1.0 if engine.kv_cache_gib is None and on_cpu else engine.kv_cache_gib,
        cpu_threads=engine.cpu_threads,
        enforce_eager=on_cpu if engine.enforce_eager is None else engine.enforce_eager,
        seed=engine.seed,
        truncate=prepared.settings.benchmarks.allow_truncation,
        allow_nonfinite=prepared.settings.allow_nonfinite,
        prefix_caching=engine.prefix_caching,
        readers=engine.readers or (engine.cpu_threads if on_cpu else 4),
        arithmetic=engine.arithmetic,
        args=further_arguments(({"compilation_config": GRAPHS} if graphs else {}) | engine.args),
    )


def _note_fleet(arms: Arms, fleet: Fleet, start: float) -> None:
    """What the fleet did in this call, for the timing, the report and the reader of the log; after `start` seconds it
    had an engine."""
    prepared, stats = arms[0][0].prepared, fleet.stats
    timing = prepared.timing
    timing.add("engine_start", start)
    timing.add("swap", stats.swap)
    timing.add("generate", stats.generate)
    timing.count("swaps", stats.swaps)
    timing.count("deaths", stats.deaths)
    timing.count("engine_seconds", stats.lifetimes)
    timing.fleet["engines"] = max(timing.fleet.get("engines", 0), fleet.seats.started)
    timing.fleet["utilisation"] = (timing.phases["swap"] + timing.phases["generate"]) / timing.fleet["engine_seconds"]
    info = next(iter(fleet.info()), {})
    timing.cpu_seconds += stats.cpu_seconds
    timing.bytes_read += stats.bytes_read
    for scoring, _ in arms:
        scoring.engine.pop("samples", None)
        scoring.engine |= {key: str(info[key]) for key in ("dtype", "mode", "probe") if key in info}
        scoring.engine |= {name.replace("_", " "): value for name, value in info.get("resolved", {}).items()}
        scoring.engine["utilisation"] = f"{timing.fleet['utilisation']:.0%}"
    prepared.say(
        f"fleet: {fleet.seats.started} of {len(fleet.seats)} engines worked, {stats.utilisation:.0%} of their time; "
        f"{stats.swaps} swaps, {stats.deaths} engines died"
    )
    for number, reason in fleet.seats.empty.items():
        prepared.note(f"engine {number} could not start: {reason}")
