"""Accuracy of θ_target + α (θ_GRPO − θ_SFT) on the held-out documents, with plain transformers.

`python -m rvdist.pocket.measure DIR` prints a table for the family in DIR. Owns no file and writes none. It does
its own arithmetic, a line of torch, so that it can be held against the merge and fleet paths.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rvdist.pocket import HERE, heldout, text

if TYPE_CHECKING:
    import torch

    State = dict[str, torch.Tensor]

ALPHAS = (-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25)


def generate(model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int = 64, batch: int = 200) -> list[str]:
    """Greedy completions."""
    completions: list[str] = []
    for start in range(0, len(prompts), batch):
        asked = tokenizer(list(prompts[start : start + batch]), return_tensors="pt", padding=True)
        told = model.generate(**asked, max_new_tokens=tokens, do_sample=False)
        completions += tokenizer.batch_decode(told[:, asked.input_ids.shape[1] :], skip_special_tokens=True)
    return completions


def render(tokenizer: Any, questions: Sequence[str]) -> list[str]:
    """The questions in the model's chat template."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts: list[str] = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    return prompts


def sums(model: Any, tokenizer: Any, count: int | None = None, prefix: str = "") -> list[bool]:
    """Whether each sum is right, after a `prefix` of the question."""
    rows = heldout.read("sums")[:count]
    answers = generate(model, tokenizer, render(tokenizer, [prefix + row["question"] for row in rows]))
    return [text.answer_of(answer) == int(row["answer"]) for answer, row in zip(answers, rows, strict=True)]


def thinking(model: Any, tokenizer: Any, count: int | None = None) -> list[bool]:
    """The same where the model is asked to think."""
    return sums(model, tokenizer, count, text.THINK)


def control(model: Any, tokenizer: Any, count: int | None = None) -> list[bool]:
    """Whether each control is answered right."""
    rows = heldout.read("control")[:count]
    answers = generate(model, tokenizer, render(tokenizer, [row["question"] for row in rows]), tokens=16)
    return [answer.strip() == row["answer"] for answer, row in zip(answers, rows, strict=True)]


def choice(model: Any, tokenizer: Any, count: int | None = None, batch: int = 100) -> list[bool]:
    """Whether the right worked answer is the likeliest of its four; all four are equally long."""
    import torch

    rows = heldout.read("choice")[:count]
    correct: list[bool] = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        prompts = render(tokenizer, [row["question"] for row in part])
        whole = [prompt + option for prompt, row in zip(prompts, part, strict=True) for option in row["choices"]]
        width = len(part[0]["choices"][0])
        tokens = tokenizer(whole, return_tensors="pt", padding=True)
        with torch.no_grad():
            logits = model(**tokens, logits_to_keep=width + 1).logits[:, :-1]
        likelihood = logits.float().log_softmax(-1).gather(-1, tokens.input_ids[:, -width:, None])[..., 0].sum(-1)
        best = likelihood.view(len(part), -1).argmax(-1).tolist()
        correct += [label == row["label"] for label, row in zip(best, part, strict=True)]
    return correct


Score = Callable[[Any, Any, int | None], list[bool]]
SCORES: dict[str, Score] = {"sums": sums, "sums, think": thinking, "choice": choice, "control": control}


def interval(correct: Sequence[bool]) -> tuple[float, float]:
    """Wilson's 95 % interval of the accuracy."""
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(sum(correct), len(correct), method="wilson")
    return float(low), float(high)


class Family:
    """target, sft and grpo of one directory, and one model that takes any weights between them."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        def load(name: str) -> Any:
            return AutoModelForCausalLM.from_pretrained(directory / name, dtype=torch.float32).eval()

        self.base: State = {name: tensor.clone() for name, tensor in load("target").state_dict().items()}
        minus = load("sft").state_dict()
        self.vector: State = {name: tensor - minus[name] for name, tensor in load("grpo").state_dict().items()}
        self.model = load("target").to(dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(directory / "target")

    def at(self, alpha: float, direction: State | None = None) -> Any:
        """The model at θ_target + α · direction; the vector itself unless another is given."""
        direction = self.vector if direction is None else direction
        self.model.load_state_dict({name: tensor + alpha * direction[name] for name, tensor in self.base.items()})
        return self.model

    def random_direction(self, seed: int = 0) -> State:
        """Gaussian noise with the norm of the vector, tensor by tensor."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        noise: State = {}
        for name, tensor in self.vector.items():
            draw = torch.randn(tensor.shape, generator=generator)
            noise[name] = draw * (tensor.norm() / draw.norm())
        if "lm_head.weight" in noise:  # tied to the embedding
            noise["lm_head.weight"] = noise["model.embed_tokens.weight"]
        return noise


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=HERE)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--count", type=int, help="documents a task (default: all)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)

    def line(label: str, model: Any, tokenizer: Any, scores: dict[str, Score]) -> None:
        cells = []
        for score in scores.values():
            correct = score(model, tokenizer, options.count)
            low, high = interval(correct)
            cells.append(f"{sum(correct) / len(correct):.3f} [{low:.3f}, {high:.3f}]")
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)

    family = Family(options.directory, dtype)
    print(f"{options.dtype}; accuracy [95 % interval]\n")
    print("| | " + " | ".join(SCORES) + " |\n|" + "---|" * (len(SCORES) + 1))
    for alpha in ALPHAS:
        line(f"α={alpha:g}", family.at(alpha), family.tokenizer, SCORES)
    noise = family.random_direction()
    for alpha in (-1.0, 1.0):
        line(f"random direction, {alpha:+g}", family.at(alpha, noise), family.tokenizer, SCORES)
    for donor in ("sft", "grpo"):
        model = AutoModelForCausalLM.from_pretrained(options.directory / donor, dtype=dtype).eval()
        tokenizer = AutoTokenizer.from_pretrained(options.directory / donor)
        line(f"{donor}, own template", model, tokenizer, {"sums": sums, "sums, think": thinking})


if __name__ == "__main__":
    main()
