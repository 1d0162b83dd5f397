"""lm-eval's own evaluation and its own log of samples, as `lm_eval --log_samples` writes them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.loggers import EvaluationTracker


def log_samples(lm: LM, tasks: Any, out: Path, **settings: Any) -> dict[str, Any]:
    """Evaluates loaded tasks and writes results and samples under `out`; returns the results."""
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(1234)
    results = evaluate(lm=lm, task_dict=tasks, bootstrap_iters=0, **settings)
    samples = results.pop("samples")
    tracker = EvaluationTracker(output_path=str(out))
    tracker.general_config_tracker.model_name_sanitized = "made__up"
    tracker.save_results_aggregated(results=copy.deepcopy(results), samples=samples)
    for name in tasks["tasks"]:
        tracker.save_results_samples(task_name=name, samples=samples[name])
    return results


class Scripted(LM):
    """Answers what it is told to: texts by `reply`, log-likelihoods by `score`, each of one request's arguments and of
    how often it was asked before."""

    def __init__(self, reply: Callable[..., str], score: Callable[..., tuple[float, bool]] | None = None) -> None:
        super().__init__()
        self._reply, self._score = reply, score
        self._asked: dict[str, int] = {}

    def _each(self, requests: Any, answer: Callable[..., Any]) -> list[Any]:
        found = []
        for one in requests:
            found.append(answer(one.args, self._asked.get(repr(one.args), 0)))
            self._asked[repr(one.args)] = self._asked.get(repr(one.args), 0) + 1
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        return self._each(requests, self._reply)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._each(requests, self._score)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        return [logprob for logprob, _ in self._each(requests, self._score)]
