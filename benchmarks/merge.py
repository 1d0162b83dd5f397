"""The merge against its floor and against mergekit, on one machine, in one run.

    python benchmarks/merge.py [--rounds 5] [--work DIR] [--no-mergekit] [--one-file]

Makes three checkpoints of Qwen2.5-1.5B's shape (3.09 GB each, bf16) and takes in turn, round by round:
the floor (`cat` of the inputs to /dev/null, `cp -r` of the target, `sync`), ours with one and with two workers, both
also into /dev/null, and mergekit 0.1.5's task_arithmetic in an environment of its own; at the end once eight values of
α in one pass. Medians and their ratios go to benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tables import write_table

sys.path.insert(0, str(Path(__file__).parent))
import shapes

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 1536, "dtype": "bfloat16",
    "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
    "vocab_size": 151936, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
FLOOR = "floor: cat, cp -r, sync"
TWO, ONE, MERGEKIT = "rvdist, 2 workers", "rvdist, 1 worker", "mergekit 0.1.5"
TWO_NULL, ONE_NULL = "rvdist, 2 workers, into /dev/null", "rvdist, 1 worker, into /dev/null"
EIGHT = "rvdist, 2 workers, 8 values of α in one pass"


@dataclass
class Measured:
    """One run of one command: seconds, and the peak resident memory of its largest process in bytes."""

    wall: float
    cpu: float
    resident: int


def measure(command: list[str], **options: object) -> Measured:
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **options)  # type: ignore[call-overload]
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    if status:
        raise SystemExit(f"{' '.join(command)} failed: {process.stderr.read().decode()[-2000:]}")
    return Measured(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10)


def mergekit(work: Path) -> Path:
    """mergekit in an environment of its own."""
    environment = work / "mergekit-env"
    if not (environment / "bin/mergekit-yaml").exists():
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        wanted = [f"torch=={torch.__version__.split('+')[0]}", "mergekit==0.1.5"]
        subprocess.run([environment / "bin/python", "-m", "pip", "install", "--quiet", *wanted], check=True)
    return environment / "bin/mergekit-yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "rvdist-benchmark")
    parser.add_argument("--no-mergekit", action="store_true")
    parser.add_argument("--one-file", action="store_true", help="each checkpoint is a single file")
    arguments = parser.parse_args()
    work: Path = arguments.work
    data = work / ("one-file" if arguments.one_file else "sharded")
    for seed, name in enumerate(("target", "plus", "minus")):
        if not (data / name).exists():
            shapes.write_checkpoint(data / name, shapes.QWEN_1_5B, 1 if arguments.one_file else 3, seed, CONFIG)
    os.sync()

    inputs = " ".join(
        str(f) for name in ("target", "plus", "minus") for f in sorted((data / name).glob("*.safetensors"))
    )
    recipe = work / "recipe.yml"
    recipe.write_text(
        f"merge_method: task_arithmetic\nbase_model: {data}/target\ndtype: bfloat16\nparameters: {{normalize: false}}\n"
        f"models:\n  - {{model: {data}/plus, parameters: {{weight: 1.0}}}}\n"
        f"  - {{model: {data}/minus, parameters: {{weight: -1.0}}}}\n"
    )
    out = work / "out"

    def ours(workers: int, output: object = out, alpha: str = "1") -> list[str]:
        return [
            sys.executable, "-m", "rvdist.launch", f"target={data}/target", f"vector.plus={data}/plus",
            f"vector.minus={data}/minus", f"alpha={alpha}", f"output={output}", f"merge.workers={workers}",
            f"hydra.run.dir={work}/run",
        ]  # fmt: skip

    commands = {
        FLOOR: ["sh", "-c", f"cat {inputs} >/dev/null; cp -r {data}/target {out}; sync"],
        TWO: ours(2),
        ONE: ours(1),
        TWO_NULL: ours(2, "/dev/null"),
        ONE_NULL: ours(1, "/dev/null"),
    }
    if not arguments.no_mergekit:
        commands[MERGEKIT] = [str(mergekit(work)), str(recipe), str(out), "--no-copy-tokenizer"]

    runs: dict[str, list[Measured]] = {name: [] for name in (*commands, EIGHT)}
    timings: dict[str, list[dict[str, object]]] = {name: [] for name in (*commands, EIGHT)}

    def take(name: str, command: list[str]) -> None:
        subprocess.run(["sh", "-c", f"rm -rf {out}*; cat {inputs} >/dev/null"], check=True)
        os.sync()
        runs[name].append(measure(command))
        if name.startswith("rvdist"):
            timings[name].append(json.loads((work / "run/timing.json").read_text()))
        print(f"round {len(runs[name])}: {name}: {runs[name][-1].wall:.1f} s", flush=True)

    for _ in range(arguments.rounds):
        for name, command in commands.items():
            take(name, command)
    take(EIGHT, ours(2, f"{out}-{{alpha}}", "[-1,-0.5,0.25,0.5,0.75,1,1.25,1.5]"))
    subprocess.run(["sh", "-c", f"rm -rf {out}*"], check=True)
    report(runs, timings, arguments)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def report(runs: dict[str, list[Measured]], timings: dict[str, list[dict]], arguments: argparse.Namespace) -> None:
    median = {name: statistics.median(m.wall for m in measured) for name, measured in runs.items() if measured}
    merge = {n: [t["phases"]["merge"] for t in found] for n, found in timings.items() if found}
    floor = median[FLOOR]
    files = "one file" if arguments.one_file else "three shards"
    lines = [
        f"Qwen2.5-1.5B shape, {files}, bf16, three inputs of 3.09 GB; {arguments.rounds} rounds in turn (eight values "
        f"of α: one), medians; {os.cpu_count()} cores, {platform.machine()}, page cache warm.",
        "",
        "| what | whole command, s (min to max) | × floor | merge stage, s (min to max) | × floor | read, GB | "
        "written, GB | CPU s | resident | anonymous: a worker, driver |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, measured in runs.items():
        if not measured:
            continue
        row = [name, spread([m.wall for m in measured]), f"{median[name] / floor:.2f}"]
        if found := timings[name]:
            row += [spread(merge[name]), f"{statistics.median(merge[name]) / floor:.2f}"]
            row += [f"{found[0]['bytes_read'] / 1e9:.2f}", f"{found[0]['bytes_written'] / 1e9:.2f}"]
            row += [f"{statistics.median(t['cpu_seconds'] for t in found):.1f} (workers)", ""]
            peaks = [max(t["peak_anonymous_bytes"][who] for t in found) / 2**20 for who in ("worker", "driver")]
            row.append(f"{peaks[0]:.0f}, {peaks[1]:.0f} MiB")
        else:
            row += ["", "", "", "", f"{statistics.median(m.cpu for m in measured):.1f}"]
            row += [f"{max(m.resident for m in measured) / 2**30:.1f} GiB", ""]
        lines.append(f"| {' | '.join(row)} |")
    stage = {name: statistics.median(values) for name, values in merge.items()}
    lines += [
        "",
        f"One worker takes {stage[ONE] / stage[TWO]:.2f} × what two take, and "
        f"{stage[ONE_NULL] / stage[TWO_NULL]:.2f} × where nothing is written. "
        f"Eight outputs in one pass take {stage[EIGHT] / stage[TWO]:.1f} × the merge stage of one, and "
        f"{median[EIGHT] / median[TWO]:.1f} × its whole command.",
    ]
    if runs.get(MERGEKIT):
        lines[-1] += (
            f" mergekit's whole command takes {median[MERGEKIT] / median[TWO]:.1f} × ours, and "
            f"{median[MERGEKIT] / stage[TWO]:.1f} × our merge stage."
        )
    print("\n".join(lines))
    write_table(f"merge.py, {files}", lines)


if __name__ == "__main__":
    main()
