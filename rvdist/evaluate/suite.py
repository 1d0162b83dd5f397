"""lm-eval as a library: task names → requests for an engine, an arm's answers → records and a results file.

Which documents are asked, how prompts are built, filtered and scored is lm-eval's alone. Knows nothing of
weights, engines or Ray.
"""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from rvdist.core.errors import BadInput
from rvdist.core.point import Arm
from rvdist.core.record import LONGEST_NAME, Record, TaskInfo
from rvdist.core.text import cut, reason
from rvdist.evaluate.request import Answer, Choice, Completion, Generate, Loglikelihood, Request, Rolling
from rvdist.evaluate.sandbox import sandbox
from rvdist.evaluate.scored import LOGARITHM, as_record, in_format
from rvdist.evaluate.tasks import catalogue
from rvdist.evaluate.tasks.humaneval import verdicts
from rvdist.evaluate.tasks.private_lm_eval import (
    Built,
    build,
    built_before,
    hashed_before,
    templates_compiled_once,
)
from rvdist.evaluate.templates import apply_template
from rvdist.evaluate.transcript import document_hash

os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval draws a bar for each task and arm

POCKET_TASKS = Path(__file__).resolve().parent.parent / "pocket" / "tasks"
_FEWSHOT_SEED = 1234  # lm-eval's own default


class TemplateRefuses(Exception):
    """A chat template cannot make a prompt of the messages of a task."""


@dataclass(frozen=True)
class Document:
    """A document as it is asked: lm-eval's number and hash of it, and of each of its requests the repeats."""

    doc_id: int
    doc: str
    requests: tuple[tuple[Request, ...], ...]

    @property
    def flat(self) -> list[Request]:
        """Every repeat of every request, in order."""
        return [request for repeats in self.requests for request in repeats]


@dataclass(frozen=True)
class Suite:
    """Loaded tasks and how they are asked. `load` makes one. `loaded` is lm-eval's TaskDict; `limit` and `chat` are as
    `load` takes them; `walls` are the sandbox's, if answers are programs; `lacking` says why names were left out. By
    task, `chosen` are the documents that `restrict` named, and `primary` is the filter whose score counts. `made_of` is
    what `load` was given; `_built` are lm-eval's requests by task, as they were last built, and for which tokenizer;
    `_hashes` are those of their documents."""

    loaded: Mapping[str, Any]
    limit: int | None
    chat: bool
    walls: sandbox.Mode | None = None
    lacking: Mapping[str, str] = field(default_factory=dict)
    chosen: Mapping[str, list[int]] | None = None
    primary: Mapping[str, str] = field(default_factory=dict)
    made_of: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    _built: list[tuple[Any, dict[str, Built]]] = field(default_factory=list, init=False, compare=False, repr=False)
    _hashes: dict[int, str] = field(default_factory=dict, init=False, compare=False, repr=False)

    @classmethod
    def load(
        cls,
        names: Sequence[str],
        include_path: Path | None = None,
        limit: int | None = None,
        num_fewshot: int | None = None,
        chat: bool = True,
        code: str | None = None,
        data_dir: Path | None = None,
        leave_out: bool = False,
        prompt: str = "",
        primary: Mapping[str, str] | None = None,
    ) -> Suite:
        """The tasks and groups called `names`, ours and those under `include_path` first, then lm-eval's own.

        `limit` documents of each task; `chat` puts prompts into the model's chat template; `code` lets answers that are
        programs run in a "strict" or "degraded" sandbox; `primary` names filters whose score counts, by task or group;
        what else there is, `catalogue.load` takes. Raises BadInput for an unknown task, data that cannot be had, code
        that may not or cannot be run.
        """
        made_of = {name: value for name, value in locals().items() if name != "cls"}
        include_paths = [POCKET_TASKS] + ([include_path] if include_path else [])
        loaded, lacking = catalogue.load(names, include_paths, num_fewshot, code, data_dir, leave_out, prompt)
        for name in (*loaded["tasks"], *loaded["groups"]):
            if len(name) > LONGEST_NAME:
                raise BadInput(f"task {cut(name, 80)}: has a name of {len(name):,} characters; give it a shorter one")
        runs_code = any(getattr(task, "UNSAFE_CODE", False) for task in loaded["tasks"].values())
        walls = sandbox.available_mode(code == "degraded") if runs_code else None
        groups = {name: _members(group) for name, group in loaded["groups"].items()}
        chosen = catalogue.primary_filters(loaded["tasks"], groups, primary or {}, lacking)
        return cls(loaded, limit, chat, walls, lacking, primary=chosen, made_of=made_of)

    @property
    def tasks(self) -> dict[str, Any]:
        """lm-eval's Task objects by name, groups unfolded."""
        return dict(self.loaded["tasks"])

    @property
    def versions(self) -> dict[str, str]:
        """The version of each task."""
        return {name: str(task.VERSION) for name, task in self.tasks.items()}

    @property
    def documents(self) -> dict[str, range]:
        """The documents that are asked of each task, by lm-eval's doc_id."""
        return {name: range(len(task.eval_docs))[: self.limit] for name, task in self.tasks.items()}

    def restrict(self, documents: Mapping[str, Sequence[int]]) -> Suite:
        """The same with these documents alone; without tasks and, if there are such, groups that have none."""
        chosen = {name: sorted(own) for name, own in documents.items() if own}
        tasks = {name: task for name, task in self.tasks.items() if name in chosen}
        groups = self.loaded["groups"] if len(tasks) == len(self.tasks) else {}
        return replace(self, loaded={**self.loaded, "tasks": tasks, "groups": groups}, limit=None, chosen=chosen)

    def requests(self, tokenizer: Any) -> dict[str, list[Request]]:
        """What every arm with this tokenizer is asked, by task, in lm-eval's order; a document's repeats together."""
        return {
            name: [request for one in instances for request in _requests(one)]
            for name, instances in self._instances(tokenizer)
        }

    def documents_asked(self, tokenizer: Any) -> dict[str, list[Document]]:
        """The same by document."""
        documents: dict[str, list[Document]] = {}
        for name, instances in self._instances(tokenizer):
            chosen = self.chosen and self.chosen[name]
            documents[name] = []
            for place, group in groupby(instances, key=lambda one: int(one.doc_id)):
                own = list(group)
                requests = tuple(tuple(_requests(one)) for one in own)
                documents[name].append(
                    Document(chosen[place] if chosen else place, document_hash(own[0].doc), requests)
                )
        return documents

    def _instances(self, tokenizer: Any) -> Iterator[tuple[str, list[Any]]]:
        """Each task with its requests as lm-eval has them."""
        self._built.clear()
        self._hashes.clear()
        self._reseed()
        model, built = _lm(tokenizer, {}), dict[str, Built]()
        for name, task in self.tasks.items():
            try:
                with templates_compiled_once():
                    built[name] = build(
                        task,
                        limit=self.limit,
                        samples=self.chosen and self.chosen[name],
                        apply_chat_template=self.chat,
                        fewshot_as_multiturn=self.chat,
                        chat_template=model.apply_chat_template if self.chat else None,
                        tokenizer_name=model.tokenizer_name if self.chat else "",
                    )
            except TemplateRefuses as error:
                raise BadInput(
                    f"task {name}: the chat template of {tokenizer.name_or_path} refuses its prompts ({error}); set "
                    "benchmarks.apply_chat_template=false, or take a template that knows such messages"
                ) from None
            yield name, list(built[name].instances)
        self._built.append((tokenizer, built))

    def score(
        self,
        arm: Arm,
        digest: str,
        tokenizer: Any,
        requests: Mapping[str, Sequence[Request]],
        answers: Mapping[str, Sequence[Answer]],
        seed: int,
    ) -> tuple[dict[str, Any], list[Record]]:
        """lm-eval's results (in the layout of its results files) and the records of one arm."""
        from lm_eval.evaluator import evaluate

        if not any(other is tokenizer for other, _ in self._built):
            self.requests(tokenizer)
        built, given = self._built[0][1], dict[int, deque[Answer]]()
        for task, came in answers.items():
            assert len(came) == len(requests[task]) == sum(one.repeats for one in built[task].instances)
            left = iter(came)
            given |= {id(one): deque(islice(left, one.repeats)) for one in built[task].instances}
        with (
            verdicts.allow_code(self.walls),
            templates_compiled_once(),
            built_before(self.tasks, built),
            hashed_before(self._hashes),
        ):
            results = evaluate(
                lm=_lm(tokenizer, given),
                task_dict=self.loaded,
                limit=self.limit,
                samples=self.chosen,
                bootstrap_iters=0,
                apply_chat_template=self.chat,
                fewshot_as_multiturn=self.chat,
                confirm_run_unsafe_code=self.walls is not None,
            )
        results["config"] = {
            "model": "rvdist",
            "model_args": {"pretrained": arm.point.base, "arm": arm.name, "point": digest, "prompt": arm.prompt},
            "limit": self.limit,
            "bootstrap_iters": 0,
            "fewshot_seed": _FEWSHOT_SEED,
        }
        if self.walls:
            results["sandbox"] = self.walls
        samples = results.pop("samples")
        records = []
        for task, entries in samples.items():
            together, found = self.tasks[task].aggregation(), in_format(self.tasks[task], entries)
            written = self._written(task, answers[task])
            for entry in entries:
                place = int(entry["doc_id"])
                own, asked_for = written.get(place, ()), found.get(place)
                records.append(as_record(arm, digest, task, together, entry, seed, own, asked_for))
        return results, records

    def _written(self, task: str, answers: Sequence[Answer]) -> dict[int, list[Completion]]:
        """The completions of each document, where it is known how long all of them are and why they ended."""
        left, chosen = iter(answers), self.chosen and self.chosen[task]
        written: defaultdict[int, list[Completion]] = defaultdict(list)
        for instance in self.tasks[task].instances:
            place = chosen[instance.doc_id] if chosen else instance.doc_id
            for answer in islice(left, instance.repeats):
                if isinstance(answer, Completion):
                    written[place].append(answer)
        return {place: own for place, own in written.items() if all(one.finish for one in own)}

    def infos(self, records: Sequence[Record]) -> list[TaskInfo]:
        """What the statistics must know of each task, given one arm's records."""
        known = []
        for name, task in self.tasks.items():
            pairs = dict.fromkeys((metric, r.filter) for r in records if r.task == name for metric in r.metrics)
            if pairs:
                metrics = tuple(pairs)
                better = {metric: _higher_is_better(task, metric) for metric, _ in metrics}
                primary = next((pair for pair in metrics if pair[1] == self.primary.get(name)), metrics[0])
                known.append(TaskInfo(name, self.versions[name], metrics, primary, better))
        return known

    def metrics_left_out(self, results: Mapping[str, Any], infos: Sequence[TaskInfo]) -> list[str]:
        """A sentence for each metric that is in an arm's results and not in its records, whose `infos` are given."""
        recorded = {(info.name, metric.removeprefix(LOGARITHM)) for info in infos for metric, _ in info.metrics}
        metrics = dict.fromkeys(
            (name, key.partition(",")[0]) for name in self.tasks for key in results["results"][name] if "," in key
        )
        return [
            f"{name}: {metric} is one number for all documents together and not a mean over them: see results/"
            for name, metric in metrics
            if (name, metric) not in recorded and not metric.endswith("_stderr")
        ]

    @property
    def groups(self) -> dict[str, tuple[Any, list[str]]]:
        """lm-eval's Group objects that have a score of their own, by name, and the tasks of each."""
        scored = {name: group for name, group in self.loaded["groups"].items() if group.aggregate_metric_list}
        return {name: (group, _members(group)) for name, group in scored.items()}

    def _reseed(self) -> None:
        """Few-shot examples are drawn anew each time requests are built: make it the same draw."""
        for task in self.tasks.values():
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)


def _members(group: Any) -> list[str]:
    return list(dict.fromkeys(task.task_name for task in group.get_all_tasks()))


def _requests(instance: Any) -> list[Request]:
    """As often as the task asks for it."""
    request = _request(instance)
    if isinstance(request, Generate):
        return [replace(request, repeat=k) for k in range(instance.repeats)]
    return [request] * instance.repeats


def _request(instance: Any) -> Request:
    prompt, *rest = instance.args
    if instance.request_type == "generate_until":
        try:
            return Generate.from_lm_eval(prompt, rest[0])
        except ValueError as error:
            raise BadInput(f"task {instance.task_name}: {error}") from None
    if instance.request_type == "loglikelihood":
        return Choice(prompt, rest[0])
    if instance.request_type == "loglikelihood_rolling":
        return Rolling(prompt)
    raise BadInput(f"task {instance.task_name}: {instance.request_type} requests are not supported yet")


def _lm(tokenizer: Any, given: Mapping[int, deque[Answer]]) -> Any:
    """An lm-eval model that has `given` answers to instances, by their ids, and nothing else. lm-eval is imported only
    when it is used."""
    from lm_eval.api.model import LM

    class Given(LM):  # type: ignore[misc]
        def _take(self, instances: Sequence[Any]) -> Iterator[Answer]:
            return (given[id(instance)].popleft() for instance in instances)

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return [answer.text for answer in self._take(requests) if isinstance(answer, Completion)]

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            return [(a.logprob, a.greedy) for a in self._take(requests) if isinstance(a, Loglikelihood)]

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return [answer.logprob for answer in self._take(requests) if isinstance(answer, Loglikelihood)]

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            try:
                return apply_template(tokenizer, chat_history, add_generation_prompt)
            except Exception as error:  # a template is a program: it raises what it likes
                roles = ", ".join(dict.fromkeys(message["role"] for message in chat_history))
                raise TemplateRefuses(f"{reason(error)}; the messages are of {roles}") from None

        @property
        def tokenizer_name(self) -> str:
            return str(tokenizer.name_or_path).replace("/", "__")

    return Given()


def _higher_is_better(task: Any, metric: str) -> bool:
    known = task.higher_is_better()
    return bool(known.get(metric, known.get(metric.removeprefix(LOGARITHM), True)))
