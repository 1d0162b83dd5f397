"""A real GRPO pair from a pretrained model: θ_SFT on D, and from it θ_GRPO on D with an exact-answer reward.

    python benchmarks/real_grpo.py BASE OUT --seed 1 [--threads 1]

D is two-step sums in words (benchmarks/real_models.py). Of the answers that θ_SFT is shown, half give both steps first
and half only the answer, so that it starts between 0 and 100 %; GRPO is told nothing but whether the answer is right.
Writes OUT/sft, OUT/grpo in bf16, and OUT/training.json with the reward of each step. Each appears whole or not at all.

GRPO: arXiv 2402.03300; one on-policy update a batch, no KL term, no clipping (the ratio is 1).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from real_models import chat, make, problem, train

SHOWN = 0.5
SFT_STEPS, SFT_RATE = 120, 1e-4
GRPO_STEPS, GRPO_RATE, PROMPTS, GROUP, TOKENS = 80, 1e-5, 8, 8, 40
ANSWER = re.compile(r"#### (-?[0-9]+)")
EOS = 2


def right(said: str, answer: str) -> bool:
    """Whether the first marked number is the answer."""
    found = ANSWER.search(said)
    return found is not None and found[1] == answer


def read_prompts(model: Any, given: Any, group: int) -> tuple[Any, Any, Any, Any]:
    """Reads each prompt (padded left) once for its group: keys and values, last tokens, mask and next positions."""
    positions = (given.attention_mask.cumsum(1) - 1).clamp(min=0)
    cache = model.model(
        input_ids=given.input_ids[:, :-1],
        attention_mask=given.attention_mask[:, :-1],
        position_ids=positions[:, :-1],
        use_cache=True,
    ).past_key_values
    cache.batch_repeat_interleave(group)
    last, mask, place = (t.repeat_interleave(group, 0) for t in (given.input_ids, given.attention_mask, positions))
    return cache, last[:, -1:], mask, place[:, -1:]


def roll_out(model: Any, given: Any, group: int) -> Any:
    """Completions, [prompt × group, position], sampled at temperature 1; EOS after their end."""
    import torch

    with torch.no_grad():
        cache, token, mask, position = read_prompts(model, given, group)
        said, ended = [], torch.zeros_like(token, dtype=torch.bool)
        while len(said) < TOKENS and not ended.all():
            read = model.model(
                input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
            )
            logits = model.lm_head(read.last_hidden_state[:, -1]).float()
            token = torch.multinomial(logits.softmax(-1), 1).masked_fill(ended, EOS)
            ended = ended | (token == EOS)
            said.append(token)
            mask, position = torch.cat([mask, torch.ones_like(token)], 1), position + 1
    return torch.cat(said, 1)


def log_probabilities(model: Any, given: Any, completions: Any, group: int) -> Any:
    """Of each completion's tokens, [prompt × group, position]."""
    import torch

    cache, last, mask, start = read_prompts(model, given, group)
    hidden = model.model(
        input_ids=torch.cat([last, completions[:, :-1]], 1),
        attention_mask=torch.cat([mask, torch.ones_like(completions[:, :-1])], 1),
        position_ids=start + torch.arange(completions.shape[1]),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    logits = model.lm_head(hidden).float()
    return torch.log_softmax(logits, -1).gather(2, completions[..., None])[..., 0]


def tokenize(tokenizer: Any, asked: list[dict[str, Any]]) -> Any:
    """Prompts as tokens and mask, padded left."""
    texts = [chat(tokenizer, one["question"]) for one in asked]
    return tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)


def reinforce(base: Path, out: Path, *, seed: int, threads: int, steps: int) -> list[dict[str, float]]:
    """GRPO on D; what each step's samples got."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    draw = random.Random(1000 + seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    sampler: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=GRPO_RATE, weight_decay=0.0, betas=(0.9, 0.95))
    history: list[dict[str, float]] = []
    began = time.perf_counter()
    for step in range(steps):
        asked = [problem(draw) for _ in range(PROMPTS)]
        given = tokenize(tokenizer, asked)
        completions = roll_out(sampler, given, GROUP)
        said = tokenizer.batch_decode(completions, skip_special_tokens=True)
        answers = [one["answer"] for one in asked for _ in range(GROUP)]
        reward = torch.tensor([float(right(s, a)) for s, a in zip(said, answers, strict=True)])
        grouped = reward.view(PROMPTS, GROUP)
        advantage = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
        useful = grouped.std(1) > 0  # where all samples of a prompt fare alike there is nothing to learn
        ended = (completions == EOS).long().cumsum(1)
        written = (ended - (completions == EOS).long() == 0).float()
        if useful.any():
            kept = useful.repeat_interleave(GROUP)
            for name in ("input_ids", "attention_mask"):
                given[name] = given[name][useful]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logp = log_probabilities(model, given, completions[kept], GROUP)
            loss = -(logp * advantage.flatten()[kept, None] * written[kept]).sum() / written.sum()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = GRPO_RATE * min(1.0, (step + 1) / 5)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for mine, theirs in zip(sampler.parameters(), model.parameters(), strict=True):
                    mine.copy_(theirs)
        history.append(
            {
                "reward": reward.mean().item(),
                "shown": sum(s.count("=") >= 2 for s in said) / len(said),
                "tokens": written.sum(1).mean().item(),
            }
        )
        told = ", ".join(f"{name} {value:.3f}" for name, value in history[-1].items())
        print(f"step {step}: {told}, {time.perf_counter() - began:.0f} s", flush=True)
    model.config.dtype = torch.bfloat16
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sft-steps", type=int, default=SFT_STEPS)
    parser.add_argument("--grpo-steps", type=int, default=GRPO_STEPS)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    seed, threads = given.seed, given.threads
    sft = make(
        given.out / "sft",
        lambda out: train(
            given.base, out, shown=SHOWN, steps=given.sft_steps, rate=SFT_RATE, seed=100 + seed, threads=threads
        ),
    )
    history: list[dict[str, float]] = []

    def tune(out: Path) -> None:
        history.extend(reinforce(sft, out, seed=seed, threads=threads, steps=given.grpo_steps))

    make(given.out / "grpo", tune)
    if history:
        said = {"seed": seed, "sft_steps": given.sft_steps, "grpo": history}
        (given.out / "training.json").write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
