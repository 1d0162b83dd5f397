"""Starts vLLM on just the files that were opened, in this process."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from uuid import uuid4

from rvdist.core.errors import BadInput, Failed
from rvdist.core.text import reason
from rvdist.evaluate.fleet import private_vllm
from rvdist.evaluate.fleet.arguments import (
    ENVIRONMENT,
    ENVIRONMENT_CPU,
    ENVIRONMENT_CPU_EAGER,
    EngineSettings,
    versions,
    vllm_arguments,
)
from rvdist.evaluate.fleet.served import link_files, own_directory, strays
from rvdist.evaluate.request import Unusable
from rvdist.weights.checkpoint.directory import Checkpoint

_TEMPLATE = "{{ messages[0]['content'] }}"  # vLLM renders one when it starts: not a stranger's, which may never end
_NO_ROOM = re.compile("is less than (desired GPU memory utilization|the engine's budget)")
_QUANTIZED = (
    "is quantized, and weights are only swapped exactly when they are not; write it plain by a merge with "
    "dtype=bfloat16, and score that"
)


@dataclass(frozen=True)
class Started:
    """vLLM, and on what it runs: cpu or cuda, and of cards the kind."""

    llm: Any
    device: str
    kind: str


def start_vllm(base: str, checkpoint: Checkpoint, settings: EngineSettings) -> Started:
    """vLLM on the `checkpoint`, which is called `base`. Raises BadInput for one that is quantized, and for settings
    that vLLM refuses; Unusable for a vLLM that is not as we know it."""
    named = {"quantization_config", "compression_config"} & checkpoint.config.keys()
    if named or (checkpoint.path / "hf_quant_config.json").exists():
        raise BadInput(f"{base}: {_QUANTIZED}")
    os.environ.update(ENVIRONMENT | os.environ)
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # it warns before it configures itself
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # it misses what is of no use on CPUs
    with _pause_collector(), private_vllm.without_sklearn(), warnings.catch_warnings(action="ignore"):
        import torch

        on_cpu = not torch.cuda.is_available()
        if on_cpu:
            os.environ.update(ENVIRONMENT_CPU | {"OMP_NUM_THREADS": str(settings.cpu_threads)} | os.environ)
        if on_cpu and settings.enforce_eager:
            os.environ.update(ENVIRONMENT_CPU_EAGER | os.environ)
        from vllm import LLM
        from vllm.engine.arg_utils import EngineArgs

        import rvdist.evaluate.fleet.swap  # noqa: F401  before vLLM starts it in a rank

        try:
            private_vllm.require_in_engine()
        except Failed as error:
            raise Unusable(str(error)) from None
    if on_cpu and settings.cpu_threads != torch.get_num_threads():
        torch.set_num_threads(settings.cpu_threads)
    with (
        _files(checkpoint, settings) as directory,
        private_vllm.meeting_at(directory.with_name(f"ranks-{uuid4().hex}")),
        warnings.catch_warnings(action="ignore", category=FutureWarning),
    ):
        arguments = vllm_arguments(str(directory), settings, on_cpu)
        if unknown := arguments.keys() - {field.name for field in fields(EngineArgs)}:
            raise BadInput(f"engine.args: vLLM {versions()['vllm']} knows no argument {min(unknown)}; leave it out")
        quantization = json.loads(settings.args).get("quantization")
        try:
            with alone_on([] if on_cpu else os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")):
                llm = LLM(**arguments, chat_template=_TEMPLATE)
        except (TypeError, ValueError) as error:
            raise explain_refusal(str(error).replace(str(directory), base), base, settings) from None
        except RuntimeError as error:
            if not on_cpu or not quantization:
                raise
            lacks = f"vLLM's CPU build lacks what it takes for {base} ({reason(error, 300)})"
            raise BadInput(f"engine.args: quantization={quantization!r}: {lacks}; leave it out, or use GPUs") from None
    model = llm.llm_engine.model_config
    if model.quantization != quantization or getattr(model.hf_config, "quantization_config", None):
        raise BadInput(f"{base}: {_QUANTIZED}")
    return Started(llm, "cpu", "") if on_cpu else Started(llm, "cuda", torch.cuda.get_device_name(0))


def explain_refusal(words: str, base: str, settings: EngineSettings) -> BadInput | Failed:
    """What is to be done about a ValueError of vLLM's start. That others have the memory now may be otherwise later."""
    said = reason(words, 300)
    if _NO_ROOM.search(words):
        return Failed(f"{base}: there is no memory for an engine now ({said})")
    if most := re.search(r"derived max_model_len \(\w+=([\d.]+)", said):
        return BadInput(
            f"engine.max_model_len={settings.max_model_len}: {base} takes at most {most[1]} tokens; lower it, or leave "
            "it out"
        )
    return BadInput(f"{base}: vLLM refuses to start on it with these settings ({said})")


@contextlib.contextmanager
def alone_on(cards: Sequence[str]) -> Iterator[None]:
    """No other engine of this user starts on one of these cards meanwhile: vLLM counts what a neighbour allocates as
    its own."""
    with contextlib.ExitStack() as locks:
        with contextlib.suppress(OSError):  # a lock that cannot be had is no reason not to start
            if directory := own_directory("rvdist"):
                for card in sorted(cards):  # in one order, so that no two wait for each other
                    name = f"card-{re.sub('[^A-Za-z0-9-]', '-', card)}"
                    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                    lock = locks.enter_context(os.fdopen(os.open(directory / name, flags, 0o600), "w"))
                    fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _files(checkpoint: Checkpoint, settings: EngineSettings) -> AbstractContextManager[Path]:
    """The directory that vLLM reads while it starts: just what was opened. Its ranks on other nodes see the
    checkpoint's own."""
    if json.loads(settings.args).get("distributed_executor_backend") != "ray":
        return link_files(checkpoint)
    if others := strays(checkpoint):
        raise BadInput(
            f"{checkpoint.path / others[0]}: is no part of the checkpoint, and vLLM would read it; move it away"
        )
    return nullcontext(checkpoint.path)


@contextlib.contextmanager
def _pause_collector() -> Iterator[None]:
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
