"""Situations of scoring: which weights an engine serves, what it is sent, where it stops, and what is made of answers.

Each is asked of the pocket family with one thing changed, beside a control: the same without it. What the answers must
be follows from the control's by plain Python, or the answers are the control's own.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoints import POCKET
from safetensors.torch import load_file, save_file
from situations import Asked, Refused, Scored, edit, put, situation

from rvdist.core.config import ArmConfig, BenchmarksConfig, Config, DonorsConfig, EngineConfig, VectorConfig
from rvdist.core.record import Record

ENGINE = EngineConfig(count=1, max_model_len=1024, kv_cache_gib=0.125)
BASE = ArmConfig("base", alpha=0.0)
Wrong = Callable[[Sequence[Record], Sequence[Record]], list[str]]


def pocket(place: Path, role: str = "target", name: str | None = None) -> Path:
    path = place / (name or role)
    shutil.copytree(POCKET / role, path)
    return path


def task(place: Path, name: str = "asked", **settings: Any) -> str:
    """A task of 12 of the pocket family's sums; `settings` are other keys of its YAML. Its name."""
    (place / "tasks").mkdir(exist_ok=True)
    rows = (POCKET / "data" / "sums.jsonl").read_text().splitlines(keepends=True)[:12]
    put(place / "tasks" / "rows.jsonl", "".join(rows))
    described = {
        "task": name, "dataset_path": "json", "test_split": "test", "output_type": "generate_until",
        "dataset_kwargs": {"data_files": {"test": str(place / "tasks" / "rows.jsonl")}},
        "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["<|im_end|>"], "do_sample": False, "max_gen_toks": 64},
        "metric_list": [{"metric": "exact_match"}],
    } | settings  # fmt: skip
    put(place / "tasks" / f"{name}.yaml", described)
    return name


def asking(place: Path, target: Path, *tasks: str, **settings: Any) -> Config:
    benchmarks = BenchmarksConfig(tasks=list(tasks), include_path=str(place / "tasks"))
    asked = Config(target=str(target), arms=[BASE], benchmarks=benchmarks, engine=ENGINE, stages=["evaluate"])
    return replace(asked, **settings)


def responses(records: Sequence[Record], arm: str = "base", name: str = "asked") -> list[str]:
    """By document, once."""
    found = {record.doc_id: record.response for record in records if (record.arm, record.task) == (arm, name)}
    return [found[number] for number in sorted(found)]


def equal(arm: str = "base", to: str = "base") -> Wrong:
    """The answers are the control's, and there are some."""

    def wrong(records: Sequence[Record], control: Sequence[Record]) -> list[str]:
        ours, theirs = responses(records, arm), responses(control, to)
        if not theirs or not any(theirs):
            return ["the control has no answers"]
        return [] if ours == theirs else [f"{ours[:2]} is not {theirs[:2]}"]

    return wrong


def beside(place: Path, change: Callable[[Path], None], wrong: Wrong | None = None) -> Asked:
    """A changed target, and the target as it is for the control."""
    name, target = task(place), pocket(place)
    change(target)
    control = asking(place, pocket(place, name="control"), name)
    return Asked(asking(place, target, name), Scored(control, wrong or equal()))


# --- which weights


def scored(what: str, report: str, right: str, todo: str = "") -> Callable[[Callable[[Path], Asked]], Any]:
    return situation("scoring", what, report, right=right, todo=todo, slow=True)


SAME = "the answers are those of the checkpoint without it"


@scored("a stray weight file beside model.safetensors, scored", "Blaizzy/mlx-vlm#1464", SAME)
def stray_weights_scored(place: Path) -> Asked:
    def change(target: Path) -> None:
        shutil.copyfile(POCKET / "grpo" / "model.safetensors", target / "old-checkpoint.safetensors")

    return beside(place, change)


@scored("another model's consolidated.safetensors and params.json, scored", "gpustack/gpustack#2257", SAME)
def both_layouts_scored(place: Path) -> Asked:
    def change(target: Path) -> None:
        shutil.copyfile(POCKET / "grpo" / "model.safetensors", target / "consolidated.safetensors")
        put(target / "params.json", {"dim": 128, "n_layers": 2})

    return beside(place, change)


@scored(
    "a tied config and an equal lm_head.weight in the target, at α = 1 in place", "arcee-ai/mergekit#464",
    "the answers are those of the target without it",
)  # fmt: skip
def tied_head_scored(place: Path) -> Asked:
    name, target, control = task(place), pocket(place), pocket(place, name="control")
    weights = load_file(target / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    donors = VectorConfig(str(POCKET / "grpo"), str(POCKET / "sft"))
    more = {"vector": donors, "arms": [BASE, ArmConfig("one", alpha=1.0)]}
    asked, other = (asking(place, path, name, **more) for path in (target, control))
    return Asked(asked, Scored(other, equal("one", "one")))


def spoiled_donor(place: Path) -> Path:
    donor = pocket(place, "grpo")
    weights = load_file(donor / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, donor / "model.safetensors", {"format": "pt"})
    return donor


@scored(
    "a donor with a NaN among the arms", "turboderp-org/exllamav2#623",
    "that arm fails by name, and the arms after it score as if it had not been",
)  # fmt: skip
def nan_among_arms(place: Path) -> Asked:
    name = task(place)
    donors = VectorConfig(str(POCKET / "grpo"), str(POCKET / "sft"))
    bad = ArmConfig("bad", alpha=1.0, vector=DonorsConfig(str(spoiled_donor(place)), str(POCKET / "sft")))
    half = ArmConfig("half", alpha=0.5)
    asked = asking(place, POCKET / "target", name, vector=donors, arms=[BASE, bad, half])
    control = asking(place, POCKET / "target", name, vector=donors, arms=[BASE, half])
    return Asked(asked, Scored(control, equal("half", "half"), failed=["bad"]))


@scored(
    "an α whose weights are finite and whose answers are not, among the arms", "none found",
    "that arm fails by name, and the arms after it score as if it had not been",
)  # fmt: skip
def overflow_among_arms(place: Path) -> Asked:
    name = task(place)
    donors = VectorConfig(str(POCKET / "grpo"), str(POCKET / "sft"))
    arms = [BASE, ArmConfig("wild", alpha=1e20), ArmConfig("half", alpha=0.5)]
    asked = asking(place, POCKET / "target", name, vector=donors, arms=arms)
    control = replace(asked, arms=[arms[0], arms[2]])
    return Asked(asked, Scored(control, equal("half", "half"), failed=["wild"]))


# --- what is sent


@scored(
    "generation_config.json asks for sampling, the task does not", "vllm-project/vllm#11164",
    "greedy, as the task asks: sampling defaults are kept out",
)  # fmt: skip
def sampling_by_default(place: Path) -> Asked:
    def change(target: Path) -> None:
        edit(target / "generation_config.json", do_sample=True, temperature=1.5, top_p=0.9, repetition_penalty=1.3)

    return beside(place, change)


@scored(
    "the beginning of text by the template and by the tokenizer, too", "lang-uk/ukrainian-llm-leaderboard#5",
    "it stands there once: the answers are those of a tokenizer that adds none",
)  # fmt: skip
def doubled_beginning(place: Path) -> Asked:
    name, target = task(place), pocket(place)
    template = "{{ bos_token }}" + (target / "chat_template.jinja").read_text()
    (target / "chat_template.jinja").write_text(template)
    edit(target / "tokenizer_config.json", bos_token="<|endoftext|>", add_bos_token=True)
    shutil.copytree(target, place / "control")
    edit(place / "control/tokenizer_config.json", add_bos_token=False)
    one = {"id": "<|endoftext|>", "ids": [256], "tokens": ["<|endoftext|>"]}
    processor = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": one},
    }  # fmt: skip
    edit(target / "tokenizer.json", post_processor=processor)
    return Asked(asking(place, target, name), Scored(asking(place, place / "control", name), equal()))


@scored("the chat template in tokenizer_config.json, scored", "hiyouga/LlamaFactory#8399", "the same prompts")
def template_in_the_config_scored(place: Path) -> Asked:
    def change(target: Path) -> None:
        text = (target / "chat_template.jinja").read_text()
        (target / "chat_template.jinja").unlink()
        edit(target / "tokenizer_config.json", chat_template=text)

    return beside(place, change)


@situation(
    "scoring", "the chat template in chat_template.json alone, which transformers reads for processors, not for text",
    "none found", refused="says that there is no template, and benchmarks.apply_chat_template=false", slow=True,
)  # fmt: skip
def template_in_json_scored(place: Path) -> Asked:
    target, name = pocket(place), task(place)
    template = (target / "chat_template.jinja").read_text()
    (target / "chat_template.jinja").unlink()
    put(target / "chat_template.json", {"chat_template": template})
    return Asked(asking(place, target, name), Refused(["target", "benchmarks.apply_chat_template=false"]))


@situation(
    "scoring", "a chat template that rejects a system role, and a task with a description",
    "EleutherAI/lm-evaluation-harness#2109",
    refused="names the task, the target and benchmarks.apply_chat_template=false", slow=True,
)  # fmt: skip
def system_role_rejected(place: Path) -> Asked:
    target = pocket(place)
    (target / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{{ m['content'] }}{% endfor %}"
    )
    name = task(place, description="Add these numbers.\n\n")
    return Asked(asking(place, target, name), Refused(["asked", "target", "benchmarks.apply_chat_template=false"]))


@situation(
    "scoring", "no chat template at all", "hiyouga/LlamaFactory#8399",
    refused="names the target and benchmarks.apply_chat_template=false", slow=True,
)  # fmt: skip
def no_template(place: Path) -> Asked:
    target, name = pocket(place), task(place)
    (target / "chat_template.jinja").unlink()
    return Asked(asking(place, target, name), Refused(["target", "benchmarks.apply_chat_template=false"]))


@situation(
    "scoring", "prompts longer than the context", "EleutherAI/lm-evaluation-harness#2554",
    refused="says how long, and names benchmarks.allow_truncation and engine.max_model_len", slow=True,
)  # fmt: skip
def prompts_too_long(place: Path) -> Asked:
    target, name = pocket(place), task(place)
    engine = replace(ENGINE, max_model_len=90)  # some of a prompt would fit
    words = ["benchmarks.allow_truncation", "engine.max_model_len"]
    return Asked(asking(place, target, name, engine=engine), Refused(words, underway=True))


# --- where it stops


def stopping(place: Path, until: Sequence[str], least: int) -> Asked:
    """The answers are the control's, which has no stops, cut at the first; in at least so many there is something to
    cut."""
    target, free = pocket(place), task(place)
    name = task(place, "stopped", generation_kwargs={"until": list(until), "do_sample": False, "max_gen_toks": 64})

    def wrong(records: Sequence[Record], control: Sequence[Record]) -> list[str]:
        whole = responses(control)
        wanted = [min((text.split(stop)[0] for stop in until if stop), key=len, default=text) for text in whole]
        cut = sum(a != b for a, b in zip(whole, wanted, strict=True))
        ours = responses(records, name="stopped")
        found = [] if ours == wanted else [f"{ours[:2]} is not {wanted[:2]}"]
        return found + ([] if cut >= least else [f"only {cut} answers have something to cut: {whole[:2]}"])

    return Asked(asking(place, target, name), Scored(asking(place, target, free), wrong))


CUT = "the answer is cut before the first stop, which is not in it"


@scored("until: an empty string among the stops", "sbintuitions/flexeval#20", "an empty string stops nothing")
def empty_stop(place: Path) -> Asked:
    return stopping(place, ["", "<|im_end|>"], 0)


@scored("until: a stop of several tokens", "EleutherAI/lm-evaluation-harness#630", CUT)
def stop_of_several_tokens(place: Path) -> Asked:
    return stopping(place, ["#### "], 1)


@scored("until: a stop that is in the prompt", "none found", CUT)
def stop_in_the_prompt(place: Path) -> Asked:
    return stopping(place, [" and ", "Assistant: "], 0)


@scored("until: two stops, of which the second is in the answer first", "EleutherAI/lm-evaluation-harness#1086", CUT)
def two_stops(place: Path) -> Asked:
    return stopping(place, ["####", ";"], 1)


# --- what is made of answers


@scored("a task with several filters", "none found", "each scores the same answers by itself")
def several_filters(place: Path) -> Asked:
    first, last = r"(\d+)", r"(?s).*?(\d+)\D*$"
    pipelines = [
        {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]}
        for name, pattern in (("first", first), ("last", last))
    ]
    target, name = pocket(place), task(place, filter_list=pipelines)

    def wrong(records: Sequence[Record], control: Sequence[Record]) -> list[str]:
        found = []
        for record in records:
            match = re.findall(first if record.filter == "first" else last, record.response)
            if record.filtered != (match[0] if match else "[invalid]"):
                found.append(f"{record.filter} of {record.response!r} is {record.filtered!r}")
        number = len({(record.filter, record.doc_id) for record in records})
        return found + ([] if number == len(records) == 24 else [f"{len(records)} records of {number}"])

    return Asked(asking(place, target, name), Scored(asking(place, target, name), wrong))


@scored(
    "repeats: every document asked three times",
    "EleutherAI/lm-evaluation-harness#1232",
    "three answers a document, all alike where greedy",
)
def repeats(place: Path) -> Asked:
    target, once = pocket(place), task(place)
    taken = [{"name": "none", "filter": [{"function": "take_first"}]}]
    name = task(place, "thrice", repeats=3, filter_list=taken)

    def wrong(records: Sequence[Record], control: Sequence[Record]) -> list[str]:
        whole, found = responses(control), []
        for record in records:
            answers = re.split(r"\n?\[\d of 3, \d+ characters\]\n", record.response)[1:]
            if answers != [whole[record.doc_id]] * 3:
                found.append(f"{record.response!r} is not three times {whole[record.doc_id]!r}")
        return found + ([] if len(records) == 12 else [f"{len(records)} records"])

    return Asked(asking(place, target, name), Scored(asking(place, target, once), wrong))
