"""The merge against its floor and against mergekit, on one machine, in one run.

    python benchmarks/merge.py [--rounds 5] [--work DIR] [--no-mergekit] [--one-file]

Makes three checkpoints of Qwen2.5-1.5B's shape (3.09 GB each, bf16) and takes in turn, round by round:
the floor (`cat` of the inputs to /dev/null, `cp -r` of the target, `sync`), ours with one and with two workers, and
mergekit 0.1.5's task_arithmetic in an environment of its own. Medians and their ratios go to benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from rvdist.checkpoint.directory import INDEX
from rvdist.checkpoint.header import build_header
from rvdist.checkpoint.stream import write_exactly

HIDDEN, LAYERS, INTERMEDIATE, KEY_VALUE, VOCABULARY = 1536, 28, 8960, 256, 151936
README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- merge.py -->", "<!-- /merge.py -->"


def shapes() -> dict[str, tuple[int, ...]]:
    """Qwen2.5-1.5B, tied embeddings: 1.54 billion parameters."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for name, rows in (("q", HIDDEN), ("k", KEY_VALUE), ("v", KEY_VALUE)):
            found[f"{at}self_attn.{name}_proj.weight"] = (rows, HIDDEN)
            found[f"{at}self_attn.{name}_proj.bias"] = (rows,)
        found[f"{at}self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        found[f"{at}mlp.gate_proj.weight"] = found[f"{at}mlp.up_proj.weight"] = (INTERMEDIATE, HIDDEN)
        found[f"{at}mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        found[f"{at}input_layernorm.weight"] = found[f"{at}post_attention_layernorm.weight"] = (HIDDEN,)
    return found | {"model.norm.weight": (HIDDEN,)}


def write_checkpoint(path: Path, noise: float, seed: int, shards: int) -> None:
    """Siblings: one block of random weights plus `noise`, repeated; only how many bytes there are matters here."""
    path.mkdir(parents=True)
    block = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02
    block = (block + noise * torch.randn(block.shape, generator=torch.Generator().manual_seed(seed))).bfloat16()
    names = list(shapes().items())
    share = sum(torch.Size(s).numel() for _, s in names) / shards
    files: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    count = 0
    for name, shape in names:
        if count >= share * len(files):
            files.append([])
        files[-1].append((name, "BF16", shape))
        count += torch.Size(shape).numel()
    weight_map = {}
    for number, tensors in enumerate(files, 1):
        file = "model.safetensors" if shards == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        header, placed = build_header(tensors, file, {"format": "pt"})
        with open(path / file, "wb") as opened:
            opened.write(header)
            opened.flush()
            for spec in placed:
                weight_map[spec.name] = file
                for begin in range(0, spec.numel, block.numel()):
                    piece = block[: min(block.numel(), spec.numel - begin)]
                    write_exactly(opened.fileno(), spec.offset + 2 * begin, piece)
    if shards > 1:
        (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": HIDDEN, "dtype": "bfloat16",
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))


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
            write_checkpoint(data / name, 0.002 * (seed > 0), seed, 1 if arguments.one_file else 3)
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

    def ours(workers: int) -> list[str]:
        return [
            sys.executable, "-m", "rvdist.launch", f"target={data}/target", f"vector.plus={data}/plus",
            f"vector.minus={data}/minus", "alpha=1", f"output={out}", f"merge.workers={workers}",
            f"hydra.run.dir={work}/run",
        ]  # fmt: skip

    commands = {
        "floor: cat, cp -r, sync": ["sh", "-c", f"cat {inputs} >/dev/null; cp -r {data}/target {out}; sync"],
        "rvdist, 2 workers": ours(2),
        "rvdist, 1 worker": ours(1),
    }
    if not arguments.no_mergekit:
        commands["mergekit 0.1.5"] = [str(mergekit(work)), str(recipe), str(out), "--no-copy-tokenizer"]

    runs: dict[str, list[Measured]] = {name: [] for name in commands}
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for number in range(arguments.rounds):
        for name, command in commands.items():
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            runs[name].append(measure(command))
            if name.startswith("rvdist"):
                timing = json.loads((work / "run/timing.json").read_text())
                stages[name].append(
                    {
                        "merge": timing["phases"]["merge"],
                        "cpu": timing["cpu_seconds"],
                        "anonymous": timing["peak_anonymous_bytes"]["worker"],
                        "read": timing["bytes_read"],
                        "written": timing["bytes_written"],
                    }
                )
            print(f"round {number + 1}: {name}: {runs[name][-1].wall:.1f} s", flush=True)
    shutil.rmtree(out, ignore_errors=True)
    report(runs, stages, arguments)


def report(
    runs: dict[str, list[Measured]], stages: dict[str, list[dict[str, float]]], arguments: argparse.Namespace
) -> None:
    floor = statistics.median(m.wall for m in runs["floor: cat, cp -r, sync"])
    lines = [
        f"Qwen2.5-1.5B shape, {'one file' if arguments.one_file else 'three shards'}, bf16, three inputs of 3.09 GB; "
        f"{arguments.rounds} rounds in turn, medians; {os.cpu_count()} cores, {platform.machine()}, page cache warm.",
        "",
        "| what | whole command, s (min to max) | × floor | merge stage, s (min to max) | × floor | CPU s | resident | "
        "anonymous a worker |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, measured in runs.items():
        walls = [m.wall for m in measured]
        row = [name, f"{statistics.median(walls):.1f} ({min(walls):.1f} to {max(walls):.1f})"]
        row.append(f"{statistics.median(walls) / floor:.2f}")
        if stages[name]:
            merges = [s["merge"] for s in stages[name]]
            row.append(f"{statistics.median(merges):.1f} ({min(merges):.1f} to {max(merges):.1f})")
            row.append(f"{statistics.median(merges) / floor:.2f}")
            row.append(f"{statistics.median(s['cpu'] for s in stages[name]):.1f} (workers)")
            row += ["", f"{max(s['anonymous'] for s in stages[name]) / 2**20:.0f} MiB"]
        else:
            row += ["", "", f"{statistics.median(m.cpu for m in measured):.1f}"]
            row += [f"{max(m.resident for m in measured) / 2**30:.1f} GiB", ""]
        lines.append(f"| {' | '.join(row)} |")
    two = stages["rvdist, 2 workers"]
    lines += ["", f"rvdist read {two[0]['read'] / 1e9:.2f} GB and wrote {two[0]['written'] / 1e9:.2f} GB each time."]
    if "mergekit 0.1.5" in runs:
        peer = statistics.median(m.wall for m in runs["mergekit 0.1.5"])
        whole = statistics.median(m.wall for m in runs["rvdist, 2 workers"])
        merge = statistics.median(s["merge"] for s in two)
        lines += [
            f"mergekit's whole command takes {peer / whole:.1f} × ours, and {peer / merge:.1f} × our merge stage."
        ]
    text = "\n".join(lines)
    print(text)
    if README.exists() and BEGIN in README.read_text():
        before, _, rest = README.read_text().partition(BEGIN)
        README.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
