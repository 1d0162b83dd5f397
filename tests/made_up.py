"""Made-up experiments: what the fleet would have written, small enough to reason about."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from rvdist.core.point import Arm, Term, Vector, WeightPoint
from rvdist.core.record import Record, TaskInfo
from rvdist.report.findings import Findings, Making
from rvdist.report.page.page import write_page
from rvdist.report.pictures.alpha import alpha_figure
from rvdist.report.pictures.drawing import render
from rvdist.report.statistics.compare import summarise
from rvdist.report.summary import GroupInfo

VECTOR = Vector(plus="org/grpo", minus="org/sft")


def make_arm(name: str, alpha: float | None = None, prompt: str = "plain") -> Arm:
    point = WeightPoint("org/grpo") if alpha is None else WeightPoint("org/target", (Term(alpha, VECTOR),))
    return Arm(name, point, prompt, alpha)


def make_task(name: str = "gsm8k", metric: str = "exact_match", higher_is_better: bool = True) -> TaskInfo:
    return TaskInfo(name, "3", ((metric, "none"),), (metric, "none"), {metric: higher_is_better})


def make_records(
    arm: str,
    scores: Sequence[float | Sequence[float]],
    task: str = "gsm8k",
    metric: str = "exact_match",
    response: str = "So the answer is 5.",
    prompt_text: str = "Q: what is 2 + 3?\nA:",
) -> list[Record]:
    """One document a score; a sequence of scores is a document asked once under each seed."""
    return [
        Record(
            arm=arm,
            point=f"{zlib.crc32(arm.encode(errors='replace')):08x}",
            alpha=None,
            prompt="plain",
            task=task,
            filter="none",
            seed=seed,
            doc_id=doc_id,
            doc=f"{task}-{doc_id:05d}",
            metrics={metric: float(score)},
            prompt_text=prompt_text,
            target="5",
            response=response,
            filtered="5",
        )
        for doc_id, repeats in enumerate(scores)
        for seed, score in enumerate(repeats if isinstance(repeats, Sequence) else [repeats])
    ]


def make_experiment(
    alphas: Sequence[float] = (-1.0, 0.0, 0.5, 1.0), tasks: int = 2, n: int = 120, **text: str
) -> tuple[list[Arm], list[Record], list[TaskInfo]]:
    """An α sweep, a donor and a think arm on several tasks, with scores drawn so that some arms differ."""
    rng = np.random.default_rng(5)
    arms = [make_arm("baseline" if a == 0 else f"α={a:g}", a) for a in alphas]
    arms += [make_arm("donor + think", None, "think"), make_arm("α=1 + think", 1.0, "think")]
    infos = [make_task(f"task_{i}") for i in range(tasks)]
    records = []
    for info in infos:
        ease = rng.random(n)
        for arm in arms:
            skill = 0.55 + 0.12 * (arm.alpha if arm.alpha is not None else 1.2) + 0.03 * (arm.prompt == "think")
            scores = [float(e + 0.1 * rng.standard_normal() < skill) for e in ease]
            records += make_records(arm.name, scores, info.name, **text)
    return arms, records, infos


EDITS = ("typos", "shuffle", "distractor", "numbers", "instruction")
SKILL = {"Baseline": 0.0, "G+T": 0.02, "+Vector": 0.04, "+Vector+Think": 0.08, "−Vector": -0.12}
REPORTED = {
    "gsm8k": {"+Vector": 2.6, "+Vector+Think": 4.9, "−Vector": -11.8},
    "humaneval_instruct": {"+Vector": 2.2, "+Vector+Think": 4.3},
    "sciq": {"+Vector+Think": 1.7},
    "bbh_cot_fewshot": {"+Vector": 12.3, "+Vector+Think": 12.3},
}


def make_paper(
    n: int = 120, members: int = 4, seeds: int = 1, **text: str
) -> tuple[list[Arm], list[Record], list[TaskInfo], list[GroupInfo]]:
    """The paper's arms on its benchmarks, with GSM8K perturbed and some of BIG-Bench-Hard as a group."""
    rng = np.random.default_rng(7)
    arms = [
        make_arm("Baseline", 0.0),
        make_arm("G+T", None, "think"),
        make_arm("+Vector", 1.0),
        make_arm("+Vector+Think", 1.0, "think"),
        make_arm("−Vector", -1.0),
    ]
    inside = [f"bbh_cot_fewshot_{name}" for name in ("navigate", "snarks", "ruin_names", "web_of_lies")][:members]
    names = ["gsm8k", *(f"gsm8k+{edit}" for edit in EDITS), "humaneval_instruct", "sciq", *inside]
    records = []
    ease = rng.random(n)
    for name in names:
        own = ease if name.startswith("gsm8k") else rng.random(n)
        for arm in arms:
            skill = 0.55 + SKILL[arm.name] - 0.05 * ("+" in name)
            scores = (own[:, None] + 0.15 * rng.standard_normal((n, seeds)) < skill).astype(float).tolist()
            made = make_records(arm.name, scores, name, **text)
            document = name.partition("+")[0]
            records += [replace(r, doc=f"{document}-{r.doc_id:05d}", prompt=arm.prompt, alpha=arm.alpha) for r in made]
    groups = [GroupInfo("bbh_cot_fewshot", tuple(inside), (("exact_match", "none"),))] if inside else []
    return arms, records, [make_task(name) for name in names], groups


def write(
    path: Path, arms, records, tasks, baseline="baseline", groups=(), reported=None, lacking=None, anatomy=None, **made
):
    rows = summarise(arms, records, tasks, baseline, groups)
    findings = Findings(arms, rows, records, tasks, groups, reported or {}, lacking or {})
    given = {
        "title": "A report",
        "command": "python -m rvdist.launch",
        "digests": {arm.name: "d1935700" for arm in arms},
        "versions": {"rvdist": "0.1.0"},
        "timing": {"generate": 12.5},
    }
    (alpha,) = render(lambda: alpha_figure(findings.benchmarks), "png")
    write_page(path, findings, Making(**(given | made)), {"alpha": alpha}, anatomy)
    return path.read_text(encoding="utf-8")
