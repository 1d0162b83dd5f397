"""Real models: the merge, a sweep of α, a race and a swap, each beside what one has today, in one run.

    python benchmarks/real.py [--work DIR] [--data DIR] [--only merge sweep race swap]
    python benchmarks/real.py --target DIR --plus DIR --minus DIR …

Without three checkpoints it makes two models and their donors (benchmarks/real_models.py) where pip reaches an index;
what is in the work directory is used again. `--data` holds GSM8K and BIG-Bench-Hard as docs/benchmarks.md has them;
without it the sweep asks held-out problems alone. Each part keeps what it found in DIR/found and can be taken by
itself; the table in benchmarks/README.md is written of all that were found.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from typing import Any

from tables import write_table

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]  # processes that this one starts have neither

import real_models  # noqa: E402
from fleet import TUNED, in_a_process, named_vllm, swap, timed  # noqa: E402
from merge import measure, mergekit, spread  # noqa: E402

from rvdist.core.record import Record, read_records  # noqa: E402

PARTS = ["merge", "sweep", "race", "swap"]
TASKS = "tasks"  # no part: what the sweep asks, for commands of one's own
ALPHAS = [0.0, 0.5, 0.75, 1.0]
HARD = ["boolean_expressions", "navigate", "object_counting"]
PROBLEMS, CHOICES, GSM8K = "real_problems", "real_choices", "real_gsm8k"
PRIMARY = {PROBLEMS: "strict", CHOICES: "none", GSM8K: "strict-match"}  # all others: the only filter
SEED = 777  # of the held-out problems; training drew from others
KV_GIB, HARD_TOKENS = 1.0, 256
CHUNK = 1 << 24

Family = Mapping[str, Path]
Key = tuple[float, str, str, int]  # α, task, filter, place of the document


# ---------------------------------------------------------------- what is asked


def write_tasks(work: Path, data: Path | None, count: int, limit: int) -> list[str]:
    """Tasks as YAML, their documents as files, so that all sides are asked the same without a Hub; their names."""
    directory = work / "tasks"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)

    def documents(name: str, rows: Iterable[Mapping[str, Any]]) -> str:
        file = directory / f"{name}.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return str(file)

    def task(name: str, settings: Mapping[str, Any], **files: str) -> str:
        asked = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
        (directory / f"{name}.yaml").write_text(json.dumps({"task": name, **asked, **settings}))  # JSON is YAML
        return name

    drawn = real_models.problems(count, SEED)
    held_out = documents(
        PROBLEMS, ({"question": real_models.prompt(p["question"]), "answer": p["answer"]} for p in drawn)
    )
    choices = documents(CHOICES, map(_with_choices, drawn))
    filters = [
        {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern, **more}, {"function": "take_first"}]}
        for name, pattern, more in (
            ("strict", "#### (-?[0-9]+)", {}),
            ("last-number", "(-?[0-9]+)", {"group_select": -1}),
        )
    ]
    ends = {"until": ["<|im_end|>", "<end_of_turn>", "\n\n\n"], "do_sample": False, "max_gen_toks": 96}
    question = {"doc_to_text": "{{question}}", "metadata": {"version": 1.0}}
    written = {"output_type": "generate_until", "doc_to_target": "{{answer}}", "generation_kwargs": ends}
    written |= {"filter_list": filters, "metric_list": [_mean("exact_match")]}
    names = [
        task(PROBLEMS, question | written, test=held_out),
        task(
            CHOICES,
            question
            | {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "label"}
            | {"metric_list": [_mean("acc")]},
            test=choices,
        ),
    ]
    if data is None:
        return names
    (found,) = find_spec("lm_eval").submodule_search_locations  # its import takes seconds
    theirs = Path(found) / "tasks"
    lines = _first(data / "gsm8k_test.jsonl", limit)
    names.append(
        task(
            GSM8K,
            {"include": str(theirs / "gsm8k" / "gsm8k.yaml"), "dataset_name": None, "tag": []},
            train=str((data / "gsm8k_train.jsonl").resolve()),
            test=documents(GSM8K, map(json.loads, lines)),
        )
    )
    for subset in HARD:
        shown = json.loads((data / "bbh" / f"{subset}.json").read_text())["examples"][:limit]
        own = theirs / "bbh" / "cot_fewshot" / f"{subset}.yaml"
        ends = {"max_gen_toks": HARD_TOKENS, "until": ["</s>", "Q", "\n\n"], "do_sample": False, "temperature": 0.0}
        settings = {"include": str(own), "dataset_name": None, "generation_kwargs": ends}
        names.append(task(f"real_{subset}", settings, test=documents(f"real_{subset}", shown)))
    return names


def _first(file: Path, count: int) -> list[str]:
    with file.open(encoding="utf-8") as lines:
        return [line for _, line in zip(range(count), lines, strict=False)]


def _mean(metric: str) -> dict[str, object]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _with_choices(one: Mapping[str, Any]) -> dict[str, Any]:
    """Four answers: the right one, and what comes of a step missed or a ten too many; for log-probabilities."""
    right = int(one["answer"])
    first = int(one["steps"][0].split()[-1])
    wrong = dict.fromkeys([first, right + 10, right + 1, right + 2, right + 3])
    wrong.pop(right, None)
    choices = sorted([right, *list(wrong)[:3]])
    return {"question": one["question"], "choices": list(map(str, choices)), "label": choices.index(right)}


# ---------------------------------------------------------------- merge


def recipe(family: Family, alpha: float, out: Path, exact: bool = False) -> Path:
    """mergekit's, in bf16 as one types it; `exact`: in fp32, rounded once."""
    models = [(family["plus"], alpha), (family["minus"], -alpha)]
    dtypes = {"dtype": "float32", "out_dtype": "bfloat16"} if exact else {"dtype": "bfloat16"}
    settings = {
        "merge_method": "task_arithmetic",
        "base_model": str(family["target"]),
        "parameters": {"normalize": False},
        "models": [{"model": str(path), "parameters": {"weight": weight}} for path, weight in models],
        **dtypes,
    }
    out.write_text(json.dumps(settings))
    return out


def off(family: Family, alpha: float, merged: Path) -> tuple[int, int]:
    """Elements that are not the fp64 result rounded once to their dtype, and how many there are."""
    from safetensors import safe_open

    def tensors(path: Path) -> dict[str, Any]:
        opened = [safe_open(file, "pt") for file in sorted(path.glob("*.safetensors"))]
        return {name: one for one in opened for name in one.keys()}  # noqa: SIM118

    sides = {name: tensors(path) for name, path in family.items()} | {"merged": tensors(merged)}
    wrong = count = 0
    for name, holder in sides["target"].items():
        target = holder.get_tensor(name)
        if name not in sides["merged"]:
            raise SystemExit(f"{merged}: lacks {name}")
        flat = {side: held[name].get_tensor(name).flatten() for side, held in sides.items() if name in held}
        for begin in range(0, target.numel(), CHUNK):
            piece = {side: tensor[begin : begin + CHUNK] for side, tensor in flat.items()}
            v = piece["plus"].double() - piece["minus"].double() if "plus" in piece else 0.0
            exact = piece["target"].double() + alpha * v
            wrong += int((round_once(exact, target.dtype) != piece["merged"]).sum())
        count += target.numel()
    return wrong, count


def round_once(exact: Any, dtype: Any) -> Any:
    """fp64 to the nearest of bf16, ties to even; torch would go by way of fp32, and round twice."""
    import torch

    if dtype is not torch.bfloat16:
        return exact.to(dtype)
    single = exact.float()
    bits = single.view(torch.int32)
    # To odd: where fp32 lost something, its last bit says so, and the second rounding goes the way of the first.
    inexact = single.double() != exact
    away = single.double().abs() > exact.abs()
    bits = torch.where(inexact, torch.where(away, bits - 1, bits) | 1, bits)
    return bits.view(torch.float32).to(torch.bfloat16)


def measure_merge(family: Family, work: Path, rounds: int, alpha: float = 0.5) -> dict[str, Any]:
    tool, out = mergekit(work), work / "merged"
    commands = {
        "rvdist": ours_merge(family, alpha, out, work / "merge-run"),
        "mergekit 0.1.5, bf16": [str(tool), str(recipe(family, alpha, work / "bf16.yml")), str(out)],
        "mergekit 0.1.5, fp32": [str(tool), str(recipe(family, alpha, work / "fp32.yml", exact=True)), str(out)],
    }
    found: dict[str, Any] = {name: {"wall": [], "stage": [], "resident": 0} for name in commands}
    for round in range(rounds):
        for name, command in commands.items():
            shutil.rmtree(out, ignore_errors=True)
            one, kept = measure(command, cwd=ROOT), found[name]
            kept["wall"].append(one.wall)
            if name == "rvdist":
                timing = json.loads((work / "merge-run" / "timing.json").read_text())
                kept["stage"].append(timing["phases"]["merge"])
                kept["anonymous"] = max(timing["peak_anonymous_bytes"].values())
            kept["resident"] = max(kept["resident"], one.resident)
            if round == 0:
                kept["off"], kept["elements"] = off(family, alpha, out)
            print(f"merge: {name}: {one.wall:.1f} s, {kept['off']:,} of {kept['elements']:,} off", flush=True)
    shutil.rmtree(out, ignore_errors=True)
    return {"alpha": alpha, "tools": found}


def ours_merge(family: Family, alpha: object, out: object, run: Path) -> list[str]:
    return [
        sys.executable, "-m", "rvdist.launch", f"target={family['target']}", f"vector.plus={family['plus']}",
        f"vector.minus={family['minus']}", f"alpha={alpha}", f"output={out}", f"hydra.run.dir={run}",
    ]  # fmt: skip


# ---------------------------------------------------------------- sweep


def shared_arguments(given: argparse.Namespace) -> dict[str, Any]:
    """How vLLM is started by lm-eval's backend: as our engines are."""
    return {
        "max_model_len": given.context, "kv_cache_memory_bytes": int(KV_GIB * 2**30), "enforce_eager": True,
        "enable_prefix_caching": given.prefix_caching,
    }  # fmt: skip


def environment(work: Path, threads: int) -> dict[str, str]:
    return TUNED | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": f"{ROOT}:{named_vllm(work)}"}


def cold(family: Family, checkpoint: Path, work: Path, tasks: Sequence[str], given: argparse.Namespace) -> float:
    """Seconds of one process of lm-eval, which scores a checkpoint."""
    model = {"pretrained": checkpoint, **shared_arguments(given)}
    command = [
        Path(sys.executable).with_name("lm_eval"), "run", "--model", "vllm", "--model_args",
        ",".join(f"{key}={value}" for key, value in model.items()), "--tasks", ",".join(tasks), "--include_path",
        work / "tasks", "--batch_size", "auto", "--log_samples", "--output_path", work / "cold-results",
        *(["--apply_chat_template"] if has_template(family["target"]) else []),
    ]  # fmt: skip
    return timed(command, work / "cold.log", environment(work, given.threads))


def has_template(target: Path) -> bool:
    from transformers import AutoTokenizer

    return bool(AutoTokenizer.from_pretrained(target).chat_template)


def warm(job: Mapping[str, Any]) -> None:
    """One vLLM engine in one process with lm-eval, given each checkpoint by vLLM's own `reload_weights`. vLLM's CPU
    build then needs a tied head's packed copy renewed, which is done as our swaps do it. Writes samples and seconds."""
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.vllm_causallms import VLLM
    from lm_eval.tasks import TaskManager

    from rvdist.core.timing import seconds_since_process_start
    from rvdist.evaluate.transcript import show_answers

    backend = VLLM(pretrained=job["target"], batch_size="auto", **job["arguments"])
    manager = TaskManager(include_path=job["tasks_in"], include_defaults=False)
    found: dict[str, Any] = {"start": seconds_since_process_start(), "reload": [], "generate": 0.0, "tokens": 0}
    own = backend.model.generate

    def counting(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        answers = own(*arguments, **named)
        found["generate"] += time.perf_counter() - began
        found["tokens"] += sum(len(one.token_ids) for answer in answers for one in answer.outputs)
        return answers

    backend.model.generate = counting
    rows = []
    for alpha, checkpoint in job["checkpoints"]:
        began = time.perf_counter()
        if checkpoint != job["target"]:
            backend.model.collective_rpc("reload_weights", kwargs={"weights_path": checkpoint})
            backend.model.apply_model(_repair)
            backend.model.reset_prefix_cache()
            found["reload"].append(time.perf_counter() - began)
        results = simple_evaluate(
            backend, tasks=list(job["tasks"]), task_manager=manager, bootstrap_iters=0, log_samples=True,
            apply_chat_template=job["chat"],
        )  # fmt: skip
        for task, samples in results["samples"].items():
            for one in samples:
                answer = "\n".join(map(show_answers, one["resps"], one["arguments"]))
                scores = {metric: float(one[metric]) for metric in one["metrics"]}
                rows.append([alpha, task, one["filter"], one["doc_id"], str(one["arguments"][0][0]), answer, scores])
    Path(job["out"]).write_text(json.dumps(found | {"rows": rows}))


def _repair(model: Any) -> None:
    from rvdist.evaluate.fleet.private_vllm import repair_packed_copies

    repair_packed_copies(model)


def ours_sweep(family: Family, work: Path, tasks: Sequence[str], given: argparse.Namespace, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "rvdist.launch", f"target={family['target']}", f"vector.plus={family['plus']}",
        f"vector.minus={family['minus']}", "stages=[evaluate,report]",
        f"sweep.alphas=[{','.join(f'{alpha:g}' for alpha in given.alphas)}]", f"benchmarks.tasks=[{','.join(tasks)}]",
        f"benchmarks.include_path={work}/tasks", f"benchmarks.apply_chat_template={has_template(family['target'])}",
        "engine.count=1", f"engine.cpu_threads={given.threads}", f"engine.max_model_len={given.context}",
        f"engine.kv_cache_gib={KV_GIB}", f"engine.prefix_caching={given.prefix_caching}", "cache.samples=false",
        f"cache.dir={work}/cache", *more,
    ]  # fmt: skip


def our_records(run: Path) -> list[Record]:
    return [record for file in sorted((run / "samples").glob("*.jsonl")) for record in read_records(file)]


def compare(ours: Iterable[Record], theirs: Iterable[Sequence[Any]]) -> dict[str, int]:
    """How many samples there are, and of how many the prompt, the answer (of choices: a log-probability, to the last
    digit) and the score differ; ends the benchmark unless both have the same samples."""
    own: dict[Key, Record] = {}
    for one in ours:
        if one.alpha is not None:
            own[one.alpha, one.task, one.filter, one.doc_id] = one
    other = {(float(alpha), task, kind, place): rest for alpha, task, kind, place, *rest in theirs}
    if own.keys() != other.keys():
        missing = sorted(own.keys() ^ other.keys())
        raise SystemExit(f"{len(missing)} samples have no counterpart, such as {missing[0]}")
    found = dict.fromkeys(("samples", "prompts", "answers", "logprobs", "scores"), 0)
    for key, (prompt, answer, scores) in other.items():
        mine = own[key]
        found["samples"] += 1
        found["prompts"] += mine.prompt_text != prompt
        found["logprobs" if key[1] == CHOICES else "answers"] += mine.response != answer
        found["scores"] += any(mine.metrics[name] != value for name, value in scores.items() if name in mine.metrics)
    return found


def means(records: Iterable[Record]) -> dict[float, dict[str, float]]:
    """α → task → the mean of its primary score."""
    scores: dict[tuple[float, str], list[float]] = defaultdict(list)
    for one in records:
        if one.alpha is not None and PRIMARY.get(one.task, one.filter) == one.filter:
            metric = "acc" if one.task == CHOICES else "exact_match"
            scores[one.alpha, one.task].append(one.metrics[metric])
    found: dict[float, dict[str, float]] = defaultdict(dict)
    for (alpha, task), values in sorted(scores.items()):
        found[alpha][task] = mean(values)
    return dict(found)


def measure_sweep(family: Family, work: Path, tasks: Sequence[str], given: argparse.Namespace) -> dict[str, Any]:
    tool, run, merged = mergekit(work), work / "sweep-run", work / "cold-merged"
    for directory in (run, work / "written", work / "cold-results"):
        shutil.rmtree(directory, ignore_errors=True)
    wall = timed(ours_sweep(family, work, tasks, given, f"hydra.run.dir={run}"), work / "sweep.log")
    timing, records = json.loads((run / "timing.json").read_text()), our_records(run)
    print(f"sweep: ours: {wall:.0f} s, {timing['phases']['generate']:.0f} of them generation", flush=True)

    peers = []
    for alpha in given.alphas:  # (a)
        merge, checkpoint = 0.0, family["target"]
        if alpha:
            shutil.rmtree(merged, ignore_errors=True)
            merge = timed([tool, recipe(family, alpha, work / "cold.yml"), merged], work / "mergekit.log")
            checkpoint = merged
        peers.append({"alpha": alpha, "merge": merge, "evaluate": cold(family, checkpoint, work, tasks, given)})
        print(f"sweep: α = {alpha:g}: mergekit {merge:.1f} s, lm-eval {peers[-1]['evaluate']:.0f} s", flush=True)
    shutil.rmtree(merged, ignore_errors=True)

    written = work / "written"  # (b): the very weights, so that samples can be compared
    others = ",".join(f"{alpha:g}" for alpha in given.alphas if alpha)
    command = ours_merge(family, f"[{others}]", f"{written}/{{alpha}}", work / "written-run")
    timed(command, work / "written.log")
    places = {float(path.name): str(path) for path in written.iterdir()} | {0.0: str(family["target"])}
    job = {
        "target": str(family["target"]), "tasks": list(tasks), "tasks_in": str(work / "tasks"),
        "arguments": shared_arguments(given), "chat": has_template(family["target"]),
        "checkpoints": [(alpha, places[alpha]) for alpha in given.alphas], "out": str(work / "warm.json"),
    }  # fmt: skip
    (work / "warm-job.json").write_text(json.dumps(job))
    command = [sys.executable, str(Path(__file__).resolve()), "--warm", str(work / "warm-job.json")]
    warm_wall = timed(command, work / "warm.log", environment(work, given.threads))
    answered = json.loads((work / "warm.json").read_text())
    rows = answered.pop("rows")
    print(f"sweep: one warm engine and lm-eval: {warm_wall:.0f} s", flush=True)
    shutil.rmtree(written)
    return {
        "alphas": given.alphas, "tasks": list(tasks), "threads": given.threads, "prefixes": given.prefix_caching,
        "ours": {"wall": wall, "phases": timing["phases"], "fleet": timing["fleet"], "tokens": written_tokens(records)},
        "cold": peers, "warm": answered | {"wall": warm_wall}, "same": compare(records, rows),
        "documents": {task: len({one.doc_id for one in records if one.task == task}) for task in tasks},
        "means": {f"{alpha:g}": found for alpha, found in means(records).items()},
    }  # fmt: skip


def written_tokens(records: Iterable[Record]) -> int:
    """Of every answer once, though each filter has a record of it."""
    return sum({(one.alpha, one.task, one.doc_id): sum(one.tokens) for one in records}.values())


# ---------------------------------------------------------------- race


def measure_race(family: Family, work: Path, tasks: Sequence[str], given: argparse.Namespace) -> dict[str, Any]:
    run = work / "race-run"
    shutil.rmtree(run, ignore_errors=True)
    more = ("search=racing", f"search.round={given.round}", f"hydra.run.dir={run}")
    wall = timed(ours_sweep(family, work, tasks, given, *more), work / "race.log")
    said = json.loads((run / "search.json").read_text())
    timing = json.loads((run / "timing.json").read_text())
    print(f"race: {wall:.0f} s", flush=True)
    return {"wall": wall, "search": said, "generate": timing["phases"]["generate"]}


# ---------------------------------------------------------------- swap


def questions() -> tuple[list[Any], list[Any]]:
    from rvdist.evaluate.request import Choice, Generate

    drawn = real_models.problems(16, SEED + 1)
    return (
        [Generate(real_models.prompt(one["question"]), 48) for one in drawn],
        [Choice(f"{one['question']} The answer is", f" {one['answer']}") for one in drawn],
    )


def answers(base: str, point: Any | None) -> list[Any]:
    """What an engine that was started on `base`, and swapped to `point`, says. Run in a process of its own."""
    from rvdist.evaluate.fleet.arguments import EngineSettings
    from rvdist.evaluate.fleet.engine import Engine

    engine = Engine(base, EngineSettings(max_model_len=512, kv_cache_gib=0.25))
    if point is not None:
        engine.swap(point)
    texts, choices = questions()
    return [*(one.text for one in engine.answer(texts)), *(one.logprob for one in engine.answer(choices))]


def measure_swap(families: Mapping[str, Family], work: Path, rounds: int, alpha: float = 0.5) -> dict[str, Any]:
    from rvdist.core.point import Term, Vector, WeightPoint

    found = {}
    for name, family in families.items():
        one = in_a_process(work / "swap.log", swap, family, rounds)
        out = work / "swap-written"
        shutil.rmtree(out, ignore_errors=True)
        timed(ours_merge(family, alpha, out, work / "swap-run"), work / "swap-merge.log")
        point = WeightPoint(str(family["target"]), (Term(alpha, Vector(str(family["plus"]), str(family["minus"]))),))
        swapped = in_a_process(work / "swapped.log", answers, str(family["target"]), point)
        fresh = in_a_process(work / "fresh.log", answers, str(out), None)
        unchanged = in_a_process(work / "unchanged.log", answers, str(family["target"]), None)
        shutil.rmtree(out)
        found[name] = vars(one) | {
            "architecture": json.loads((family["target"] / "config.json").read_text())["architectures"][0],
            "answers": len(fresh),
            "different": sum(a != b for a, b in zip(swapped, fresh, strict=True)),
            "moved": sum(a != b for a, b in zip(unchanged, fresh, strict=True)),
        }
        print(
            f"swap: {name}: {found[name]['different']} of {len(fresh)} answers differ from a fresh engine's", flush=True
        )
    return found


# ---------------------------------------------------------------- report


def report(found: Mapping[str, Any]) -> list[str]:
    """The README's section, of the parts that were found."""
    lines = [found["machine"]] if "machine" in found else []
    for part, write in (("merge", _merge), ("sweep", _sweep), ("race", _race), ("swap", _swap)):
        if part in found:
            lines += ["", *write(found)]
    return lines


def _merge(found: Mapping[str, Any]) -> list[str]:
    tools = found["merge"]["tools"]
    own = median(tools["rvdist"]["wall"])
    alpha = found["merge"]["alpha"]
    lines = [
        f"| merge, α = {alpha:g} | whole command, s (min to max) | × ours | merge stage, s | memory | elements off "
        "the fp64 result |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in tools.items():
        stage = spread(one["stage"]) if one["stage"] else ""
        memory = f"{one['resident'] / 2**30:.2f} GiB resident"
        if "anonymous" in one:
            memory = f"{one['anonymous'] / 2**20:.0f} MiB anonymous, a process at most"
        ratio = f"{median(one['wall']) / own:.1f}"
        wrong = f"{one['off']:,} of {one['elements']:,}"
        lines.append(f"| {name} | {spread(one['wall'])} | {ratio} | {stage} | {memory} | {wrong} |")
    return lines


def _sweep(found: Mapping[str, Any]) -> list[str]:
    sweep = found["sweep"]
    own, there = sweep["ours"], sweep["warm"]
    merges = sum(one["merge"] for one in sweep["cold"])
    cold_wall, warm_wall = merges + sum(one["evaluate"] for one in sweep["cold"]), merges + there["wall"]
    asked = ", ".join(f"{task.removeprefix('real_')} {count}" for task, count in sweep["documents"].items())
    alphas = ", ".join(f"{alpha:g}" for alpha in sweep["alphas"])
    generate = own["phases"]["generate"]
    ours_rate, their_rate = 1000 * generate / max(own["tokens"], 1), 1000 * there["generate"] / max(there["tokens"], 1)
    caching = "on" if sweep["prefixes"] else "off"
    same = sweep["same"]
    best = max(sweep["means"], key=lambda alpha: mean(sweep["means"][alpha].values()))
    lines = [
        f"α = {alphas}; documents: {asked}; an engine of {_count(sweep['threads'], 'thread')} on each side, prefix "
        f"caching {caching}.",
        "",
        "| sweep | whole, s | × ours | of it mergekit, s | generation, s | not generation | ms a token |",
        "|---|---|---|---|---|---|---|",
        f"| rvdist, one engine | {own['wall']:.0f} | 1.0 |  | {generate:.0f} | {1 - generate / own['wall']:.0%} | "
        f"{ours_rate:.2f} |",
        f"| (a) mergekit, `lm_eval --model vllm`, a process each | {cold_wall:.0f} | {cold_wall / own['wall']:.1f} | "
        f"{merges:.0f} |  |  |  |",
        f"| (b) mergekit, one warm engine, `reload_weights`, lm-eval | {warm_wall:.0f} | "
        f"{warm_wall / own['wall']:.1f} | {merges:.0f} | {there['generate']:.0f} | "
        f"{1 - there['generate'] / warm_wall:.0%} | {their_rate:.2f} |",
        "",
        f"Of {same['samples']:,} samples {same['prompts']} prompts, {same['answers']} answers, {same['logprobs']} "
        f"log-probabilities and {same['scores']} scores differ from (b)'s, which was given the same bytes. "
        f"{_count(own['fleet'].get('swaps', 0), 'swap')} took {own['phases']['swap']:.1f} s, an engine's start "
        f"{own['phases']['engine_start']:.1f} s; (b)'s start, imports included, {there['start']:.1f} s.",
        "",
        f"| α | {' | '.join(task.removeprefix('real_') for task in sweep['documents'])} |",
        "|---" * (len(sweep["documents"]) + 1) + "|",
    ]
    for alpha, scores in sweep["means"].items():
        bold = "**" if alpha == best else ""
        lines.append(f"| {bold}{alpha}{bold} | {' | '.join(f'{scores[task]:.1%}' for task in sweep['documents'])} |")
    return lines


def _race(found: Mapping[str, Any]) -> list[str]:
    race = found["race"]
    text = f"`search=racing` took {race['wall']:.0f} s"
    if sweep := found.get("sweep"):
        warm_wall = sum(one["merge"] for one in sweep["cold"]) + sweep["warm"]["wall"]
        best = max(sweep["means"], key=lambda alpha: mean(sweep["means"][alpha].values()))
        text += f", {race['wall'] / warm_wall:.2f} × (b)'s time; the grid's best α is {best}"
    said = race["search"]
    return [f"{text}; the race's is {said['best']}, from {said['samples']:,} of {said['full_grid']:,} samples."]


def _swap(found: Mapping[str, Any]) -> list[str]:
    lines = [
        "| architecture | parameters | from nothing to an engine, s | first swap, with the probe, s | later, s (min to "
        "max) | of a start | answers that differ from a fresh engine's | from the target's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found["swap"].values():
        later = median(one["later"])
        lines.append(
            f"| {one['architecture']} | {one['parameters'] / 1e6:.0f} M | {one['start']:.1f} | {one['first']:.2f} | "
            f"{later:.2f} ({min(one['later']):.2f} to {max(one['later']):.2f}) | {later / one['start']:.1%} | "
            f"{one['different']} of {one['answers']} | {one['moved']} of {one['answers']} |"
        )
    return lines


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}{'s' * (number != 1)}"


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "rvdist-benchmark" / "real")
    parser.add_argument("--data", type=Path, help="a directory with GSM8K and BIG-Bench-Hard")
    parser.add_argument("--only", nargs="+", choices=[*PARTS, TASKS], default=PARTS, help=f"{TASKS}: writes them")
    for side in ("target", "plus", "minus"):
        parser.add_argument(f"--{side}", type=Path, help="a checkpoint; all three or none")
    parser.add_argument("--alphas", type=float, nargs="+", default=ALPHAS, metavar="α", help="0 must be among them")
    parser.add_argument("--problems", type=int, default=100, help="held-out problems")
    parser.add_argument("--limit", type=int, default=12, help="documents of GSM8K and of each BIG-Bench-Hard task")
    parser.add_argument("--rounds", type=int, default=3, help="of merges and of swaps")
    parser.add_argument("--round", type=int, default=32, help="documents a round of the race")
    parser.add_argument("--threads", type=int, default=1, help="of each engine, on all sides")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a prompt and its answer")
    parser.add_argument("--prefix-caching", action="store_true", help="on all sides; answers may then differ")
    parser.add_argument("--no-table", action="store_true", help="leave benchmarks/README.md as it is")
    parser.add_argument("--warm", type=Path, help=argparse.SUPPRESS)
    found = parser.parse_args(given)
    found.alphas = sorted(set(found.alphas))
    if 0 not in found.alphas or len(found.alphas) < 2:
        parser.error("--alphas: give 0, the baseline, and at least one more")
    if len({one is None for one in (found.target, found.plus, found.minus)}) > 1:
        parser.error("--target, --plus, --minus: give all three or none")
    return found


def main() -> None:
    given = arguments()
    if given.warm:
        warm(json.loads(given.warm.read_text()))
        return
    work: Path = given.work.resolve()
    kept = work / "found"
    kept.mkdir(parents=True, exist_ok=True)
    if given.target:
        own = {side: getattr(given, side).resolve() for side in ("target", "plus", "minus")}
        families: dict[str, Family] = {"given": own}
    else:
        families = dict(real_models.families(work))
    family = next(iter(families.values()))
    tasks = (
        write_tasks(work, given.data, given.problems, given.limit) if {"sweep", "race", TASKS} & set(given.only) else []
    )
    takes: dict[str, Callable[[], dict[str, Any]]] = {
        "merge": lambda: measure_merge(family, work, given.rounds),
        "sweep": lambda: measure_sweep(family, work, tasks, given),
        "race": lambda: measure_race(family, work, tasks, given),
        "swap": lambda: measure_swap(families, work, given.rounds),
    }
    for part in (part for part in given.only if part != TASKS):
        began = time.perf_counter()
        (kept / f"{part}.json").write_text(json.dumps(takes[part](), indent=1))
        print(f"{part}: {time.perf_counter() - began:.0f} s in all", flush=True)
    parts = {file.stem: json.loads(file.read_text()) for file in kept.glob("*.json")}
    machine = f"{os.cpu_count()} cores, {platform.machine()}, no GPU, a load of {os.getloadavg()[1]:.1f} at the end."
    lines = report({"machine": machine, **parts})
    print("\n".join(lines))
    if not given.no_table:
        write_table("real.py", lines)


if __name__ == "__main__":
    main()
