"""What we take from lm-eval beyond its public interface, in the process that asks and scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

from rvdist.core.private import Library

LM_EVAL = Library("lm-eval", "0.4.13")
NEEDED = (
    "lm_eval.utils:env.from_string",
    "lm_eval.utils:apply_template",
    "lm_eval.tasks._yaml_loader:load_yaml",
    "lm_eval.tasks._index:Entry(yaml_path)",
    "lm_eval.tasks._index:Entry(cfg)",
    "lm_eval.tasks._index:Entry(tags)",
    "lm_eval.tasks:TaskManager.task_index",
    "lm_eval.api.task:Task.build_all_requests",
    "lm_eval.api.task:Task.doc_iterator",
    "lm_eval.api.instance:Instance(filtered_resps)",
    "lm_eval.evaluator:json.dumps",
    "lm_eval.evaluator:hash_string(string)",
)


def require() -> None:
    """Raises Failed where something of this is gone."""
    LM_EVAL.require(*NEEDED)


@contextmanager
def templates_compiled_once() -> Iterator[None]:
    """A patch while a task builds its requests or scores: lm-eval compiles a task's templates anew for every document,
    which takes most of that time. What is compiled is kept for the next time."""
    from lm_eval.utils import env

    compile_template = env.from_string
    env.from_string = _keeping(compile_template)
    try:
        yield
    finally:
        env.from_string = compile_template


@lru_cache(maxsize=1)
def _keeping(compile_template: Callable[[str], Any]) -> Callable[[str], Any]:
    return lru_cache(compile_template)


@dataclass(frozen=True)
class Built:
    """What a task asks: lm-eval's requests, and the documents that it went through for them, with its numbers."""

    instances: Sequence[Any]
    documents: Sequence[tuple[int, Any]]


def build(task: Any, **how: Any) -> Built:
    """Has a task build its requests; `how` is what lm-eval's function takes."""
    documents, go_through = list[tuple[int, Any]](), task.doc_iterator

    def keeping(**which: Any) -> Iterator[tuple[int, Any]]:
        for pair in go_through(**which):
            documents.append(pair)
            yield pair

    task.doc_iterator = keeping
    try:
        task.build_all_requests(**how)
    finally:
        del task.doc_iterator
    return Built(task.instances, documents)


@contextmanager
def built_before(tasks: Mapping[str, Any], built: Mapping[str, Built]) -> Iterator[None]:
    """A patch while tasks score: lm-eval builds all requests anew for every arm, which takes half of that time, and
    reads all documents anew. They have those of before, requests without answers; documents are copied, since a metric
    may write into its own."""
    for name, task in tasks.items():
        for instance in built[name].instances:
            instance.resps, instance.filtered_resps = [], {}
        task._instances = built[name].instances
        task.build_all_requests = _build_nothing
        task.doc_iterator = partial(_go_through, built[name].documents)
    try:
        yield
    finally:
        for task in tasks.values():
            del task.build_all_requests, task.doc_iterator


class _Hash(str):
    """Of a document that was hashed before, in the place of its text."""


@contextmanager
def hashed_before(hashes: dict[int, str]) -> Iterator[None]:
    """A patch while tasks score: lm-eval writes every document as indented JSON anew for every arm, to hash it.
    `hashes` keeps those of documents by their ids, as long as they live. Other texts, whose hashes no record has, get
    none."""
    from lm_eval import evaluator

    library, hash_text = evaluator.json, evaluator.hash_string

    def dumps(document: Any, **how: Any) -> str:
        if id(document) not in hashes:
            hashes[id(document)] = hash_text(library.dumps(document, **how))
        return _Hash(hashes[id(document)])

    evaluator.json = SimpleNamespace(dumps=dumps)
    evaluator.hash_string = lambda text: str(text) if type(text) is _Hash else ""
    try:
        yield
    finally:
        evaluator.json, evaluator.hash_string = library, hash_text


def _go_through(documents: Sequence[tuple[int, Any]], **_: Any) -> Iterator[tuple[int, Any]]:
    for number, document in documents:
        yield number, document.copy() if type(document) is dict else document


def _build_nothing(**_: Any) -> None:
    pass


def definition(entry: Any) -> dict[str, Any]:
    """A task's definition, with its functions, by its entry in a TaskManager's index."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(entry.yaml_path) if entry.yaml_path else dict(entry.cfg)


def render(template: str, document: Mapping[str, Any]) -> str:
    """What lm-eval makes of a document by a template."""
    from lm_eval.utils import apply_template

    return str(apply_template(template, document))
