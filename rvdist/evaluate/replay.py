"""The replay engine: answers that were recorded once, given again as any engine gives them.

Reads the samples of our runs and of lm-eval's, and finds in them what a suite asks; scores are made anew. Knows nothing
of weights and of vLLM. Whatever it reads may have been written by anybody.
"""

from __future__ import annotations

import math
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import xxhash

from rvdist.core.errors import BadInput
from rvdist.core.foreign import parse_line
from rvdist.core.point import WeightPoint
from rvdist.core.record import require_ends
from rvdist.core.regular import read_lines
from rvdist.evaluate.fleet.arguments import versions
from rvdist.evaluate.fleet.schedule import Slice
from rvdist.evaluate.request import (
    Answer,
    Answered,
    Choice,
    Completion,
    Generate,
    Loglikelihood,
    Refused,
    Request,
    Rolling,
)
from rvdist.evaluate.suite import Document
from rvdist.evaluate.transcript import document_hash, likelihood, parse_answers
from rvdist.weights.checkpoint.digest import file_digest

T = TypeVar("T")
Answers: TypeAlias = Mapping[tuple[WeightPoint, str], Sequence[Answer]]  # by point and task, as requests are ordered

_LOGGED = re.compile(r"samples_(.+)_(\d{4}-\d\d-\d\dT[\d.:-]+)\.jsonl?")  # lm-eval's names: task, date
_LONGEST = 32 << 20  # bytes of a sample
_HINT = "give a run directory of ours, or samples_TASK_DATE.jsonl of `lm_eval --log_samples`"
_BOOLEANS = {"True": True, "False": False, True: True, False: False}

_Place: TypeAlias = tuple[str | None, int | None, str, str]  # point, seed, task, prompt
_LACKING = ("of these weights", "with this engine.seed", "of this task", "with this prompt")


class ReplayActor:
    """Stands where an engine does, as a Ray actor. `answers` has those to every slice that it will be asked."""

    def __init__(self, base: str, answers: Answers) -> None:
        self._answers = answers

    def info(self) -> dict[str, Any]:
        """What an engine's `info` says, as far as it holds."""
        return {**versions(), "mode": "replay"}

    def answer(self, piece: Slice, requests: Sequence[Request]) -> tuple[Answered | Refused, float]:
        """The recorded answers of a slice, and no seconds of a swap."""
        begin = time.perf_counter()
        recorded = tuple(
            answer for part in piece.parts for answer in self._answers[piece.point, part.task][part.begin : part.end]
        )
        if any(isinstance(answer, Loglikelihood) and math.isnan(answer.logprob) for answer in recorded):
            return Refused(f"a recorded log-probability of {piece.name} is not a number; leave the arm out"), 0.0
        return Answered(recorded, 0, time.perf_counter() - begin), 0.0


@dataclass(frozen=True)
class _Kept:
    """What a record of ours has of a document."""

    doc_id: int
    doc: str
    response: str
    tokens: Sequence[int] = ()
    finish: Sequence[str] = ()

    def answers(self, document: Document) -> list[Answer]:
        return parse_answers(self.response, document.requests, self.tokens, self.finish)


@dataclass(frozen=True)
class _Logged:
    """What lm-eval logged of a document: of each request the arguments, if they are there, and the responses."""

    doc_id: int
    doc: str
    arguments: Sequence[Sequence[Any]]
    responses: Sequence[Any]

    def answers(self, document: Document) -> list[Answer]:
        if len(self.responses) != len(document.requests):
            raise ValueError(f"it has {len(self.responses)} responses, and {len(document.requests)} are asked for")
        answers: list[Answer] = []
        for place, (repeats, given) in enumerate(zip(document.requests, self.responses, strict=True)):
            request = repeats[0]
            choice = isinstance(request, Choice) and request.continuation
            if choice and self.arguments and self.arguments[place][1:] != [choice]:
                raise ValueError("its responses are to other choices")
            if not isinstance(given, list) or len(given) < len(repeats):
                raise ValueError(f"its responses are fewer than the {len(repeats)} repeats that are asked for")
            answers += [_response(request, one) for one in given[: len(repeats)]]
        return answers


_Sample: TypeAlias = _Kept | _Logged


class Recording:
    """The samples in `path`: a run directory of ours or its samples/, a directory of lm-eval's samples, or one such
    file. `logged`: they are lm-eval's, which do not say of what point and seed they are. Raises BadInput."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.logged = False
        # both also by lm-eval's number of the document: there may be the same one twice
        self._by_prompt: dict[_Place, dict[int, _Sample]] = defaultdict(dict)
        self._by_document: dict[tuple[str, str], dict[int, _Sample]] = defaultdict(dict)
        files = _files(path)
        for file in files:
            for number, line in _lines(file):
                try:
                    self._add(file, parse_line(line))
                except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
                    raise BadInput(f"engine.replay: {file}: line {number} is no sample; {_HINT}") from None
        places = [*self._by_prompt, *((None, None, task) for task, _ in self._by_document)]
        if not places:
            raise BadInput(f"engine.replay: {path} holds no samples; {_HINT}")
        self._known = {place[:size] for place in places for size in range(1, len(place) + 1)}
        self.digest: str = xxhash.xxh3_128_hexdigest("".join(map(file_digest, files)).encode())

    def answers(
        self, documents: Mapping[str, Sequence[Document]], point: str, seed: int, arm: str
    ) -> tuple[dict[str, list[Answer]], int, int]:
        """The answers to these documents by task, as their requests are ordered, at the point of this digest; how many
        of the documents lm-eval asked in other words; and of how many a completion went on where the task says it
        ends, as no engine's does, and was cut there. `arm` is for people. Raises BadInput where answers lack."""
        by_task: dict[str, list[Answer]] = {}
        lacking: list[str] = []
        reworded = shortened = 0
        for task, asked in documents.items():
            by_task[task] = []
            for document in asked:
                prompt = _prompt(document.requests[0][0])
                place = (None, None, task, prompt) if self.logged else (point, seed, task, prompt)
                try:
                    found = self._sample(place, document).answers(document)
                    ended = [_end(*pair) for pair in zip(document.flat, found, strict=True)]
                    shortened += ended != found
                    by_task[task] += ended
                except ValueError as error:
                    lacking.append(f"{task} {document.doc_id} ({error})")
                reworded += place not in self._by_prompt
        if lacking:
            total = sum(map(len, documents.values()))
            raise BadInput(
                f"engine.replay: {self.path} lacks answers to {len(lacking)} of the {total} documents that {arm} is "
                f"asked, first to {lacking[0]}; set target, vectors, prompts, benchmarks.limit and num_fewshot as when "
                "they were recorded, or ask an engine"
            )
        return by_task, reworded, shortened

    def _sample(self, place: _Place, document: Document) -> _Sample:
        """What is recorded of a document, whose contents tell it where nothing was asked in its words."""
        sample = self._by_prompt.get(place) or self._by_document.get((place[2], document.doc))
        if not sample:
            lacking = (name for size, name in enumerate(_LACKING, start=1) if place[:size] not in self._known)
            raise ValueError(f"nothing {next(lacking)}")
        same = sample.get(document.doc_id)
        if same and same.doc == document.doc:
            return same
        return min(sample.values(), key=lambda one: (one.doc != document.doc, one.doc_id != document.doc_id))

    def _add(self, file: Path, sample: Any) -> None:
        """Of the samples of one document, one for each filter, the first counts: all have the same responses."""
        doc_id = _of(int, sample["doc_id"])
        if "response" in sample:
            point, task, prompt = (_of(str, sample[key]) for key in ("point", "task", "prompt_text"))
            ends = [_of(list, sample.get(key, [])) for key in ("tokens", "finish")]
            require_ends(*ends)
            kept = _Kept(doc_id, _of(str, sample["doc"]), _of(str, sample["response"]), *ends)
            self._by_prompt[point, _of(int, sample["seed"]), task, prompt].setdefault(doc_id, kept)
            return
        responses, arguments = _of(list, sample["resps"]), _arguments(sample.get("arguments"))
        if arguments and len(arguments) != len(responses):
            raise ValueError
        hashed = _of(str, sample["doc_hash"]) if "doc_hash" in sample else document_hash(sample["doc"])
        name = _LOGGED.fullmatch(file.name)
        if not name:
            raise BadInput(
                f"engine.replay: {file} has samples of lm-eval's, and its name does not say of what task; call it "
                "samples_TASK_DATE.jsonl, as lm-eval does"
            )
        self.logged = True
        logged = _Logged(doc_id, hashed, arguments, responses)
        if arguments and isinstance(arguments[0][0], str):
            self._by_prompt[None, None, name[1], arguments[0][0]].setdefault(doc_id, logged)
        self._by_document[name[1], hashed].setdefault(doc_id, logged)


def _files(path: Path) -> list[Path]:
    """Where the samples are; of lm-eval's files the newest of each task."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise BadInput(f"engine.replay: {path} is neither a file nor a directory; {_HINT}")
    own = sorted((path / "samples").glob("*.jsonl"))
    logged = _newest(path)
    below = [one for one in sorted(path.iterdir()) if one.is_dir() and _newest(one)]
    if own or logged or not below:
        return own or logged or sorted(path.glob("*.jsonl"))
    if len(below) > 1:
        raise BadInput(f"engine.replay: {path} holds samples of {len(below)} models; give one, such as {below[0]}")
    return _newest(below[0])


def _newest(directory: Path) -> list[Path]:
    named = [(found[1], found[2], file) for file in directory.iterdir() if (found := _LOGGED.fullmatch(file.name))]
    return [file for _, file in sorted({task: (date, file) for task, date, file in sorted(named)}.values())]


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    try:
        for number, line in read_lines(file, _LONGEST):
            if line.strip():
                yield number, line
    except OSError as error:
        raise BadInput(f"engine.replay: {file}: cannot be read ({error.strerror}); {_HINT}") from None


def _of(kind: type[T], value: Any) -> T:
    if type(value) is not kind:  # True is no number here
        raise TypeError
    if isinstance(value, str):
        value.encode()  # half a surrogate pair could not be written again
    return value


def _arguments(logged: Any) -> list[list[Any]]:
    """lm-eval's arguments of each request: {"gen_args_0": {"arg_0": …, …}, …}, or lists, as it wrote them once."""
    requests = list(logged.values()) if isinstance(logged, dict) else _of(list, logged or [])
    arguments = [list(one.values()) if isinstance(one, dict) else _of(list, one) for one in requests]
    if not all(arguments):
        raise ValueError
    return arguments


def _prompt(request: Request) -> str:
    """The first of lm-eval's arguments."""
    return request.context if isinstance(request, Choice) else request.text


def _end(request: Request, answer: Answer) -> Answer:
    """The answer, a completion without what follows the first stop string of what is asked."""
    if not isinstance(answer, Completion) or not isinstance(request, Generate):
        return answer
    places = [place for stop in request.stop if (place := answer.text.find(stop)) >= 0]
    return Completion(answer.text[: min(places)], "", 0, 0) if places else answer


def _response(request: Request, given: Any) -> Answer:
    """One of lm-eval's responses, in which numbers and truth values may be texts."""
    try:
        if not isinstance(request, Generate):
            logprob, greedy = (given, False) if isinstance(request, Rolling) else given
            return likelihood(logprob, _BOOLEANS[greedy])
        return Completion(_of(str, given), "", 0, 0)
    except (ValueError, TypeError, LookupError, OverflowError):
        pass
    raise ValueError("its responses are of another kind than what is asked for")
