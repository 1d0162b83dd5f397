"""python docs/configuration.py: writes docs/configuration.md, all keys, from rvdist/core/config/schema.py and conf/.

Types and defaults are the schema's, groups and their options those of conf/; the one thing written here is what each
key means. A key without a meaning, and a meaning without a key, is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from rvdist.core import config
from rvdist.core.method import FACTS, METHODS
from rvdist.launch import CONF

REFERENCE = Path(__file__).with_suffix(".md")


def _methods_with(parameter: str) -> str:
    return _names([row.name for row in FACTS if row.name in METHODS and parameter in row.parameters])


def _methods_of_matrices() -> str:
    return _names([row.name for row in FACTS if row.name in METHODS and row.whole_matrices])


def _names(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


_DONORS = {
    "plus": "θ_GRPO of v = plus − minus: a directory, or `org/name@revision`",
    "minus": "θ_SFT, of the same initialisation and data as plus",
    "path": "a stored vector or a LoRA adapter, instead of plus and minus",
    "mask": "which tensors take part, and how much",
    "rename": "[regular expression, replacement] pairs that make the donors' tensor names the target's",
}

MEANINGS: dict[type, dict[str, str]] = {
    config.Config: {
        "target": "what the vectors are added to: a directory in the Hugging Face layout, or `org/name@revision`",
        "vector": "the vector",
        "vectors": "several vectors, added together, instead of `vector`",
        "alpha": "α of what is written, times the `alpha` of each entry of `vectors`; of a list each is an output",
        "batch": "several merges as one plan, of which one may fail alone: every source byte is read once "
        "(docs/batches.md)",
        "recipe": "a mergekit recipe (YAML) that says what is merged, instead of target, vector and alpha "
        "(docs/recipes.md)",
        "tokenizer": "whose tokens the output has: target, union, or a model or directory; or {source: …, tokens: "
        "{TOKEN: {source: …, force: …}}, pad_to_multiple_of: …}; null: all must have the target's (docs/recipes.md)",
        "stages": "what to do; null: merge if there is something to write, evaluate and report if there are tasks, "
        "publish if that is set",
        "output": "the directory to write, with `{alpha}`, `{target}`, `{vector}` and `{recipe}` filled in; "
        "`/dev/null` keeps nothing",
        "publish": "upload what was written to this Hub repository: `org/name` or `org/name@branch`, filled in like "
        "`output` (docs/publishing.md)",
        "hub": "how `publish` uploads",
        "overwrite": "replace a checkpoint that stands at `output`",
        "max_shard_size": "the largest weight file of an output; null: sharded as the target is",
        "dtype": "of the output; null and target: the target's own, its quantised format too, which null leaves to a "
        "recipe that says another",
        "device": "where a merge computes",
        "allow_nonfinite": "write, and serve, infinite values and NaN instead of refusing",
        "merge": "how the merge is computed, and by how many",
        "prompts": "what is put before every question, by the name of the style; conf/config.yaml adds `think`",
        "reported": "changes against the baseline that somebody else found, in points, shown beside ours: by task, arm",
        "arms": "what is scored, the baseline first, instead of the target; `sweep.alphas`, if set, come on top",
        "sweep": "which α are scored",
        "search": "how to find the best α without scoring all of them on everything (docs/search.md)",
        "analyze": "what the analyze stage looks at (docs/anatomy.md)",
        "benchmarks": "what is asked (docs/benchmarks.md)",
        "engine": "the vLLM engines (docs/fleet.md)",
        "cluster": "the Ray cluster (docs/clusters.md)",
        "compat": "which vectors may be added to which target (docs/formats.md)",
        "cache": "what is kept between runs",
        "log": "what is printed: text, or a JSON object a line and nothing else (docs/logs.md)",
    },
    config.MaskConfig: {
        "include": "regular expressions on whole tensor names; empty: every name",
        "exclude": "regular expressions on whole tensor names that do not take part",
        "layers": "[first, last] ranges, inclusive; when any is given, what is outside the layers is left out",
        "depth": "coefficients from the first layer to the last, interpolated in between",
    },
    config.DonorsConfig: _DONORS,
    config.VectorConfig: {
        "save": "a directory to store the vector in (docs/vectors.md)",
        "dtype": "of the stored vector; null: exact",
        "rank": "store each matrix as two factors of this rank",
        "density": "store this share of each tensor, the largest elements",
        "format": "store a LoRA adapter that peft and vLLM load, by `rank` or `error` (docs/vectors.md)",
        "error": "store each matrix as two factors of the least rank whose relative error is at most this",
    },
    config.WeightedVectorConfig: {"alpha": "of this vector, times `alpha`"},
    config.MergeConfig: {
        "workers": "in all, evenly on the nodes; null: one for each core or share of a GPU, at most 16 a node, and "
        "one a GiB written; where 64 GiB at most are read and written on this machine's cores, they are the "
        "command's own and need no Ray; a number has them on Ray",
        "threads": "cores of each worker",
        "gpus_per_worker": "the share of a GPU that each worker takes (device=cuda)",
        "timeout": "seconds without an answer after which a worker is ended and, on Ray, another does its work",
        "direct_io": "write past the page cache where the file system can",
        "method": "how several vectors are combined (docs/methods.md)",
        "density": f"{_methods_with('density')}: the share of each vector that is kept",
        "seed": f"{_methods_with('seed')}: of its random choice",
        "memory": f"{_methods_of_matrices()}: what a worker, or a rank of an engine, takes for a matrix at most",
    },
    config.ArmConfig: {
        "name": "in tables and file names",
        "prompt": "a style of `prompts`",
        "weights": "a checkpoint, scored as it is; or else alpha",
        "alpha": "of the vector, added to the target",
        "vector": "a vector of its own; null: the run's",
    },
    config.SweepConfig: {"alphas": "the α to score in place, without writing them; null: `alpha`"},
    config.AnalyzeConfig: {
        "text": "a text file to read along straight lines between the models; null: none",
        "points": "how many points of each line, its ends among them",
    },
    config.SearchConfig: {
        "method": "racing: drop an α when it is shown not to be the best; null: score the whole grid",
        "alphas": "the candidates; null: `sweep.alphas`, else `alpha`",
        "groups": "masks; a candidate is then a choice of one α for each",
        "confidence": "the chance with which all that is promised holds",
        "tolerance": "how much worse than the best the chosen one may be, in mean score",
        "round": "documents a round",
        "holdout": "the share of each task's documents that is kept for the confirmation",
        "seed": "of the split and of the order of documents",
    },
    config.BenchmarksConfig: {
        "tasks": "names of lm-eval's tasks and groups, of your own, of ours, and `TASK+EDIT`",
        "include_path": "a directory of task YAML files of your own",
        "data_dir": "a directory of local copies of the data sets, instead of the Hub",
        "allow_missing": "leave out tasks whose data are not in data_dir",
        "limit": "documents of each task at most; null: all",
        "num_fewshot": "examples before each question; null: as each task says",
        "apply_chat_template": "ask in the target's chat template",
        "allow_truncation": "cut prompts that do not fit from the left instead of refusing, and count them",
        "allow_code_execution": "run programs that a model wrote, in a sandbox; tasks that need it are refused without",
        "sandbox": "degraded: run them with what isolation there is where namespaces are not to be had",
        "primary": "the filter whose score counts, by task or group, as `{gsm8k: flexible-extract}`; of others the one "
        "that their prompts ask for",
        "margin": "points within which a change counts as none: where the whole interval of one is smaller, the "
        "verdict is equivalent; 0 for never",
    },
    config.EngineConfig: {
        "count": "engines; null: as many as there are GPUs or cores for",
        "cpu_threads": "threads of each rank, on CPUs",
        "tensor_parallel_size": "ranks of each engine: GPUs of one node",
        "gpus": "the share of a GPU that each engine takes; below 1 several share one",
        "max_model_len": "tokens of prompt and answer; null: the checkpoint's own",
        "max_num_seqs": "sequences at a time; null: vLLM's default",
        "gpu_memory_utilization": "the share of a GPU's memory, on GPUs",
        "device": "cpu or cuda; auto: the GPUs, where the cluster has any",
        "accelerator_type": "the kind of GPU by Ray's name, such as H100; null: the only one of the cluster",
        "kv_cache_gib": "GiB of KV cache of each rank; null: 1 on CPUs, what `gpu_memory_utilization` leaves on GPUs",
        "enforce_eager": "true: no compilation and no graphs, whose text differs; false: vLLM's own; null: true on "
        "CPUs, CUDA graphs without compilation on GPUs",
        "seed": "of sampling, with the number of the sample and its prompt",
        "slice_size": "requests of one call to an engine, at most; null: 256 on CPUs, 1024 on GPUs",
        "prefix_caching": "whether texts of one slice share what they begin with, which may change answers",
        "readers": "threads of each rank that read a point at a swap, which changes no answer; null: `cpu_threads` on "
        "CPUs, 4 on GPUs",
        "arithmetic": "on what the sums of a swap are computed, which changes no answer; cuda: on the engine's GPU, "
        "by one reader",
        "timeout": "seconds without a word after which an engine at work is replaced; 15 minutes unless given, or 20 "
        "times as long as its slice should take or as its start took",
        "start_timeout": "seconds that an engine may take to start; half an hour and 10 s a GB of weights unless given",
        "args": "further arguments of `vllm.LLM`, as they are",
        "replay": "a run directory or lm-eval's log of samples that answers instead of engines; null: none",
    },
    config.ClusterConfig: {
        "address": "local: one of this machine that ends with the run (in a Ray job: the job's); auto, `host:port` or "
        "`ray://host:port`: one that runs, whose cores, or GPUs, are asked for, of a cluster of one machine, too; with "
        "local, one that `rvdist up` began is joined by what needs Ray",
        "nodes": "wait for so many; of a plan without a cluster: so many like this machine",
        "timeout": "seconds to wait for nodes, workers and engines",
    },
    config.CompatConfig: {
        "force": "add a vector from another architecture or pre-training all the same; the card says so",
        "extra_rows": "keep: tensors may differ in rows (a padded vocabulary), and extra ones stay as they are",
    },
    config.CacheConfig: {
        "dir": "where digests of files and answered samples are kept",
        "samples": "keep answers, and use those that are there",
    },
    config.HubConfig: {
        "private": "create a repository that only its members see",
        "confirmed": "upload without asking; without a terminal to ask at nothing is uploaded unless this is set",
    },
    config.BatchConfig: {
        "target": "checkpoints, each with every vector and α; null, here and below: as at the top level",
        "vector": "of these merges",
        "vectors": "of these merges, added together",
        "each": "several vectors, each for merges of its own",
        "alpha": "of these merges",
        "output": "of these merges",
    },
    config.EachConfig: {"name": "what `{vector}` stands for; null: the last part of plus or path"},
}

_TYPES = {  # what the schema cannot say
    (config.Config, "alpha"): "number, or a list of them",
    (config.BatchConfig, "alpha"): "number, or a list of them",
    (config.BatchConfig, "target"): "text, or a list of them",
    (config.Config, "tokenizer"): "text, or a block",
    (config.Config, "max_shard_size"): "bytes, or a text like 5GB or 512MiB",
}
_WORDS = {str: "text", int: "integer", float: "number", bool: "true or false", Any: "anything"}

_HEAD = """\
# Configuration
<!-- Written by `python docs/configuration.py` from rvdist/core/config/, conf/ and the meanings in that script. -->

Every key, set with `key=value`. A heading says whose keys a table lists: `workers` under `merge` is `merge.workers`;
`[]` stands for the entries of a list. Lists and mappings are written in Hydra's syntax: `alpha=[0.5,1]`,
`vectors=[{plus: …, minus: …}]`. `--help` lists all keys with the values of the groups chosen, `--cfg job` shows what a
command composes to, `hydra.run.dir=DIR` names the run directory, `--config-dir DIR` adds a directory of options of your
own to those of `conf/`. With `RVDIST_TRACEBACK=1` in the environment an error says where it comes from. In bash,
`eval "$(rvdist -sc install=bash)"` completes groups, their options, and keys of the installed command.
"""


def reference() -> str:
    """The text of configuration.md."""
    sections = [_HEAD, "## Groups\nChosen with `group=option`; each is a file of `conf/`.\n\n" + _groups()]
    for block, paths in _places(config.Config).items():
        where = ", ".join(f"`{path}`" for path in paths)
        sections.append(f"## {where or 'At the top'}\n" + _table(block, paths))
    return "\n".join(sections)


def _groups() -> str:
    lines = ["| option | what it is |", "|---|---|"]
    for file in sorted(CONF.glob("*/*.yaml")):
        said = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("# @package")]
        first = " ".join(line.removeprefix("# ") for line in _while_comment(said))
        lines.append(f"| `{file.parent.name}={file.stem}` | {first} |")
    return "\n".join(lines) + "\n"


def _while_comment(lines: list[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith("#"):
            return
        yield line


def _places(block: type, path: str = "") -> dict[type, list[str]]:
    """Each dataclass of the schema under `block`, and the keys whose value is one."""
    found: dict[type, list[str]] = {block: [path] if path else []}
    for name, hint in get_type_hints(block).items():
        inner = _block(hint)
        if inner:
            step = f"{path}.{name}" if path else name
            listed = "[]" if _is_list(hint) else ""
            for below, paths in _places(inner, step + listed).items():
                found[below] = found.get(below, []) + paths
    return found


def _table(block: Any, paths: list[str]) -> str:
    meanings = {key: text for base in reversed(block.__mro__) for key, text in MEANINGS.get(base, {}).items()}
    names = [field.name for field in fields(block)]
    if wrong := set(names) ^ meanings.keys():
        raise SystemExit(
            f"docs/configuration.py: {block.__name__} and its meanings differ in {', '.join(sorted(wrong))}"
        )
    default, hints = block(), get_type_hints(block)
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name in names:
        hint, value = hints[name], getattr(default, name)
        shown = "" if is_dataclass(value) else f"`{json.dumps(value, ensure_ascii=False)}`"
        meaning = meanings[name]
        keys = [f"{path}.{name}" for path in paths] or [name]
        if choices := next((config.CHOICES[key] for key in keys if key in config.CHOICES), None):
            meaning += f"; one of {', '.join(choices)}" if not _is_list(hint) else f"; of {', '.join(choices)}"
        lines.append(f"| `{name}` | {_TYPES.get((block, name)) or _type(hint)} | {shown} | {meaning} |")
    return "\n".join(lines) + "\n"


def _alternatives(hint: Any) -> list[Any]:
    """The types of `hint` but None."""
    return [one for one in get_args(hint) if one is not NoneType] if isinstance(hint, UnionType) else [hint]


def _is_list(hint: Any) -> bool:
    return get_origin(_alternatives(hint)[0]) is list


def _block(hint: Any) -> type | None:
    """The dataclass that a key of this type holds, or that the entries of its list are."""
    (one,) = _alternatives(hint)
    one = get_args(one)[0] if get_origin(one) is list else one
    return one if is_dataclass(one) and isinstance(one, type) else None


def _type(hint: Any) -> str:
    (one,) = _alternatives(hint)
    if get_origin(one) is list:
        inner = get_args(one)[0]
        return "list of blocks" if is_dataclass(inner) else f"list of {_plural(_type(inner))}"
    if get_origin(one) is dict:
        return "mapping"
    return "block" if is_dataclass(one) else _WORDS[one]


def _plural(word: str) -> str:
    return word.replace("list of", "lists of") if word.startswith("list of") else word + "s"


if __name__ == "__main__":
    REFERENCE.write_text(reference(), encoding="utf-8")
