"""A record's answer as text, and back: what was asked and answered of a document, shown whole and read again.

Knows requests and answers; nothing of lm-eval's tasks or of engines.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rvdist.evaluate.request import Answer, Completion, Generate, Loglikelihood, Request, Rolling

_SCORED = re.compile(r"(\S+) \((not )?greedy\) ")  # before a continuation in records
_HEADING = re.compile(r"\[\d+ of \d+, (\d{1,9}) characters\]\n")  # before one of several answers
_ELSE = "it shows answers to something else"


def document_hash(doc: Any) -> str:
    """lm-eval's hash of a document."""
    from lm_eval.utils import handle_non_serializable, hash_string

    text = json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False)
    return str(hash_string(text))


def show_answers(response: Any, arguments: Sequence[Any]) -> str:
    """One answer as text, to the last digit; several answers to one request numbered, one after the other."""
    if isinstance(response, list):
        if len(response) == 1:
            return show_answers(response[0], arguments)
        texts = [show_answers(one, arguments) for one in response]
        numbered = (f"{_heading(k, len(texts), len(text))}{text}" for k, text in enumerate(texts, start=1))
        return "\n".join(numbered)
    if isinstance(response, tuple):
        return f"{float(response[0])!r} ({'' if response[1] else 'not '}greedy) {arguments[1]}"
    return repr(float(response)) if isinstance(response, float) else str(response)


def _heading(number: int, count: int, length: int) -> str:
    return f"[{number} of {count}, {length} characters]\n"


def parse_answers(
    response: str, requests: Sequence[Sequence[Request]], tokens: Sequence[int] = (), finish: Sequence[str] = ()
) -> list[Answer]:
    """The answers that a record's `response` shows: to the repeats of each request of its document. `tokens` are those
    of each completion and `finish` why it ended, as the record has them. Raises ValueError where it shows something
    else."""
    answers: list[Answer] = []
    left = response
    for repeats in requests:
        for number, request in enumerate(repeats, start=1):
            if answers:
                left = _after("\n", left)
            size = len(left)
            if len(repeats) > 1:
                heading = _HEADING.match(left)
                size = int(heading[1]) if heading else 0
                left = _after(_heading(number, len(repeats), size), left)
            answer, rest = _read(left[:size], request)
            answers.append(answer)
            left = rest + left[size:]
    if left:
        raise ValueError(_ELSE)
    if len(tokens) == len(finish) == sum(isinstance(answer, Completion) for answer in answers):
        ends = iter(zip(finish, tokens, strict=True))
        for place, answer in enumerate(answers):
            if isinstance(answer, Completion):
                why, count = next(ends)
                answers[place] = replace(answer, finish=why, tokens=count)
    return answers


def _after(beginning: str, text: str) -> str:
    if not text.startswith(beginning):
        raise ValueError(_ELSE)
    return text.removeprefix(beginning)


def _read(text: str, request: Request) -> tuple[Answer, str]:
    """The answer that a text begins with, and what follows."""
    if isinstance(request, Generate):
        return Completion(text, "", 0, 0), ""
    if isinstance(request, Rolling):
        number, line_end, rest = text.partition("\n")
        return likelihood(number, False), line_end + rest
    match = _SCORED.match(text)
    if not match:
        raise ValueError("it shows no log-likelihood, or one of 4 decimals, as older versions wrote it")
    return likelihood(match[1], not match[2]), _after(request.continuation, text[match.end() :])


def likelihood(logprob: str | float, greedy: bool) -> Loglikelihood:
    """What was recorded of one, without the count of its tokens. Raises ValueError for what is no number."""
    number = float(logprob)
    if math.isnan(number):
        raise ValueError("its log-likelihood is not a number")
    return Loglikelihood(number, greedy, 0)
