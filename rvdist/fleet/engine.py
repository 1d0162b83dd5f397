"""The engine: one vLLM instance in this process, which answers requests at any weight point.

Tokens, truncation and scores are those of lm-eval's own vLLM backend; weights change through `swap.py`.
Knows nothing of Ray, tasks or arms. One engine a process: vLLM is configured through the environment.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rvdist.checkpoint.source import open_source
from rvdist.fleet.request import Choice, Completion, Generate, Loglikelihood
from rvdist.point import WeightPoint

# setdefault: a user who exports one of these has a reason
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core in this process: no second import of vLLM
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True)
class EngineSettings:
    """How every engine of a run is started; two settings may give different text for one request.

    `max_model_len` in tokens, None: the checkpoint's own. `gpu_memory_utilization` counts on GPUs,
    `kv_cache_gib` (GiB for each rank) on CPUs. `truncate`: cut prompts that do not fit from the left
    instead of raising.
    """

    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    dtype: str = "auto"
    gpu_memory_utilization: float = 0.9
    kv_cache_gib: float = 1.0
    enforce_eager: bool = True
    max_num_seqs: int | None = None
    seed: int = 0
    truncate: bool = False


class Engine:
    """vLLM started on the checkpoint `base` (a directory or Hub repository). Takes seconds; see `info`."""

    def __init__(self, base: str, settings: EngineSettings = EngineSettings()) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        begin = time.perf_counter()
        from vllm import LLM
        from vllm.platforms import current_platform

        imported = time.perf_counter()
        self.settings = settings
        self.truncated = 0
        self._device = current_platform.device_type
        self._llm = LLM(
            model=str(open_source(base).path),
            tensor_parallel_size=settings.tensor_parallel_size,
            max_model_len=settings.max_model_len,
            dtype=settings.dtype,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            kv_cache_memory_bytes=int(settings.kv_cache_gib * 2**30) if self._device == "cpu" else None,
            enforce_eager=settings.enforce_eager,
            max_num_seqs=settings.max_num_seqs,
            seed=settings.seed,
            trust_remote_code=False,
            generation_config="vllm",  # sampling parameters come from the request alone
            enable_prefix_caching=False,  # hits are not bitwise reproducible, and stale after a swap
            worker_extension_cls="rvdist.fleet.swap.SwapExtension",
        )
        self._seconds = {"import_seconds": imported - begin, "start_seconds": time.perf_counter() - imported}
        self._tokenizer: Any = self._llm.get_tokenizer()
        self._max_len: int = self._llm.llm_engine.model_config.max_model_len
        self._eos = self._tokenizer.decode(self._tokenizer.eos_token_id) or self._tokenizer.eos_token
        bos = self._tokenizer.bos_token_id
        self._prefix: int = self._tokenizer.eos_token_id if bos is None else bos
        self._prefix_text: str = self._tokenizer.decode(self._prefix)
        self._at: tuple[Any, ...] | None = (base, ())

    def info(self) -> dict[str, Any]:
        """What this engine is: part of what names a cached sample, and of the timing report."""
        import vllm

        return {
            "vllm": vllm.__version__,
            "mode": "eager" if self.settings.enforce_eager else "compiled",
            "device": self._device,
            "dtype": str(self._llm.llm_engine.model_config.dtype).removeprefix("torch."),
            "max_model_len": self._max_len,
            "truncated": self.truncated,
            **self._seconds,
        }

    def swap(self, point: WeightPoint) -> None:
        """Takes on the weights of `point`; does nothing when they are there already.

        Raises RuntimeError naming the tensors when they do not all arrive; the engine is then unusable.
        """
        goal = (point.base, point.active_terms)
        if self._at != goal:
            self._load(point)
            self._at = goal

    def _load(self, point: WeightPoint, mirrored: bool = False) -> None:
        self._at = None
        self._llm.collective_rpc("rvdist_swap", args=(json.dumps(point.to_json()), mirrored))
        self._llm.reset_prefix_cache()

    def generate(self, requests: Sequence[Generate]) -> list[Completion]:
        """One completion a request, in order. The requests are one batch: vLLM's text depends on the others in it,
        but not on their order. Raises ValueError for a prompt that is empty or does not fit."""
        from vllm import SamplingParams

        prompts = [
            self._fit(self._encode(request.prompt), self._max_len - request.max_tokens, request.max_tokens)
            for request in requests
        ]
        stops = [[*request.stop, *({self._eos} - set(request.stop))] for request in requests]
        parameters = [
            SamplingParams(
                max_tokens=request.max_tokens,
                stop=stop,
                temperature=request.temperature,
                top_p=request.top_p,
                top_k=request.top_k,
                min_p=request.min_p,
                repetition_penalty=request.repetition_penalty,
                seed=request.seed,
                skip_special_tokens=False,
                spaces_between_special_tokens=False,
            )
            for request, stop in zip(requests, stops, strict=True)
        ]
        order = sorted(range(len(requests)), key=lambda i: (-len(prompts[i]), requests[i].prompt))
        completions: dict[int, Completion] = {}
        for i, answer in zip(order, self._run([prompts[i] for i in order], [parameters[i] for i in order]), strict=True):
            output = answer.outputs[0]
            text = output.text
            for stop in filter(None, stops[i]):
                text = text.split(stop)[0]
            completions[i] = Completion(text, output.finish_reason, len(prompts[i]), len(output.token_ids))
        return [completions[i] for i in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Choice]) -> list[Loglikelihood]:
        """One score a request, in order; one batch, as `generate`. Raises ValueError as `generate`."""
        from vllm import SamplingParams

        prompts, starts = [], []
        for request in requests:
            context, continuation = self._encode_pair(request)
            # vLLM always generates one token
            prompts.append(self._fit(context + continuation, self._max_len - 1, 1))
            starts.append(len(prompts[-1]) - len(continuation))
            if starts[-1] < 1:
                raise ValueError(f"a continuation of {len(continuation)} tokens leaves no room for its context")
        parameters = SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=1, detokenize=False)
        order = sorted(range(len(requests)), key=lambda i: (-len(prompts[i]), prompts[i]))
        scores: dict[int, Loglikelihood] = {}
        for i, answer in zip(order, self._run([prompts[i] for i in order], parameters), strict=True):
            logprob, greedy = 0.0, True
            tokens = prompts[i][starts[i] :]
            for token, candidates in zip(tokens, answer.prompt_logprobs[starts[i] :], strict=True):
                logprob += candidates[token].logprob
                # lm-eval's rule, in which a token that ties with the likeliest is greedy; vLLM's rank says otherwise
                greedy &= all(candidates[token].logprob >= other.logprob for other in candidates.values())
            scores[i] = Loglikelihood(logprob, greedy, len(tokens))
        return [scores[i] for i in range(len(requests))]

    def _run(self, prompts: list[list[int]], parameters: Any) -> list[Any]:
        if self._at is None:
            raise RuntimeError("this engine's weights are undefined since a swap failed; start a new engine")
        from vllm import TokensPrompt

        inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        answers: list[Any] = self._llm.generate(inputs, parameters, use_tqdm=False)
        return answers

    def _fit(self, tokens: list[int], room: int, to_generate: int) -> list[int]:
        """`tokens`, at most `room` of them."""
        if not tokens:
            raise ValueError("a prompt has no tokens; ask for at least one")
        if len(tokens) <= room:
            return tokens
        if room < 1 or not self.settings.truncate:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens and {to_generate} to generate exceed the context of "
                f"{self._max_len} tokens; raise max_model_len, ask for less, or allow truncation"
            )
        self.truncated += 1
        return tokens[-room:]

    def _encode(self, text: str, special: bool | None = None) -> list[int]:
        """lm-eval's `tok_encode`: the tokenizer's own special tokens, unless the text begins with them."""
        if not text:
            return []
        if text.startswith(self._prefix_text):
            special = False
        keywords = {} if special is None else {"add_special_tokens": special}
        ids: list[int] = self._tokenizer(text, **keywords).input_ids
        return ids

    def _encode_pair(self, request: Choice) -> tuple[list[int], list[int]]:
        """lm-eval's `loglikelihood` and `_encode_pair`: white space at the end of the context is scored with the
        continuation, and an empty context is the tokenizer's beginning of text."""
        context = request.context.rstrip()
        text = request.context + request.continuation
        if not context:
            tokens = self._encode(text, special=False)
            return (tokens[:1], tokens[1:]) if tokens[:1] == [self._prefix] else ([self._prefix], tokens)
        before = self._encode(context)
        return before, self._encode(text)[len(before) :]
