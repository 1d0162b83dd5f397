from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_up import make_arm, make_experiment, make_records, make_task

from rvdist.report.page import write_page
from rvdist.report.plot import alpha_plot
from rvdist.report.samples import CHOSEN, UNCHANGED, choose_samples
from rvdist.report.statistics import summarise

HOSTILE = (
    "<script>alert(1)</script></script><script>document.title='owned'</script>]]><!--<img src=x onerror=alert(2)>"
    "\u202egnp.exe\u2066\x00\u2028&lt;i&gt;\ud800{{ 7 * 7 }}\"'"
)
LONG = "x" * 100_000
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def write(path: Path, arms, records, tasks, baseline="baseline", **changes) -> str:
    rows = summarise(arms, records, tasks, baseline)
    given = {
        "title": "A report",
        "command": "python -m rvdist.launch",
        "digests": {arm.name: "d1935700" for arm in arms},
        "plot_png": alpha_plot(rows),
        "versions": {"rvdist": "0.1.0"},
        "timing": {"generate": 12.5},
        "notes": [],
    }
    write_page(path, rows=rows, arms=arms, records=records, tasks=tasks, **(given | changes))
    return path.read_text(encoding="utf-8")


def hostile_page(path: Path) -> str:
    arms = [make_arm("baseline", 0.0), make_arm(f"arm {HOSTILE}", 1.0)]
    task = make_task(f"task {HOSTILE}")
    records = []
    for arm, scores in zip(arms, ([0.0, 1.0, 1.0], [1.0, 0.0, 1.0]), strict=True):
        made = make_records(arm.name, scores, task.name, response=HOSTILE, prompt_text=HOSTILE)
        records += [replace(made[0], filtered=HOSTILE, target=HOSTILE), replace(made[1], response=LONG), made[2]]
    return write(
        path, arms, records, [task], title=HOSTILE, command=HOSTILE, notes=[HOSTILE], versions={HOSTILE: HOSTILE},
        timing={HOSTILE: 1.0}, digests={arm.name: HOSTILE for arm in arms},
    )  # fmt: skip


class Elements(HTMLParser):
    """The start tags of a document, and the text of its JSON data."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        if self.tags and self.tags[-1] == ("script", {"type": "application/json", "id": "data"}):
            self.data += text


def test_hostile_text_adds_no_element(tmp_path):
    page = Elements(hostile_page(tmp_path / "report.html"))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 2 and tags.count("img") == 1
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    texts = json.loads(page.data)["texts"]
    assert HOSTILE in texts  # the data are whole: escaped, not filtered
    assert max(map(len, texts)) < 7000 and any("characters left out" in text for text in texts)


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    html = write(tmp_path / "report.html", *make_experiment(n=30))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for _, attributes in Elements(html).tags:
        assert (attributes.get("src") or "data:").startswith("data:") and "href" not in attributes
        assert "style" not in attributes  # the policy would drop it


def test_says_what_changed_and_how_it_was_made(tmp_path):
    arms, records, tasks = make_experiment()
    html = write(tmp_path / "report.html", arms, records, tasks, notes=["Three prompts were refused."])
    text = re.sub(r"<[^>]*>", "", html)
    assert "comparisons with “baseline”" in text and "rose by" in text
    assert "θ = org/target\n" in text  # α = 0 is the target itself
    assert "θ = org/target + 0.5 · (org/grpo − org/sft)" in text and "θ = org/grpo" in text
    for said in (
        "python -m rvdist.launch",
        "d1935700",
        "generate",
        "12.5 s",
        "Three prompts were refused.",
        "often go unseen",
    ):
        assert said in text


def test_flips_come_first_and_the_rest_is_counted():
    theirs = [1.0] * 50 + [0.0] * 50
    ours = [0.0] * 3 + [1.0] * 47 + [1.0] * 5 + [0.0] * 45
    records = make_records("baseline", theirs) + make_records("α=1", ours)
    chosen = choose_samples(records, [make_task()], ["baseline", "α=1"], "baseline")
    [task] = chosen["tasks"]
    kinds = [kind for _, kind in task["pairs"]["α=1"]]
    assert kinds == ["worse"] * 3 + ["better"] * 5 + ["same"] * UNCHANGED
    assert task["left_out"] == {"α=1": {"flipped": 0, "same": 92 - UNCHANGED}}
    assert set(task["answers"]) == {"baseline", "α=1"}
    [lower] = choose_samples(records, [make_task(higher_is_better=False)], ["α=1"], "baseline")["tasks"]
    assert [kind for _, kind in lower["pairs"]["α=1"]][:3] == ["better"] * 3


def test_many_flips_are_bounded():
    n = 3 * CHOSEN
    records = make_records("baseline", [0.0] * n) + make_records("α=1", [1.0] * n)
    [task] = choose_samples(records, [make_task()], ["baseline", "α=1"], "baseline")["tasks"]
    documents = [doc for doc, _ in task["pairs"]["α=1"]]
    assert len(documents) == CHOSEN and task["left_out"]["α=1"]["flipped"] == n - CHOSEN
    assert documents[-1] > f"gsm8k-{n - 10:05d}"  # spread over the task, not its beginning


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
class TestInBrowser:
    def dom(self, path: Path, tmp_path: Path) -> str:
        flags = "headless no-sandbox disable-gpu disable-background-networking disable-component-update disable-sync"
        flags += " no-first-run virtual-time-budget=5000 dump-dom"
        command = [
            CHROMIUM,
            *(f"--{flag}" for flag in flags.split()),
            f"--user-data-dir={tmp_path / 'browser'}",
            path.as_uri(),
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

    def test_hostile_samples_are_shown_as_text(self, tmp_path):
        path = tmp_path / "report.html"
        hostile_page(path)
        html = self.dom(path, tmp_path)
        tags = [tag for tag, _ in Elements(html).tags]
        assert tags.count("script") == 2 and tags.count("img") == 1 and "<title>owned" not in html
        assert tags.count("article") == 3
        shown = re.search(r'<div id="list">(.*?)</section>', html, re.S)[1]
        assert (
            "&lt;script&gt;alert(1)&lt;/script&gt;" in shown
            and "⟨U+202E⟩" in shown
            and "⟨U+0000⟩" in shown
            and "⟨U+D800⟩" in shown
        )
        assert "wrong → right" in shown and "right → wrong" in shown and "unchanged, right" in shown
        assert "characters left out" in shown

    def test_thousands_of_samples_are_shown_twenty_at_a_time(self, tmp_path):
        n = 2500
        arms = [make_arm("baseline", 0.0), make_arm("α=1", 1.0)]
        records = make_records("baseline", [0.0] * n) + make_records("α=1", [1.0] * n)
        path = tmp_path / "report.html"
        write(path, arms, records, [make_task()])
        html = self.dom(path, tmp_path)
        assert [tag for tag, _ in Elements(html).tags].count("article") == 20
        assert "2000 documents; in samples/ but not here: 500 that flipped" in html and "1 of 100" in html

    def test_without_a_baseline_each_arm_stands_alone(self, tmp_path):
        path = tmp_path / "report.html"
        write(path, [make_arm("α=1", 1.0)], make_records("α=1", [1.0, 0.0]), [make_task()], baseline=None)
        html = self.dom(path, tmp_path)
        assert [attributes.get("class") for _, attributes in Elements(html).tags].count("answer") == 2
