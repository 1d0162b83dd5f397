from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_up import REPORTED, make_arm, make_experiment, make_paper, make_records, make_task, write

from rvdist.report.findings import Anatomy, Exhibit, Findings, Making
from rvdist.report.page.page import _json_for_html, write_page
from rvdist.report.page.samples import choose_samples

HOSTILE = (
    "<script>alert(1)</script></script><script>document.title='owned'</script>]]><!--<img src=x onerror=alert(2)>"
    "\u202egnp.exe\u2066\x00\u2028&lt;i&gt;\ud800{{ 7 * 7 }}\"'"
)
LONG = "x" * 100_000
ROOT = Path(__file__).resolve().parents[3]
BENCHMARK = ROOT / "benchmarks" / "page.py"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def hostile_page(path: Path) -> str:
    arms = [make_arm("baseline", 0.0), make_arm(f"arm {HOSTILE}", 1.0)]
    name = f"task {HOSTILE.replace('+', ' ')}"
    records = []
    for arm, scores in zip(arms, ([0.0, 1.0, 1.0], [1.0, 0.0, 1.0]), strict=True):
        made = make_records(arm.name, scores, name, response=HOSTILE, prompt_text=HOSTILE)
        made = [replace(made[0], filtered=HOSTILE, target=HOSTILE), replace(made[1], response=LONG), made[2]]
        records += made + [replace(record, task=f"{name}+{HOSTILE}") for record in made]
        records += [replace(record, seed=1) for record in made]
    anatomy = Anatomy([HOSTILE], [Exhibit(HOSTILE, b"PNG")], [(HOSTILE, [HOSTILE], [[HOSTILE]])], [HOSTILE])
    return write(
        path, arms, records, [make_task(name), make_task(f"{name}+{HOSTILE}")], title=HOSTILE, command=HOSTILE,
        notes=[HOSTILE], versions={HOSTILE: HOSTILE}, timing={HOSTILE: 1.0},
        digests={arm.name: HOSTILE for arm in arms}, lacking={HOSTILE: HOSTILE},
        reported={name: {arms[1].name: 1.0}}, anatomy=anatomy,
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
    assert tags.count("script") == 2 and tags.count("img") == 2
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


def test_the_papers_layout_with_what_was_reported_and_what_is_lacking(tmp_path):
    arms, records, tasks, groups = make_paper(80)
    lacking = {"humaneval_plus_instruct": "there is no file humaneval_plus"}
    html = write(tmp_path / "report.html", arms, records, tasks, "Baseline", groups, REPORTED, lacking)
    text = re.sub(r"<[^>]*>", "", html)
    assert re.search(r"reported \+4\.9, (in|out)side", text) and "reported −11.8" in text
    assert "humaneval_plus_instruct" in text and "not asked: there is no file humaneval_plus" in text
    assert "The members of groups (4)" in text and "bbh_cot_fewshot_snarks" in text
    for section in ("Results", "Along α", "Edited questions", "Samples", "Weight points"):
        assert f"<h2>{section}</h2>" in html
    assert "all 5 edits" in text and "Between seeds" not in text and "Vector anatomy" not in text
    assert "Between seeds" in write(tmp_path / "seeds.html", *make_paper(20, seeds=2)[:3], "Baseline")  # no groups


def test_a_run_that_scored_nothing_shows_its_vectors(tmp_path):
    png = b"PNG" * 50_000
    table = ("v", ["layer", "norm"], [["0", "1.5"]])
    anatomy = Anatomy(["v is small."], [Exhibit("Layers", png)], [table], ["v may not help."])
    making = Making("Vectors", "python -m rvdist.launch stages=[analyze]", {})
    write_page(tmp_path / "report.html", Findings([], [], [], []), making, {}, anatomy)
    html = (tmp_path / "report.html").read_text()
    assert "v is small." in html and '<p class="lead">v may not help.</p>' in html and "1.5" in html
    assert f"data:image/png;base64,{base64.b64encode(png).decode()}" in html, "a picture is shown whole"
    assert "Samples" not in html and "Results" not in html and "nan" not in html


ARMS = ["baseline", "α=1", "α=2"]


def flips(chosen, task=0):
    """(document, scores by arm) of all that is shown."""
    shown = chosen["tasks"][task]
    answers = zip(*(shown["answers"][arm] for arm in chosen["arms"]), strict=True)
    return [(number, [a and a[0] for a in of]) for (number, _), of in zip(shown["documents"], answers, strict=True)]


def test_every_pair_of_arms_is_counted_whatever_is_shown():
    records = make_records("baseline", [1, 1, 0, 0]) + make_records("α=1", [1, 0, 1, 0]) + make_records("α=2", [0] * 4)
    chosen = choose_samples(records, [make_task()], ARMS, "baseline")
    counts = {
        "0,0": [0, 0, 4],
        "0,1": [1, 1, 2],
        "0,2": [0, 2, 2],
        "1,1": [0, 0, 4],
        "1,2": [0, 2, 2],
        "2,2": [0, 0, 4],
    }
    assert chosen["tasks"][0]["counts"] == counts
    assert flips(chosen) == [(0, [1, 1, 0]), (1, [1, 0, 0]), (2, [0, 1, 0]), (3, [0, 0, 0])]
    lower = choose_samples(records, [make_task(higher_is_better=False)], ARMS, "baseline")["tasks"][0]
    assert lower["counts"]["0,2"] == [2, 0, 2] and not lower["higher_is_better"]


def test_what_flipped_comes_first_when_there_is_too_much():
    n = 400
    theirs, ours = [float(i % 2) for i in range(n)], [float(i % 2) for i in range(n)]
    for i in range(0, n, 20):
        ours[i] = 1.0 - theirs[i]
    records = [
        replace(r, response=f"{r.arm} {r.doc_id} {'x' * 1000}")
        for r in make_records("baseline", theirs) + make_records("α=1", ours)
    ]
    records += make_records("baseline", [1.0] * 3, "small") + make_records("α=1", [1.0] * 3, "small")
    chosen = choose_samples(records, [make_task(), make_task("small")], ARMS[:2], "baseline", characters=100_000)
    shown = flips(chosen)
    assert sum(map(len, chosen["texts"])) < 105_000 and 30 < len(shown) < 60
    assert [number for number, (a, b) in shown if a != b] == list(range(0, n, 20))  # all of them
    same = [number for number, (a, b) in shown if a == b]
    assert min(same) < 100 and max(same) > 300  # spread over the task, not its beginning
    assert len(flips(chosen, 1)) == 3  # a small task is not crowded out


@pytest.mark.parametrize("character", ["中", "🤯", "<", '"', "x", ""])
def test_the_page_is_bounded_whatever_texts_are_made_of(character):
    """Some characters take twelve bytes in it, and answers of none take some as well."""
    n, limit = 3000, 60_000
    records = [replace(r, prompt_text="", filtered="", response=f"{r.doc_id}{character * 200}") for r in made_of(n)]
    chosen = choose_samples(records, [make_task()], ["baseline"], None, characters=limit)
    assert len(_json_for_html(chosen)) < 3.2 * limit
    assert len(chosen["tasks"][0]["documents"]) > 10


def made_of(n):
    return make_records("baseline", [1.0] * n)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_the_page_of_100_000_records_opens_in_3_s():
    line = [sys.executable, str(BENCHMARK), "--browser", CHROMIUM]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    megabytes, seconds = map(float, re.search(r"([\d.]+) MB, loaded after ([\d.]+) s", done.stdout).groups())
    assert megabytes < 50 and seconds < 3


def test_what_prompts_begin_with_is_stored_once():
    made = make_records("baseline", [1.0, 0.0])
    records = [replace(r, prompt_text=f"Examples. {'e' * 500}\nQuestion {r.doc_id}") for r in made]
    chosen = choose_samples(records, [make_task()], ["baseline"], None)
    first, second = chosen["tasks"][0]["answers"]["baseline"]
    assert chosen["texts"][first[1]] + chosen["texts"][first[2]] == records[0].prompt_text
    assert first[1] == second[1] and chosen["texts"][second[2]] == "Question 1"
    assert sum("Examples." in text for text in chosen["texts"]) == 1


def test_an_arm_that_was_asked_less_has_gaps():
    records = make_records("baseline", [1.0, 0.0]) + make_records("α=1", [1.0])
    chosen = choose_samples(records, [make_task()], ARMS[:2], None)
    assert flips(chosen) == [(0, [1, 1]), (1, [0, None])]
    assert chosen["tasks"][0]["counts"]["0,1"] == [0, 0, 1]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
@pytest.mark.heavy
class TestInBrowser:
    def dom(self, path: Path, tmp_path: Path, width: int = 800) -> str:
        flags = "headless no-sandbox disable-gpu disable-background-networking disable-component-update disable-sync"
        flags += " no-first-run virtual-time-budget=5000 dump-dom"
        command = [
            CHROMIUM,
            *(f"--{flag}" for flag in flags.split()),
            f"--user-data-dir={tmp_path / 'browser'}",
            f"--window-size={width},900",
            path.as_uri(),
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

    def test_hostile_samples_are_shown_as_text(self, tmp_path):
        path = tmp_path / "report.html"
        hostile_page(path)
        html = self.dom(path, tmp_path)
        tags = [tag for tag, _ in Elements(html).tags]
        assert tags.count("script") == 2 and tags.count("img") == 2 and "<title>owned" not in html
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

    def test_twenty_thousand_records_are_shown_twenty_at_a_time(self, tmp_path):
        n = 5000
        arms = [make_arm("baseline", 0.0), *(make_arm(f"α={k}", float(k)) for k in (1, 2, 3))]
        records = [
            replace(r, response=f"{r.arm} {r.doc_id}: {'because ' * 100}", prompt_text=f"{'Example. ' * 50}{r.doc_id}")
            for k, arm in enumerate(arms)
            for r in make_records(arm.name, [float(i % 4 < k) for i in range(n)])
        ]
        path = tmp_path / "report.html"
        write(path, arms, records, [make_task()])
        assert path.stat().st_size < 20_000_000
        html = self.dom(path, tmp_path)
        assert [tag for tag, _ in Elements(html).tags].count("article") == 20
        said = re.search(r'<p id="count"[^>]*>gsm8k: (.*?)</p>', html)[1]
        shown, *left_out = [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", said)]
        assert shown > 2000 and shown + sum(left_out) == n, said

    def test_the_page_fits_a_laptop_and_lines_go_through_on_a_phone(self, tmp_path):
        path = tmp_path / "report.html"
        html = write(path, *make_paper(40, members=2, seeds=2)[:3], "Baseline")
        html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
        driver = """
          const all = (what) => [...document.querySelectorAll(what)];
          document.getElementById("where").textContent = JSON.stringify([
            all("section > .scroll").map((box) => box.scrollWidth - box.clientWidth),
            document.documentElement.scrollWidth - innerWidth,
            all(".scores tbody td:first-child").map((cell) => getComputedStyle(cell).borderTopWidth),
            all(".controls select, .controls input").map((field) => field.offsetHeight).filter((height) => height)]);"""
        path.write_text(html.replace("</body>", f"<script>{driver}</script></body>"), encoding="utf-8")
        for width in (1280, 400):
            found = re.search(r'<span id="where">(.*?)</span>', self.dom(path, tmp_path, width))[1]
            wider, beyond, lines, heights = json.loads(found)
            assert (max(wider) <= 0 or width == 400) and beyond <= 0, wider
            assert set(lines) == {"1px"} and len(set(heights)) == 1

    def test_letters_of_a_picture_are_as_large_as_the_pages(self, tmp_path):
        """A single panel is 6.4 inches wide; 9 points are 16 pixels where an inch is 130."""
        path = tmp_path / "report.html"
        html = write(path, *make_experiment(n=20, tasks=1))
        html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
        driver = 'document.getElementById("where").textContent = document.querySelector("figure img").offsetWidth;'
        path.write_text(html.replace("</body>", f"<script>{driver}</script></body>"), encoding="utf-8")
        found = re.search(r'<span id="where">(.*?)</span>', self.dom(path, tmp_path, 1280))[1]
        assert int(found) == pytest.approx(6.4 * 130, abs=2)

    def test_searching_is_quick_and_any_two_arms_are_compared(self, tmp_path):
        """The page's script in a copy without its policy, driven by one of ours."""
        arms, records, tasks, groups = make_paper(400, members=2)
        records = [
            replace(r, response=f"{r.arm} wrote {r.doc_id}: {'because ' * 40}", prompt_text=f"Ask {r.doc_id % 7} now")
            for r in records
        ]
        path = tmp_path / "report.html"
        html = write(path, arms, records, tasks, "Baseline", groups)
        html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
        driver = """
          const find = (id) => document.getElementById(id), said = [];
          const act = (id, value) => {
            const start = performance.now();
            find(id).value = value;
            find(id === "search" ? "task" : id).dispatchEvent(new Event("change"));
            const found = [find("count").textContent, find("list").childElementCount];
            said.push([id, value, ...found, performance.now() - start]);
          };
          act("search", "ASK 3 NOW"); act("search", "nowhere to be found"); act("search", "");
          act("left", 2); act("right", 4); act("change", "worse"); act("left", -1); act("change", "right");
          find("where").textContent = JSON.stringify(said);"""
        path.write_text(html.replace("</body>", f"<script>{driver}</script></body>"), encoding="utf-8")
        said = json.loads(re.search(r'<span id="where">(.*?)</span>', self.dom(path, tmp_path))[1])
        counts = [text.removeprefix("gsm8k: ").partition(" ")[0] for _, _, text, _, _ in said]
        scores = {
            arm.name: [r.metrics["exact_match"] for r in records if (r.arm, r.task) == (arm.name, "gsm8k")]
            for arm in arms
        }
        worse = sum(b < a for a, b in zip(scores["+Vector"], scores["−Vector"], strict=True))
        right = int(sum(scores["−Vector"]))
        assert counts == ["57", "0", "400", "400", "400", str(worse), "400", str(right)]
        assert [articles for *_, articles, _ in said][:3] == [20, 0, 20]
        assert max(milliseconds for *_, milliseconds in said) < 3000  # on a busy machine; 50 on a quiet one

    def test_without_a_baseline_each_arm_stands_alone(self, tmp_path):
        path = tmp_path / "report.html"
        write(path, [make_arm("α=1", 1.0)], make_records("α=1", [1.0, 0.0]), [make_task()], baseline=None)
        html = self.dom(path, tmp_path)
        assert [attributes.get("class") for _, attributes in Elements(html).tags].count("answer") == 2

    def test_answers_are_compared_by_word_and_filtered_by_length_and_format_as_the_address_says(self, tmp_path):
        said = {"baseline": "First add two and three: it is 6", "α=1": "First add two and three, so it is #5"}
        arms = [make_arm("baseline", 0.0), make_arm("α=1", 1.0)]
        records = [
            replace(
                record,
                response=f"{said[arm.name]} of {record.doc_id}",
                tokens=(9 + record.doc_id * (arm.name != "baseline"),),
                finish=("length" if record.doc_id == 3 else "stop",),
                in_format=arm.name != "baseline" and record.doc_id != 2,
            )
            for arm in arms
            for record in make_records(arm.name, [float(arm.name != "baseline")] * 4)
        ]
        path = tmp_path / "report.html"
        html = write(path, arms, records, [make_task()])
        html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
        driver = """
          const find = (id) => document.getElementById(id), said = [];
          const shown = () => [...document.querySelectorAll("article strong")].map((one) => one.textContent);
          const choose = (id, value) => { find(id).value = value; find(id).dispatchEvent(new Event("change")); };
          said.push([...document.querySelectorAll("article:first-of-type mark")].map((one) => one.textContent.trim()));
          for (const [id, value] of [["length", "cut"], ["length", "longer"], ["length", "all"], ["format", "gained"],
            ["format", "no"]]) { choose(id, value); said.push(shown()); }
          said.push(location.hash);
          location.hash = "#samples?format=gained&length=cut&left=0&right=1&change=better";
          setTimeout(() => { said.push(shown(), find("length").value);
            find("where").textContent = JSON.stringify(said); }, 200);"""
        path.write_text(html.replace("</body>", f"<script>{driver}</script></body>"), encoding="utf-8")
        found = re.search(r'<span id="where">(.*?)</span>', self.dom(path, tmp_path))[1]
        words, cut, longer, every, gained, other, address, recalled, length = json.loads(found.replace("&amp;", "&"))
        assert words == ["three:", "6", "three, so", "#5"]
        numbers = [[int(one.split()[1]) for one in own] for own in (cut, longer, every, gained, other, recalled)]
        assert numbers == [[3], [1, 2, 3], [0, 1, 2, 3], [0, 1, 3], [2], [3]]
        assert "format=no" in address and "left=0" in address and length == "cut"
