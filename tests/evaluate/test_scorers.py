"""Scoring beside: in processes that have the tasks too, to the bit what it is here, and here where they cannot."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import POCKET

from rvdist.core.point import Arm, WeightPoint
from rvdist.evaluate import scorers as module
from rvdist.evaluate.asking import Asking
from rvdist.evaluate.request import Completion, Generate, Loglikelihood
from rvdist.evaluate.scorers import Scorers
from rvdist.evaluate.suite import Suite
from rvdist.evaluate.tokenizer import load_tokenizer
from rvdist.evaluate.transcript import document_hash

ARMS = [Arm(f"alpha={k}", WeightPoint("t"), alpha=float(k)) for k in range(3)]
COUNTING = """
from pathlib import Path
HERE = Path(__file__).parent
def text(doc):
    with open(HERE / "asked", "a") as file:
        file.write(".")
    return doc["question"] + {words}
"""


def asking_of(suite):
    tokenizer = load_tokenizer(POCKET / "target", suite.chat)
    return Asking("serving", "tensors", suite, tokenizer, suite.requests(tokenizer))


def answers_of(asking, arm):
    """Some right, some wrong, others at every arm."""
    return {
        task: [
            Completion(f"12 = {k % 7 + int(arm.alpha)} #### {k}", "stop", 9, 9)
            if isinstance(request, Generate)
            else Loglikelihood(-1.0 - (k * 7 + int(arm.alpha)) % 5, True, 2)
            for k, request in enumerate(asked)
        ]
        for task, asked in asking.requests.items()
    }


def score_all(asking, scorers):
    scored = [scorers.submit(scorers.score, asking, arm, "digest", answers_of(asking, arm), 0) for arm in ARMS]
    return [written(*one.result()) for one in scored]


def written(results, records):
    """As a run directory has them."""
    return json.dumps(results, default=str), [repr(record) for record in records]


def here(asking):
    return [
        written(*asking.suite.score(arm, "digest", asking.tokenizer, asking.requests, answers_of(asking, arm), 0))
        for arm in ARMS
    ]


def counting_task(folder, words="''"):
    (folder / "asked.json").write_text(json.dumps([{"question": f"{k}+1?", "answer": str(k)} for k in range(4)]))
    (folder / "counting.py").write_text(COUNTING.format(words=words))
    (folder / "counted.yaml").write_text(
        "task: counted\ndataset_path: json\ntest_split: test\noutput_type: generate_until\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'asked.json'}}}}}\n"
        "doc_to_text: !function counting.text\ndoc_to_target: answer\nmetric_list: [{metric: exact_match}]\n"
        "metadata: {version: 1}\n"
    )
    return Suite.load(["counted"], folder, chat=False)


def test_prompts_are_built_once_for_all_arms(tmp_path):
    """lm-eval's own evaluation builds them anew each time."""

    def built():
        """How many prompts, since this was last asked."""
        count = len((tmp_path / "asked").read_text())
        (tmp_path / "asked").write_text("")
        return count

    suite = counting_task(tmp_path)
    built()
    asking = asking_of(suite)
    assert built() == 4
    before = here(asking)
    assert built() == 0
    suite.requests(load_tokenizer(POCKET / "target", False))  # another tokenizer: they are built for that
    assert built() == 4
    assert here(asking) == before
    assert built() == 4


SPOILING = """
def results(doc, answers):
    right = float(answers[0].endswith(doc["answer"]))
    doc["answer"] = "spoiled"
    return {"acc": right}
"""


def test_documents_are_read_once_for_all_arms(tmp_path, monkeypatch):
    """And a metric that writes into its own changes no other arm's."""
    from datasets import Dataset

    counting_task(tmp_path)
    (tmp_path / "spoiling.py").write_text(SPOILING)
    with open(tmp_path / "counted.yaml", "a") as file:
        file.write("process_results: !function spoiling.results\n")
    suite = Suite.load(["counted"], tmp_path, chat=False)
    asking = asking_of(suite)
    monkeypatch.setattr(Dataset, "__iter__", None)
    monkeypatch.setattr(Dataset, "__getitem__", None)
    _, first = asking.suite.score(ARMS[0], "d", asking.tokenizer, asking.requests, answers_of(asking, ARMS[0]), 0)
    _, second = asking.suite.score(ARMS[0], "d", asking.tokenizer, asking.requests, answers_of(asking, ARMS[0]), 0)
    assert first == second and [record.metrics["acc"] for record in first] == [1.0] * 4


def test_documents_are_hashed_once_for_all_arms_as_lm_eval_hashes_them(tmp_path, monkeypatch):
    from lm_eval import evaluator

    suite = counting_task(tmp_path)
    asking, tasks = asking_of(suite), suite.tasks
    _, first = suite.score(ARMS[0], "d", asking.tokenizer, asking.requests, answers_of(asking, ARMS[0]), 0)
    assert [record.doc for record in first] == [document_hash(doc) for doc in tasks["counted"].eval_docs]
    hash_text = evaluator.hash_string
    monkeypatch.setattr(evaluator, "json", None)  # nothing is written again
    _, second = suite.score(ARMS[0], "d", asking.tokenizer, asking.requests, answers_of(asking, ARMS[0]), 0)
    assert first == second and all(type(record.doc) is str for record in second)
    monkeypatch.undo()
    assert evaluator.json is json and evaluator.hash_string is hash_text


@pytest.fixture
def in_a_process(monkeypatch):
    monkeypatch.setattr(module, "_WORTH", 0)
    monkeypatch.setattr(module, "_MOST", 1)


def test_a_process_scores_to_the_bit_what_is_scored_here_and_another_one_is_not_missed(in_a_process, monkeypatch):
    asking = asking_of(Suite.load(["pocket_sums", "pocket_choice", "pocket_control"], limit=20))
    expected = here(asking)
    monkeypatch.setattr(module, "_TOGETHER", 7)
    with Scorers(1) as scorers:
        scorers.expect(asking)
        monkeypatch.setattr(Suite, "score", None)  # here nothing is scored
        assert score_all(asking, scorers) == expected
        monkeypatch.undo()
        scorers._processes[0]._process.kill()
        assert score_all(asking, scorers) == expected
        pid = scorers._processes[0]._process.pid
    assert not Path(f"/proc/{pid}").exists()


def test_when_nothing_else_is_to_be_done_here_arms_are_scored_here_too(in_a_process, tmp_path):
    asking = asking_of(counting_task(tmp_path))
    with Scorers(1) as scorers:
        busy = scorers._idle.get()
        scorers.take_part()
        assert score_all(asking, scorers) == here(asking)
        scorers._idle.put(busy)
        assert not busy._numbers, "it was not asked"


def test_a_process_that_would_ask_otherwise_is_not_used(in_a_process, tmp_path):
    asking = asking_of(counting_task(tmp_path))
    expected = here(asking)
    (tmp_path / "counting.py").write_text(COUNTING.format(words="' Think.'"))
    with Scorers(1) as scorers:
        scored = score_all(asking, scorers)
        assert [records for _, records in scored] == [records for _, records in expected]  # results show the code
        assert scorers._processes[0]._serves == {asking: False}


def test_a_process_is_expected_to_load_several_and_scores_each(in_a_process):
    askings = [asking_of(Suite.load(["pocket_sums"], limit=limit)) for limit in (3, 5, 7)]
    expected = [here(asking) for asking in askings]
    with Scorers(1) as scorers:
        for asking in askings:
            scorers.expect(asking)
        assert [score_all(asking, scorers) for asking in askings] == expected
        assert list(scorers._processes[0]._serves.values()) == [True] * 3


def test_a_process_scores_on_while_what_it_scored_is_read(in_a_process, monkeypatch):
    """It is asked for an arm before the records of the last one are read."""
    asking = asking_of(Suite.load(["pocket_sums"], limit=20))
    expected = here(asking)
    monkeypatch.setattr(module, "_TOGETHER", 5)
    asked = threading.Event()
    read, ask = module._read, module._Process._ask

    def read_late(pipe):
        if isinstance(heard := read(pipe), list):  # records
            assert asked.wait(60)
        return heard

    def note(*given):
        arms.append(None)
        if len(arms) == 2:
            asked.set()
        return ask(*given)

    arms = []
    monkeypatch.setattr(module, "_read", read_late)
    monkeypatch.setattr(module._Process, "_ask", note)
    with Scorers(1) as scorers:
        assert score_all(asking, scorers) == expected


def test_few_answers_are_scored_here(tmp_path):
    asking = asking_of(counting_task(tmp_path))
    with Scorers(12) as scorers:
        scorers.expect(asking)
        assert score_all(asking, scorers) == here(asking) and not scorers._processes


KILLED = """
import os, signal, sys, time
from rvdist.evaluate import scorers
scorers._WORTH, scorers._MOST = 0, 1
pool = scorers.Scorers(1)
print(pool._processes[0]._process.pid, flush=True)
time.sleep(60)
"""


def test_a_process_ends_with_a_command_that_is_killed():
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True) as command:
        pid = int(command.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        os.kill(command.pid, signal.SIGKILL)
    until = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("walls", [None, "strict"])
def test_the_collector_waits_while_an_arm_is_scored_unless_its_code_is_run(walls):
    found = []

    def score(*given):
        found.append(gc.isenabled())
        raise KeyError("whatever happens")

    asking = SimpleNamespace(suite=SimpleNamespace(walls=walls, score=score), tokenizer=None, requests={})
    with Scorers(1) as pool, pytest.raises(KeyError):
        pool.score(asking, None, "", {}, 0)
    assert found == [walls is not None] and gc.isenabled()
