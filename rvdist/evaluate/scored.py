"""What lm-eval scored, one sample of a task at a time, as our records. Knows nothing of how it was asked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from numbers import Real
from typing import Any

from rvdist.core.point import Arm
from rvdist.core.record import Record
from rvdist.evaluate.request import Completion
from rvdist.evaluate.transcript import show_answers

LOGARITHM = "log2_"  # before the name of a perplexity in records


def in_format(task: Any, entries: Sequence[Mapping[str, Any]]) -> dict[int, bool]:
    """By document, whether its answers were as the task asks for them. Of the task's filters that search answers by a
    regular expression, and may find nothing, one says so: strict-match, or else the first. It must have found something
    in each answer. Empty where the task has no such filter."""
    from lm_eval.api.registry import get_filter
    from lm_eval.filters.extraction import RegexFilter

    filters = task.config.filter_list or ()
    for ensemble in sorted(filters, key=lambda ensemble: ensemble["name"] != "strict-match"):
        for step in ensemble["filter"]:
            kind = get_filter(step["function"]) if isinstance(step["function"], str) else step["function"]
            if isinstance(kind, type) and issubclass(kind, RegexFilter):
                nothing = step.get("fallback", "[invalid]")
                of_filter = [entry for entry in entries if entry["filter"] == ensemble["name"]]
                return {int(entry["doc_id"]): nothing not in _each(entry["filtered_resps"]) for entry in of_filter}
    return {}


def _each(filtered: Sequence[Any]) -> list[Any]:
    """What was made of each answer to each request: lists of them, where a filter kept several."""
    return [one for own in filtered for one in (own if isinstance(own, list) else [own])]


@cache
def _pooling() -> tuple[frozenset[Any], Any]:
    """How lm-eval puts perplexities together, and bits per byte."""
    from lm_eval.api.registry import get_aggregation

    return frozenset(map(get_aggregation, ("perplexity", "weighted_perplexity"))), get_aggregation("bits_per_byte")


def _numbers(together: Mapping[str, Any], entry: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """The numbers of one sample whose means say something, given how lm-eval puts each metric `together`; and of those
    that are pooled, what each counts.

    A perplexity is of all documents together: exp of the negative sum of log-likelihoods over the sum of words, bytes
    or documents. A record has the binary logarithm of the perplexity of its document alone, as `log2_word_perplexity`
    and so on: bits for each word. Their mean counts every document once, however long, where lm-eval's counts every
    word. `bits_per_byte` is of the document alone, too, which counts by its bytes, so that the mean is lm-eval's. What
    else comes as more than a number (F1, MCC, BLEU, …) has no value for one sample and is left out.
    """
    logarithms, bits_per_byte = _pooling()
    numbers, weights = {}, {}
    for metric in entry["metrics"]:
        value, how = entry[metric], together.get(metric)
        if how in logarithms or how is bits_per_byte:
            logprob, count = value if isinstance(value, tuple) else (value, 1)
            name = LOGARITHM + metric if how in logarithms else metric
            numbers[name] = -logprob / count / math.log(2) if count else 0.0
            if how not in logarithms:
                weights[name] = float(count)
        elif isinstance(value, Real):
            numbers[metric] = float(value)
    return numbers, weights


def as_record(
    arm: Arm,
    digest: str,
    task: str,
    together: Mapping[str, Any],
    entry: Mapping[str, Any],
    seed: int,
    written: Sequence[Completion] = (),
    in_format: bool | None = None,
) -> Record:
    """A sample of lm-eval's as the record of an arm, whose point has this digest. `together` says how lm-eval puts the
    samples of each metric together, `written` are the completions, where it is known why all of them ended."""
    arguments, responses = entry["arguments"], entry["resps"]
    response = "\n".join(map(show_answers, responses, arguments))
    if len(arguments) == 1:
        filtered = show_answers(entry["filtered_resps"][0], arguments[0])
    else:
        best = max(range(len(arguments)), key=lambda k: responses[k][0][0])
        filtered = str(arguments[best][1]).strip()
    target = entry["target"]
    if len(arguments) > 1 and isinstance(target, int) and 0 <= target < len(arguments):
        target = str(arguments[target][1]).strip()
    metrics, weights = _numbers(together, entry)
    return Record(
        arm=arm.name,
        point=digest,
        alpha=arm.alpha,
        prompt=arm.prompt,
        task=task,
        filter=str(entry["filter"]),
        seed=seed,
        doc_id=int(entry["doc_id"]),
        doc=str(entry["doc_hash"]),
        metrics=metrics,
        weights=weights,
        prompt_text=str(arguments[0][0]),
        target=str(target),
        response=response,
        filtered=filtered,
        tokens=tuple(one.tokens for one in written),
        finish=tuple(one.finish for one in written),
        in_format=in_format,
    )
