"""What each perturbation keeps: on made-up word problems, and on all of GSM8K's test split where it is at hand."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from rvdist.core.errors import BadInput
from rvdist.evaluate.tasks.perturb import (
    _DISTRACTORS,
    _INSTRUCTIONS,
    EDITS,
    VERSION,
    Perturbation,
    in_words,
    parse,
    split_sentences,
)

LIKE = Path(__file__).with_name("gsm8k_like.jsonl")
GSM8K = Path(__file__).resolve().parents[4] / "shared/benchmarks/gsm8k_test.jsonl"


@pytest.fixture(scope="module", params=[LIKE, GSM8K], ids=["made-up", "gsm8k"])
def problems(request):
    if not request.param.exists():
        pytest.skip("no GSM8K beside the repository")
    rows = [json.loads(line)["question"] for line in request.param.read_text().splitlines()]
    assert len(rows) == {LIKE: 6, GSM8K: 1319}[request.param]
    return rows


def edited(problems, name, seed=0, rate=None):
    perturbation = Perturbation(name, rate or EDITS[name].rate, seed)
    return [(text, perturbation(text)) for text in problems]


SMALL = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
OTHER = {"zero": 0, "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15}
OTHER |= {"sixteen": 16, "seventeen": 17, "eighteen": 18, "nineteen": 19}
BELOW_100 = rf"(?:{'|'.join(TENS)})(?:-(?:{'|'.join(SMALL)}))?|{'|'.join(OTHER)}|{'|'.join(SMALL)}"
BELOW_1000 = rf"(?:{'|'.join(SMALL)}) hundred(?: and (?:{BELOW_100}))?|{BELOW_100}"
NUMBER = re.compile(rf"\d[\d,]*(?:\.\d+)?(?<!,)(?: hundred\b)?|\b(?:{BELOW_1000})\b", re.I)


def value(written):
    """A number in digits or in words, read independently of how the edit writes it."""
    digits = re.match(r"[\d.,]+", written)
    if digits:
        return float(digits[0].replace(",", "")) * (100 if written.endswith("hundred") else 1)
    total = 0
    for word in re.split(r"[ -]", written.lower().replace(" and", "")):
        if word == "hundred":
            total *= 100
        elif word in TENS:
            total += 20 + 10 * TENS.index(word)
        else:
            total += SMALL.index(word) + 1 if word in SMALL else OTHER[word]
    return float(total)


def quantities(text):
    return [value(match[0]) for match in NUMBER.finditer(text)]


@pytest.mark.parametrize("seed", range(3))
def test_typos_touch_no_number_and_no_name(problems, seed):
    changed = 0
    for text, noisy in edited(problems, "typos", seed, rate=0.5):
        assert quantities(noisy) == quantities(text)
        words, slipped = re.split(r"([\w'’-]+)", text), re.split(r"([\w'’-]+)", noisy)
        assert len(words) == len(slipped)
        for a, b in zip(words, slipped, strict=True):
            assert a == b or (re.fullmatch("[a-z]{4,}", a) and a[0] == b[0] and abs(len(a) - len(b)) <= 1)
            changed += a != b
    eligible = sum(len(re.findall(r"(?<![\w'’-])[a-z]{4,}(?![\w'’-])", text)) for text in problems)
    if len(problems) > 1000:
        assert 0.4 < changed / eligible < 0.5  # some words say a quantity, and two equal letters can be swapped


@pytest.mark.parametrize("seed", range(3))
def test_shuffling_keeps_the_sentences_and_the_last_question(problems, seed):
    moved = 0
    for text, shuffled in edited(problems, "shuffle", seed):
        before, after = split_sentences(text)[0], split_sentences(shuffled)[0]
        assert Counter(before) == Counter(after) and len(text) == len(shuffled)
        asks = max((k for k, s in enumerate(before) if re.search(r"\?[\"”')]*$", s.strip())), default=len(before) - 1)
        assert before[asks:] == after[asks:]
        assert (text != shuffled) == (len(set(before[:asks])) > 1)
        moved += text != shuffled
    assert moved >= len(problems) // 2


@pytest.mark.parametrize("seed", range(3))
def test_a_distractor_is_one_sentence_about_something_else(problems, seed):
    patterns = [re.escape(line).replace(r"\{n\}", r"(\d\d)") for line in _DISTRACTORS]
    for text, longer in edited(problems, "distractor", seed):
        (found,) = [match for pattern in patterns for match in re.finditer(pattern, longer)]
        without = longer[: found.start()] + longer[found.end() :].lstrip(" ")
        assert without.replace(" ", "") == text.replace(" ", "") and longer.endswith(split_sentences(text)[0][-1])
        assert float(found[1]) not in quantities(text)
        words = {word.rstrip("s") for word in re.findall("[a-z]{4,}", text.lower())}
        assert not words & {word.rstrip("s") for word in re.findall("[a-z]{4,}", found[0].lower())}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_numbers_written_otherwise_are_the_same_numbers(problems, seed, rate):
    for text, rewritten in edited(problems, "numbers", seed, rate):
        assert quantities(rewritten) == quantities(text), (text, rewritten)
        assert NUMBER.sub("#", rewritten) == NUMBER.sub("#", text)


def test_an_instruction_stands_before_the_question(problems):
    for text, longer in edited(problems, "instruction"):
        assert longer.removesuffix(" " + text) in _INSTRUCTIONS
    assert not any(quantities(line) for line in _INSTRUCTIONS)


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_depends_on_the_document_the_seed_and_the_rate_alone(problems, name):
    first, again = edited(problems, name), edited(problems[::-1], name)[::-1]
    assert first == again
    assert edited(problems, name, rate=0.5) != edited(problems, name, seed=1, rate=0.5)
    share = sum(a != b for a, b in edited(problems, name, rate=0.01)) / len(problems)
    assert share <= sum(a != b for a, b in first) / len(problems)


def test_choices_in_the_text_stay():
    options = "\nOptions:\n(A) 12 apples are redder. Then 12 pears.\n(B) 1200 apples are greener"
    text = "There are 12 crates and 1200 apples. Every crate was painted. Which apples are meant here?" + options
    for name in EDITS:
        assert Perturbation(name, 1.0, 3)(text).endswith(options) and Perturbation(name, 1.0, 3)(text) != text


def test_sentences_end_where_a_reader_ends_them():
    text = (
        'Mrs. Ek meets J. Lind at 9 a.m. on Oak St. near "Bar 12". She says, "Wait. 5 more." (He waits. So what?) Why?'
    )
    sentences, gaps = split_sentences(text)
    assert sentences == [
        'Mrs. Ek meets J. Lind at 9 a.m. on Oak St. near "Bar 12".',
        'She says, "Wait. 5 more."',
        "(He waits. So what?)",
        "Why?",
    ]
    assert gaps == [" "] * 3


def test_words_are_the_number():
    assert [value(in_words(number)) for number in range(1000)] == list(range(1000))


@pytest.mark.parametrize(
    ("text", "rewritten"),
    [
        ("8 cats and 12 dogs.", "Eight cats and twelve dogs."),
        ("He has 1200 of $3000, $1,500 and 45$.", "He has 1,200 of $3,000, $1500 and 45$."),
        (
            "In 1998 at 7:30, 50% of 3/4, 2.5 or -4; 5kg, 6-packs",
            "In 1998 at 7:30, 50% of 3/4, 2.5 or -4; 5kg, 6-packs",
        ),
        ("100 and 5 more, 2 one-litre jars, 3 + 4", "100 and 5 more, 2 one-litre jars, 3 + 4"),
        ("Is it 0? 007 is not.", "Is it zero? 007 is not."),
    ],
)
def test_which_numbers_are_rewritten(text, rewritten):
    assert Perturbation("numbers", 1.0, 0)(text) == rewritten


def test_no_typo_makes_or_breaks_a_number():
    text = "tent none weight freight often done sevens height " * 40
    noisy = set(re.findall(r"\w+", Perturbation("typos", 1.0, 0)(text)))
    assert "none" in noisy and noisy.isdisjoint({"ten", "one", "eight", "seven"})


def test_a_change_of_the_edits_has_a_version():
    """Scores of perturbed tasks can be compared only at equal texts: raise VERSION with these digests."""
    texts = [json.loads(line)["question"] for line in LIKE.read_text().splitlines()]
    said = json.dumps([Perturbation(name, 0.7, seed)(text) for name in EDITS for seed in range(5) for text in texts])
    assert (VERSION, hashlib.sha256(said.encode()).hexdigest()[:16]) == (1, "6e8c331b79a83e58")


@pytest.mark.parametrize(
    ("name", "task", "perturbation"),
    [
        ("gsm8k", "gsm8k", None),
        ("gsm8k+typos", "gsm8k", Perturbation("typos", 0.1, 0)),
        ("gsm8k+shuffle:0.5", "gsm8k", Perturbation("shuffle", 0.5, 0)),
        ("bbh_zeroshot_snarks+numbers:1:7", "bbh_zeroshot_snarks", Perturbation("numbers", 1.0, 7)),
    ],
)
def test_names_say_edit_rate_and_seed(name, task, perturbation):
    assert parse(name) == (task, perturbation)


@pytest.mark.parametrize("name", ["+typos:0", "+typos:1.5", "+typos:x", "+typos:nan", "+typos:0.1:1.5", "+typos:1:2:3"])
def test_a_rate_that_is_none_is_refused(name):
    with pytest.raises(BadInput, match=r"a perturbation is written \+typos:RATE:SEED"):
        parse("gsm8k" + name)


def test_an_unknown_edit_is_refused():
    with pytest.raises(BadInput, match=r"no perturbation 'typo'; did you mean gsm8k\+typos\?"):
        parse("gsm8k+typo")
    with pytest.raises(BadInput, match="there are typos, shuffle, distractor, numbers, instruction"):
        parse("gsm8k+")
