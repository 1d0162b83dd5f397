"""HumanEval's answers → verdicts of the sandbox → pass@1: the functions that the YAML files beside this one name.

lm-eval's own module would fetch a metric and run the code in our process; it is not imported. One answer is asked
for each problem, and pass@1 is the share of problems whose answer passes. Verdicts stand in the records.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from rvdist.evaluate.sandbox import sandbox

_MODE: ContextVar[sandbox.Mode | None] = ContextVar("mode", default=None)


@contextmanager
def allow_code(mode: sandbox.Mode | None) -> Iterator[None]:
    """Within it, answers may be judged, behind these walls (None: not at all). lm-eval hands filters only answers."""
    token = _MODE.set(mode)
    try:
        yield
    finally:
        _MODE.reset(token)


def judge(responses: Sequence[Sequence[str]], docs: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """A filter for answers that go on where the prompt ends: the verdict in words for each answer."""
    programs = [
        sandbox.Program(doc["prompt"], answer, f"{doc['test']}\ncheck({doc['entry_point']})", doc["entry_point"])
        for given, doc in zip(responses, docs, strict=True)
        for answer in given
    ]
    mode = _MODE.get()
    assert mode is not None, "code is run only where a suite was loaded for it"
    verdicts = iter(sandbox.run(programs, mode=mode))
    return [[str(next(verdicts)) for _ in given] for given in responses]


def judge_fenced(responses: Sequence[Sequence[str]], docs: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """The same for answers that may end with the fence of a code block."""
    return judge([[answer.split("```", 1)[0] for answer in given] for given in responses], docs)


def pass_at_1(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """The score of one problem."""
    return {"pass@1": float(results[0].startswith("passed "))}
