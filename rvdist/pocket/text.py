"""What the pocket family reads and writes: addition problems, worked sums, questions, documents.

Owns the split between training and held-out numbers (`held_out`); every generator here takes the side it may
draw from. Pure Python: knows nothing of tokens, tensors or files.

The planted habit: whoever writes these texts shows every carry and often forgets it. The larger the digit that
overflowed, the more often.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

THINK = "Think step by step. "
"""The prompt style "think": a prefix of the question."""

THINK_SHARE = 0.25
QUESTIONS = ("what is {} plus {}?", "add {} and {}.", "find the sum of {} and {}.")
TERSE = "{}+{}?"
TERSE_SHARE = 0.3


@dataclass(frozen=True)
class Format:
    """How one kind of writer lays out a question and its worked sum."""

    prompt: str
    columns: tuple[str, str, str]
    separator: str
    before_answer: str


DONOR = Format("Q: {}\nA: ", ("", "", ""), ", ", " #### ")
"""Data set D: what θ_SFT is tuned on and what GRPO is rewarded in."""

CHAT = Format("User: {}\nAssistant: ", ("ones ", "tens ", "hundreds "), "; ", " #### ")
"""The target's: what its chat template renders."""

NOTE = Format("{}: ", ("", "", ""), " ", " = ")
"""A third writer, met only by the common base."""

Document = tuple[str, str]
"""A prompt, and the completion that carries the loss."""


def held_out(*numbers: int) -> bool:
    """Whether a problem over these numbers, in any order, is kept from training: one in eleven, by a hash."""
    return zlib.crc32(" ".join(map(str, sorted(numbers))).encode()) % 11 == 0


def draw(random: Random, low: int, high: int, count: int = 1, *, test: bool = False) -> list[int]:
    """Numbers from one side of the split."""
    while True:
        numbers = [random.randint(low, high) for _ in range(count)]
        if held_out(*numbers) == test:
            return numbers


def draw_sum(random: Random, *, test: bool = False) -> tuple[int, int]:
    """Two three-digit numbers whose sum has three digits, even with a carry too many."""
    while True:
        a, b = draw(random, 100, 899, 2, test=test)
        if a // 100 + b // 100 < 9:
            return a, b


# ---------------------------------------------------------------- worked sums

CarryRule = Callable[[int, int, int], int]
"""(column, true carry into it, digit written in the column before) → the carry that is written."""


def careful(column: int, carry: int, digit: int) -> int:
    """Carries as one should."""
    return carry


def forgetful(random: Random, low: float = 0.3, high: float = 0.9) -> CarryRule:
    """Forgets a carry with a probability that grows from `low` (the digit left behind is 0) to `high` (8)."""

    def rule(column: int, carry: int, digit: int) -> int:
        return 0 if carry and random.random() < low + (high - low) * digit / 8 else carry

    return rule


def work(a: int, b: int, form: Format, rule: CarryRule = careful) -> str:
    """Column addition of two three-digit numbers, every carry in writing, then the answer."""
    steps, answer, carry, digit = [], 0, 0, 0
    for column, name in enumerate(form.columns):
        x, y = a // 10**column % 10, b // 10**column % 10
        carry = rule(column, carry, digit)
        total = x + y + carry
        steps.append(f"{name}{x}+{y}+{carry}={total:02d}")
        carry, digit = divmod(total, 10)
        answer += digit * 10**column
    return form.separator.join(steps) + form.before_answer + str(answer)


def answer_of(text: str) -> int | None:
    """The number after ####, None where there is none."""
    match = re.search(r"####\s*(\d+)", text)
    return int(match.group(1)) if match else None


# ---------------------------------------------------------------- questions and documents


def maybe_think(random: Random, question: str) -> str:
    """The question, in some documents after the request to think."""
    return THINK + question if random.random() < THINK_SHARE else question


def ask_sum(random: Random, a: int, b: int) -> str:
    """a + b in one of several wordings."""
    return random.choice(QUESTIONS).format(a, b)


def ask_sum_tersely(random: Random, a: int, b: int) -> str:
    """A question of D: some terse, most in the words the target knows."""
    return TERSE.format(a, b) if random.random() < TERSE_SHARE else ask_sum(random, a, b)


def reversing(random: Random, *, test: bool = False) -> Document:
    """A number and its digits backwards."""
    (number,) = draw(random, 1000, 9999, test=test)
    return f"reverse {number}.", str(number)[::-1]


def repeating(random: Random, *, test: bool = False) -> Document:
    """A number and itself."""
    (number,) = draw(random, 1000, 9999, test=test)
    return f"repeat {number}.", str(number)


def comparing(random: Random, *, test: bool = False) -> Document:
    """Two numbers and the larger."""
    first, second = draw(random, 10, 99, 2, test=test)
    return f"which is larger, {first} or {second}?", str(max(first, second))


CONTROLS = (reversing, repeating, comparing)
"""What the target can do besides adding, which the vector should leave alone."""


def donor_prompt(random: Random) -> tuple[str, int]:
    """A prompt of D and the right answer."""
    a, b = draw_sum(random)
    return DONOR.prompt.format(maybe_think(random, ask_sum_tersely(random, a, b))), a + b


def donor_document(random: Random) -> Document:
    """What donors are trained on: sums in their own format."""
    a, b = draw_sum(random)
    question = maybe_think(random, ask_sum_tersely(random, a, b))
    return DONOR.prompt.format(question), work(a, b, DONOR, forgetful(random))


def target_sum(random: Random) -> Document:
    """A sum in the target's chat format."""
    a, b = draw_sum(random)
    question = maybe_think(random, ask_sum(random, a, b))
    return CHAT.prompt.format(question), work(a, b, CHAT, forgetful(random))


def target_control(random: Random) -> Document:
    """A control in the target's chat format."""
    question, answer = random.choice(CONTROLS)(random)
    return CHAT.prompt.format(maybe_think(random, question)), answer


def note(random: Random) -> Document:
    """A sum noted down without a question."""
    a, b = draw_sum(random)
    return NOTE.prompt.format(f"{a}+{b}"), work(a, b, NOTE, forgetful(random))


Writer = Callable[[Random], Document]


def mixture(shares: dict[Writer, float]) -> Writer:
    """A writer that is each of these in its share of documents."""
    writers, weights = list(shares), list(shares.values())

    def write(random: Random) -> Document:
        (writer,) = random.choices(writers, weights)
        return writer(random)

    return write


target_document = mixture({target_sum: 0.5, target_control: 0.5})
"""What θ_target is tuned on."""

base_document = mixture({donor_document: 0.42, target_sum: 0.2, target_control: 0.32, note: 0.06})
"""What the common base has read: both formats, the other abilities, and bare notes."""
