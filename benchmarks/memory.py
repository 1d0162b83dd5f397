"""That memory does not grow with the model: merges of sparse checkpoints into /dev/null.

    python benchmarks/memory.py [--work DIR] [--layouts | --vocabularies | --stacks]

Makes target, plus and minus of Llama-70B's shape (141 GB each) out of holes, which take no disk, and merges them with
two workers into /dev/null; then plans, without reading tensors, merges of Llama-405B's and DeepSeek-V3's shapes for a
cluster of 8 nodes. With --layouts, instead: layers of gpt-oss-120b's, Qwen3-235B's and DeepSeek-V3's experts, whose
donors store them otherwise than the target. With --vocabularies: an embedding and a head of 152,064 rows of 8,192, of
models that have each token at another id, and a fifth of them not at all, padded. With --stacks: one fused tensor of
320 experts, of random weights, by methods that look at all of it. Peak anonymous memory (file-backed pages not counted)
goes to benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from tables import write_table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent))
import shapes
from peaks import peak_while

IMPORTS = (
    "import rvdist.launch, rvdist.stages.jobs, ray; "
    "from rvdist.core.timing import anonymous_bytes; print(anonymous_bytes())"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "rvdist-memory")
    parser.add_argument("--layouts", action="store_true")
    parser.add_argument("--vocabularies", action="store_true")
    parser.add_argument("--stacks", action="store_true")
    given = parser.parse_args()
    work: Path = given.work
    shutil.rmtree(work, ignore_errors=True)
    if given.stacks:
        across_stacks(work)
        return
    imports = int(subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True).stdout)
    if given.layouts:
        across_layouts(work, imports)
        return
    if given.vocabularies:
        across_vocabularies(work, imports)
        return
    rows = []
    for name, shape, shards, stages in (
        ("Llama-70B", shapes.LLAMA_70B, 30, "merge"),
        ("Llama-405B", shapes.LLAMA_405B, 191, "plan"),
        ("DeepSeek-V3, bf16", shapes.DEEPSEEK_V3, 163, "plan"),
    ):
        donors = {}
        for seed, part in enumerate(("target", "plus", "minus")):
            donors[part] = work / name / part
            nbytes = shapes.write_checkpoint(donors[part], shape, shards, seed, {"model_type": "of-holes"}, holes=True)
        command = command_of(donors, work, stages)
        on = ["merge.workers=2"] if stages == "merge" else ["cluster.nodes=8", "merge.workers=64"]
        print(f"{name}: {nbytes / 1e9:.0f} GB each, {stages}", flush=True)
        usage_before = os.times().children_user + os.times().children_system
        subprocess.run([*command, *on], check=True)
        cpu = os.times().children_user + os.times().children_system - usage_before
        row = [name, f"{nbytes / 1e9:,.0f} GB × 3", f"{len(shape):,}", stages]
        if stages == "merge":
            row += measured(work, imports)
        else:
            row += ["", "", f"{cpu:.1f} s of CPU"]
        rows.append(row)
        shutil.rmtree(work / name)
    lines = [
        "| shape | sparse checkpoints | tensors each | stage | anonymous, a worker | driver above its imports | rate |",
        "|---|---|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    text = "\n".join(lines)
    print(text)
    write_table("memory.py", text.splitlines())


def command_of(sources: dict[str, Path], work: Path, stages: str) -> list[str]:
    """The command on these sources, into /dev/null."""
    return [
        sys.executable, "-m", "rvdist.launch", f"target='{sources['target']}'", f"vector.plus='{sources['plus']}'",
        f"vector.minus='{sources['minus']}'", "alpha=0.5", "output=/dev/null", f"stages=[{stages}]",
        f"hydra.run.dir='{work}/run'", "compat.force=true",
    ]  # fmt: skip


def measured(work: Path, imports: int) -> list[str]:
    """The memory and the rate of a merge, as it told them."""
    timing = json.loads((work / "run/timing.json").read_text())
    peak = timing["peak_anonymous_bytes"]
    rate = (timing["bytes_read"] + timing["bytes_written"]) / 1e9 / timing["phases"]["merge"]
    memory = [peak["worker"], peak["driver"] - imports]
    return [*(f"{nbytes / 2**20:.0f} MiB" for nbytes in memory), f"{rate:.1f} GB/s"]


def across_layouts(work: Path, imports: int) -> None:
    """Merges of a layer of experts whose donors store them otherwise."""
    rows = []
    for name, sizes, biased, layouts in (
        ("gpt-oss-120b", (2880, 2880, 128), True, ("interleaved", "one by one")),
        ("gpt-oss-120b", (2880, 2880, 128), True, ("one by one", "interleaved")),
        ("Qwen3-235B", (4096, 1536, 128), False, ("fused", "one by one")),
        ("DeepSeek-V3", (7168, 2048, 64), False, ("one by one", "fused")),
    ):
        sources, config = {}, {"model_type": "gpt_oss"} if biased else {}
        for seed, part in enumerate(("target", "plus", "minus")):
            shape = shapes.mixture(layouts[part == "target"], *sizes, biased)
            sources[part] = work / name / part
            nbytes = shapes.write_checkpoint(sources[part], shape, 4, seed, config, holes=True)
        subprocess.run([*command_of(sources, work, "merge"), "merge.workers=2"], check=True)
        rows.append([name, f"{nbytes / 1e9:.1f} GB × 3", *layouts, *measured(work, imports)])
        shutil.rmtree(work / name)
    head = ["a layer of", "sparse checkpoints", "donors", "target"]
    head += ["anonymous, a worker", "driver above its imports", "rate"]
    lines = [f"| {' | '.join(head)} |", "|---" * 7 + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    print("\n".join(lines))
    write_table("memory.py, layouts", lines)


def across_vocabularies(work: Path, imports: int) -> None:
    """A merge by token of embeddings and heads as wide as 70B's, in another order each."""
    rows, width, chance, sources = 152_064, 8192, random.Random(0), {}
    shape = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (rows, width)) | {
        "model.norm.weight": (width,)
    }
    config = {"model_type": "llama", "vocab_size": rows}
    for seed, (part, left) in enumerate((("target", 0), ("plus", 1), ("minus", 1))):
        sources[part] = work / "vocabularies" / part
        nbytes = shapes.write_checkpoint(sources[part], shape, 1, seed, config, holes=True)
        tokens = [f"t{number}" for number in range(left * rows // 5, left * rows // 5 + rows)]
        chance.shuffle(tokens)
        model = {"type": "BPE", "vocab": {token: number for number, token in enumerate(tokens)}, "merges": []}
        (sources[part] / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": model}))
    more = ["merge.workers=2", "tokenizer={source: union, pad_to_multiple_of: 128}"]
    subprocess.run([*command_of(sources, work, "merge"), *more], check=True)
    shutil.rmtree(work / "vocabularies")
    lines = [
        "| rows | sparse checkpoints | anonymous, a worker | driver above its imports | rate |",
        "|---|---|---|---|---|",
        f"| {rows:,} × {width:,} | {nbytes / 1e9:.1f} GB × 3 | {' | '.join(measured(work, imports))} |",
    ]
    print("\n".join(lines))
    write_table("memory.py, vocabularies", lines)


def across_stacks(work: Path) -> None:
    """A reader of one fused tensor, by methods that look at all of it; what sees matrices, at the first eight."""
    name, shape = "model.layers.0.mlp.experts.gate_up_proj", (320, 1024, 1024)
    for seed, part in enumerate(("target", "plus", "minus", "other")):
        nbytes = shapes.write_checkpoint(work / part, {name: shape}, 1, seed, {})
    lines = ["| method | of the tensor | CPU s | memory |", "|---|---|---|---|"]
    for method in ("linear", "ties", "slerp", "breadcrumbs", "sce", "karcher", "ramplus_tl", "arcee_fusion", "della"):
        lines.append(_in_a_process(work, name, method, 320 * 1024 * 1024, "all"))
    for method in ("iso_c", "tsv_m"):
        lines.append(_in_a_process(work, name, method, 8 * 1024 * 1024, "8 matrices"))
    shutil.rmtree(work)
    print(f"{nbytes >> 20} MiB", *lines, sep="\n")
    write_table("memory.py, stacks", lines)


def _in_a_process(work: Path, name: str, method: str, stop: int, share: str) -> str:
    """A row of the table. Ends with the process that computes it."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        seconds, nbytes = pool.submit(_read, work, name, method, stop).result()
    return f"| `{method}` | {share} | {seconds:.0f} | {nbytes / 2**20:.0f} MiB |"


def _read(work: Path, name: str, method: str, stop: int) -> tuple[float, int]:
    """Seconds of CPU, and anonymous bytes at most beside what there was."""
    import torch

    from rvdist.core.method import MethodSpec
    from rvdist.core.point import Term, Vector, WeightPoint
    from rvdist.weights.arithmetic.method import warm_up
    from rvdist.weights.checkpoint.source import open_source
    from rvdist.weights.reader import PointReader

    torch.set_num_threads(1)
    warm_up()
    spec = MethodSpec(method)
    vectors = [Vector(str(work / part), str(work / "minus")) for part in ("plus", "other")[: 2 - spec.facts.one_vector]]
    spec = MethodSpec(method, density=0.5) if "density" in spec.facts.parameters else spec
    point = WeightPoint(str(work / "target"), tuple(Term(0.5, vector) for vector in vectors), spec)
    sources = {source: open_source(source) for source in point.sources()}
    began = time.process_time()

    def read() -> None:
        for _ in PointReader([point], sources).chunks(name, 0, stop):
            pass

    nbytes = peak_while(read)
    return time.process_time() - began, nbytes


if __name__ == "__main__":
    main()
