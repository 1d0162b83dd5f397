"""That memory does not grow with the model: merges of sparse checkpoints into /dev/null.

    python benchmarks/memory.py [--work DIR]

Makes target, plus and minus of Llama-70B's shape (141 GB each) out of holes, which take no disk, and merges them with
two workers into /dev/null; then plans, without reading tensors, merges of Llama-405B's and DeepSeek-V3's shapes for a
cluster of 8 nodes. Peak anonymous memory (file-backed pages not counted) goes to benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tables import write_table

sys.path.insert(0, str(Path(__file__).parent))
import shapes

IMPORTS = (
    "import rvdist.launch, rvdist.stages.jobs, ray; "
    "from rvdist.core.timing import anonymous_bytes; print(anonymous_bytes())"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "rvdist-memory")
    work: Path = parser.parse_args().work
    shutil.rmtree(work, ignore_errors=True)
    imports = int(subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True).stdout)
    rows = []
    for name, shape, shards, stages in (
        ("Llama-70B", shapes.LLAMA_70B, 30, "merge"),
        ("Llama-405B", shapes.LLAMA_405B, 191, "plan"),
        ("DeepSeek-V3, bf16", shapes.DEEPSEEK_V3, 163, "plan"),
    ):
        donors = {}
        for part in ("target", "plus", "minus"):
            donors[part] = work / name / part
            nbytes = shapes.write_checkpoint(donors[part], shape, shards, None, {"model_type": "of-holes"})
        command = [
            sys.executable, "-m", "rvdist.launch", f"target='{donors['target']}'", f"vector.plus='{donors['plus']}'",
            f"vector.minus='{donors['minus']}'", "alpha=0.5", "output=/dev/null", f"stages=[{stages}]",
            f"hydra.run.dir='{work}/run'", "compat.force=true",
        ]  # fmt: skip
        on = ["merge.workers=2"] if stages == "merge" else ["cluster.nodes=8", "merge.workers=64"]
        print(f"{name}: {nbytes / 1e9:.0f} GB each, {stages}", flush=True)
        usage_before = os.times().children_user + os.times().children_system
        subprocess.run([*command, *on], check=True)
        cpu = os.times().children_user + os.times().children_system - usage_before
        row = [name, f"{nbytes / 1e9:,.0f} GB × 3", f"{len(shape):,}", stages]
        if stages == "merge":
            timing = json.loads((work / "run/timing.json").read_text())
            peak = timing["peak_anonymous_bytes"]
            row += [f"{peak['worker'] / 2**20:.0f} MiB", f"{(peak['driver'] - imports) / 2**20:.0f} MiB"]
            row += [f"{(timing['bytes_read'] + timing['bytes_written']) / 1e9 / timing['phases']['merge']:.1f} GB/s"]
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


if __name__ == "__main__":
    main()
