"""From a configuration to the workers and engines that a cluster has room for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path

from rvdist.core.config.schema import Config
from rvdist.core.errors import BadInput

_MOST_WORKERS, _BYTES_EACH = 16, 1 << 30  # of a node, and that a worker writes at least
_ALONE = 64 << 30  # bytes moved on one machine, for which Ray takes longer to start than its workers save
_SLICES = {"cpu": 256, "cuda": 1024}  # a card answers many more at once than a few cores
_START, _SLOWEST = 1800.0, 1e8  # seconds for a start, and bytes a second of weights at least


def cache_directory(config: Config) -> Path:
    """`cache.dir`."""
    return Path(config.cache.dir).expanduser()


def require_resources(config: Config) -> None:
    """Raises BadInput unless there can be so many nodes, workers, engines and documents, such times, and such shares of
    a device."""
    for key, count, least in (
        ("engine.count", config.engine.count, 1),
        ("engine.cpu_threads", config.engine.cpu_threads, 1),
        ("engine.tensor_parallel_size", config.engine.tensor_parallel_size, 1),
        ("engine.max_model_len", config.engine.max_model_len, 1),
        ("engine.max_num_seqs", config.engine.max_num_seqs, 1),
        ("engine.slice_size", config.engine.slice_size, 1),
        ("engine.readers", config.engine.readers, 1),
        ("merge.workers", config.merge.workers, 1),
        ("merge.threads", config.merge.threads, 1),
        ("cluster.nodes", config.cluster.nodes, 1),
        ("benchmarks.limit", config.benchmarks.limit, 1),
        ("benchmarks.num_fewshot", config.benchmarks.num_fewshot, 0),
    ):
        if count is not None and not (isinstance(count, Integral) and int(count) >= least):
            raise BadInput(f"{key}: {count!r} is not a number of them; give at least {least}")
    each, part = ranks(config), config.engine.gpus
    share = config.merge.gpus_per_worker
    for key, seconds in (
        ("engine.timeout", config.engine.timeout),
        ("merge.timeout", config.merge.timeout),
        ("engine.start_timeout", config.engine.start_timeout),
        ("cluster.timeout", config.cluster.timeout),
    ):
        if seconds is not None and not 0 < seconds < math.inf:
            raise BadInput(f"{key}: {seconds:g} is not a time; give seconds above 0, or leave it out")
    cache, memory = config.engine.kv_cache_gib, config.engine.gpu_memory_utilization
    if cache is not None and not 0 < cache < math.inf:
        raise BadInput(f"engine.kv_cache_gib: {cache:g} is not a size; give GiB above 0, or leave it out")
    if not 0 < memory <= 1:
        raise BadInput(f"engine.gpu_memory_utilization: {memory:g} is not a share; give a number above 0, at most 1")
    if not 0 < share <= 1:
        raise BadInput(f"merge.gpus_per_worker: {share} is not a share of one GPU; give a number above 0, at most 1")
    if not 0 < part <= 1:
        raise BadInput(f"engine.gpus: {part:g} is not a share of one GPU; give a number above 0, at most 1")
    if part < 1 and (each > 1 or over_nodes(config)):
        raise BadInput(f"engine.gpus={part:g}: an engine of {each} ranks takes whole GPUs; set one of both to 1")


def device(config: Config, gpus: int) -> str:
    """Where a cluster with so many GPUs merges: `cpu` or `cuda`. Raises BadInput where it cannot."""
    if config.device == "cuda" and not gpus:
        raise BadInput("device=cuda: the cluster has no GPU; set device=cpu, or cluster.address to one that has")
    return config.device


def workers(config: Config, nodes: Sequence[tuple[int, int]], nbytes: int) -> list[int]:
    """How many workers each node of so many (cores, GPUs) gets, to write so many bytes: `merge.workers` evenly; or as
    many as its cores or GPUs have room for, 16 at most, and one a GiB of all of them together; one at least. With
    device=cuda nodes without GPUs get none."""
    merge = config.merge
    on_cards = device(config, sum(gpus for _, gpus in nodes)) == "cuda"
    if merge.workers:
        able = [k for k, (_, gpus) in enumerate(nodes) if gpus or not on_cards]
        evenly = [(merge.workers + k) // len(able) for k in range(len(able))][::-1]
        return [evenly[able.index(k)] if k in able else 0 for k in range(len(nodes))]
    if on_cards:
        room = [gpus * int(1 / merge.gpus_per_worker) for _, gpus in nodes]
    else:
        room = [cores // merge.threads for cores, _ in nodes]
    most = max(1, math.ceil(nbytes / _BYTES_EACH))
    given = [0] * len(nodes)
    while sum(given) < most and (free := [k for k, has in enumerate(room) if given[k] < min(has, _MOST_WORKERS)]):
        given[min(free, key=lambda k: given[k])] += 1
    return given if any(given) else [1, *given[1:]]


def merges_alone(config: Config, nbytes: int) -> bool:
    """Whether a merge that reads and writes so many bytes is done by the command's own process: on this machine's
    cores, where nobody asks for workers or nodes, if Ray would take longer to start than its workers save."""
    asked = config.merge.workers or (config.cluster.nodes or 1) > 1
    return not asked and config.cluster.address == "local" and config.device == "cpu" and nbytes <= _ALONE


def ranks(config: Config) -> int:
    """How many GPUs an engine takes, or how many ranks it has on CPUs. Raises BadInput."""
    found = config.engine.tensor_parallel_size
    for name in ("pipeline_parallel_size", "prefill_context_parallel_size"):
        size = config.engine.args.get(name, 1)
        if type(size) is not int or size < 1:
            raise BadInput(f"engine.args: {name}={size!r} is not a number of them; give at least 1")
        found *= size
    return found


def over_nodes(config: Config) -> bool:
    """Whether an engine's ranks may be on several nodes."""
    return bool(config.engine.args.get("distributed_executor_backend") == "ray")


def engines(config: Config, nodes: Sequence[tuple[int, int]]) -> tuple[int, tuple[float, float]]:
    """How many engines a run wants, and the cores and GPUs that each takes, of nodes that have so many (cores, GPUs)
    now. A cluster that is not ours may grow into it. Raises BadInput."""
    engine, local = config.engine, config.cluster.address == "local"
    each, share = ranks(config), engine.gpus
    cpus, gpus = sum(cores for cores, _ in nodes), sum(cards for _, cards in nodes)
    if gpus and engine.device != "cpu":
        most = max(cards for _, cards in nodes)
        if each > most and not over_nodes(config):
            raise BadInput(
                f"an engine of {each} GPUs (engine.tensor_parallel_size times pipeline_parallel_size) is more than the "
                f"{most} of any node; lower it, or set engine.args.distributed_executor_backend=ray for one over "
                "several nodes, which has never run on cards"
            )
        room = [gpus // each] if over_nodes(config) else [cards * int(1 / share) // each for _, cards in nodes]
        count = engine.count or max(1, sum(room))
        if local and count > sum(room):
            raise BadInput(
                f"engine.count={count} times {each * share:g} GPUs each are more than this machine's {gpus}; lower "
                "engine.count, engine.tensor_parallel_size or engine.gpus"
            )
        return count, (0.0, each * share)
    count = engine.count or max(1, cpus // (each * engine.cpu_threads))
    cores = float(each * engine.cpu_threads)
    return count, (min(cores, int(cpus / count * 1000) / 1000) if local else cores, 0.0)


def engine_device(config: Config, gpus: int, build: str | None) -> str:
    """On what the engines of a cluster with so many GPUs compute, `cpu` or `cuda`, where vLLM is a `build` for one of
    them (None: unknown). Raises BadInput where there is no such device, or vLLM cannot use it."""
    asked = config.engine.device
    chosen = asked if asked != "auto" else "cuda" if gpus else "cpu"
    if chosen == "cuda" and not gpus:
        raise BadInput(
            "engine.device=cuda: the cluster has no GPU, or none yet; set cluster.address to one that has, or "
            "cluster.nodes to how many nodes are to come"
        )
    if chosen == "cpu" and config.engine.arithmetic == "cuda":
        raise BadInput("engine.arithmetic=cuda: engines compute on CPUs here; set engine.arithmetic=cpu")
    if chosen == "cpu" and (kind := config.engine.accelerator_type):
        raise BadInput(f"engine.accelerator_type={kind}: engines compute on CPUs here; leave it out")
    if build is not None and build != chosen:
        reason = f"engine.device={chosen}" if asked != "auto" else f"the cluster has {'GPUs' if gpus else 'no GPU'}"
        ways = {
            "cuda": "install rvdist[gpu], or set engine.device=cpu",
            "cpu": "install rvdist[cpu], or set cluster.address to a cluster with GPUs",
        }
        name = {"cuda": "GPUs", "cpu": "CPUs"}[build]
        raise BadInput(f"{reason}, and the vLLM that is installed is built for {name} alone; {ways[chosen]}")
    return chosen


def slice_size(config: Config, device: str) -> int:
    """How many requests an engine is asked at a time."""
    return config.engine.slice_size or _SLICES[device]


def engine_timeouts(config: Config, checkpoint_bytes: int) -> tuple[float | None, float]:
    """How many seconds an engine may be silent at its work (None: by what that should take), and how many its start may
    take on a checkpoint of so many bytes."""
    return config.engine.timeout, config.engine.start_timeout or _START + checkpoint_bytes / _SLOWEST
