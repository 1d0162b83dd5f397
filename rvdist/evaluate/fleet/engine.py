"""The engine: one vLLM instance in this process, which answers requests at any weight point.

Tokens, truncation and scores are those of lm-eval's own vLLM backend; weights change through `swap.py`.
Knows nothing of Ray, tasks or arms. One engine a process: vLLM is configured through the environment.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import re
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from rvdist.core.errors import BadInput, Failed
from rvdist.core.point import WeightPoint
from rvdist.evaluate.fleet.arguments import DEFAULTS, GRAPHS, EngineSettings, versions
from rvdist.evaluate.fleet.private_vllm import steps, under_way
from rvdist.evaluate.fleet.prompts import Prompts
from rvdist.evaluate.fleet.running import Running, finish, next_of
from rvdist.evaluate.fleet.start import start_vllm
from rvdist.evaluate.request import (
    Answer,
    Choice,
    Completion,
    Generate,
    Loglikelihood,
    Progress,
    Request,
    Rolling,
    Unscorable,
    Unusable,
)
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.kept import KeptSources
from rvdist.weights.checkpoint.source import open_source

_TOKENS_AT_ONCE = 2**18  # of rolling windows: vLLM answers with two objects for each

_TELL_EVERY = 0.5  # seconds, how far a batch is

_PROBE = "12 + 34 = 46, and the sum of 5 and 6 is 11."
_PROBE_TOLERANCE = 1e-3  # nats: only the order in which a normaliser is summed may differ


class Engine:
    """vLLM started on the checkpoint `base` (a directory or Hub repository). Takes seconds; see `info`.

    Raises BadInput for a base that cannot be read or is quantized, and for settings that vLLM refuses.
    """

    def __init__(self, base: str, settings: EngineSettings = DEFAULTS) -> None:
        self._base, self._checkpoint = base, open_source(base)
        self._here: dict[str, str] = {}  # where this node has the files of a source that is called otherwise
        self._place(base, self._checkpoint)
        started = start_vllm(base, self._checkpoint, settings)
        self._llm, self._device, self._kind = started.llm, started.device, started.kind
        self.settings = settings
        try:
            how = (settings.readers, settings.arithmetic)
            self._llm.collective_rpc("rvdist_ready", args=(sorted(self._checkpoint.tensors), *how))
        except Failed as error:
            raise Unusable(str(error)) from None
        self._max_len: int = self._llm.llm_engine.model_config.max_model_len
        self._tokenizer: Any = self._llm.get_tokenizer()
        self._prompts = Prompts(self._tokenizer, self._max_len, settings.truncate)
        self._checkpoint_bytes = sum(spec.nbytes for spec in self._checkpoint.tensors.values())
        self._at: WeightPoint | None = WeightPoint(base)
        self._sources, self._read = KeptSources(), list[Checkpoint]()  # that the present weights are of
        self.spoiled: dict[str, str] = {}  # tensors of the present point with infinities or NaNs, and why
        self._own: list[float] = []  # the probe's log-probabilities at the base
        self._probe: str | None = None
        self._check_start()

    @property
    def truncated(self) -> int:
        """How many prompts were cut to fit, so far."""
        return self._prompts.truncated

    def info(self) -> dict[str, Any]:
        """What this engine is and what it found out."""
        return {
            **versions(),
            "mode": self._mode,
            "device": self._device,
            "kind": self._kind,
            "dtype": str(self._llm.llm_engine.model_config.dtype).removeprefix("torch."),
            "resolved": self._llm.collective_rpc("rvdist_resolved")[0],
            "probe": self._probe or "not run",
            "cpu_seconds": time.process_time(),
            "bytes_read": sum(
                self._checkpoint_bytes + read for read in self._llm.collective_rpc("rvdist_bytes")
            ),  # of weights, by all ranks
        }

    @property
    def _mode(self) -> str:
        if self.settings.enforce_eager:
            return "eager"
        compilation = json.loads(self.settings.args).get("compilation_config", {})
        return "graphs" if compilation == GRAPHS else "compiled"

    def swap(self, point: WeightPoint) -> None:
        """Takes on the weights of `point`; does nothing when they are there already. The first swap of an engine
        also runs the probe.

        Raises Unusable when tensors do not arrive (naming them) or the probe fails.
        Raises Unscorable for weights that are infinite or NaN, and are not allowed to be.
        """
        self._require_weights()
        if not self.is_at(point):
            if self._probe is None:
                from rvdist.evaluate.fleet.mirror import mirror_obstacle

                obstacle = mirror_obstacle(self._checkpoint.tensors, self._checkpoint.config)
                if obstacle and "quantization" in json.loads(self.settings.args):
                    raise Unusable(f"{self._base}: {obstacle}, and quantized it is swapped where a probe shows how")
                if obstacle:
                    self._llm.collective_rpc("rvdist_forget")  # nothing proves what was recorded
                self._probe = obstacle or self._run_probe()
            self._load(point)
            self._at = point.active
        self._require_finite()

    def is_at(self, point: WeightPoint) -> bool:
        """Whether the weights of `point` are those that it has, of sources that are what they were."""
        return self._at == point.active and all(source.is_unchanged() for source in self._read)

    def _place(self, source: str, opened: Checkpoint | None = None) -> str:
        """The directory of a source on this node; of a Hub repository all files are fetched, once by all engines of a
        node. Raises BadInput, Failed."""
        if source not in self._here:
            here = Path(source)
            if not here.exists():
                from rvdist.weights.checkpoint.hub import download_weights

                download_weights(opened := opened or open_source(source))
                here = opened.path
            self._here[source] = str(here)
        return self._here[source]

    def _load(self, point: WeightPoint, exchanged: Sequence[int] = ()) -> None:
        point = point.relocate({source: self._place(source) for source in point.sources()})
        self._at = None  # undefined, should the next line fail
        self._read = [self._sources.open(source) for source in point.sources()]
        from rvdist.evaluate.fleet.swap import LACKS, LEFT

        try:
            spoiled = self._llm.collective_rpc("rvdist_swap", args=(json.dumps(point.to_json()), list(exchanged)))
        except RuntimeError as error:  # of ranks in other processes vLLM hands on the words alone
            if found := re.search(f"(?:{LACKS}|{LEFT}).*", str(error)):
                raise Unusable(found[0].rstrip("'\"")) from None
            raise
        self.spoiled = {name: why for rank in spoiled for name, why in rank.items()}
        self._forget_prefixes()

    def _forget_prefixes(self) -> None:
        """Nothing that was read of a prompt is left for the next."""
        if not self._llm.reset_prefix_cache() and self.settings.prefix_caching:
            raise Unusable("this vLLM keeps what older weights made of a prompt; set engine.prefix_caching=false")

    def _check_start(self) -> None:
        """Swaps in the base as it was opened: it must give the log-probabilities that vLLM's own loading gave."""
        tokens = self._probe_tokens()
        try:
            self._own = self._log_probabilities(tokens)
        except Unscorable:
            self._probe = "not run: the log-probabilities of the target are not a number"
        self._load(WeightPoint(str(self._checkpoint.path)))
        self._at = WeightPoint(self._base)
        if self._own:
            same = 0.0 if self._device == "cpu" else _PROBE_TOLERANCE
            self._require_own(
                self._log_probabilities(tokens),
                same,
                f"{self._base}: the probe failed: vLLM loaded other weights than those that were opened",
            )
        else:
            self._llm.collective_rpc("rvdist_forget")

    def _run_probe(self) -> str:
        """Swaps in the mirror image, and again where that fails and may be due to what was recorded of the start."""
        try:
            return self._swap_in_mirror()
        except Exception as error:
            if isinstance(error, BadInput) or not any(self._llm.collective_rpc("rvdist_forget")):
                raise
            print(f"{error}: vLLM has to search for the place of each tensor anew", file=sys.stderr, flush=True)
        return self._swap_in_mirror()

    def _swap_in_mirror(self) -> str:
        """Swaps in a mirror image of the base (mirror.mirror), whose log-probabilities are known: those of the base.
        Any weight left behind anywhere, as a vLLM of another version or build might, gives others."""
        tokens = self._probe_tokens()
        one, other, *_ = dict.fromkeys(tokens)
        exchange = {one: other, other: one}
        self._load(WeightPoint(str(self._checkpoint.path)), (one, other))
        after = self._log_probabilities([exchange.get(token, token) for token in tokens])
        self._require_own(
            after,
            _PROBE_TOLERANCE,
            "the probe failed: after a swap this vLLM keeps some of the old weights; score written checkpoints instead",
        )
        return "passed"

    def _probe_tokens(self) -> list[int]:
        return self._prompts.encode(_PROBE)[: self._max_len - 1]

    def _log_probabilities(self, tokens: list[int]) -> list[float]:
        """Of each token but the first after those before it."""
        (candidates,) = finish(self._candidates([tokens]))
        return [candidates[i][token].logprob for i, token in enumerate(tokens) if i > 0]

    def _require_own(self, given: Sequence[float], tolerance: float, otherwise: str) -> None:
        off = max(0.0 if a == b else abs(a - b) for a, b in zip(given, self._own, strict=True))
        if not off <= tolerance:
            raise Unusable(f"{otherwise} (a log-probability is {off:.3g} nats from what it must be)")

    def answer(self, requests: Sequence[Request]) -> Sequence[Answer]:
        """The answers to requests of one kind, in order: completions, or scores. The requests are one batch: vLLM's
        text depends on the others in it, but not on their order. Raises ValueError for a prompt that is empty or does
        not fit, Unscorable where a token had no distribution."""
        return finish(self.answer_all(requests))

    def prepare(self, requests: Sequence[Request]) -> None:
        """Makes prompts ready in the background, of requests that may come next."""
        if requests:
            threading.Thread(target=self._prompts.remember, args=(list(requests),), daemon=True).start()

    def answer_all(self, requests: Sequence[Request]) -> Running[Sequence[Answer]]:
        """As `answer`; meanwhile, about twice a second, how far they are."""
        self._require_finite()
        if isinstance(requests[0], Generate):
            return (yield from self._generate([r for r in requests if isinstance(r, Generate)]))
        if isinstance(requests[0], Rolling):
            return (yield from self._score_texts([r for r in requests if isinstance(r, Rolling)]))
        return (yield from self._score_choices([r for r in requests if isinstance(r, Choice)]))

    def _generate(self, requests: Sequence[Generate]) -> Running[Sequence[Answer]]:
        from vllm import SamplingParams

        if self.settings.prefix_caching:
            self._forget_prefixes()  # shared within a batch alone: what was asked before changes no answer
        prompts = [
            self._prompts.fit(
                self._prompts.encode(request.prompt), self._max_len - request.max_tokens, request.max_tokens
            )
            for request in requests
        ]
        stops = [[*request.stop, *({self._prompts.eos} - set(request.stop))] for request in requests]
        parameters = [
            SamplingParams(
                max_tokens=request.max_tokens,
                stop=stop,
                temperature=request.temperature,
                top_p=request.top_p,
                top_k=request.top_k,
                min_p=request.min_p,
                repetition_penalty=request.repetition_penalty,
                seed=self._seed(request),
                skip_special_tokens=False,
                spaces_between_special_tokens=False,
                skip_clone=True,  # vLLM else copies every request's deeply
            )
            for request, stop in zip(requests, stops, strict=True)
        ]
        order = sorted(range(len(requests)), key=lambda i: (-len(prompts[i]), requests[i].prompt))
        completions: dict[int, Completion] = {}
        answers = yield from self._run([prompts[i] for i in order], [parameters[i] for i in order])
        for i, answer in zip(order, answers, strict=True):
            output = answer.outputs[0]
            text = output.text
            for stop in filter(None, stops[i]):
                text = text.split(stop)[0]
            completions[i] = Completion(text, output.finish_reason, len(prompts[i]), len(output.token_ids))
        return [completions[i] for i in range(len(requests))]

    def _seed(self, request: Generate) -> int:
        """The request's own seed, or else one that depends on the engine's and on nothing that was asked before;
        another for each of its repeats."""
        if request.seed is not None:
            return request.seed + request.repeat
        drawn = hashlib.blake2b(f"{self.settings.seed} {request.repeat} {request.prompt}".encode(), digest_size=4)
        return int.from_bytes(drawn.digest(), "big")

    def _score_choices(self, requests: Sequence[Choice]) -> Running[Sequence[Answer]]:
        prompts, starts = [], []
        for request in requests:
            context, continuation = self._prompts.encode_pair(request)
            # vLLM always generates one token
            prompts.append(self._prompts.fit(context + continuation, self._max_len - 1, 1))
            starts.append(len(prompts[-1]) - len(continuation))
            if starts[-1] < 1:
                raise ValueError(f"a continuation of {len(continuation)} tokens leaves no room for its context")
        return (yield from self._score(prompts, starts))

    def _score_texts(self, requests: Sequence[Rolling]) -> Running[Sequence[Answer]]:
        windows = [
            (i, *window)
            for i, request in enumerate(requests)
            for window in self._prompts.windows(self._prompts.encode(request.continuation))
        ]
        scores: list[list[Loglikelihood]] = [[] for _ in requests]
        at_once, told = max(1, _TOKENS_AT_ONCE // self._max_len), Progress()
        for k in range(0, len(windows), at_once):
            owners, prompts, starts = zip(*windows[k : k + at_once], strict=True)
            before, score = told, self._score(prompts, starts)
            while isinstance(came := next_of(score), Progress):
                told = before + came
                yield replace(told, requests=told.requests * len(requests) // len(windows))
            for i, own in zip(owners, came, strict=True):
                scores[i].append(own)
        return [
            Loglikelihood(sum((s.logprob for s in own), 0.0), all(s.greedy for s in own), sum(s.tokens for s in own))
            for own in scores
        ]

    def _score(self, prompts: Sequence[list[int]], starts: Sequence[int]) -> Running[list[Loglikelihood]]:
        """How likely each prompt is from its start on."""
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i]))
        candidates = yield from self._candidates([prompts[i] for i in order])
        answers = dict(zip(order, candidates, strict=True))
        scores = []
        for i, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
            numbers = answers[i].logprobs[answers[i].start_indices[start] :]
            own, likeliest = numbers[::2], numbers[1::2]
            assert len(own) == len(likeliest) == len(prompt) - start
            # lm-eval's rule: a token that ties with the likeliest is greedy, whatever vLLM's rank says
            greedy = all(map(operator.ge, own, likeliest))
            total = sum(own, 0.0)
            if math.isnan(total) or total == math.inf:  # -inf is that of a token which the model rules out
                raise Unscorable("a log-probability is not a number; choose a smaller alpha, or leave the arm out")
            scores.append(Loglikelihood(total, greedy, len(prompt) - start))
        return scores

    def _candidates(self, prompts: Sequence[list[int]]) -> Running[list[Any]]:
        """For each prompt vLLM's FlatLogprobs over its positions: the token there, then the likeliest."""
        from vllm import SamplingParams

        parameters = SamplingParams(
            temperature=0, prompt_logprobs=1, max_tokens=1, detokenize=False, flat_logprobs=True, skip_clone=True
        )
        answers = yield from self._run(prompts, parameters)
        return [answer.prompt_logprobs for answer in answers]

    def _run(self, prompts: Sequence[list[int]], parameters: Any) -> Running[list[Any]]:
        """vLLM's answers, in order."""
        answers: list[Any] = []
        told, number = time.monotonic(), 0
        try:
            with closing(steps(self._llm, prompts, parameters)) as stepping:
                for number, finished in enumerate(stepping, 1):
                    answers += finished
                    if time.monotonic() - told > _TELL_EVERY:
                        yield self._progress(prompts, answers, number)
                        told = time.monotonic()
        except BaseException:  # nothing of it may be left for the next batch
            self._llm.collective_rpc("rvdist_rows")
            raise
        rows, bad = map(sum, zip(*self._llm.collective_rpc("rvdist_rows"), strict=True))
        if not rows:
            raise Unusable("this vLLM takes no logits from where they are watched; install another version")
        if bad:
            raise Unscorable(
                f"of {rows:,} distributions over the next token {bad:,} are not a number; choose a smaller alpha, or "
                "leave the arm out"
            )
        yield self._progress(prompts, answers, number)
        return sorted(answers, key=lambda answer: int(answer.request_id))

    def _progress(self, prompts: Sequence[list[int]], answers: Sequence[Any], number: int) -> Progress:
        """How far a batch is: counted, not guessed, but for prompts that vLLM has read in part."""
        going = under_way(self._llm)
        return Progress(
            len(answers),
            sum(map(len, prompts)),
            sum(len(answer.prompt_token_ids) for answer in answers) + sum(read for read, _ in going),
            sum(len(answer.outputs[0].token_ids) for answer in answers) + sum(made for _, made in going),
            number,
        )

    def _require_weights(self) -> None:
        if self._at is None:
            raise RuntimeError("this engine's weights are undefined since a swap failed; start a new engine")

    def _require_finite(self) -> None:
        self._require_weights()
        if self.spoiled and not self.settings.allow_nonfinite:
            more = f" (as are {len(self.spoiled) - 1} more of its tensors)" if len(self.spoiled) > 1 else ""
            raise Unscorable(next(filter(None, self.spoiled.values())) + more)
