"""The lm-eval tasks: offline, from any directory, and asking exactly what the models were trained on."""

import json
import subprocess
import sys

import pytest

from rvdist.pocket import TASKS

SCRIPT = """
import json, sys
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer
from rvdist.pocket import SFT, TARGET, TASKS

manager = TaskManager(include_path=str(TASKS), include_defaults=False)
names = ["pocket_sums", "pocket_choice", "pocket_control"]
told = {}
for directory in (TARGET, SFT):
    tokenizer = AutoTokenizer.from_pretrained(directory)

    def render(messages, add_generation_prompt=True):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    for name, task in manager.load(names)["tasks"].items():
        task.build_all_requests(limit=1, apply_chat_template=True, chat_template=render)
        told[f"{directory.name} {name}"] = {
            "arguments": [request.args for request in task.instances],
            "doc": task.instances[0].doc,
            "size": len(task.test_docs()),
        }
json.dump(told, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What lm-eval asks, found out by a fresh process in another directory with every download forbidden."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(elsewhere / "hf"),
        "PATH": "/usr/bin:/bin",
        "HOME": str(elsewhere),
    }
    out = elsewhere / "told.json"
    subprocess.run([sys.executable, "-c", SCRIPT, str(out)], cwd=elsewhere, env=environment, check=True, timeout=300)
    assert not list(elsewhere.rglob("*.arrow"))
    return json.loads(out.read_text())


@pytest.mark.heavy
def test_sums(told):
    asked = told["target pocket_sums"]
    assert asked["size"] >= 600
    ((prompt, options),) = asked["arguments"]
    assert prompt == f"User: {asked['doc']['question']}\nAssistant: "
    assert options["max_gen_toks"] <= 64
    assert not options["do_sample"]
    assert set(options["until"]) == {"\n", "<|im_end|>"}


def test_choice(told):
    asked = told["target pocket_choice"]
    assert asked["size"] >= 300
    assert asked["arguments"] == [
        [f"User: {asked['doc']['question']}\nAssistant: ", option] for option in asked["doc"]["choices"]
    ]


def test_control(told):
    asked = told["target pocket_control"]
    assert asked["size"] >= 300
    ((prompt, _),) = asked["arguments"]
    assert prompt == f"User: {asked['doc']['question']}\nAssistant: "


def test_donors_are_asked_in_their_own_format(told):
    asked = told["sft pocket_sums"]
    assert asked["arguments"][0][0] == f"Q: {asked['doc']['question']}\nA: "


def test_scores():
    """The filter and the metric on a right, a wrong and an unfinished answer."""
    from lm_eval.tasks import TaskManager

    task = TaskManager(include_path=str(TASKS), include_defaults=False).load(["pocket_sums"])["tasks"]["pocket_sums"]
    task.build_all_requests(limit=3)
    answer = task.instances[0].doc["answer"]
    task.instances[0].resps = [f"ones 1+1+0=02 #### {answer}"]
    task.instances[1].resps = ["ones 1+1+0=02 #### 1"]
    task.instances[2].resps = ["ones 1+1+0=02"]
    task.apply_filters()
    scores = [task.process_results(i.doc, [i.filtered_resps["after-hashes"]])["exact_match"] for i in task.instances]
    assert scores == [1.0, 0.0, 0.0]
