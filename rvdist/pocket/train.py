"""Trains a pocket family from nothing: base → target, base → SFT on D → GRPO on D.

`python -m rvdist.pocket.train OUT_DIR --seed N` writes OUT_DIR/{target,sft,grpo} in bf16 and training.json; about
six minutes on one core. Owns the hyperparameters and the two training loops. Texts come from `text`, which keeps
the held-out problems out of reach; nothing here writes to the shipped checkpoints unless told their directory.
Sources: GRPO, arXiv 2402.03300 (one on-policy update a batch, no KL term, no clipping: the ratio is 1).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from rvdist.pocket import measure, text
from rvdist.pocket.tokenizer import CHAT_TEMPLATE, DONOR_TEMPLATE, EOS, PAD, VOCABULARY, build

if TYPE_CHECKING:
    import torch

CONTEXT = 8192
IGNORED = -100  # a label that carries no loss


@dataclass(frozen=True)
class Hyperparameters:
    """Steps, rates and batches of each stage of training."""

    base_steps: int = 1200
    base_rate: float = 3e-3
    tuning_steps: int = 80
    tuning_rate: float = 5e-4
    batch: int = 48
    grpo_steps: int = 60
    grpo_rate: float = 5e-5
    grpo_prompts: int = 16
    grpo_group: int = 8
    grpo_tokens: int = 44


def new_model() -> Any:
    """A model of the family's shape with random weights."""
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": 300.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD)
    return model


def copy(model: Any) -> Any:
    """Another model with the same weights."""
    twin = new_model()
    twin.load_state_dict(model.state_dict())
    return twin


# ---------------------------------------------------------------- supervised


def collate(documents: list[text.Document]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels, [document, position], padded on the right; the loss is on completions only."""
    import torch

    rows = [(list(prompt.encode()), [*completion.encode(), EOS]) for prompt, completion in documents]
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    tokens = torch.full((len(rows), width), PAD)
    labels = torch.full((len(rows), width), IGNORED)
    for i, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        tokens[i, :end] = torch.tensor(prompt + completion)
        labels[i, len(prompt) : end] = torch.tensor(completion)
    return tokens, labels


def supervise(model: Any, document: Callable[[], text.Document], steps: int, batch: int, rate: float) -> None:
    """Cross-entropy with AdamW, a short warm-up, then a cosine down to a tenth of the rate."""
    import torch
    import torch.nn.functional as F

    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = 20 if steps > 200 else 5
    model.train()
    for step in range(steps):
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * cosine * min(1.0, (step + 1) / warmup)
        documents = sorted((document() for _ in range(batch)), key=lambda d: len(d[0]) + len(d[1]))
        written = sum(len(completion) + 1 for _, completion in documents)
        optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for half in (documents[: batch // 2], documents[batch // 2 :]):  # short ones need no long padding
            tokens, labels = collate(half)
            hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
            asked = labels[:, 1:] != IGNORED
            part = F.cross_entropy(model.lm_head(hidden[asked]), labels[:, 1:][asked], reduction="sum") / written
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"  step {step}: loss {loss:.4f}", flush=True)


# ---------------------------------------------------------------- reinforcement


def rollout(model: Any, tokenizer: Any, prompts: list[str], tokens: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Sampled completions: tokens and mask, [sample, position], and where the completions begin.
    The mask ends with each sample's eos."""
    import torch

    asked = tokenizer(prompts, return_tensors="pt", padding=True)
    start = asked.input_ids.shape[1]
    model.eval()
    sampled = model.generate(**asked, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens)
    ended = (sampled[:, start:] == EOS).long().cumsum(1)
    written = ended - (sampled[:, start:] == EOS).long() == 0
    return sampled, torch.cat([asked.attention_mask, written.long()], 1), start


def reinforce(model: Any, tokenizer: Any, random: Random, hyper: Hyperparameters) -> list[float]:
    """GRPO: reward 1 for the exact answer, advantage normalised within the samples of one prompt.
    Returns the mean reward of each step."""
    import torch
    import torch.nn.functional as F

    optimizer = torch.optim.AdamW(model.parameters(), lr=hyper.grpo_rate, betas=(0.9, 0.95), weight_decay=0.0)
    history: list[float] = []
    for step in range(hyper.grpo_steps):
        asked = [text.donor_prompt(random) for _ in range(hyper.grpo_prompts)]
        asked = [question for question in asked for _ in range(hyper.grpo_group)]
        tokens, mask, start = rollout(model, tokenizer, [prompt for prompt, _ in asked], hyper.grpo_tokens)
        said = tokenizer.batch_decode(tokens[:, start:], skip_special_tokens=True)
        reward = torch.tensor([float(text.answer_of(s) == a) for s, (_, a) in zip(said, asked, strict=True)])
        history.append(reward.mean().item())
        grouped = reward.view(hyper.grpo_prompts, hyper.grpo_group)
        spread = grouped.std(1, keepdim=True)
        advantage = ((grouped - grouped.mean(1, keepdim=True)) / (spread + 1e-4)).flatten()
        useful = advantage != 0  # where all samples of a prompt fare alike there is nothing to learn
        if useful.any():
            tokens, mask, advantage = tokens[useful], mask[useful], advantage[useful]
            model.train()
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
            chosen = tokens[:, start:, None]
            logp = F.log_softmax(logits[:, start - 1 : -1], -1).gather(2, chosen)[..., 0]
            written = mask[:, start:]
            loss = -(logp * advantage[:, None] * written).sum() / written.sum()
            for group in optimizer.param_groups:
                group["lr"] = hyper.grpo_rate * min(1.0, (step + 1) / 5)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if step % 10 == 9:
            print(f"  step {step}: reward {sum(history[-10:]) / 10:.3f}", flush=True)
    return history


# ---------------------------------------------------------------- the family


def save(model: Any, template: str, directory: Path) -> None:
    """Writes a model in bf16 and its tokenizer."""
    import torch

    copy(model).to(torch.bfloat16).save_pretrained(directory)
    build(template, CONTEXT).save_pretrained(directory)  # a used tokenizer would save its last padding
    (directory / "model.safetensors").chmod(0o644)


def train_family(out: Path, seed: int, hyper: Hyperparameters = Hyperparameters()) -> None:
    """Trains and writes one family; the same seed and package versions on one thread give the same bytes."""
    import torch

    torch.manual_seed(seed)
    seconds: dict[str, float] = {}

    def timed(stage: str, run: Callable[[], Any]) -> Any:
        print(stage, flush=True)
        began = time.monotonic()
        result = run()
        seconds[stage] = round(time.monotonic() - began, 1)
        return result

    def tuned(model: Any, stage: str, document: Callable[[Random], text.Document], steps: int, rate: float) -> Any:
        random = Random(f"{stage} {seed}")
        timed(stage, lambda: supervise(model, lambda: document(random), steps, hyper.batch, rate))
        return model

    donor = build(DONOR_TEMPLATE, CONTEXT)
    base = tuned(new_model(), "base", text.base_document, hyper.base_steps, hyper.base_rate)
    target = tuned(copy(base), "target", text.target_document, hyper.tuning_steps, hyper.tuning_rate)
    save(target, CHAT_TEMPLATE, out / "target")
    sft = tuned(copy(base), "sft", text.donor_document, hyper.tuning_steps, hyper.tuning_rate)
    save(sft, DONOR_TEMPLATE, out / "sft")
    grpo = copy(sft)
    rewards = timed("grpo", lambda: reinforce(grpo, donor, Random(f"grpo {seed}"), hyper))
    save(grpo, DONOR_TEMPLATE, out / "grpo")

    family = measure.Family(out, torch.float32)
    accuracy = {
        f"alpha {alpha:g}": {
            name: round(sum(correct) / len(correct), 4)
            for name, score in measure.SCORES.items()
            for correct in [score(family.at(alpha), family.tokenizer, None)]
        }
        for alpha in (-1.0, 0.0, 1.0)
    }
    for name, model in (("sft", sft), ("grpo", grpo)):
        correct = measure.sums(model.eval(), donor)
        accuracy[name] = {"sums": round(sum(correct) / len(correct), 4)}
    report = {
        "seed": seed,
        "hyperparameters": asdict(hyper),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "seconds": seconds,
        "accuracy": accuracy,
        "grpo_rewards": [round(reward, 4) for reward in rewards],
    }
    (out / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report["accuracy"], indent=1), seconds, flush=True)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    train_family(options.out, options.seed)


if __name__ == "__main__":
    main()
