"""What sharing prefixes is worth on few-shot prompts, on a real model: our engine without and with
`engine.prefix_caching`, and lm-eval's vLLM backend with its default, which is on.

    python benchmarks/prefixes.py --target DIR --data DIR [--limit 16] [--tokens 64]

`--data` holds GSM8K and BIG-Bench-Hard as docs/benchmarks.md has them. Each way is a process of its own with one vLLM
engine on one thread and is asked the same prompts, a task after the other. Seconds are of CPU, since the machine may
have other work. Into benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from fleet import TUNED, named_vllm
from tables import write_table

ROOT = Path(__file__).resolve().parent.parent
SHOTS = {"gsm8k": 5, "bbh_cot_fewshot_boolean_expressions": 3, "bbh_cot_fewshot_navigate": 3}
CONTEXT, KV_GIB = 2048, 1.0
WAYS = {
    "off": "rvdist, `engine.prefix_caching=false`",
    "on": "rvdist, `engine.prefix_caching=true`",
    "lm-eval": "lm-eval's backend, its default",
}


def asked(given: argparse.Namespace) -> dict[str, list[Any]]:
    from rvdist.evaluate.request import Generate
    from rvdist.evaluate.suite import Suite
    from rvdist.evaluate.tokenizer import load_tokenizer

    found: dict[str, list[Any]] = {}
    for task, shots in SHOTS.items():
        suite = Suite.load([task], limit=given.limit, num_fewshot=shots, chat=False, data_dir=given.data)
        for name, requests in suite.requests(load_tokenizer(given.target, False)).items():
            found[name] = [replace(one, max_tokens=given.tokens) for one in requests if isinstance(one, Generate)]
    return found


def one_way(given: argparse.Namespace) -> dict[str, Any]:
    """By task: seconds of CPU, the answers, and of the tokens of prompts how many were not read anew."""
    requests, found = asked(given), dict[str, Any]()
    if given.one == "lm-eval":
        from lm_eval.api.instance import Instance
        from lm_eval.models.vllm_causallms import VLLM

        backend = VLLM(
            pretrained=str(given.target), batch_size="auto", max_model_len=CONTEXT, enforce_eager=True,
            kv_cache_memory_bytes=int(KV_GIB * 2**30), disable_log_stats=False,
        )  # fmt: skip
        llm = backend.model

        def answer(own: list[Any]) -> list[str]:
            arguments = [
                (one.prompt, {"until": list(one.stop), "max_gen_toks": one.max_tokens, "do_sample": False})
                for one in own
            ]
            return list(backend.generate_until([Instance("generate_until", {}, it, 0) for it in arguments]))
    else:
        from rvdist.evaluate.fleet.arguments import EngineSettings
        from rvdist.evaluate.fleet.engine import Engine

        engine = Engine(
            str(given.target),
            EngineSettings(
                max_model_len=CONTEXT, kv_cache_gib=KV_GIB, prefix_caching=given.one == "on",
                args=json.dumps({"disable_log_stats": False}),
            ),
        )  # fmt: skip
        llm = engine._llm

        def answer(own: list[Any]) -> list[str]:
            return [one.text for one in engine.answer(own)]  # type: ignore[union-attr]

    warm = [replace(one, prompt="Q: 1 + 1 = ?\nA:", max_tokens=4) for one in next(iter(requests.values()))[:1]]
    answer(warm)
    for task, own in requests.items():
        before, began, hits = time.perf_counter(), time.process_time(), _hits(llm)
        texts = answer(own)
        cpu, wall = time.process_time() - began, time.perf_counter() - before
        found[task] = {
            "cpu": cpu,
            "wall": wall,
            "texts": texts,
            "hits": [b - a for a, b in zip(hits, _hits(llm), strict=True)],
        }
    return found


def _hits(llm: Any) -> list[float]:
    """Tokens of prompts that were looked for in the cache of prefixes, and those that were found, so far."""
    counted = dict.fromkeys(("vllm:prefix_cache_queries", "vllm:prefix_cache_hits"), 0.0)
    for metric in llm.get_metrics():
        if metric.name in counted:
            counted[metric.name] += metric.value
    return list(counted.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        given.out.write_text(json.dumps(one_way(given)))
        return
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        own = os.environ | TUNED | {"PYTHONPATH": f"{ROOT}:{named_vllm(work)}:{Path(__file__).parent}"}
        for way in WAYS:
            out = work / f"{way}.json"
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", way, "--out", out], env=own, check=True)
            found[way] = json.loads(out.read_text())
            print(way, {task: (round(one["cpu"], 1), one["hits"]) for task, one in found[way].items()}, flush=True)
    lines = [
        f"The first {given.limit} documents of each task, answers of at most {given.tokens} tokens.",
        "",
        "| task | way | s of CPU | × off | tokens of prompts taken from the cache | answers as with it off |",
        "|---|---|---|---|---|---|",
    ]
    for task, off in found["off"].items():
        for way, name in WAYS.items():
            one = found[way][task]
            same = sum(a == b for a, b in zip(one["texts"], off["texts"], strict=True))
            share = one["hits"][1] / one["hits"][0] if one["hits"][0] else 0.0
            lines.append(
                f"| {task} | {name} | {one['cpu']:.1f} | {one['cpu'] / off['cpu']:.2f} | {share:.0%} | "
                f"{same} of {len(off['texts'])} |"
            )
    print("\n".join(lines))
    write_table("prefixes.py", lines)


if __name__ == "__main__":
    main()
