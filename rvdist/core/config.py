"""The schema of a run: every key, its type and its default, and what Hydra cannot check by itself.

`conf/` holds the same tree as YAML, for people; this module refuses what does not fit it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any

from rvdist.core.errors import BadInput
from rvdist.core.point import Arm, Mask, MethodSpec, Term, Vector, WeightPoint, name_of

STAGES = ("plan", "merge", "analyze", "evaluate", "report", "publish")
DEVICES = ("cpu", "cuda")
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
EXTRA_ROWS = ("refuse", "keep")
SANDBOXES = ("strict", "degraded")
METHODS = ("linear", "ties", "dare")
SEARCHES = ("racing",)
LOGS = ("text", "json")
BASELINE = "baseline"
PLAIN = "plain"
RECIPE = "recipe"
PLACEHOLDERS = "{alpha}, {target}, {vector} or {recipe}"
MOST_CANDIDATES = 1000
_NAME = r"\w([\w.-]{0,94}\w)?"
_REPOSITORY = re.compile(rf"(?![^@]*(--|\.\.)){_NAME}/{_NAME}(@\w[\w.-]*(/\w[\w.-]*)*)?", re.ASCII)
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass
class MaskConfig:
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    layers: list[list[int]] = field(default_factory=list)
    depth: list[float] = field(default_factory=list)


@dataclass
class DonorsConfig:
    plus: str | None = None
    minus: str | None = None
    path: str | None = None
    mask: MaskConfig = field(default_factory=MaskConfig)
    rename: list[list[str]] = field(default_factory=list)


@dataclass
class VectorConfig(DonorsConfig):
    save: str | None = None
    dtype: str | None = None
    rank: int | None = None
    density: float | None = None


@dataclass
class WeightedVectorConfig(DonorsConfig):
    alpha: float = 1.0


@dataclass
class MergeConfig:
    workers: int | None = None
    threads: int = 1
    gpus_per_worker: float = 1.0
    direct_io: bool = True
    method: str = "linear"
    density: float = 1.0
    seed: int = 0


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
    alphas: list[float] | None = None


@dataclass
class AnalyzeConfig:
    text: str | None = None
    points: int = 11


@dataclass
class SearchConfig:
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


@dataclass
class EngineConfig:
    count: int | None = None
    cpu_threads: int = 1
    tensor_parallel_size: int = 1
    gpus: float = 1.0
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    gpu_memory_utilization: float = 0.9
    kv_cache_gib: float = 1.0
    enforce_eager: bool = True
    seed: int = 0
    slice_size: int = 256
    args: dict[str, Any] = field(default_factory=dict)
    replay: str | None = None


@dataclass
class ClusterConfig:
    address: str = "local"
    nodes: int | None = None
    timeout: float = 120.0


@dataclass
class CompatConfig:
    force: bool = False
    extra_rows: str = "refuse"


@dataclass
class CacheConfig:
    dir: str = "~/.cache/rvdist"
    samples: bool = True


@dataclass
class HubConfig:
    private: bool = False
    confirmed: bool = False


@dataclass
class EachConfig(DonorsConfig):
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


@dataclass
class Config:
    target: str = ""
    vector: VectorConfig = field(default_factory=VectorConfig)
    vectors: list[WeightedVectorConfig] = field(default_factory=list)
    alpha: Any = 1.0
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


def stages(config: Config) -> list[str]:
    """The stages to run, in their order. Raises BadInput."""
    if config.stages is None:
        merges = bool(config.batch) or config.output is not None or config.vector.save is not None
        chosen = ["merge"] * merges + ["evaluate", "report"] * bool(config.benchmarks.tasks)
        chosen += ["publish"] * (config.publish is not None)
        if not chosen:
            raise BadInput("nothing to do; set output=DIRECTORY to merge, or benchmarks=… to evaluate")
        return chosen
    for stage in config.stages:
        if stage not in STAGES:
            raise BadInput(f"stages: {stage!r} is not one of {', '.join(STAGES)}")
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


def alphas(value: Any, key: str = "alpha") -> list[float]:
    """One finite number or a list of them. Raises BadInput, naming `key`."""
    numbers = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise BadInput(f"{key}: {number!r} is not a finite number")
    if not numbers:
        raise BadInput(f"{key} is an empty list; give at least one number")
    return [float(number) for number in numbers]


def spell(alpha: float) -> str:
    """The shortest spelling of α: 1, −1, 0.25."""
    return str(int(alpha)) if alpha.is_integer() else repr(alpha)


def point(config: Config, alpha: float) -> WeightPoint:
    """target + alpha · (the vector, or the weighted sum of `vectors`). Raises BadInput."""
    if not config.target:
        raise BadInput("target is not set; give target=DIRECTORY or target=ORG/NAME")
    weighted = list(config.vectors)
    own = config.vector
    if own.plus or own.minus or own.path:
        if weighted:
            raise BadInput("vector and vectors are both set; put every vector into vectors=[…]")
        weighted = [WeightedVectorConfig(own.plus, own.minus, own.path, own.mask, own.rename)]
    terms = []
    for number, vector in enumerate(weighted):
        key = f"vectors[{number}]" if config.vectors else "vector"
        named, mask = _named(vector, key), _mask(vector.mask, f"{key}.mask")
        try:
            terms.append(Term(alpha * vector.alpha, named, mask))
        except ValueError as error:
            raise BadInput(f"{key}: {error}") from None
    return WeightPoint(config.target, tuple(terms), method(config.merge))


def method(merge: MergeConfig) -> MethodSpec:
    """What it has no use for stays at its default: points that are computed alike are equal. Raises BadInput."""
    if merge.method not in METHODS:
        raise BadInput(f"merge.method: {merge.method!r} is not one of {', '.join(METHODS)}")
    if not 0 < merge.density <= 1:
        raise BadInput(
            f"merge.density: {merge.density:g} is not a share of each vector; give a number above 0 and at most 1"
        )
    return {
        "linear": MethodSpec(),
        "ties": MethodSpec("ties", merge.density),
        "dare": MethodSpec("dare", merge.density, merge.seed),
    }[merge.method]


def _named(vector: DonorsConfig, key: str) -> Vector:
    if vector.path and (vector.plus or vector.minus):
        raise BadInput(f"{key}.path is a vector by itself; set it, or plus and minus, but not both")
    if vector.path:
        return _renamed(Vector(vector.path), vector, key)
    if vector.plus is None or vector.minus is None:
        lacking = "plus" if vector.plus is None else "minus"
        raise BadInput(f"{key}.{lacking} is not set; a vector needs both donors, plus and minus")
    return _renamed(Vector(vector.plus, vector.minus), vector, key)


def _renamed(named: Vector, vector: DonorsConfig, key: str) -> Vector:
    for pair in vector.rename:
        if len(pair) != 2:
            raise BadInput(f"{key}.rename: {list(pair)} is not a pair [regular expression, replacement]")
    try:
        return replace(named, rename=tuple((pattern, replacement) for pattern, replacement in vector.rename))
    except ValueError as error:
        raise BadInput(f"{key}.{error}") from None


def _mask(mask: MaskConfig, key: str) -> Mask:
    for span in mask.layers:
        if len(span) != 2:
            raise BadInput(f"{key}.layers: {list(span)} is not a range [first, last]")
    layers = tuple((first, last) for first, last in mask.layers)
    try:
        return Mask(tuple(mask.include), tuple(mask.exclude), layers, tuple(mask.depth))
    except ValueError as error:
        raise BadInput(f"{key.removesuffix('.mask')}: {error}") from None


def outputs(config: Config, recipe: WeightPoint | None = None) -> dict[Path, WeightPoint]:
    """What the merge stage writes: directory → point, that of a `recipe` where there is one. Raises BadInput where a
    vector or a placeholder lacks or two points would share a directory."""
    found: dict[Path, WeightPoint] = {}
    for directory, _, merged in _merges(config, recipe):
        if not merged.terms:
            raise BadInput("vector.plus and vector.minus (or vector.path) are not set; a merge needs a vector")
        if directory in found:
            raise BadInput(f"output: several points would be written to {directory}; put {PLACEHOLDERS} into it")
        found[directory] = merged
    return found


def _merges(config: Config, recipe: WeightPoint | None) -> Iterator[tuple[Path, float, WeightPoint]]:
    """Every directory that `output` names, with its α and its point."""
    if not config.output:
        return
    for alpha in alphas(config.alpha):
        merged = recipe or point(config, alpha)
        yield Path(_filled(config, config.output, merged, alpha)).absolute(), alpha, merged


def _filled(config: Config, text: str, merged: WeightPoint, alpha: float) -> str:
    named = {"{alpha}": spell(alpha), "{target}": name_of(merged.base), "{vector}": called(merged)}
    for placeholder, name in (named | {"{recipe}": Path(config.recipe or "").stem}).items():
        text = text.replace(placeholder, name)
    return text


def published(config: Config, recipe: WeightPoint | None = None) -> dict[Path, str]:
    """What the publish stage uploads, and where to: directory → `org/name` or `org/name@branch`. Raises BadInput."""
    assert config.publish is not None
    own = saved(config)
    found = {own.directory: config.publish} if own else {}
    for directory, alpha, merged in _merges(config, recipe):
        found[directory] = _filled(config, config.publish, merged, alpha)
    if not found:
        raise BadInput("publish uploads what was written; set output=DIRECTORY or vector.save=DIRECTORY")
    for repository in found.values():
        if not _REPOSITORY.fullmatch(repository):
            raise BadInput(
                f"publish: {repository!r} is not the name of a repository; write it as ORG/NAME or ORG/NAME@BRANCH, of "
                "letters, digits, '-', '_' and '.'"
            )
    names = [repository.casefold() for repository in found.values()]
    if twice := [name for name in names if names.count(name) > 1]:
        raise BadInput(
            f"publish: several outputs would be uploaded to {twice[0]}; put {PLACEHOLDERS} into the name, or publish "
            "the vector by a run of its own"
        )
    return found


def called(merged: WeightPoint) -> str:
    """What `{vector}` stands for: the name of what each vector leads to."""
    return "+".join(dict.fromkeys(name_of(term.vector.plus) for term in merged.terms))


def require_recipe_alone(config: Config) -> None:
    """Raises BadInput where something is set that a recipe says itself."""
    default = Config()
    for key in (
        "target", "vector", "vectors", "batch", "alpha", "arms", "sweep.alphas", "search.method", "merge.method",
        "merge.density",
    ):  # fmt: skip
        of = attrgetter(key)
        if of(config) != of(default):
            raise BadInput(f"recipe and {key} are both set, and a recipe says what is merged; leave {key} out")


def examined(config: Config) -> dict[str, WeightPoint]:
    """What the analyze stage looks at: every vector of the configuration and of its arms, by what it is called, as the
    target plus that vector. Raises BadInput."""
    whole = point(config, 1.0)
    names = ["vector"] if len(whole.terms) == 1 else [f"vectors[{k}]" for k in range(len(whole.terms))]
    found = {name: replace(whole, terms=(term,)) for name, term in zip(names, whole.terms, strict=True)}
    for number, entry in enumerate(config.arms):
        if entry.vector is not None:
            (term,) = _listed(config, entry, number).point.terms
            found[entry.name] = replace(whole, terms=(term,))
    if not found:
        raise BadInput("stages: analyze needs a vector; give vector.plus and vector.minus, or vector.path")
    return found


def lines(config: Config) -> dict[str, list[Arm]]:
    """The points along which `analyze.text` is read, evenly from 0 to 1: from minus to plus, and from the target along
    the vector. Raises BadInput."""
    count = config.analyze.points
    if count < 3:
        raise BadInput(f"analyze.points: {count} points show no barrier; give at least 3")
    whole = point(config, 1.0)
    if len(whole.terms) != 1:
        raise BadInput(
            "analyze.text needs one vector; give vector.plus and vector.minus, or vector.path, and no vectors"
        )
    (term,) = whole.terms
    starts = {"target": (config.target, term)}
    if term.vector.minus is not None:
        starts = {"donors": (term.vector.minus, Term(1.0, term.vector))} | starts
    digits = max(3, len(str(count - 2)))  # each arm has another name
    return {
        name: [
            Arm(
                f"{name} {step / (count - 1):.{digits}f}", replace(whole, base=base, terms=_at(one, step / (count - 1)))
            )
            for step in range(count)
        ]
        for name, (base, one) in starts.items()
    }


def _at(term: Term, share: float) -> tuple[Term, ...]:
    return (replace(term, alpha=share * term.alpha),) if share else ()


def arms(config: Config, recipe: WeightPoint | None = None) -> list[Arm]:
    """What the evaluate stage scores, the baseline first: the listed `arms`, if there are any, and every α of
    `sweep.alphas`; else the target itself and every α, or of a search every candidate, or the point of a `recipe`.
    Raises BadInput."""
    searched, swept = config.search.method, config.sweep.alphas
    if config.arms and searched:
        raise BadInput("arms and search.method are both set; a search makes its own arms, so leave one out")
    if config.arms:
        listed = [_listed(config, entry, number) for number, entry in enumerate(config.arms)]
    else:
        listed = [Arm(BASELINE, WeightPoint(config.target), alpha=0.0)]
    listed += [Arm(RECIPE, recipe)] if recipe else []
    has_vector = bool(point(config, 1.0).terms)
    if searched and not has_vector:
        raise BadInput("search.method is set, and no vector; give vector.plus and vector.minus, or vector.path")
    if searched:
        listed += [arm for arm in candidates(config) if arm.name != BASELINE]
    elif has_vector and (swept is not None or not config.arms):
        values = alphas(config.alpha) if swept is None else alphas(swept, "sweep.alphas")
        listed += [_arm(config, alpha) for alpha in sorted(set(values) - {0.0})]
    names = [arm.name for arm in listed]
    if twice := [name for name in names if names.count(name) > 1]:
        raise BadInput(f"arms: {twice[0]!r} is the name of two of them; give each its own")
    for arm in listed:
        if PLAIN not in config.prompts or arm.prompt not in config.prompts:
            raise BadInput(f"prompts: there is no style {arm.prompt!r}; there are {', '.join(config.prompts)}")
    return listed


def cache_directory(config: Config) -> Path:
    """`cache.dir`."""
    return Path(config.cache.dir).expanduser()


def require_name(name: str, key: str) -> None:
    """Raises BadInput unless files can have the name of this arm."""
    if not re.fullmatch(r"[^\s./\\][^/\\\x00-\x1f]{0,99}", name):
        raise BadInput(f"{key}: {name!r} cannot be the name of a file; give a short one without / or \\")


def _listed(config: Config, entry: ArmConfig, number: int) -> Arm:
    key = f"arms[{number}]"
    require_name(entry.name, f"{key}.name")
    if (entry.weights is None) == (entry.alpha is None):
        raise BadInput(f"{key}: give weights=CHECKPOINT or alpha=NUMBER, one of them")
    if entry.weights is not None:
        alpha = 0.0 if entry.weights == config.target else None
        return Arm(entry.name, WeightPoint(entry.weights), entry.prompt, alpha)
    (alpha,) = alphas(entry.alpha, f"{key}.alpha")
    if alpha == 0.0:
        return Arm(entry.name, WeightPoint(config.target), entry.prompt, 0.0)
    if entry.vector is not None:
        config = replace(config, vector=VectorConfig(**vars(entry.vector)), vectors=[])
    scaled = point(config, alpha)
    if not scaled.terms:
        raise BadInput(f"{key}.alpha is set, and no vector; give vector.plus and vector.minus, or vector.path")
    own = entry.vector is None and len(scaled.terms) == 1
    return Arm(entry.name, scaled, entry.prompt, scaled.terms[0].alpha if own else None)


def _arm(config: Config, alpha: float) -> Arm:
    scaled = point(config, alpha)
    single = scaled.terms[0].alpha if len(scaled.terms) == 1 else None
    return Arm(f"alpha={spell(alpha)}", scaled, alpha=single)


def candidates(config: Config) -> list[Arm]:
    """What a search chooses from: every α, or with `search.groups` every choice of one α for each group of tensors. The
    smallest come first: of equals the first is chosen. α = 0 is the baseline. Raises BadInput."""
    search = config.search
    _require_search(search)
    if search.alphas is not None:
        values = alphas(search.alphas, "search.alphas")
    else:
        values = alphas(config.alpha) if config.sweep.alphas is None else alphas(config.sweep.alphas, "sweep.alphas")
    choices = sorted(product(sorted(set(values)), repeat=max(1, len(search.groups))), key=lambda c: sum(map(abs, c)))
    if len(choices) < 2:
        raise BadInput("search.alphas: a search needs at least two values to choose from")
    if len(choices) > MOST_CANDIDATES:
        raise BadInput(
            f"search.groups: {len(search.groups)} groups of {len(set(values))} values each are {len(choices):,} "
            f"candidates; at most {MOST_CANDIDATES:,} can be raced, so give fewer of one"
        )
    found = []
    for choice in choices:
        if not any(choice):
            found.append(Arm(BASELINE, WeightPoint(config.target), alpha=0.0))
        elif search.groups:
            found.append(Arm(f"alpha={','.join(map(spell, choice))}", _grouped(config, choice)))
        else:
            found.append(_arm(config, choice[0]))
    return found


def _grouped(config: Config, choice: Sequence[float]) -> WeightPoint:
    """target + Σ α_g · (m_g ⊙ v)."""
    whole = point(config, 1.0)
    if len(whole.terms) != 1 or whole.terms[0].mask != Mask():
        raise BadInput("search.groups: are masks of one vector; set vector alone, without a mask of its own")
    (term,) = whole.terms
    masks = [_mask(group, f"search.groups[{number}]") for number, group in enumerate(config.search.groups)]
    weighted = [(alpha * term.alpha, mask) for alpha, mask in zip(choice, masks, strict=True)]
    return replace(whole, terms=tuple(Term(alpha, term.vector, mask) for alpha, mask in weighted))


def _require_search(search: SearchConfig) -> None:
    if search.method not in SEARCHES:
        raise BadInput(f"search.method: {search.method!r} is not one of {', '.join(SEARCHES)}")
    for key in ("confidence", "holdout"):
        if not 0 < getattr(search, key) < 1:
            raise BadInput(f"search.{key}: {getattr(search, key):g} is not a share; give a number above 0, below 1")
    if not 0 <= search.tolerance < 1:
        raise BadInput(f"search.tolerance: {search.tolerance:g} is not a difference of scores; give 0 or more, below 1")
    if search.round < 1:
        raise BadInput(f"search.round: {search.round} is not a number of documents; give at least 1")


@dataclass(frozen=True)
class Saved:
    """A vector that is stored, where, and how: a safetensors dtype (None where it must be exact), the rank of its
    matrices or the share of its elements that is kept."""

    vector: Vector
    directory: Path
    dtype: str | None
    rank: int | None
    density: float | None


def saved(config: Config) -> Saved | None:
    """What `vector.save` asks for. Raises BadInput."""
    own = config.vector
    if own.save is None:
        for key in ("dtype", "rank", "density"):
            if getattr(own, key) is not None:
                raise BadInput(f"vector.{key} says how to store a vector, and vector.save is not set; set it to a path")
        return None
    if config.batch:
        raise BadInput("vector.save stores one vector, and batch is set; save it by a run of its own")
    if config.vectors:
        raise BadInput("vector.save stores one vector, and vectors=[…] is set; name it as vector.plus and vector.minus")
    if own.dtype is not None and own.dtype not in DTYPES:
        raise BadInput(f"vector.dtype: {own.dtype!r} is not one of {', '.join(DTYPES)}")
    if own.rank is not None and own.rank < 1:
        raise BadInput(f"vector.rank: {own.rank} is not a rank; give a number of at least 1")
    if own.density is not None and not 0 < own.density <= 1:
        raise BadInput(f"vector.density: {own.density} is not a share; give a number above 0, at most 1")
    if own.rank is not None and own.density is not None:
        raise BadInput("vector.rank and vector.density are two ways to store a vector; set one of them")
    directory = Path(own.save).absolute()
    dtype = DTYPES[own.dtype] if own.dtype else None
    return Saved(_named(own, "vector"), directory, dtype, own.rank, own.density)


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


def output_dtype(config: Config) -> str | None:
    """The safetensors dtype of the output, None to keep the target's. Raises BadInput."""
    if config.dtype is not None and config.dtype not in DTYPES:
        raise BadInput(f"dtype: {config.dtype!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[config.dtype] if config.dtype else None


def require_resources(config: Config) -> None:
    """Raises BadInput unless there can be so many nodes and workers, such a device and such shares of it."""
    ranks, part = config.engine.tensor_parallel_size, config.engine.gpus
    share = config.merge.gpus_per_worker
    for key, count in (
        ("merge.workers", config.merge.workers),
        ("merge.threads", config.merge.threads),
        ("cluster.nodes", config.cluster.nodes),
    ):
        if count is not None and count < 1:
            raise BadInput(f"{key}: {count} is not a number of them; give at least 1")
    if config.device not in DEVICES:
        raise BadInput(f"device: {config.device!r} is not one of {', '.join(DEVICES)}")
    if not 0 < share <= 1:
        raise BadInput(f"merge.gpus_per_worker: {share} is not a share of one GPU; give a number above 0, at most 1")
    if not 0 < part <= 1:
        raise BadInput(f"engine.gpus: {part:g} is not a share of one GPU; give a number above 0, at most 1")
    if part < 1 and ranks > 1:
        raise BadInput(
            f"engine.gpus={part:g}: an engine of engine.tensor_parallel_size={ranks} takes whole GPUs; set one to 1"
        )


def logs_json(config: Config) -> bool:
    """Whether the command prints JSON Lines. Raises BadInput."""
    if config.log not in LOGS:
        raise BadInput(f"log: {config.log!r} is not one of {', '.join(LOGS)}")
    return config.log == "json"


def keeps_extra_rows(config: Config) -> bool:
    """Whether a vector may have fewer or more rows than the target, as a padded vocabulary has. Raises BadInput."""
    policy = config.compat.extra_rows
    if policy not in EXTRA_ROWS:
        raise BadInput(f"compat.extra_rows: {policy!r} is not one of {', '.join(EXTRA_ROWS)}")
    return policy == "keep"


def device(config: Config, gpus: int) -> str:
    """Where a cluster with so many GPUs merges: `cpu` or `cuda`. Raises BadInput where it cannot."""
    if config.device == "cuda" and not gpus:
        raise BadInput("device=cuda: the cluster has no GPU; set device=cpu, or cluster.address to one that has")
    return config.device


def workers(config: Config, nodes: Sequence[tuple[int, int]]) -> list[int]:
    """How many workers each node of so many (cores, GPUs) gets: `merge.workers` evenly, or as many as its cores or GPUs
    have room for; one at least of all of them."""
    merge = config.merge
    if merge.workers:
        return [(merge.workers + k) // len(nodes) for k in range(len(nodes))][::-1]
    if device(config, sum(gpus for _, gpus in nodes)) == "cuda":
        return [gpus * int(1 / merge.gpus_per_worker) for _, gpus in nodes]
    room = [cores // merge.threads for cores, _ in nodes]
    return room if any(room) else [1, *room[1:]]


def code_sandbox(config: Config) -> str | None:
    """The sandbox for code that a model wrote: strict, degraded, None where none may run. Raises BadInput."""
    benchmarks = config.benchmarks
    if benchmarks.sandbox not in SANDBOXES:
        raise BadInput(f"benchmarks.sandbox: {benchmarks.sandbox!r} is not one of {', '.join(SANDBOXES)}")
    return benchmarks.sandbox if benchmarks.allow_code_execution else None


def engines(config: Config, cpus: int, gpus: int) -> tuple[int, tuple[float, float]]:
    """How many engines a run wants, and the cores and GPUs that each takes, of a cluster that has so many now.
    A cluster that is not ours may grow into it. Raises BadInput."""
    engine, local = config.engine, config.cluster.address == "local"
    ranks, share = engine.tensor_parallel_size, engine.gpus
    if gpus:
        count = engine.count or max(1, int(gpus / share) // ranks)
        if local and count * ranks * share > gpus:
            raise BadInput(
                f"engine.count={count} times {ranks * share:g} GPUs each are more than this machine's {gpus}; lower "
                "engine.count, engine.tensor_parallel_size or engine.gpus"
            )
        return count, (0.0, ranks * share)
    count = engine.count or max(1, cpus // (ranks * engine.cpu_threads))
    cores = float(ranks * engine.cpu_threads)
    return count, (min(cores, int(cpus / count * 1000) / 1000) if local else cores, 0.0)
