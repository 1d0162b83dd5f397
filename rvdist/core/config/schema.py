"""The schema of a run: every key, its type, its default and its choices.

`conf/` holds the same tree as YAML, for people. A Config with a value that is none of its key's choices cannot be made,
so nobody asks for that again.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from operator import attrgetter
from typing import Any

from rvdist.core.errors import BadInput
from rvdist.core.method import METHODS
from rvdist.core.text import is_url

STAGES = ("plan", "merge", "analyze", "evaluate", "report", "publish")
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # our word: that of safetensors
AS_TARGET = "target"  # what no `dtype` means, too, but that it goes before a recipe's
CHOICES: dict[str, Collection[str]] = {
    "stages": STAGES,
    "dtype": (AS_TARGET, *DTYPES),
    "vector.dtype": DTYPES,
    "vector.format": ("peft",),
    "device": ("cpu", "cuda"),
    "engine.device": ("auto", "cpu", "cuda"),
    "engine.arithmetic": ("cpu", "cuda"),
    "log": ("text", "json"),
    "merge.method": METHODS,
    "search.method": ("racing",),
    "benchmarks.sandbox": ("strict", "degraded"),
    "compat.extra_rows": ("refuse", "keep"),
}
DIRECTORIES = (
    "output", "vector.save", "recipe", "cache.dir", "benchmarks.data_dir", "benchmarks.include_path", "engine.replay",
)  # fmt: skip
PLAIN = "plain"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass
class MaskConfig:
    """Which tensors a vector reaches, and how much: the fields of a `Mask`."""

    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    layers: list[list[int]] = field(default_factory=list)
    depth: list[float] = field(default_factory=list)


@dataclass
class DonorsConfig:
    """A vector by its two donors, or by the `path` of one that is stored."""

    plus: str | None = None
    minus: str | None = None
    path: str | None = None
    mask: MaskConfig = field(default_factory=MaskConfig)
    rename: list[list[str]] = field(default_factory=list)


@dataclass
class VectorConfig(DonorsConfig):
    """The vector, and how it is stored where `save` names a directory."""

    save: str | None = None
    dtype: str | None = None
    rank: int | None = None
    density: float | None = None
    format: str | None = None
    error: float | None = None


@dataclass
class WeightedVectorConfig(DonorsConfig):
    """One of several vectors, times its own α."""

    alpha: float = 1.0


@dataclass
class MergeConfig:
    """How a merge is computed, and by how many workers."""

    workers: int | None = None
    threads: int = 1
    gpus_per_worker: float = 1.0
    timeout: float = 900.0
    direct_io: bool = True
    method: str = "linear"
    density: float = 1.0
    seed: int = 0
    memory: Any = "2GiB"


@dataclass
class ArmConfig:
    """An arm: the checkpoint `weights` as it is, or the target plus `alpha` times the vector, its own if it has one."""

    name: str = ""
    prompt: str = PLAIN
    weights: str | None = None
    alpha: float | None = None
    vector: DonorsConfig | None = None


@dataclass
class SweepConfig:
    """Which α are scored."""

    alphas: list[float] | None = None


@dataclass
class AnalyzeConfig:
    """What is read along the lines between models, and at how many points."""

    text: str | None = None
    points: int = 11


@dataclass
class SearchConfig:
    """The race: its candidates, its promise and its documents."""

    method: str | None = None
    alphas: list[float] | None = None
    groups: list[MaskConfig] = field(default_factory=list)
    confidence: float = 0.95
    tolerance: float = 0.01
    round: int = 128
    holdout: float = 0.2
    seed: int = 0


@dataclass
class BenchmarksConfig:
    """Which tasks are asked, of which documents, and how."""

    tasks: list[str] = field(default_factory=list)
    include_path: str | None = None
    data_dir: str | None = None
    allow_missing: bool = False
    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = True
    allow_truncation: bool = False
    allow_code_execution: bool = False
    sandbox: str = "strict"
    primary: dict[str, str] = field(default_factory=dict)
    margin: float = 2.0


@dataclass
class EngineConfig:
    """How many engines answer, and how each is started."""

    count: int | None = None
    cpu_threads: int = 1
    tensor_parallel_size: int = 1
    gpus: float = 1.0
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    gpu_memory_utilization: float = 0.9
    device: str = "auto"
    accelerator_type: str | None = None
    kv_cache_gib: float | None = None
    enforce_eager: bool | None = None
    seed: int = 0
    slice_size: int | None = None
    prefix_caching: bool = False
    readers: int | None = None
    arithmetic: str = "cpu"
    timeout: float | None = None
    start_timeout: float | None = None
    args: dict[str, Any] = field(default_factory=dict)
    replay: str | None = None


@dataclass
class ClusterConfig:
    """Where Ray is, and for how many nodes to wait how many seconds."""

    address: str = "local"
    nodes: int | None = None
    timeout: float = 120.0


@dataclass
class CompatConfig:
    """What is let pass of vectors that do not fit."""

    force: bool = False
    extra_rows: str = "refuse"


@dataclass
class CacheConfig:
    """Where digests and answered samples are kept."""

    dir: str = "~/.cache/rvdist"
    samples: bool = True


@dataclass
class HubConfig:
    """How an output is published."""

    private: bool = False
    confirmed: bool = False


@dataclass
class EachConfig(DonorsConfig):
    """One of several vectors of a batch, which each make an output."""

    name: str | None = None


@dataclass
class BatchConfig:
    """One entry of `batch`: every target with every vector and every α. What it leaves out is as at the top level."""

    target: Any = None
    vector: DonorsConfig | None = None
    vectors: list[WeightedVectorConfig] | None = None
    each: list[EachConfig] | None = None
    alpha: Any = None
    output: str | None = None


@dataclass(frozen=True)
class OutputFormat:
    """How a checkpoint is stored: `dtype` of its floating-point tensors, as safetensors names it, and `max_shard_size`
    of its files in bytes. None keeps the base's own. `allow_nonfinite`: its values may be infinite or not a number."""

    dtype: str | None = None
    max_shard_size: int | None = None
    allow_nonfinite: bool = False


@dataclass(frozen=True)
class Storage:
    """How v is stored. `dtype`: a safetensors dtype, None for the working precision of the donors, which is exact.
    `rank`: matrices as factors of that rank; `density`: each tensor as that share of its elements, the largest.
    `max_shard_size`: of a file, in bytes; None keeps the donors' own files. `format`: "peft", or None for ours.
    `error`: matrices as factors of the least rank with that relative error."""

    dtype: str | None = None
    rank: int | None = None
    density: float | None = None
    max_shard_size: int | None = None
    format: str | None = None
    error: float | None = None

    def to_json(self) -> dict[str, Any]:
        """What JSON can hold: of what later versions know only what is set."""
        own = asdict(self)
        return {key: value for key, value in own.items() if value is not None or key not in ("format", "error")}


@dataclass
class Config:
    """All keys. Raises BadInput for a value that is none of its key's choices."""

    target: str = ""
    vector: VectorConfig = field(default_factory=VectorConfig)
    vectors: list[WeightedVectorConfig] = field(default_factory=list)
    alpha: Any = 1.0
    tokenizer: Any = None
    batch: list[BatchConfig] = field(default_factory=list)
    recipe: str | None = None
    stages: list[str] | None = None
    output: str | None = None
    publish: str | None = None
    hub: HubConfig = field(default_factory=HubConfig)
    overwrite: bool = False
    max_shard_size: Any = None
    dtype: str | None = None
    device: str = "cpu"
    allow_nonfinite: bool = False
    merge: MergeConfig = field(default_factory=MergeConfig)
    prompts: dict[str, str] = field(default_factory=lambda: {PLAIN: ""})
    arms: list[ArmConfig] = field(default_factory=list)
    reported: dict[str, dict[str, float]] = field(default_factory=dict)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    analyze: AnalyzeConfig = field(default_factory=AnalyzeConfig)
    benchmarks: BenchmarksConfig = field(default_factory=BenchmarksConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    compat: CompatConfig = field(default_factory=CompatConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    log: str = "text"

    def __post_init__(self) -> None:
        for key, choices in CHOICES.items():
            given = attrgetter(key)(self)
            for value in given if isinstance(given, list) else [given]:
                if value is not None and value not in choices:
                    raise BadInput(f"{key}: {value!r} is not one of {', '.join(choices)}")
        for key in DIRECTORIES:
            if is_url(str(attrgetter(key)(self) or "")):
                raise BadInput(
                    f"{key}={attrgetter(key)(self)}: is a URL, and this is a path; mount it, or copy from there"
                )
        if self.benchmarks.margin < 0:
            raise BadInput(f"benchmarks.margin={self.benchmarks.margin:g}: is less than no points; give 0 or more")
        _ = self.output_format, self.matrix_memory

    @property
    def output_format(self) -> OutputFormat:
        """`dtype`, `max_shard_size` and `allow_nonfinite`."""
        dtype = DTYPES.get(self.dtype or AS_TARGET)
        return OutputFormat(dtype, size(self.max_shard_size, "max_shard_size"), self.allow_nonfinite)

    @property
    def matrix_memory(self) -> int:
        """`merge.memory` in bytes."""
        return size(self.merge.memory, "merge.memory") or 0


def stages(config: Config) -> list[str]:
    """The stages to run, in their order. Raises BadInput."""
    if config.stages is None:
        merges = bool(config.batch) or config.output is not None or config.vector.save is not None
        chosen = ["merge"] * merges + ["evaluate", "report"] * bool(config.benchmarks.tasks)
        chosen += ["publish"] * (config.publish is not None)
        if not chosen:
            raise BadInput("nothing to do; set output=DIRECTORY to merge, or benchmarks=… to evaluate")
        return chosen
    chosen = [stage for stage in STAGES if stage in config.stages]
    if "merge" in chosen and config.output is None and config.vector.save is None and not config.batch:
        raise BadInput("output is not set; the merge stage needs output=DIRECTORY or vector.save=DIRECTORY")
    if "evaluate" in chosen and not config.benchmarks.tasks:
        raise BadInput("benchmarks.tasks is empty; the evaluate stage needs benchmarks=… or benchmarks.tasks=[…]")
    if "report" in chosen and not {"evaluate", "analyze"} & set(chosen):
        raise BadInput("stages: report needs evaluate or analyze")
    if "publish" in chosen and config.publish is None:
        raise BadInput("publish is not set; the publish stage needs publish=ORG/NAME")
    if "publish" in chosen and "merge" not in chosen:
        raise BadInput("stages: publish needs merge; what is finished is not merged again")
    return chosen


_EMPTY = {  # set to nothing by an option of its group, for the user to fill
    "engine.replay": "is not set; give a run directory of ours, or one of lm-eval's samples",
}


def require_filled(config: Any, prefix: str = "") -> None:
    """Raises BadInput for a text that is set to nothing, which mostly is a shell's variable that has no value."""
    for one in fields(config):
        value = getattr(config, one.name)
        if value == "" and one.default != "":
            key = prefix + one.name
            raise BadInput(f"{key}: {_EMPTY.get(key, 'is empty; give a value, or leave it out')}")
        for number, inner in enumerate(value if isinstance(value, list) else [value]):
            if is_dataclass(inner):
                require_filled(inner, f"{prefix}{one.name}{f'[{number}]' if inner is not value else ''}.")


def size(value: Any, key: str) -> int | None:
    """Bytes from a number or a text such as 5GB or 512MiB; None stays None. Raises BadInput."""
    text = str(value).strip().upper()
    if value is None:
        return None
    for suffix, factor in _UNITS.items():
        if text.endswith(suffix) and text.removesuffix(suffix).strip().replace(".", "", 1).isdigit():
            return max(1, int(float(text.removesuffix(suffix)) * factor))
    if text.isdigit() and int(text) > 0:
        return int(text)
    raise BadInput(f"{key}: {value!r} is not a size; write it as 5GB or 512MiB")
