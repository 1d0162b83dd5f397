"""A sweep of α on live engines against a process for each value, on one machine, in one run.

    python benchmarks/fleet.py [--values -1 -0.5 0 0.25 0.5 0.75 1 1.25] [--rounds 3] [--work DIR]

The same values of α around the pocket family's target, its sums and its choices, three ways: mergekit 0.1.5 (in an
environment of its own) and lm-eval's own vLLM backend, a process each for every value; ours with one engine; ours with
two. Then a swap beside an engine start, and what a request costs on its way through lm-eval, by our path and by its
own backend. What is compared is interleaved. Medians and their ratios go to benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

from tables import write_table

sys.path.insert(0, str(Path(__file__).parent))
import shapes
from merge import mergekit, spread

from rvdist.core.point import Arm, Term, Vector, WeightPoint
from rvdist.core.record import read_records
from rvdist.core.timing import seconds_since_process_start

ROOT = Path(__file__).resolve().parent.parent

POCKET = ROOT / "rvdist" / "pocket"
FAMILY = {"target": POCKET / "target", "plus": POCKET / "grpo", "minus": POCKET / "sft"}
TASKS = ["pocket_sums", "pocket_choice"]
MAX_MODEL_LEN, KV_CACHE_GIB, SLICE_SIZE = 1024, 0.125, 256
VALUES = [-1, -0.5, 0, 0.25, 0.5, 0.75, 1, 1.25]

# lm-eval as one types it, and with all that we found out about vLLM on CPUs (docs/vllm.md)
TYPED = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # as our engines run
TUNED = TYPED | ONE_THREAD | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCH_COMPILE_DISABLE": "1"}

LARGE = shapes.qwen2(768, 14, 3072, 256, 32000)
LARGE_CONFIG = {
    "hidden_size": 768, "num_hidden_layers": 14, "intermediate_size": 3072, "num_attention_heads": 12,
    "num_key_value_heads": 4, "vocab_size": 32000, "layer_types": ["full_attention"] * 14, "max_window_layers": 14,
}  # fmt: skip


@dataclass
class Peer:
    """One value of α by mergekit (0 where α is 0: the target is there already) and lm-eval; seconds."""

    alpha: float
    merge: float
    evaluate: float
    results: Path

    @property
    def wall(self) -> float:
        return self.merge + self.evaluate


@dataclass
class Ours:
    """One run of our command: seconds, and its timing.json."""

    wall: float
    timing: dict[str, Any]


@dataclass
class Agreement:
    """Our records against lm-eval's samples of the same values of α: how many of one document's scores there are, how
    many differ, and the largest difference of a task's mean at one α."""

    samples: int
    different: int
    largest: float


@dataclass
class Swap:
    """Seconds from nothing to an engine, of its first swap (with the probe) and of later ones; of `cat`, which reads
    the same bytes."""

    parameters: int
    start: float
    first: float
    later: list[float]
    cat: list[float]


class Round(NamedTuple):
    """All requests once: wall seconds, those of them within the engine, and seconds of CPU (there is one thread)."""

    wall: float
    engine: float
    cpu: float


@dataclass
class Overhead:
    """The same requests again and again, by our path and by lm-eval's backend."""

    requests: int
    ours: list[Round] = field(default_factory=list)
    theirs: list[Round] = field(default_factory=list)


@dataclass
class Measured:
    values: list[float]
    typed: list[Peer] = field(default_factory=list)
    tuned: list[Peer] = field(default_factory=list)
    ours: dict[int, list[Ours]] = field(default_factory=lambda: defaultdict(list))  # by engines
    loads: list[float] = field(default_factory=list)  # of the machine, after each of all these
    agreement: Agreement | None = None
    swaps: list[Swap] = field(default_factory=list)
    overhead: Overhead | None = None


def timed(command: Sequence[object], log: Path, environment: Mapping[str, str] = {}) -> float:
    """Wall seconds of a command that must succeed; what it says goes to `log`."""
    started = time.perf_counter()
    with log.open("w") as out:
        ended = subprocess.run(
            list(map(str, command)), cwd=ROOT, env=os.environ | environment, stdout=out, stderr=subprocess.STDOUT
        )
    if ended.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{log.read_text()[-2000:]}")
    return time.perf_counter() - started


def named_vllm(work: Path) -> Path:
    """A directory for PYTHONPATH that gives vLLM's CPU build, whose distribution has another name, the name by which
    lm-eval's backend asks for its version. Nothing else of lm-eval or vLLM is touched."""
    directory = work / "vllm-by-name"
    directory.mkdir(exist_ok=True)
    try:
        version("vllm")
    except PackageNotFoundError:
        found = f"{version('vllm-cpu')}+cpu"
        metadata = directory / f"vllm-{found}.dist-info" / "METADATA"
        metadata.parent.mkdir(exist_ok=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {found}\n")
    return directory


def peer(merger: Path, work: Path, alpha: float, tuned: bool) -> Peer:
    """mergekit (`merger`) writes a checkpoint, lm-eval scores it: both tasks in one process."""
    name = f"{'tuned' if tuned else 'typed'}-{alpha:g}"
    checkpoint, results = FAMILY["target"], work / f"lm-eval-{name}"
    merge = 0.0
    shutil.rmtree(results, ignore_errors=True)
    if alpha:
        checkpoint, recipe = work / "merged", work / "pocket.yml"
        shutil.rmtree(checkpoint, ignore_errors=True)
        recipe.write_text(
            f"merge_method: task_arithmetic\nbase_model: {FAMILY['target']}\ndtype: bfloat16\n"
            f"parameters: {{normalize: false}}\nmodels:\n"
            f"  - {{model: {FAMILY['plus']}, parameters: {{weight: {alpha}}}}}\n"
            f"  - {{model: {FAMILY['minus']}, parameters: {{weight: {-alpha}}}}}\n"
        )
        merge = timed([merger, recipe, checkpoint], work / f"mergekit-{name}.log")
    model = f"pretrained={checkpoint},max_model_len={MAX_MODEL_LEN},enforce_eager=True"
    if tuned:
        model += f",kv_cache_memory_bytes={int(KV_CACHE_GIB * 2**30)}"
    command = [
        Path(sys.executable).with_name("lm_eval"), "run", "--model", "vllm", "--model_args", model, "--tasks",
        ",".join(TASKS), "--include_path", POCKET / "tasks", "--apply_chat_template", "--batch_size", "auto",
        "--log_samples", "--output_path", results,
    ]  # fmt: skip
    environment = (TUNED if tuned else TYPED) | {"PYTHONPATH": str(named_vllm(work))}
    return Peer(alpha, merge, timed(command, work / f"lm-eval-{name}.log", environment), results)


def ours(work: Path, values: Sequence[float], engines: int) -> Ours:
    run, cache = work / f"engines-{engines}", work / "cache"
    for directory in (run, cache):
        shutil.rmtree(directory, ignore_errors=True)
    command = [
        sys.executable, "-m", "rvdist.launch", f"target={FAMILY['target']}", f"vector.plus={FAMILY['plus']}",
        f"vector.minus={FAMILY['minus']}", "stages=[evaluate,report]",
        f"sweep.alphas=[{','.join(f'{value:g}' for value in values)}]", f"benchmarks.tasks=[{','.join(TASKS)}]",
        f"engine.count={engines}", f"engine.max_model_len={MAX_MODEL_LEN}", f"engine.kv_cache_gib={KV_CACHE_GIB}",
        f"engine.slice_size={SLICE_SIZE}", "cache.samples=false", f"cache.dir={cache}", f"hydra.run.dir={run}",
    ]  # fmt: skip
    wall = timed(command, work / f"engines-{engines}.log")
    return Ours(wall, json.loads((run / "timing.json").read_text()))


def agreement(run: Path, peers: Sequence[Peer]) -> Agreement:
    """Ends the benchmark unless both were asked the same: documents and prompts, of every task at every α."""
    found: dict[tuple[float | None, str], dict[tuple[str, str], float]] = defaultdict(dict)
    for file in (run / "samples").glob("*.jsonl"):
        for record in read_records(file):
            found[record.alpha, record.task][record.doc, record.prompt_text] = next(iter(record.metrics.values()))
    result = Agreement(0, 0, 0.0)
    for one in peers:
        for task in TASKS:
            (file,) = one.results.glob(f"*/samples_{task}_*.jsonl")
            theirs = {}
            for sample in map(json.loads, file.read_text().splitlines()):
                prompt = sample["arguments"]["gen_args_0"]["arg_0"]
                theirs[sample["doc_hash"], prompt] = float(sample[sample["metrics"][0]])
            own = found[one.alpha, task]
            if own.keys() != theirs.keys():
                raise SystemExit(f"{task} at α = {one.alpha:g}: lm-eval and ours were not asked the same")
            result.samples += len(own)
            result.different += sum(own[key] != theirs[key] for key in own)
            means = [sum(scores.values()) / len(scores) for scores in (own, theirs)]
            result.largest = max(result.largest, abs(means[0] - means[1]))
    return result


def in_a_process(log: Path, function: Callable[..., Any], *arguments: object) -> Any:
    """Engines keep their process; what they need of its environment is set before it begins."""
    os.environ.update(ONE_THREAD)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _talk_to, (log,)) as pool:
        return pool.submit(function, *arguments).result()


def _talk_to(log: Path) -> None:
    opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for standard in (1, 2):
        os.dup2(opened, standard)


def large_family(work: Path) -> dict[str, Path]:
    """Random checkpoints of a hundred million parameters, with the pocket family's tokenizer."""
    directory = work / "large"
    family = {name: directory / name for name in FAMILY}
    if not directory.exists():
        config = json.loads((FAMILY["target"] / "config.json").read_text()) | LARGE_CONFIG
        for seed, path in enumerate(family.values()):
            shapes.write_checkpoint(path, LARGE, 1, seed, config)
            for file in FAMILY["target"].glob("*tokenizer*"):
                shutil.copy(file, path)
    return family


def swap(family: Mapping[str, Path], rounds: int) -> Swap:
    """An engine from nothing, then swaps and `cat` in turn. Run in a process of its own."""
    from rvdist.evaluate.fleet.arguments import EngineSettings
    from rvdist.evaluate.fleet.engine import Engine

    settings = EngineSettings(max_model_len=MAX_MODEL_LEN, kv_cache_gib=KV_CACHE_GIB)
    engine = Engine(str(family["target"]), settings)
    found = Swap(0, seconds_since_process_start(), 0.0, [], [])
    files = [str(file) for path in family.values() for file in path.glob("*.safetensors")]
    vector = Vector(str(family["plus"]), str(family["minus"]))
    for round in range(rounds + 1):
        started = time.perf_counter()
        subprocess.run(["sh", "-c", 'cat "$@" >/dev/null', "cat", *files], check=True)
        read = time.perf_counter()
        engine.swap(WeightPoint(str(family["target"]), (Term(0.5 + round, vector),)))
        if round:
            found.cat.append(read - started)
            found.later.append(time.perf_counter() - read)
        else:
            found.first = time.perf_counter() - read
    found.parameters = sum(os.path.getsize(file) for file in files) // len(family) // 2
    return found


def overhead(name: Path, rounds: int) -> Overhead:
    """Both tasks at the target, by our path and by lm-eval's vLLM backend in turn, each with an engine that is up.
    Building requests, answering and scoring count, loading tasks does not. Run in a process of its own."""
    from rvdist.evaluate.fleet.arguments import EngineSettings
    from rvdist.evaluate.fleet.engine import Engine
    from rvdist.evaluate.fleet.schedule import cut
    from rvdist.evaluate.suite import Suite

    target = str(FAMILY["target"])
    settings = EngineSettings(max_model_len=MAX_MODEL_LEN, kv_cache_gib=KV_CACHE_GIB)
    engine, suite = Engine(target, settings), Suite.load(TASKS)
    sys.path.insert(0, str(name))
    from lm_eval.evaluator import evaluate
    from lm_eval.models.vllm_causallms import VLLM
    from transformers import AutoTokenizer

    class Timed(VLLM):  # type: ignore[misc]
        """lm-eval's own backend; only counts the seconds that it takes to answer."""

        seconds = 0.0

        def generate_until(self, *arguments: Any, **named: Any) -> Any:
            return self._count(super().generate_until, *arguments, **named)

        def loglikelihood(self, *arguments: Any, **named: Any) -> Any:
            return self._count(super().loglikelihood, *arguments, **named)

        def _count(self, method: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - began

    backend = Timed(
        pretrained=target,
        batch_size="auto",
        max_model_len=MAX_MODEL_LEN,
        kv_cache_memory_bytes=int(KV_CACHE_GIB * 2**30),
        enforce_eager=True,
        enable_prefix_caching=False,  # ours does without it too; from one round to the next it would answer for nothing
    )
    tokenizer, point = AutoTokenizer.from_pretrained(target), WeightPoint(target)
    theirs = Suite.load(TASKS).loaded
    found = Overhead(sum(map(len, suite.requests(tokenizer).values())))

    def by_ours() -> float:
        requests = suite.requests(tokenizer)
        answers: dict[str, list[Any]] = {task: [] for task in requests}
        seconds = 0.0
        for piece in cut(point, requests, SLICE_SIZE):
            asked: list[Any] = piece.take(requests)
            sent = time.perf_counter()
            found = list(engine.answer(asked))
            seconds += time.perf_counter() - sent
            for part in piece.parts:
                answers[part.task] += found[: part.end - part.begin]
                del found[: part.end - part.begin]
        suite.score(Arm("baseline", point, alpha=0.0), "", tokenizer, requests, answers, seed=0)
        return seconds

    def by_theirs() -> float:
        before = backend.seconds
        evaluate(lm=backend, task_dict=theirs, bootstrap_iters=0, apply_chat_template=True, fewshot_as_multiturn=True)
        return backend.seconds - before

    def once(evaluation: Callable[[], float]) -> Round:
        wall, cpu = time.perf_counter(), time.process_time()
        seconds = evaluation()
        return Round(time.perf_counter() - wall, seconds, time.process_time() - cpu)

    both = [(by_ours, found.ours), (by_theirs, found.theirs)]
    for evaluation, _ in both:  # the first of each warms up
        evaluation()
    for _ in range(rounds):
        for evaluation, kept in both:
            kept.append(once(evaluation))
        both.reverse()
    return found


def measure(merger: Path, work: Path, values: list[float], rounds: int) -> Measured:
    """Everything in turn: in each round its share of the values by the others' tools, and all of them by ours."""
    found = Measured(values)
    for round in range(rounds):
        share = values[round::rounds]
        typed = max(share, key=abs)  # never 0, which needs no merge
        for alpha, tuned in [*((alpha, True) for alpha in share), (typed, False)]:
            one = peer(merger, work, alpha, tuned)
            (found.tuned if tuned else found.typed).append(one)
            found.loads.append(os.getloadavg()[0])
            how = "tuned" if tuned else "as typed"
            print(f"α = {alpha:g}: mergekit {one.merge:.1f} s, lm-eval, {how}, {one.evaluate:.1f} s", flush=True)
        for engines in (1, 2):
            found.ours[engines].append(ours(work, values, engines))
            found.loads.append(os.getloadavg()[0])
            print(f"round {round + 1}: ours, engines: {engines}: {found.ours[engines][-1].wall:.1f} s", flush=True)
    found.agreement = agreement(work / "engines-1", found.tuned)
    for family in (FAMILY, large_family(work)):
        found.swaps.append(in_a_process(work / "swap.log", swap, family, 9))
    found.overhead = in_a_process(work / "overhead.log", overhead, named_vllm(work), max(5, rounds))
    return found


def report(found: Measured) -> str:
    """The README's section."""
    values, merges = len(found.values), sum(value != 0 for value in found.values)
    typed = values * mean(p.evaluate for p in found.typed) + merges * mean(p.merge for p in found.typed)
    others = [
        ("mergekit, lm-eval, tuned", sum(p.wall for p in found.tuned), found.tuned),
        (f"the same, as typed, from {len(found.typed)} of the values", typed, found.typed),
    ]
    walls = {engines: [run.wall for run in runs] for engines, runs in found.ours.items()}
    one, two = (median(walls[engines]) for engines in (1, 2))
    requests = found.ours[1][0].timing["fleet"]["requests"]
    alphas = ", ".join(f"{value:g}" for value in found.values)
    lines = [
        f"α = {alphas}; {', '.join(TASKS)}: {requests:,} requests; {len(found.ours[1])} rounds in turn, medians; "
        f"{os.cpu_count()} cores, {platform.machine()}, no GPU, a load of {spread(found.loads)}.",
        "",
        "| what | whole, s (min to max) | × one engine | × two engines | requests/s | of one value: mergekit, s | "
        "lm-eval, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, wall, peers in others:
        cells = [f"{wall:.0f}", f"{wall / one:.1f}", f"{wall / two:.1f}", f"{requests / wall:.0f}"]
        cells += [spread([p.merge for p in peers if p.alpha]), spread([p.evaluate for p in peers])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name, wall in (("rvdist, one engine", walls[1]), ("rvdist, two engines", walls[2])):
        middle = median(wall)
        cells = [spread(wall), f"{middle / one:.2f}", f"{middle / two:.2f}", f"{requests / middle:.0f}", "", ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    assert found.agreement
    lines += [
        "",
        f"The same {found.agreement.samples:,} documents and prompts; of their scores {found.agreement.different} "
        f"differ, of a task's mean at one α at most {100 * found.agreement.largest:.1f} points.",
        "",
        *_phases(found.ours),
        "",
        *_swaps(found.swaps),
        "",
        *_overhead(found.overhead),
    ]
    return "\n".join(lines)


def _phases(runs: Mapping[int, Sequence[Ours]]) -> list[str]:
    """Seconds by phase. They overlap; those of several engines are summed over them."""
    lines = ["| phase, s (min to max) | one engine | two engines |", "|---|---|---|"]
    for phase in runs[1][0].timing["phases"]:
        cells = (spread([run.timing["phases"].get(phase, 0.0) for run in runs[engines]]) for engines in (1, 2))
        lines.append(f"| {phase} | {' | '.join(cells)} |")
    rates, utilisation, swaps = [], [], []
    for engines in (1, 2):
        timings = [run.timing for run in runs[engines]]
        rates.append(median(t["fleet"]["requests"] / t["phases"]["generate"] for t in timings))
        utilisation.append(median(t["fleet"]["utilisation"] for t in timings))
        swaps.append(median(t["phases"]["swap"] / max(t["fleet"]["swaps"], 1) for t in timings))
    lines += [
        f"| requests/s in generation, an engine | {rates[0]:.0f} | {rates[1]:.0f} |",
        f"| one swap, ms | {1000 * swaps[0]:.0f} | {1000 * swaps[1]:.0f} |",
        f"| utilisation | {utilisation[0]:.0%} | {utilisation[1]:.0%} |",
    ]
    return lines


def _swaps(swaps: Sequence[Swap]) -> list[str]:
    lines = [
        "| parameters | from nothing to an engine, s | first swap, with the probe, s | later, s (min to max) | of a "
        "start | `cat` target and donors, s | swap / cat |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in swaps:
        later, cat = median(one.later), median(one.cat)
        lines.append(
            f"| {one.parameters / 1e6:.1f} M | {one.start:.1f} | {one.first:.2f} | {later:.3f} ({min(one.later):.3f} "
            f"to {max(one.later):.3f}) | {later / one.start:.1%} | {cat:.3f} | {later / cat:.1f} |"
        )
    return lines


def _overhead(found: Overhead | None) -> list[str]:
    assert found
    lines = [
        "| one engine that is up, one point | whole, s (min to max) | in the engine, s | around it, s | CPU, s (min to "
        "max) | requests/s |",
        "|---|---|---|---|---|---|",
    ]
    wall, cpu = {}, {}
    for name, rounds in (("rvdist", found.ours), ("lm-eval's vLLM backend", found.theirs)):
        wall[name], cpu[name] = median(r.wall for r in rounds), median(r.cpu for r in rounds)
        cells = [spread([r.wall for r in rounds]), spread([r.engine for r in rounds])]
        cells += [f"{median(r.wall - r.engine for r in rounds):.2f}", spread([r.cpu for r in rounds])]
        lines.append(f"| {name} | {' | '.join(cells)} | {found.requests / wall[name]:.0f} |")
    ratios = [ours / theirs for ours, theirs in (wall.values(), cpu.values())]
    return [
        *lines,
        "",
        f"{found.requests:,} requests, {len(found.ours)} rounds in turn: ours takes {ratios[0]:.2f} × as long, and "
        f"{ratios[1]:.2f} × the CPU.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=float, nargs="+", default=VALUES, metavar="α", help="0 must be among them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "rvdist-benchmark")
    arguments = parser.parse_args()
    values = sorted(set(arguments.values))
    if 0 not in values or len(values) < 2 * arguments.rounds:
        parser.error("--values: give 0, the baseline, among them, and at least two for each round")
    work = arguments.work / "fleet"
    work.mkdir(parents=True, exist_ok=True)
    text = report(measure(mergekit(arguments.work), work, values, arguments.rounds))
    print(text)
    write_table("fleet.py", text.splitlines())


if __name__ == "__main__":
    main()
