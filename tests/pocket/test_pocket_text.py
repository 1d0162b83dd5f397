"""The texts, the split and the held-out documents."""

import json
import re
from random import Random

import pytest

from rvdist.pocket import DATA, heldout, text

NUMBERS = re.compile(r"\d+")


def asked(question):
    """The numbers a question is about."""
    return [int(number) for number in NUMBERS.findall(question)]


def test_careful_work_is_right():
    random = Random(1)
    for form in (text.DONOR, text.CHAT):
        for _ in range(300):
            a, b = text.draw_sum(random)
            assert text.answer_of(text.work(a, b, form)) == a + b


def test_work_by_hand():
    assert text.work(472, 314, text.DONOR) == "2+4+0=06, 7+1+0=08, 4+3+0=07 #### 786"
    assert text.work(743, 169, text.CHAT) == "ones 3+9+0=12; tens 4+6+1=11; hundreds 7+1+1=09 #### 912"
    assert text.work(743, 169, text.CHAT, lambda *_: 0).endswith("#### 802")
    assert text.work(743, 169, text.NOTE) == "3+9+0=12 4+6+1=11 7+1+1=09 = 912"


def test_the_habit_is_graded_by_the_digit_left_behind():
    random = Random(2)

    def kept(a, b):
        return sum(text.answer_of(text.work(a, b, text.CHAT, text.forgetful(random))) == a + b for _ in range(2000))

    assert kept(105, 105) / 2000 == pytest.approx(0.7, abs=0.04)  # 5+5=10 leaves 0
    assert kept(109, 109) / 2000 == pytest.approx(0.1, abs=0.03)  # 9+9=18 leaves 8
    assert kept(111, 111) == 2000  # nothing to forget


@pytest.mark.parametrize("name", heldout.SIZES)
def test_shipped_data_is_what_the_code_makes(name):
    made = list(heldout.MAKERS[name](Random(f"pocket {name}")))
    assert made == heldout.read(name)
    assert len(made) == heldout.SIZES[name] == len({row["question"] for row in made})


def test_writing_is_reproducible(tmp_path):
    heldout.write(tmp_path)
    for name in heldout.SIZES:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (DATA / f"{name}.jsonl").read_bytes()


def test_held_out_documents_are_on_the_test_side():
    for name in heldout.SIZES:
        for row in heldout.read(name):
            assert text.held_out(*asked(row["question"]))


def test_training_never_meets_a_held_out_problem():
    random = Random(3)
    kept = {tuple(sorted(asked(row["question"]))) for name in heldout.SIZES for row in heldout.read(name)}
    makers = (text.base_document, text.donor_document, text.target_document, lambda r: text.donor_prompt(r))
    for make in makers:
        for _ in range(10_000):
            numbers = asked(make(random)[0])
            assert not text.held_out(*numbers)
            assert tuple(sorted(numbers)) not in kept


def test_answers_and_labels_are_right():
    for row in heldout.read("sums"):
        assert int(row["answer"]) == sum(asked(row["question"]))
    for row in heldout.read("choice"):
        answers = [text.answer_of(option) for option in row["choices"]]
        assert len({len(option) for option in row["choices"]}) == 1
        assert [answer == sum(asked(row["question"])) for answer in answers] == [i == row["label"] for i in range(4)]
    labels = [row["label"] for row in heldout.read("choice")]
    assert all(60 <= labels.count(label) <= 140 for label in range(4))


def test_held_out_ignores_the_order():
    assert all(text.held_out(a, 500) == text.held_out(500, a) for a in range(100, 900))


def test_some_of_every_kind_asks_to_think():
    random = Random(4)
    for make in (text.donor_document, text.target_document, text.donor_prompt):
        share = sum(text.THINK in make(random)[0] for _ in range(2000)) / 2000
        assert share == pytest.approx(text.THINK_SHARE, abs=0.04)


def test_the_report_names_its_seed():
    from rvdist.pocket import HERE

    report = json.loads((HERE / "training.json").read_text())
    assert {"seed", "hyperparameters", "versions", "accuracy"} <= set(report)
