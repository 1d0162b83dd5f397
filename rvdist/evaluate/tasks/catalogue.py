"""Task names → lm-eval's Task objects: ours, the user's and lm-eval's own, with data from the Hub or from files, and
perturbed on request.

How a task asks and scores is its definition's alone; only where the documents come from, and the question's wording in
a perturbed task, are changed here. Nothing that runs a model's code is loaded unless it does so in our sandbox.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rvdist.core.errors import BadInput
from rvdist.evaluate.tasks import local, perturb, private_lm_eval

OURS = Path(__file__).resolve().parent
TEXT = "text"  # followed by a colon and a file: a task of ours
_FOLDERS = ("bbh", "gsm8k", "gsm8k_platinum", "gsm_plus", "sciq")  # of lm-eval's; reading all of them takes 10 s
# The filter that reads what a task's prompt asks for: where examples show how an answer ends, and without examples. Of
# lm-eval's tasks with several filters these are those where it may not be the first.
_ASKED_FOR = {
    r"(gsm8k(_platinum)?(_cot)?|gsm_plus(_mini)?)": ("strict-match", "flexible-extract"),
    r"(gsm8k(_platinum)?_cot_zeroshot|bbh_(cot_)?zeroshot_\w+)": ("flexible-extract", "flexible-extract"),
}
_QUESTIONS = ("question", "problem", "input")


@dataclass(frozen=True)
class Perturbed:
    """The `doc_to_text` of a perturbed task: the original one, on a document whose question was edited. The document
    that lm-eval knows stays the original, and with it the target and the hash it is known by."""

    perturbation: perturb.Perturbation
    doc_to_text: str | Callable[[Mapping[str, Any]], str]

    def __call__(self, doc: Mapping[str, Any]) -> str:
        field = _question_field(self.doc_to_text, doc)
        return str(_text(self.doc_to_text, {**doc, field: self.perturbation(doc[field])}))


@dataclass(frozen=True)
class Prompted:
    """The `doc_to_text` of a task whose questions come after a `prompt`."""

    prompt: str
    doc_to_text: str | Callable[[Mapping[str, Any]], str | int]

    def __call__(self, doc: Mapping[str, Any]) -> str | int:
        text = _text(self.doc_to_text, doc)
        return text if isinstance(text, int) else self.prompt + text  # a number chooses among several questions


def _text(doc_to_text: str | Callable[[Mapping[str, Any]], str | int], doc: Mapping[str, Any]) -> str | int:
    """What lm-eval makes of a document."""
    if callable(doc_to_text):
        return doc_to_text(doc)
    return str(doc[doc_to_text]) if doc_to_text in doc else private_lm_eval.render(doc_to_text, doc)


def load(
    names: Sequence[str],
    include_paths: Sequence[Path],
    num_fewshot: int | None = None,
    code: str | None = None,
    data_dir: Path | None = None,
    leave_out: bool = False,
    prompt: str = "",
) -> tuple[dict[str, Any], dict[str, str]]:
    """lm-eval's TaskDict of these tasks and groups, and the names left out, each with the reason.

    Of two definitions the later counts: lm-eval's, ours, those under `include_paths`. `num_fewshot` overrides tasks
    that set a number other than 0. With `data_dir` the data sets in `local.LAYOUTS` are read from there and from
    nowhere else; names without their files are left out on request. A `prompt` is put before every question, but for
    those of examples. Raises BadInput for a name there is not, data that cannot be had, code that may not be run
    (`code` is None) or would run outside our sandbox.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    private_lm_eval.require()
    if data_dir is not None and not data_dir.is_dir():
        raise BadInput(f"benchmarks.data_dir: {data_dir} is not a directory")
    parsed = {name: (TEXT, None) if name.startswith(f"{TEXT}:") else perturb.parse(name) for name in names}
    manager = _manager([task for task, _ in parsed.values()], include_paths)
    for name, (task, perturbation) in parsed.items():
        _check(manager.task_index, task, code)
        if perturbation:
            _check_perturbable(manager.task_index, name, task)

    built: list[Any] = []
    lacking: dict[str, str] = {}
    for name, (task, perturbation) in parsed.items():
        try:
            if data_dir is not None:
                _localise(manager.task_index, task, data_dir, num_fewshot)
            if perturbation:
                manager.task_index[name] = _perturb(manager.task_index[task], name, perturbation)
            elif name.startswith(f"{TEXT}:"):
                manager.task_index[name] = _text_file(manager.task_index[TEXT], name)
            task_dict = manager.load([name])
        except local.MissingData as error:
            lacking[name] = str(error)
            if not leave_out or len(lacking) == len(parsed):
                raise
        except BadInput:
            raise
        except Exception as error:  # whatever a data set's loader raises
            raise BadInput(f"benchmarks.tasks: {name} could not be loaded ({_reason(error)})") from None
        else:
            built += [task_dict["groups"][name]] if name in task_dict["groups"] else task_dict["tasks"].values()
    try:
        loaded: dict[str, Any] = manager.load(built)
    except ValueError as error:  # one task twice, by itself and in a group
        raise BadInput(f"benchmarks.tasks: {_reason(error)}") from None
    for one in loaded["tasks"].values():
        one.set_config(key="num_fewshot", value=_shots(one.get_config("num_fewshot"), num_fewshot))
        if getattr(one, "UNSAFE_CODE", False):  # defined inside a group, so that no check has seen it
            _require_sandbox(one.task_name, one.get_config("metadata"), code)
        if prompt:
            _prompt(one, prompt)
    return loaded, lacking


def primary_filters(
    tasks: Mapping[str, Any],
    groups: Mapping[str, Sequence[str]],
    wanted: Mapping[str, str],
    lacking: Collection[str] = (),
) -> dict[str, str]:
    """The filter whose score counts for each task: the one `wanted` of it, of the task whose questions it edits, or of
    a group that has it; else the one that reads what its prompt asks for; else its first. Raises BadInput for a name
    that is none of these and for a filter that a task does not have."""
    known = {*tasks, *map(_original, tasks), *groups, *lacking, *map(_original, lacking)}
    for name in wanted:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "name a task of benchmarks.tasks"
            raise BadInput(f"benchmarks.primary: {name} is none of the tasks that are asked; {hint}")
    chosen = {}
    for name, task in tasks.items():
        filters = [one["name"] for one in task.get_config("filter_list") or [{"name": "none"}]]
        holding = sorted((group for group in groups if name in groups[group]), key=lambda group: len(groups[group]))
        names = [one for one in (name, _original(name), *holding) if one in wanted]
        if names and wanted[names[0]] not in filters:
            raise BadInput(
                f"benchmarks.primary: {name} has no filter {wanted[names[0]]!r}; it has {', '.join(filters)}"
            )
        asked_for = [pair for pattern, pair in _ASKED_FOR.items() if re.fullmatch(pattern, _original(name))]
        own = asked_for[0][0 if task.get_config("num_fewshot") else 1] if asked_for else filters[0]
        chosen[name] = wanted[names[0]] if names else own if own in filters else filters[0]
    return chosen


def _original(name: str) -> str:
    """The task whose questions a task edits, or itself."""
    return name.partition("+")[0]


def _prompt(task: Any, prompt: str) -> None:
    original = task.config.doc_to_text
    if original is None:
        raise BadInput(
            f"benchmarks.tasks: {task.task_name} has no doc_to_text, so no prompt can go before its questions"
        )
    task.fewshot_cfg.doc_to_text = task.fewshot_cfg.doc_to_text or original
    task.config.doc_to_text = Prompted(prompt, original)


def _manager(names: Sequence[str], include_paths: Sequence[Path]) -> Any:
    """A TaskManager that knows all of these names, if there are such."""
    import lm_eval.tasks

    paths = [OURS, *include_paths]
    folders = [Path(lm_eval.tasks.__file__).parent / folder for folder in _FOLDERS]
    manager = lm_eval.tasks.TaskManager(include_path=[*folders, *paths], include_defaults=False)
    if all(_complete(manager.task_index, name) for name in names):
        return manager
    return lm_eval.tasks.TaskManager(include_path=paths)


def _members(entry: Any) -> list[str]:
    """What a group or tag holds; a task holds nothing."""
    listed = entry.cfg.get("task") if entry.cfg else sorted(entry.tags)
    if not isinstance(listed, list):
        return []
    return [one if isinstance(one, str) else one.get("group", one.get("task")) for one in listed]


def _complete(index: Mapping[str, Any], name: str) -> bool:
    """Whether all that the name stands for is known; of a tag, which gathers from everywhere, one cannot be sure."""
    entry = index.get(name)
    return bool(entry and entry.cfg) and all(_complete(index, member) for member in _members(entry))


def _leaves(index: Mapping[str, Any], name: str) -> list[str]:
    """The tasks a name stands for, without those that a group defines itself."""
    if name not in index:
        return []
    members = _members(index[name])
    return [leaf for member in members for leaf in _leaves(index, member)] if members else [name]


def _check(index: Mapping[str, Any], name: str, code: str | None) -> None:
    if name not in index:
        close = difflib.get_close_matches(name, list(index), n=1)
        hint = f"did you mean {close[0]}?" if close else "set benchmarks.include_path for tasks of your own"
        raise BadInput(f"benchmarks.tasks: there is no task {name!r}; {hint}")
    for leaf in _leaves(index, name):
        settings = index[leaf].cfg or {}
        if settings.get("unsafe_code"):
            _require_sandbox(leaf, settings.get("metadata"), code)  # before loading, which may already run code


def _check_perturbable(index: Mapping[str, Any], name: str, task: str) -> None:
    settings = index[task].cfg or {}
    if _members(index[task]):
        raise BadInput(f"benchmarks.tasks: {name}: {task} is a group; name those of its tasks that shall be perturbed")
    if settings.get("unsafe_code"):
        raise BadInput(
            f"benchmarks.tasks: {name}: the questions of {task} are programs; perturbations edit prose alone"
        )
    if not isinstance(settings.get("doc_to_text"), str):  # a function is still a string here
        raise BadInput(f"benchmarks.tasks: {name}: {task} has no doc_to_text, which a perturbed task needs")


def _require_sandbox(name: str, metadata: Mapping[str, Any] | None, code: str | None) -> None:
    if not (metadata or {}).get("sandboxed"):
        raise BadInput(f"benchmarks.tasks: {name} runs what the model wrote outside our sandbox; leave it out")
    if code is None:
        raise BadInput(
            f"benchmarks.tasks: {name} runs what the model wrote; set benchmarks.allow_code_execution=true to let it, "
            "in a sandbox (docs/sandbox.md)"
        )


def _localise(index: dict[str, Any], name: str, data_dir: Path, num_fewshot: int | None) -> None:
    """Let the tasks that a name stands for read their documents from files."""
    for leaf in _leaves(index, name):
        config = private_lm_eval.definition(index[leaf])
        dataset = str(config.get("dataset_path"))
        if dataset in local.LAYOUTS and "custom_dataset" not in config:
            shots = _shots(config.get("num_fewshot"), num_fewshot)
            files = {
                split: str(local.find(leaf, data_dir, dataset, config.get("dataset_name"), split)) if needed else None
                for split, needed in _splits(config, shots).items()
            }
            source = {"files": files, "fields": list(local.LAYOUTS[dataset].fields)}
            config |= {"custom_dataset": local.load, "dataset_kwargs": source}
            index[leaf] = replace(index[leaf], cfg=config, yaml_path=None)


def _splits(config: Mapping[str, Any], shots: int) -> dict[str, bool]:
    """The splits that lm-eval opens, and whether anything is taken from them."""
    asked = config.get("test_split") or config["validation_split"]
    fewshot = config.get("fewshot_config") or {}
    drawn = fewshot.get("split") or config.get("fewshot_split")
    if not drawn and "samples" not in fewshot:
        drawn = config.get("training_split") or config.get("validation_split")
    return {drawn: shots > 0, asked: True} if drawn else {asked: True}


def _text_file(entry: Any, name: str) -> Any:
    """The entry of the task that is the perplexity of a file."""
    path = Path(name.removeprefix(f"{TEXT}:")).expanduser().absolute()
    config = private_lm_eval.definition(entry) | {"task": name, "dataset_kwargs": {"path": str(path)}}
    return replace(entry, name=name, cfg=config, yaml_path=None)


def _perturb(entry: Any, name: str, perturbation: perturb.Perturbation) -> Any:
    """The entry of a perturbed task. Examples are shown as they are: only the question asked is edited."""
    config = private_lm_eval.definition(entry)
    original = config["doc_to_text"]
    metadata = config.get("metadata") or {}
    config |= {
        "task": name,
        "doc_to_text": Perturbed(perturbation, original),
        "fewshot_config": {"doc_to_text": original, **(config.get("fewshot_config") or {})},
        "metadata": metadata | {"version": f"{metadata.get('version', 0)}+{perturb.VERSION}"},
    }
    return replace(entry, name=name, cfg=config, yaml_path=None)


def _shots(own: int | None, override: int | None) -> int:
    if own is None:
        return override or 0
    return override if own and override is not None else own


def _question_field(template: str | Callable[..., str], doc: Mapping[str, Any]) -> str:
    """The field of a document that its prompt asks about: the only text in the template, or one of _QUESTIONS."""
    from jinja2 import Environment, meta

    shown = set() if callable(template) else meta.find_undeclared_variables(Environment().parse(template)) | {template}
    texts = [field for field in doc if field in shown and isinstance(doc[field], str)]
    for field in texts if len(texts) == 1 else _QUESTIONS:
        if isinstance(doc.get(field), str):
            return field
    raise BadInput(
        f"a perturbed task needs a prompt made of one text field, or a document with one of {', '.join(_QUESTIONS)}; "
        f"this one has {', '.join(doc)}"
    )


def _reason(error: Exception) -> str:
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__
