"""How vLLM is started: what an engine's settings are to it, and which of its own arguments are let through.

Imports no vLLM, so that a driver can refuse what no engine would take.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rvdist.core.errors import BadInput

# Set before vLLM is imported; whoever exports one of these keeps his value.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core in this process: no second import of vLLM
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "THP_MEM_ALLOC_ENABLE": "1",  # torch asks for huge pages: fewer faults on the tensors that a swap makes
}
ENVIRONMENT_CPU = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else ranks want a NUMA node each, and engines all take the same cores
}
ENVIRONMENT_CPU_EAGER = {
    "TORCH_COMPILE_DISABLE": "1",  # else the first log-probability waits seconds for a C++ compiler
}

# Arguments of vLLM's that no engine is started with, by why; any other that is not below is refused too.
REFUSED = {
    "is decided by the target or by another key of the configuration": (
        "model tokenizer tokenizer_mode tokenizer_revision skip_tokenizer_init revision code_revision hf_config_path "
        "config_format dtype seed max_model_len max_num_seqs tensor_parallel_size enforce_eager gpu_memory_utilization "
        "kv_cache_memory_bytes use_tqdm_on_load"
    ),
    "makes weights that no swap has been shown to give to the bit": "quantization_config",
    "puts weights where no swap has been shown to reach them": (
        "cpu_offload_gb cpu_offload_params offload_backend offload_group_size offload_num_in_group "
        "offload_prefetch_step offload_params"
    ),
    "lets an engine wake with other weights than it went to sleep with, or with none": (
        "enable_sleep_mode sleep_mode_offload_cudagraph sleep_preserve_parameter_names"
    ),
    "keeps what older weights made of a prompt, and is not the same to the bit": (
        "kv_transfer_config kv_offloading_size kv_offloading_backend"
    ),
    "is engine.prefix_caching": "enable_prefix_caching",
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
# Of those below, the ones that are let through with these values alone.
_VALUES = {"distributed_executor_backend": ("mp", "ray"), "quantization": ("fp8_per_channel",)}
# Those that leave a swap right: they say how vLLM computes, batches and places, not what.
ALLOWED = (
    "async_scheduling all2all_backend attention_backend attention_config block_size compilation_config "
    "cpu_distributed_timeout_seconds cudagraph_capture_sizes dcp_comm_backend decode_context_parallel_size device_ids "
    "disable_cascade_attn disable_custom_all_reduce disable_hybrid_kv_cache_manager disable_log_stats "
    "disable_sliding_window distributed_executor_backend distributed_timeout_seconds enable_chunked_prefill "
    "enable_expert_parallel enable_flashinfer_autotune gdn_prefill_backend hf_overrides kda_decode_backend "
    "kda_prefill_backend kernel_config kv_cache_dtype language_model_only limit_mm_per_prompt linear_backend "
    "long_prefill_token_threshold mamba_backend mamba_block_size mamba_cache_dtype mamba_ssm_cache_dtype "
    "max_cudagraph_capture_size max_num_batched_tokens max_num_scheduled_tokens max_parallel_loading_workers "
    "mm_processor_cache_gb moe_backend num_gpu_blocks_override numa_bind numa_bind_cpus numa_bind_nodes "
    "optimization_level performance_mode pipeline_parallel_size prefill_context_parallel_size quantization "
    "scheduler_reserve_full_isl skip_mm_profiling watermark"
)

# Parts of names of variables that change no text, or that vLLM sets by itself where an engine has started.
_HARMLESS = (
    "LOG|TRACE|CACHE_ROOT|CONFIG_ROOT|ASSETS|API_KEY|HOST_IP|PORT|USAGE|DEBUG|PLUGINS|MULTIPROC|TIMEOUT|RPC|S3_|"
    "DIST_IDENT|OBJECT_STORAGE|SSM_CONV_STATE_LAYOUT|DISABLE_SHARED_EXPERTS_STREAM"
)
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}  # CUDA graphs of what is computed as in eager mode

# Part of what names a cached sample: raise it with every change here that may change an answer.
VERSION = 3


@dataclass(frozen=True)
class EngineSettings:
    """How every engine of a run is started; two settings may give different text for one request.

    `max_model_len` in tokens, None: the checkpoint's own. `gpu_memory_utilization` counts on GPUs, unless there is
    `kv_cache_gib` (GiB a rank, on CPUs zeroed at start: two seconds a GiB). `cpu_threads` counts on CPUs, where a
    thread too many on a busy machine costs far more than one too few. `truncate`: cut prompts that do not fit from
    the left, not raise. `allow_nonfinite`: weights that are infinite or NaN are served. `prefix_caching`: texts of one
    slice share what they begin with. So many `readers`, threads of a rank, read a point; its `arithmetic` is the
    `cpu`'s or, `cuda`, the card's; neither changes an answer. `args`: what else vLLM is started with, as
    `further_arguments` gives it.
    """

    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    dtype: str = "auto"
    gpu_memory_utilization: float = 0.9
    kv_cache_gib: float | None = 1.0
    cpu_threads: int = 1
    enforce_eager: bool = True
    max_num_seqs: int | None = None
    seed: int = 0
    truncate: bool = False
    allow_nonfinite: bool = False
    prefix_caching: bool = False
    readers: int = 1
    arithmetic: str = "cpu"
    args: str = "{}"


DEFAULTS = EngineSettings()


def further_arguments(arguments: Mapping[str, Any]) -> str:
    """`EngineSettings.args` for these arguments of vllm.LLM: JSON, since settings are compared, hashed and part of the
    cache's keys. Raises BadInput for one that is decided elsewhere, that makes answers at a swapped point wrong or is
    not known not to, or that is no JSON. Whether this vLLM knows them, a starting engine finds out."""
    for name, value in arguments.items():
        for reason, names in REFUSED.items():
            if name in names.split():
                raise BadInput(f"engine.args: {name} {reason}; leave it out")
        if name not in ALLOWED.split():
            raise BadInput(
                f"engine.args: {str(name)[:60]!r} is not among the arguments known to leave a swap right "
                "(docs/fleet.md lists them); leave it out"
            )
        if name in _VALUES and value not in _VALUES[name]:
            why = " among those that leave a swap right:" if name == "quantization" else " one of"
            raise BadInput(
                f"engine.args: {name}={str(value)[:60]!r} is not{why} {', '.join(_VALUES[name])}; set one of these, or "
                "leave it out"
            )
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
        "kv_cache_memory_bytes": int(settings.kv_cache_gib * 2**30) if settings.kv_cache_gib else None,
        "enforce_eager": settings.enforce_eager,
        "max_num_seqs": settings.max_num_seqs,
        "seed": settings.seed,
        "trust_remote_code": False,
        "generation_config": "vllm",  # sampling parameters come from the request alone
        "enable_prefix_caching": settings.prefix_caching,  # a hit may change bits, and is stale after a swap
        "worker_extension_cls": "rvdist.evaluate.fleet.swap.SwapExtension",
        "use_tqdm_on_load": False,
    }


def identity(settings: EngineSettings, device: str) -> dict[str, Any]:
    """What decides an engine's answers besides weights, tokenizer and requests, and is known without starting one.
    `device` says on what kind of it engines run. Raises BadInput where vLLM is not installed."""
    installed = versions()
    if "vllm" not in installed:
        raise BadInput("vLLM is not installed, and scoring needs it; install rvdist[cpu] or rvdist[gpu]")
    variables = {"environment": told} if (told := environment()) else {}
    decides = asdict(settings)
    del decides["readers"], decides["arithmetic"]
    if not settings.prefix_caching:
        del decides["prefix_caching"]  # keys are as they were before it could be set
    return {"engine": VERSION, "device": device, **installed, **decides, **variables}


def build() -> str | None:
    """For what device the vLLM here is built, `cpu` or `cuda`; None where none is installed."""
    with contextlib.suppress(PackageNotFoundError):
        return "cpu" if "+cpu" in version("vllm") else "cuda"
    with contextlib.suppress(PackageNotFoundError):
        return version("vllm-cpu") and "cpu"
    return None


def environment() -> dict[str, str]:
    """The variables by which this process's user tells vLLM how to compute; two that differ may give other text."""
    ours = {*ENVIRONMENT, *ENVIRONMENT_CPU}
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith("VLLM_") and name not in ours and not re.search(_HARMLESS, name)
    }


def versions() -> dict[str, str]:
    """The versions here of what may change an answer; builds for another device count as the same."""
    installed = {}
    for package in ("vllm", "vllm-cpu", "torch", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            installed[package.removesuffix("-cpu")] = version(package).partition("+")[0]
    return installed
