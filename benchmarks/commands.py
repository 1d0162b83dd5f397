"""Whole merge commands against mergekit 0.1.5 with its best flags, one after the other, in one run.

    python benchmarks/commands.py NAME [--models TARGET PLUS MINUS | --holes] [--rounds 3] [--work DIR] [--cold]

Without `--models` on three checkpoints of Qwen2.5-1.5B's shape, as benchmarks/merge.py makes them; with `--holes` on
three of Qwen2.5-7B's, files of holes, which are read as if a page cache of 46 GB had them and take no disk (outputs do,
15 GB); mergekit's API, which would hold all of it in memory, is left out then. Round by round: the
floor (`cat` of the inputs, `cp -r` of the target, `sync`); ours as typed, the same after `rvdist up`, and then with two
workers on its Ray; mergekit as typed, with asynchronous writes by two threads, with these, two threads of computing and
the lazy unpickler, and its API in memory with its batched kernels. With `--cold` no input is in the page cache when a
command begins, and two rows more show what the disk gives: `dd` with direct reads, and ours into /dev/null.
Medians go to benchmarks/README.md, under "commands.py, NAME".
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tables import write_table

sys.path.insert(0, str(Path(__file__).parent))
import merge
import shapes

FLOOR, OURS = "floor: cat, cp -r, sync", "rvdist"
UP, ON_RAY = "rvdist, after `rvdist up`", "rvdist, `merge.workers=2`, on a Ray that is up"
ASYNC = ("--async-write", "--write-threads", "2")
FLAGS = {
    "mergekit": (),
    "mergekit, `--async-write --write-threads 2`": ASYNC,
    "mergekit, these and `-j 2 --lazy-unpickle`": (*ASYNC, "-j", "2", "--lazy-unpickle"),
}
POCKET = Path(__file__).parent.parent / "rvdist" / "pocket"
NOTHING = [
    f"target={POCKET}/target",
    f"vector.plus={POCKET}/grpo",
    f"vector.minus={POCKET}/sft",
    f"output={os.devnull}",
]
CONFIG_7B = merge.CONFIG | {
    "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
    "vocab_size": 152064, "tie_word_embeddings": False,
}  # fmt: skip
DD, NOWHERE = "`dd iflag=direct bs=16M`, one file after the other", "rvdist into /dev/null"
IN_MEMORY = "mergekit's `merge_state_dicts`, files read and written by safetensors"
_MEMORY = """
import shutil, sys
import torch
from pathlib import Path
from mergekit.merge_methods.api import merge_state_dicts
from safetensors.torch import load_file, save_file
*places, out = map(Path, sys.argv[1:])
files = [sorted(place.glob("*.safetensors")) for place in places]
models = {str(k): {n: t for f in one for n, t in load_file(f).items()} for k, one in enumerate(files)}
weights = {"0": 0.0, "1": 1.0, "2": -1.0}
merged = merge_state_dicts(
    models, "task_arithmetic", base="0", parameters={"weight": weights, "normalize": False}, out_dtype=torch.bfloat16
)
out.mkdir()
for file in files[0]:
    save_file({name: merged[name] for name in load_file(file)}, out / file.name, {"format": "pt"})
for file in places[0].glob("*.json"):
    shutil.copy(file, out)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--models", type=Path, nargs=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--holes", action="store_true")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "rvdist-benchmark")
    arguments = parser.parse_args()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    if arguments.models:
        target, plus, minus = arguments.models
    else:
        target, plus, minus = (
            work / ("holes" if arguments.holes else "sharded") / name for name in ("target", "plus", "minus")
        )
        for seed, place in enumerate((target, plus, minus)):
            if place.exists():
                continue
            if arguments.holes:
                shapes.write_checkpoint(place, shapes.QWEN_7B, 4, seed, CONFIG_7B, holes=True)
            else:
                shapes.write_checkpoint(place, shapes.QWEN_1_5B, 3, seed, merge.CONFIG)
    files = [file for one in (target, plus, minus) for file in sorted(one.glob("*.safetensors"))]
    inputs = " ".join(map(str, files))
    recipe, out = work / "recipe.yml", work / "out"
    models = [{"model": str(one), "parameters": {"weight": w}} for one, w in ((plus, 1.0), (minus, -1.0))]
    said = {"merge_method": "task_arithmetic", "base_model": str(target), "dtype": "bfloat16", "models": models}
    recipe.write_text(json.dumps(said | {"parameters": {"normalize": False}}))
    tool = merge.mergekit(work)
    ours = [
        sys.executable, "-m", "rvdist.launch", f"target={target}", f"vector.plus={plus}", f"vector.minus={minus}",
        f"output={out}", f"hydra.run.dir={work}/run",
    ]  # fmt: skip
    commands = {
        FLOOR: ["sh", "-c", f"cat {inputs} >/dev/null; cp -r --sparse=never {target} {out}; sync"],
        OURS: ours,
        UP: ours,
        ON_RAY: [*ours, "merge.workers=2"],
        **{name: [str(tool), str(recipe), str(out), "--no-copy-tokenizer", *more] for name, more in FLAGS.items()},
        IN_MEMORY: [str(tool.with_name("python")), "-c", _MEMORY, *map(str, (target, plus, minus, out))],
    }
    if arguments.holes:
        del commands[IN_MEMORY]
    if arguments.cold:
        reads = "; ".join(f"dd if={file} of=/dev/null bs=16M iflag=direct" for file in files)
        into_nothing = [f"output={os.devnull}" if one == f"output={out}" else one for one in ours]
        commands = {DD: ["sh", "-c", reads], NOWHERE: into_nothing} | commands
    door = [sys.executable, "-m", "rvdist.launch"]
    os.environ["RVDIST_UP"] = str(work / "up")
    runs: dict[str, list[merge.Measured]] = {name: [] for name in commands}
    for _ in range(arguments.rounds):
        for name, command in commands.items():
            warm = "" if arguments.cold else f"; cat {inputs} >/dev/null"
            subprocess.run(["sh", "-c", f"rm -rf {out}*{warm}"], check=True)
            os.sync()
            if arguments.cold:
                evict(files)
            if name in (UP, ON_RAY):
                subprocess.run([*door, "up"], check=True, stdout=subprocess.DEVNULL)
                subprocess.run([*command, *NOTHING], check=True, stdout=subprocess.DEVNULL)  # waits until all is up
            try:
                runs[name].append(merge.measure(command))
            finally:
                if name in (UP, ON_RAY):
                    subprocess.run([*door, "down"], check=True, stdout=subprocess.DEVNULL)
            print(f"round {len(runs[name])}: {name}: {runs[name][-1].wall:.1f} s", flush=True)
    subprocess.run(["sh", "-c", f"rm -rf {out}*"], check=True)
    nbytes = sum(file.stat().st_size for file in files)
    report(arguments.name, nbytes, runs, os.getloadavg()[2], "cold" if arguments.cold else "warm")


def evict(files: list[Path]) -> None:
    """Has the page cache forget these, which must be written."""
    for file in files:
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def report(name: str, nbytes: int, runs: dict[str, list[merge.Measured]], load: float, cache: str) -> None:
    median = {one: statistics.median(m.wall for m in measured) for one, measured in runs.items()}
    lines = [
        f"Inputs of {nbytes / 1e9:.2f} GB together, bf16; {len(runs[OURS])} round(s) in turn, medians; "
        f"{os.cpu_count()} cores at a load of {load:.0f}, page cache {cache}.",
        "",
        "| what | whole command, s (min to max) | × ours | × floor | CPU s | resident, GiB |",
        "|---|---|---|---|---|---|",
    ]
    for one, measured in runs.items():
        wall = merge.spread([m.wall for m in measured])
        cpu, resident = statistics.median(m.cpu for m in measured), max(m.resident for m in measured) / 2**30
        cells = f"{median[one] / median[OURS]:.2f} | {median[one] / median[FLOOR]:.2f} | {cpu:.1f} | {resident:.1f}"
        lines.append(f"| {one} | {wall} | {cells} |")
    print("\n".join(lines))
    write_table(f"commands.py, {name}", lines)


if __name__ == "__main__":
    main()
