"""The acceptance of a card: eight checks, each one command of at most ten minutes, one JSON line a check.

    python benchmarks/gpu_kit.py               all of them, in order; stops at the first red one
    python benchmarks/gpu_kit.py 3             one of them, or several
    python benchmarks/gpu_kit.py --device cpu  the same code at tiny sizes, without a card

1 bytes    every dtype, merge method and awkward bit pattern: the card's digests are the CPU's; rates; the sanitizer
2 copies   a point into parameters on the card as a swap does it: by ordinary memory, page-locked, with 2 to 16 readers
3 swaps    tiny families (tied, untied, Llama, mixture, MLA): swapped equals fresh, in all modes and both runners
4 lm-eval  our texts and log-probabilities are those of lm-eval's own vLLM backend
5 shapes   a model of 1.5B and one of 7B with random weights: start, probe, swap, requests a second
6 faults   engines that are killed, stopped, find no memory, and share a card: every request answered, and the same
7 demo     `python -m rvdist.launch experiment=demo`
8 tests    those marked `gpu`

1 and 2 need torch, numpy, numba, xxhash and safetensors alone, and no installation; the others what `.[gpu,dev]` has.
Exit status: 0, 1 where a check is red, 2 without a card. A line has `check`, `name`, `ok`, `seconds`, `device` and what
was found; of a red one `why`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT / "tests/evaluate")]

MOST = 570.0  # seconds of a check
SHARE = 0.03  # of a card, for each engine of a tiny model
Facts = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a check runs, on what, and until when."""

    work: Path
    device: str
    end: float

    @property
    def on_card(self) -> bool:
        return self.device == "cuda"

    def is_late(self, seconds: float) -> bool:
        """Whether so many more would be too many."""
        return time.monotonic() + seconds > self.end


class Red(Exception):
    """A check failed: why, in a sentence."""


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Red(otherwise)


# 1 and 2: torch, numpy, numba, xxhash, safetensors


def check_bytes(place: Place) -> Facts:
    import gpu
    import torch

    torch.set_num_threads(1)
    found: Facts = {"compared": 0}
    for stored, written in product((torch.bfloat16, torch.float16, torch.float32), repeat=2):
        paths = write_patterns(place.work / f"{stored}-{written}".replace("torch.", ""), stored)
        for point in points_of_all_methods(paths):
            digests = [
                gpu.digests(gpu.reader_of([point], where, written if written != stored else None))
                for where in ("cpu", place.device)
            ]
            require(digests[0] == digests[1], f"{point.method.name}, {stored} to {written}: {digests}")
            found["compared"] += 1
        shutil.rmtree(Path(paths["target"]).parent)
    (place.work / "rates").mkdir()
    paths = gpu.write_checkpoints(place.work / "rates", int((4.0 if place.on_card else 0.05) * 2**30))
    elements = sum(spec.numel for spec in gpu.reader_of(gpu.points(paths)[:1], "cpu").base.tensors.values())
    for where in dict.fromkeys(("cpu", place.device)):
        reader = gpu.reader_of(gpu.points(paths)[:1], where)
        seconds = gpu.wall(lambda reader=reader: gpu.drain(reader), 3)
        found[f"gb_per_second_{where}"] = round(elements * (gpu.IN + gpu.OUT) / seconds / 1e9, 2)
    if place.on_card:
        found |= {what.replace(" ", "_"): round(rate, 1) for what, rate in gpu.copies(256 << 20, 3).items()}
    return found | sanitize(place)


def write_patterns(directory: Path, dtype: Any) -> dict[str, str]:
    """Siblings whose elements are all bit patterns of 16 bits, in another order each, or many of 32: infinities, NaNs
    with every payload, subnormal numbers, both zeros."""
    import torch

    from rvdist.weights.checkpoint.header import build_header
    from rvdist.weights.checkpoint.stream import write_exactly

    stored = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]
    paths = {}
    for seed, name in enumerate(("target", "plus", "minus")):
        generator = torch.Generator().manual_seed(seed)
        patterns = torch.randperm(1 << 16, generator=generator).to(torch.int32)
        if dtype == torch.float32:
            low = torch.randint(0, 1 << 16, patterns.shape, generator=generator, dtype=torch.int32)
            weights = (patterns << 16 | low).view(torch.float32)
        else:
            weights = patterns.to(torch.int16).view(dtype)
        shapes = {"model.layers.0.mlp.weight": (256, 256), "model.layers.1.norm.weight": (77,)}
        header, specs = build_header([(n, stored, s) for n, s in shapes.items()], "model.safetensors", {"format": "pt"})
        (directory / name).mkdir(parents=True)
        (directory / name / "config.json").write_text("{}")
        with open(directory / name / "model.safetensors", "wb") as file:
            file.write(header)
            file.flush()
            for spec in specs:
                write_exactly(file.fileno(), spec.offset, weights[: spec.numel].clone())
        paths[name] = str(directory / name)
    return paths | {name: write_adapter(directory / name, seed) for seed, name in enumerate(("first", "second"))}


def write_adapter(directory: Path, seed: int) -> str:
    """A LoRA adapter of the siblings' matrix."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    shapes = {"lora_A": (4, 256), "lora_B": (256, 4)}
    tensors = {
        f"base_model.model.model.layers.0.mlp.{name}.weight": torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["mlp"], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(said))
    return str(directory)


def points_of_all_methods(paths: dict[str, str]) -> Iterator[Any]:
    from rvdist.core.method import FACTS, MethodSpec
    from rvdist.core.point import Term, Vector, WeightPoint

    one, other = Vector(paths["plus"], paths["minus"]), Vector(paths["minus"], paths["plus"])
    for facts in FACTS:
        if facts.one_vector:
            terms: tuple[Term, ...] = (Term(0.4, Vector(paths["plus"], paths["target"])),)
        elif facts.low_rank:
            terms = (Term(0.7, Vector(paths["first"])), Term(-1.3, Vector(paths["second"])))
        else:
            terms = (Term(0.7, one), Term(-1.3, other))
        density = 0.5 if "density" in facts.parameters else 1.0
        yield WeightPoint(paths["target"], terms, MethodSpec(facts.name, density, 7).without_unused())


def sanitize(place: Place) -> Facts:
    """What NVIDIA's memory checker says of one merge, where it is installed."""
    checker = shutil.which("compute-sanitizer")
    if not place.on_card or checker is None or place.is_late(200):
        return {"sanitizer": "not run"}
    code = "import sys; sys.path[:0] = sys.argv[1:3]; import gpu_kit; gpu_kit.merge_once(sys.argv[3])"
    arguments = [str(ROOT), str(ROOT / "benchmarks"), str(place.work / "sanitized")]
    command = [checker, "--error-exitcode=9", sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    require(done.returncode == 0, f"compute-sanitizer: {(done.stdout + done.stderr)[-800:]}")
    return {"sanitizer": "clean"}


def merge_once(directory: str) -> None:
    import gpu
    import torch

    for point in points_of_all_methods(write_patterns(Path(directory), torch.bfloat16)):
        gpu.drain(gpu.reader_of([point], "cuda"))


def check_copies(place: Place) -> Facts:
    import gpu
    import torch

    from rvdist.core.point import Term, Vector, WeightPoint
    from rvdist.evaluate.fleet.bounce import BounceBuffers, Straight
    from rvdist.evaluate.fleet.deferred import defer_tensors
    from rvdist.evaluate.fleet.readers import Readers

    torch.set_num_threads(1)
    (place.work / "copies").mkdir()
    paths = gpu.write_checkpoints(place.work / "copies", int((6.0 if place.on_card else 0.03) * 2**30))
    point = WeightPoint(paths["target"], (Term(0.7, Vector(paths["plus"], paths["minus"])),))
    with_spec = gpu.reader_of([point], "cpu").base.tensors
    parameters = {
        name: torch.nn.Parameter(torch.zeros(spec.shape, dtype=torch.bfloat16, device=place.device), False)
        for name, spec in with_spec.items()
    }
    nbytes = sum(2 * spec.numel for spec in with_spec.values())

    def wait() -> None:
        if place.on_card:
            torch.cuda.synchronize()

    bounce = BounceBuffers(place.on_card)

    def swap(buffers: BounceBuffers | None, readers: int, arithmetic: str = "cpu") -> None:
        with closing(Readers(point, readers, device=arithmetic)) as reader:
            for name, tensor in defer_tensors(reader, buffers):
                parameters[name].copy_(tensor)
            bounce.wait()

    ways: dict[str, Callable[[], object]] = {"pageable": partial(swap, None, 1), "pinned": partial(swap, bounce, 1)}
    ways |= {f"readers_{count}": partial(swap, bounce, count) for count in (2, 4, 8, 16)}
    ways["arithmetic_there"] = partial(swap, Straight(), 1, place.device)
    expected: dict[str, Any] = {}
    found: Facts = {"gb": round(nbytes / 1e9, 2)}
    for way, act in ways.items():
        for parameter in parameters.values():
            parameter.data.zero_()
        seconds = []
        for _ in range(3):
            begun = time.perf_counter()
            act()
            wait()
            seconds.append(time.perf_counter() - begun)
        found[f"{way}_gb_per_second"] = round(nbytes / sorted(seconds)[1] / 1e9, 2)
        there = {name: parameter.detach().cpu().view(torch.int16) for name, parameter in parameters.items()}
        expected = expected or there
        wrong = [name for name, bits in there.items() if not torch.equal(bits, expected[name])]
        require(not wrong, f"{way}: other bits in {wrong[:3]}")
    return found


# 3 to 8: what `.[gpu,dev]` has


def modes(place: Place) -> dict[str, tuple[dict[str, Any], dict[str, str]]]:
    """How engines compute: settings, and variables."""
    from rvdist.evaluate.fleet.arguments import GRAPHS, further_arguments

    graphs = further_arguments({"compilation_config": GRAPHS})
    if not place.on_card:
        return {"eager": ({"enforce_eager": True}, {})}
    found = {}
    for name, settings in (
        ("eager", {"enforce_eager": True}),
        ("graphs", {"enforce_eager": False, "args": graphs}),
        ("compiled", {"enforce_eager": False}),
    ):
        for runner in ("1", "0"):
            found[f"{name}, runner {2 if runner == '1' else 1}"] = (settings, {"VLLM_USE_V2_MODEL_RUNNER": runner})
    return found


def check_swaps(place: Place) -> Facts:
    """A process for each mode: vLLM is configured through the environment."""
    kinds = ["tied", "untied", "llama", "moe", "mla"] if place.on_card else ["tied"]
    found: Facts = {"left_out": []}
    for mode, (settings, variables) in modes(place).items():
        if place.is_late(100):
            found["left_out"].append(mode)
            continue
        asked = json.dumps([kinds, settings, str(place.work / mode.replace(", ", "-").replace(" ", "-"))])
        code = f"import sys; sys.path[:0] = {sys.path[:4]!r}; import gpu_kit; gpu_kit.swap_families({asked!r})"
        done = run([sys.executable, "-c", code], place, variables)
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"kind"')]
        require(done.returncode == 0, f"{mode}: {done.stderr[-800:]}")
        wrong = [line for line in map(json.loads, lines) if not line["equal"]]
        require(not wrong and len(lines) == len(kinds), f"{mode}: a swap is no fresh engine: {wrong}")
        found[mode] = {one["kind"]: one["swap_seconds"] for one in map(json.loads, lines)}
    return found


def swap_families(asked: str) -> None:
    """Prints a line a family: whether an engine that was swapped to α = 0.5 answers as one started there."""
    import families

    kinds, settings, work = json.loads(asked)
    with_settings = replace(families.SETTINGS, gpu_memory_utilization=SHARE, **settings)
    for kind in kinds:
        family = families.make_family(kind, Path(work) / kind)
        fresh = families.answers(families.start(family.write(0.5, Path(work) / kind / "merged"), with_settings))
        engine = families.start(family.point(0.0), with_settings)
        begun = time.perf_counter()
        engine.swap(family.point(0.5))
        seconds = time.perf_counter() - begun
        equal = families.answers(engine) == fresh
        print(json.dumps({"kind": kind, "equal": equal, "swap_seconds": round(seconds, 3)}), flush=True)


def check_lm_eval(place: Place) -> Facts:
    words = ["tests/evaluate/fleet/test_engine.py", "-k", "are_lm_evals"]
    return run_tests(place, words)


def check_shapes(place: Place) -> Facts:
    """One process a shape and mode; the last of its lines has what was found."""
    shapes = ["1.5B", "7B"] if place.on_card else ["tiny"]
    found: Facts = {"left_out": []}
    for shape in shapes:
        for mode in ("graphs", "graphs, shared prefixes", "eager") if place.on_card else ("eager, shared prefixes",):
            if place.is_late(150):
                found["left_out"].append(f"{shape}, {mode}")
                continue
            asked = json.dumps([shape, mode, str(place.work / shape)])
            code = f"import sys; sys.path[:0] = {sys.path[:4]!r}; import gpu_kit; gpu_kit.time_shape({asked!r})"
            done = run([sys.executable, "-c", code], place, {})
            require(done.returncode == 0, f"{shape}, {mode}: {done.stderr[-800:]}")
            found[f"{shape}, {mode}"] = json.loads(done.stdout.splitlines()[-1])
    return found


def time_shape(asked: str) -> None:
    """Prints one line: seconds of a start, a first swap (with the probe) and a second one, and requests a second by how
    many are asked at once, each after the same examples."""
    import families
    import shapes

    from rvdist.core.point import Term, Vector, WeightPoint
    from rvdist.evaluate.fleet.arguments import GRAPHS, EngineSettings, further_arguments
    from rvdist.evaluate.request import Generate

    shape, mode, work = json.loads(asked)
    tiny = shape == "tiny"
    made = {
        "1.5B": lambda: (shapes.QWEN_1_5B, (1536, 28, 8960, 12, 2)),
        "7B": lambda: (shapes.qwen2(3584, 28, 18944, 512, 152064), (3584, 28, 18944, 28, 4)),
        "tiny": lambda: (shapes.qwen2(128, 2, 256, 64, 512), (128, 2, 256, 4, 2)),
    }[shape]()
    tensors, (hidden, layers, intermediate, heads, kv) = made
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": hidden,
        "num_hidden_layers": layers, "intermediate_size": intermediate, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": tensors["model.embed_tokens.weight"][0],
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True,
        "hidden_act": "silu", "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    paths = {}
    for seed, name in enumerate(("target", "plus", "minus")):
        paths[name] = Path(work) / name
        if not paths[name].exists():
            shapes.write_checkpoint(paths[name], tensors, 1, seed, config)
            families._tokenizer().save_pretrained(paths[name])
    computed, _, shares = mode.partition(", ")
    graphs = further_arguments({"compilation_config": GRAPHS}) if computed == "graphs" else "{}"
    settings = EngineSettings(
        max_model_len=256 if tiny else 2048,
        kv_cache_gib=0.0625 if tiny else 8.0,
        enforce_eager=computed == "eager",
        prefix_caching=bool(shares),
        args=graphs,
        max_num_seqs=16 if tiny else None,
    )
    found: Facts = {}
    begun = time.perf_counter()
    engine = families.start(WeightPoint(str(paths["target"])), settings)
    found["start_seconds"] = round(time.perf_counter() - begun, 2)
    vector = Vector(str(paths["plus"]), str(paths["minus"]))
    for what, alpha in (("first_swap_seconds", 0.5), ("swap_seconds", 1.0)):
        begun = time.perf_counter()
        engine.swap(WeightPoint(str(paths["target"]), (Term(alpha, vector),)))
        found[what] = round(time.perf_counter() - begun, 2)
    for size in (8, 16) if tiny else (256, 1024):
        examples = "".join(f"Q: {k}+{k}=?\nA: {2 * k}\n" for k in range(8 if tiny else 64))
        requests = [Generate(f"{examples}Q: {k}+{k}=?\nA: ", 16 if tiny else 128) for k in range(size)]
        begun = time.perf_counter()
        tokens = sum(one.tokens for one in engine.answer(requests))
        seconds = time.perf_counter() - begun
        found[f"requests_per_second_{size}"] = round(size / seconds, 1)
        found[f"tokens_per_second_{size}"] = round(tokens / seconds, 1)
    found["probe"], found["resolved"] = engine.info()["probe"], engine.info()["resolved"]
    print(json.dumps(found), flush=True)


def check_faults(place: Place) -> Facts:
    """On a Ray of our own: a fleet that nothing disturbs, then one of whose engines each of these happens to."""
    import signal

    from rvdist.core import cluster
    from rvdist.core.point import Term, Vector, WeightPoint
    from rvdist.evaluate.fleet.arguments import EngineSettings
    from rvdist.evaluate.fleet.fleet import Fleet
    from rvdist.evaluate.fleet.schedule import cut
    from rvdist.evaluate.request import Generate

    pocket = ROOT / "rvdist/pocket"
    target, vector = WeightPoint(str(pocket / "target")), Vector(str(pocket / "grpo"), str(pocket / "sft"))
    requests = {"sums": [Generate(f"{k} + {k + 7} =", 24) for k in range(64 if place.on_card else 16)]}
    points = [target, WeightPoint(target.base, (Term(1.0, vector),))]
    slices = [piece for point in points for piece in cut(point, requests, 8)]
    settings = EngineSettings(
        max_model_len=256, kv_cache_gib=0.0625, gpu_memory_utilization=SHARE, enforce_eager=True, max_num_seqs=16
    )
    need = {"gpus": 0.25, "cpus": 0.0} if place.on_card else {"cpus": 0.4}

    def engines() -> list[int]:
        found = []
        for process in filter(str.isdigit, os.listdir("/proc")):
            try:
                if Path(f"/proc/{process}/cmdline").read_text().startswith("ray::EngineActor"):
                    found.append(int(process))
            except OSError:
                continue
        return found

    def answer(count: int, signals: list[int], timeout: float = 60.0) -> dict[Any, Any]:
        fleet, left = Fleet(target.base, settings, count, timeout=timeout, **need), list(signals)

        def disturb(came: Any) -> None:
            if left and (there := engines()):
                os.kill(there[0], left.pop())

        try:
            answered = fleet.answer(slices, requests, disturb)
        finally:
            fleet.stop()
        require(not left, "nothing was disturbed")
        return {piece: found.answers for piece, found in answered.items()}

    cluster.connect("local")
    try:
        expected = answer(1, [])
        found: Facts = {"requests": sum(map(len, expected.values()))}
        for name, number in (("SIGKILL", signal.SIGKILL), ("SIGSTOP", signal.SIGSTOP)):
            require(answer(2, [number], 20.0) == expected, f"after {name} answers are others")
            found[name] = "same answers"
        if place.on_card:
            found["out of memory"] = starve(lambda: answer(1, []) == expected)
        rounds = 10 if place.on_card else 1
        for number in range(rounds):
            if place.is_late(60):
                rounds = number
                break
            require(answer(2, []) == expected, f"two engines on one card, round {number}: other answers")
        found["two engines on one card"] = f"{rounds} times the same answers"
    finally:
        cluster.disconnect()
    return found


def starve(act: Callable[[], bool]) -> str:
    """`act` while another process has nearly all of the card's memory, and gives it back after a while."""
    code = (
        "import torch, time; free, _ = torch.cuda.mem_get_info(); held = torch.empty(int(free * 0.985), "
        "dtype=torch.uint8, device='cuda'); print('held', flush=True); time.sleep(45)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    require(holder.stdout.readline() == "held\n", "the card's memory could not be taken")
    try:
        require(act(), "after a start that found no memory answers are others")
    finally:
        holder.kill()
        holder.wait()
    return "started when there was some"


def check_demo(place: Place) -> Facts:
    words = [
        "experiment=demo",
        f"hydra.run.dir={place.work}/run",
        f"output={place.work}/out",
        f"cache.dir={place.work}/c",
    ]
    if place.on_card:
        words += ["engine.gpus=0.25", "engine.count=2", f"engine.gpu_memory_utilization={SHARE / 0.25}"]
    else:
        words += ["benchmarks.limit=20", "sweep.alphas=[1]"]
    begun = time.perf_counter()
    done = run([sys.executable, "-m", "rvdist.launch", *words], place, {})
    require(done.returncode == 0, done.stderr[-800:])
    rows = json.loads((place.work / "run/summary.json").read_text())
    at = {row["arm"]: row["value"] for row in rows if row["task"] == "pocket_sums" and row["primary"]}
    require(at["alpha=1"] > at["baseline"], f"α = 1 is not better than the target: {at}")
    return {"wall": round(time.perf_counter() - begun, 1), "pocket_sums": at}


def check_tests(place: Place) -> Facts:
    return run_tests(place, ["-m", "gpu"] if place.on_card else ["-m", "gpu", "tests/weights/test_lanes.py"])


def run_tests(place: Place, words: list[str]) -> Facts:
    words = [*words, "-q", "-p", "no:cacheprovider", f"--basetemp={place.work / 'tests'}"]
    done = run([sys.executable, "-m", "pytest", *words], place, {})
    last = (done.stdout.strip().splitlines() or [""])[-1]
    require(done.returncode == 0, f"{last}: {done.stdout[-1500:]}")
    return {"tests": last.strip("= ")}


def run(command: list[str], place: Place, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A command within the time that is left."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | variables
    left = max(1.0, place.end - time.monotonic())
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        raise Red(f"{' '.join(command[:3])[:100]} … takes more than the {MOST:.0f} s of a check") from None


CHECKS: dict[int, Callable[[Place], Facts]] = dict(
    enumerate(
        (
            check_bytes, check_copies, check_swaps, check_lm_eval, check_shapes, check_faults, check_demo, check_tests,
        ),
        1,
    )
)  # fmt: skip


def device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else f"cpu ({platform.machine()})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", type=int, metavar="CHECK", help="1 to 8; all of them without one")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--work", type=Path, help="where the temporary directory is made")
    given = parser.parse_args()
    if unknown := set(given.checks) - CHECKS.keys():
        parser.error(f"there is no check {min(unknown)}")
    if given.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("torch finds no CUDA device here; --device cpu runs the same code without one", file=sys.stderr)
            return 2
    for number in given.checks or CHECKS:
        check, begun = CHECKS[number], time.monotonic()
        line: Facts = {"check": number, "name": check.__name__.removeprefix("check_"), "ok": True}
        with tempfile.TemporaryDirectory(dir=given.work) as work:
            try:
                found = check(Place(Path(work), given.device, begun + MOST))
            except Exception as error:
                line["ok"] = False
                found = {"why": str(error) if isinstance(error, Red) else f"{type(error).__name__}: {error}"}
        line |= {"seconds": round(time.monotonic() - begun, 1), "device": device_name(given.device), **found}
        print(json.dumps(line), flush=True)
        if not line["ok"]:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
