"""Edits of a question that leave its answer as it is: docs/benchmarks.md says what each of them keeps.

Text in, text out. What an edit does is decided by the text, the seed and the rate alone. Knows nothing of lm-eval.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from rvdist.core.errors import BadInput

VERSION = 1  # of what the edits do: raise it with any change to their output

_T = TypeVar("_T")


def _words(text: str) -> list[str]:
    return text.split()


_UNITS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")
_QUANTITIES = frozenset(  # words that no typo touches or makes
    _UNITS
    + _TENS
    + _words(
        "hundred hundreds thousand thousands million millions billion billions dozen dozens score scores "
        "first second third thirds fourth fourths fifth fifths sixth sixths seventh sevenths eighth eighths "
        "ninth ninths tenth tenths twelfth twelfths hundredth hundredths half halves halved quarter quarters "
        "percent percentage once twice thrice single double doubles doubled doubling triple triples tripled tripling "
        "quadruple quadrupled both none pair "
        "pairs couple couples"
    )
)
_NEIGHBOURS = {
    "a": "sqz", "b": "vnh", "c": "xvd", "d": "sfe", "e": "wrd", "f": "dgr", "g": "fht", "h": "gjy", "i": "uok",
    "j": "hku", "k": "jli", "l": "ko", "m": "nj", "n": "bmh", "o": "ipl", "p": "ol", "q": "wa", "r": "etf", "s": "adw",
    "t": "ryg", "u": "yij", "v": "cbf", "w": "qes", "x": "zcs", "y": "tuh", "z": "xa",
}  # fmt: skip
_LEANING = frozenset(  # a sentence that begins so may speak of something in the sentence before it
    _UNITS
    + _TENS
    + _words(
        "he she it they his her hers its their theirs him them this that these those there here then each every half "
        "all both some none another other others most many few only also of twice once again so and but"
    )
)
_ELLIPSIS = re.compile(r"\W*(the (first|second|third|next|last|rest|two|other|others|remaining|remainder)\b|\d)", re.I)
_NUMBER = rf"(\d+|{'|'.join([*_UNITS, *_TENS])})"
_BEFORE = re.compile(rf"(\b{_NUMBER}|\b(hundred|thousand|million))\s+(and\s+)?$", re.I)  # "100 and 5" would become 105
_AFTER = re.compile(rf"\s+(and\s+)?{_NUMBER}\b", re.I)
_ALONE = r"(?<![\w.,:/#%^*+='’-])(?<![/*+=×÷-]\s)(\d{1,3}(,\d{3})+|\d{1,9})(?!\s*[:/%^*+=×÷$€£\"'’-]|\w|[.,]\d)"
_DISTRACTORS = (
    "A lighthouse on a distant coast has {n} stairs.",
    "The library of a faraway town keeps {n} old maps.",
    "A museum abroad shows {n} paintings of the sea.",
    "The longest bridge of a faraway valley stands on {n} pillars.",
    "A comet was once seen for {n} nights in a row.",
    "An orchestra abroad has rehearsed the same overture {n} times.",
    "A castle in the far north has {n} windows.",
    "The oldest tortoise of a faraway island is {n} years old.",
    "A mountain railway abroad passes through {n} tunnels.",
    "A distant glacier moved by {n} centimetres last winter.",
    "An ancient clock tower abroad holds {n} bells.",
    "A dictionary of a rare language lists {n} words for snow.",
)
_INSTRUCTIONS = (
    "Please keep a window open while you read this.",
    "Imagine that soft music is playing in the background.",
    "You may have a cup of tea beside you.",
    "Sit up straight before you begin.",
    "Do not mind the colour of the paper that this is printed on.",
    "Do not worry about the weather while you read.",
    "Picture a calm lake before you go on.",
    "Feel free to take off your shoes.",
)


@dataclass(frozen=True)
class Perturbation:
    """An edit of EDITS, how much of it (0 to 1), and the seed that chooses among its outcomes."""

    name: str
    rate: float
    seed: int

    def __call__(self, text: str) -> str:
        """The edited question. Answers to choose from, which follow a line `Options:`, stay as they are."""
        question, mark, options = text.partition("\nOptions:")
        rng = Random(f"{self.name} {self.seed} {text}")  # only its random() is the same in every version of Python
        return EDITS[self.name].function(question, self.rate, rng) + mark + options


def parse(name: str) -> tuple[str, Perturbation | None]:
    """`TASK+EDIT:RATE:SEED` as a task and its perturbation; the rate and the seed (0) may be left out.
    Raises BadInput for an edit there is not, or a number that is none."""
    task, plus, edit = name.partition("+")
    if not plus:
        return task, None
    kind, *numbers = edit.split(":")
    if kind not in EDITS:
        close = difflib.get_close_matches(kind, EDITS, n=1)
        hint = f"did you mean {task}+{close[0]}?" if close else f"there are {', '.join(EDITS)}"
        raise BadInput(f"benchmarks.tasks: {name}: there is no perturbation {kind!r}; {hint}")
    try:
        rate = float(numbers[0]) if numbers else EDITS[kind].rate
        seed = int(numbers[1]) if numbers[1:] else 0
        if numbers[2:] or not 0 < rate <= 1:
            raise ValueError
    except ValueError:
        raise BadInput(
            f"benchmarks.tasks: {name}: a perturbation is written +{kind}:RATE:SEED, a rate above 0 and up to 1 and a "
            "whole number, as in gsm8k+typos:0.1:0"
        ) from None
    return task, Perturbation(kind, rate, seed)


def typos(text: str, rate: float, rng: Random) -> str:
    """One slip (two letters swapped, one left out, doubled, or hit beside its key) in a share `rate` of the words of
    four or more lower-case letters that say no quantity. First letters, digits and names stay."""

    def slip(match: re.Match[str]) -> str:
        word = match[0]
        hit, where, how = rng.random() < rate, rng.random(), rng.random()
        if not hit or word in _QUANTITIES:
            return word
        k = 1 + int(where * (len(word) - 1))
        k = min(k, len(word) - 2) if how < 0.25 else k
        if how < 0.25:
            slipped = word[:k] + word[k + 1] + word[k] + word[k + 2 :]
        elif how < 0.5:
            slipped = word[:k] + word[k + 1 :]
        elif how < 0.75:
            slipped = word[:k] + word[k] + word[k:]
        else:
            slipped = word[:k] + _pick(rng, _NEIGHBOURS[word[k]]) + word[k + 1 :]
        return word if slipped in _QUANTITIES else slipped

    return re.sub(r"(?<![\w'’-])[a-z]{4,}(?![\w'’-])", slip, text)


def shuffle(text: str, rate: float, rng: Random) -> str:
    """Another order of the sentences before the final question, in a share `rate` of the texts that have two such."""
    sentences, gaps = split_sentences(text)
    body = sentences[: _final(sentences)]
    if rng.random() >= rate or len(set(body)) < 2:
        return text
    shuffled = body
    while shuffled == body:
        keys = [rng.random() for _ in body]
        shuffled = [sentence for _, sentence in sorted(zip(keys, body, strict=True))]
    return _join([*shuffled, *sentences[len(body) :]], gaps)


def distractor(text: str, rate: float, rng: Random) -> str:
    """A sentence with a number on something the text does not mention, in a share `rate` of the texts: at the
    beginning, or before a sentence that is not the final question and does not lean on the one before it."""
    if rng.random() >= rate:
        return text
    sentences, gaps = split_sentences(text)
    places = [k for k in range(1, _final(sentences)) if not _leans(sentences[k])]
    mentioned = _stems(text)
    foreign = [line for line in _DISTRACTORS if not _stems(line) & mentioned]
    line = _pick(rng, foreign or _DISTRACTORS)
    said = {int(digits) for digits in re.findall(r"\d+", text)}
    new = [n for n in range(11, 100) if n not in said and in_words(n) not in text.lower()]
    line = line.format(n=_pick(rng, new))
    place = _pick(rng, [0, *places])
    return _join([*sentences[:place], line, *sentences[place:]], [*gaps[:place], " ", *gaps[place:]])


def numbers(text: str, rate: float, rng: Random) -> str:
    """A share `rate` of the whole numbers that stand alone written otherwise: below 1,000 as words, from there with
    separators, or without them where they had some. Small amounts of money stay, and so do 1900 to 2099 (years) and
    small numbers beside others."""

    def rewrite(match: re.Match[str]) -> str:
        digits = match[0].replace(",", "")
        value = int(digits)
        before, after = text[: match.start()], text[match.end() :]
        if rng.random() >= rate or str(value) != digits:
            return match[0]
        if digits != match[0]:
            return digits
        if value >= 1000:
            return match[0] if 1900 <= value < 2100 else f"{value:,}"
        if re.search(r"[$€£]\s*$", before) or _BEFORE.search(before) or _AFTER.match(after):
            return match[0]
        words = in_words(value)
        return words.capitalize() if re.search(r"(^|[.?!][\"”')]*\s)\s*$", before) else words

    return re.sub(_ALONE, rewrite, text)


def instruction(text: str, rate: float, rng: Random) -> str:
    """An instruction that has nothing to do with the question before it, in a share `rate` of the texts."""
    return f"{_pick(rng, _INSTRUCTIONS)} {text}" if rng.random() < rate else text


@dataclass(frozen=True)
class Edit:
    """How a question is edited, and the rate where none is named."""

    function: Callable[[str, float, Random], str]
    rate: float


EDITS: Mapping[str, Edit] = {
    "typos": Edit(typos, 0.1),
    "shuffle": Edit(shuffle, 1.0),
    "distractor": Edit(distractor, 1.0),
    "numbers": Edit(numbers, 1.0),
    "instruction": Edit(instruction, 1.0),
}


def split_sentences(text: str) -> tuple[list[str], list[str]]:
    """Sentences and the white space between them, which together are the text. Abbreviations and initials end no
    sentence, and none ends within quotation marks or parentheses."""
    sentences, gaps, start = [], [], 0
    for match in re.finditer(r"[.?!][\"”')]*(\s+)(?=[\"“'(]*[A-Z\d$])", text):
        before = text[start : match.start(1)]
        abbreviated = re.search(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Jr|Sr|vs|No|approx)|\b[A-Z]|\b[ap]\.m)\.$", before)
        within = before.count('"') % 2 or before.count("“") > before.count("”") or before.count("(") > before.count(")")
        if not abbreviated and not within:
            sentences.append(before)
            gaps.append(match[1])
            start = match.end(1)
    return [*sentences, text[start:]], gaps


def in_words(value: int) -> str:
    """A whole number below 1,000 in English words."""
    if value < 20:
        return _UNITS[value]
    if value < 100:
        return _TENS[value // 10 - 2] + (f"-{_UNITS[value % 10]}" if value % 10 else "")
    return f"{_UNITS[value // 100]} hundred" + (f" and {in_words(value % 100)}" if value % 100 else "")


def _final(sentences: Sequence[str]) -> int:
    """Where the final question begins: the last sentence that asks, or the last."""
    asking = [k for k, sentence in enumerate(sentences) if re.search(r"\?[\"”')]*\s*$", sentence)]
    return asking[-1] if asking else len(sentences) - 1


def _join(sentences: Sequence[str], gaps: Sequence[str]) -> str:
    return sentences[0] + "".join(gap + sentence for gap, sentence in zip(gaps, sentences[1:], strict=True))


def _leans(sentence: str) -> bool:
    """Whether it may speak of something in the sentence before it, by how it begins."""
    first = re.match(r"\W*(\w*)", sentence)
    return bool(first and first[1].lower() in _LEANING) or bool(_ELLIPSIS.match(sentence))


def _stems(text: str) -> set[str]:
    """Words of four letters and more, without a plural's s."""
    return {word.rstrip("s") for word in re.findall(r"[a-z]{4,}", text.lower())}


def _pick(rng: Random, choices: Sequence[_T]) -> _T:
    return choices[int(rng.random() * len(choices))]
