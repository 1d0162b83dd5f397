from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard
from markdown_it import MarkdownIt

from rvdist.core.point import Mask, Term, Vector, WeightPoint
from rvdist.core.vocabulary import TokenRule, Vocabulary
from rvdist.report.card.card import _line, model_card, vector_card
from rvdist.report.card.metadata import Licence, Result, licence_of
from rvdist.report.summary import Row
from rvdist.report.wording import is_hub_id, printable, source_name

HUB = WeightPoint("Qwen/Qwen2.5-1.5B-Instruct", (Term(-0.5, Vector("org/grpo@main", "org/sft")),))


def card(point: WeightPoint, sources=None, notes=(), **more) -> str:
    return model_card(
        point, digest="f00d", sources=sources or {}, dtype="bfloat16", notes=notes, versions={"rvdist": "0.1.0"}, **more
    )


def front_matter(text: str) -> dict:
    _, yaml_text, _ = text.split("---\n", 2)
    return yaml.safe_load(yaml_text)


def test_hub_card_names_its_base_models_and_formula():
    text = card(HUB, {"org/sft": "revision 1234567"}, ["3 tensors of the vision tower were skipped"])
    assert front_matter(text) == {
        "library_name": "transformers",
        "tags": ["merge", "task-arithmetic", "rvdist"],
        "base_model": ["Qwen/Qwen2.5-1.5B-Instruct", "org/grpo", "org/sft"],
        "base_model_relation": "merge",
    }
    assert "θ = Qwen/Qwen2.5-1.5B-Instruct − 0.5 · (org/grpo@main − org/sft)" in text
    assert "| org/sft | minus | revision 1234567 |" in text
    assert "- 3 tensors of the vision tower were skipped" in text and "`f00d`" in text


def test_the_json_of_a_hub_card_is_the_point():
    point = WeightPoint(
        "org/base", (Term(1.0, Vector("org/a", "org/b"), Mask(exclude=(r".*\.bias",), layers=((0, 3),))),)
    )
    text = card(point)
    assert WeightPoint.from_json(json.loads(text.split("```json\n")[1].split("```")[0])) == point
    assert r"`.*\.bias`" in text and "layers 0–3" in text


def test_a_vector_of_renamed_tensors_has_a_card():
    renamed = Vector("org/plus", "org/minus", (("^language_model", "model"),))
    text = card(WeightPoint("org/base", (Term(1.0, renamed),)))
    point = json.loads(text.partition("```json\n")[2].partition("\n```")[0])
    assert point["terms"][0]["vector"]["rename"] == [["^language_model", "model"]]


def test_no_absolute_path_leaves_the_house(tmp_path):
    home = tmp_path / "secret user" / "private"
    paths = [str(home / name) for name in ("target", "a/checkpoint-100", "b/checkpoint-100")]
    point = WeightPoint(paths[0], (Term(1.0, Vector(paths[1], paths[2])),))
    sources = {path: f"read from {path}, file:///secret/private/x, at:/secret/private/y" for path in paths}
    text = card(point, sources, [f"skipped {paths[1]}: visual", "see ~/private/log.txt, https://example.org/a/b.html"])
    for word in ("secret", "private", str(tmp_path)):
        assert word not in text
    assert "base_model" not in front_matter(text)
    by_token = replace(point, vocabulary=Vocabulary(str(home / "words"), tuple(paths), (TokenRule("a", paths[1]),)))
    text_by_token = card(by_token, sources, [str(by_token.vocabulary)])
    for word in ("secret", "private", str(tmp_path)):
        assert word not in text_by_token
    assert "the tokenizer is that of words" in text_by_token and '"source": "words"' in text_by_token
    assert "θ = target + 1 · (checkpoint-100 − checkpoint-100 (2))" in text
    assert "https&#58;//example.org/a/b.html" in text and "see log.txt" in text


def test_an_existing_directory_is_not_a_hub_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("models/target")
    (tmp_path / "models" / "target").mkdir(parents=True)
    assert not is_hub_id("models/target") and source_name("models/target") == "target"
    assert source_name(".") == tmp_path.name
    assert not any(map(is_hub_id, ["/models/target", "./models/target", "target", "a/b/c", "../target", "a b/c"]))


def test_text_cannot_break_the_card():
    text = card(HUB, {"org/sft": "a | b\n# c"}, ["line\n---\nbase_model: evil"])
    assert r"| org/sft | minus | a \| b # c |" in text
    assert front_matter(text)["base_model"][0] == "Qwen/Qwen2.5-1.5B-Instruct"
    assert "\n---\nbase_model: evil" not in text


def test_cheap_to_import():
    heavy = ("numpy", "scipy", "statsmodels", "matplotlib", "rich", "jinja2", "torch")
    code = f"import sys, rvdist.report.card.card; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


# Licences and results


def result(task: str = "gsm8k", prompt: str = "plain", delta: float | None = 0.05, **what) -> Result:
    row = Row(
        arm="alpha=1", point="f00d", alpha=1.0, prompt=prompt, task=task, metric="exact_match", filter="strict-match",
        primary=True, higher_is_better=True, seed=0, value=0.75, stderr=0.01, ci_low=0.7, ci_high=0.8, n=1319,
    )  # fmt: skip
    if delta is None:
        return Result(row, **what)
    found = {"delta": delta, "delta_ci_low": 0.02, "delta_ci_high": 0.08, "p_value": 0.001, "p_adjusted": 0.002}
    return Result(replace(row, **found, verdict="better"), replace(row, arm="baseline", value=0.7), **what)


def test_results_are_what_the_client_of_the_hub_reads():
    results = [result(dataset="openai/gsm8k", config="main", split="test", shots=8), result("own_task", "think")]
    text = card(HUB, name="me/merged", results=results)
    assert ModelCard(text).data.eval_results == [
        EvalResult(
            task_type="text-generation", task_name="gsm8k", dataset_type="openai/gsm8k", dataset_name="openai/gsm8k",
            dataset_config="main", dataset_split="test", dataset_args={"num_few_shot": 8}, metric_type="exact_match",
            metric_name="exact_match, strict-match", metric_value=0.75,
            metric_args={"n": 1319, "interval_95": [0.7, 0.8]},
        ),
        EvalResult(
            task_type="text-generation", task_name="own_task, prompt style think", dataset_type="own_task",
            dataset_name="own_task", metric_type="exact_match", metric_name="exact_match, strict-match",
            metric_value=0.75, metric_args={"n": 1319, "interval_95": [0.7, 0.8]},
        ),
    ]  # fmt: skip
    assert ModelCard(text).data.model_name == "merged"
    strict = replace(results[0].row, filter="get|answer", verdict="no detectable difference")
    disagreeing = card(HUB, name="me/merged", results=[replace(results[0], dissent=(strict,))])
    assert "| better (by get\\|answer: no detectable difference) |" in disagreeing
    row = "| gsm8k | exact_match (strict-match) % | 1319 | 70.0 [70.0, 80.0] | 75.0 [70.0, 80.0] | +5.0 [+2.0, +8.0] |"
    assert f"{row} better |" in text and 'path = "me/merged"' in text
    assert 'from_pretrained(path, revision="trial")' in card(HUB, name="me/merged@trial")
    alone = card(HUB, results=[result(delta=None)])
    assert "| 1319 |  | 75.0 [70.0, 80.0] |  | baseline |" in alone


def licences(*said: Licence | None) -> dict:
    of = dict(zip(HUB.sources(), said, strict=True))
    data = front_matter(card(HUB, licences=of))
    return {key: data[key] for key in data if key.startswith("license")}


def test_a_licence_follows_from_those_of_the_sources():
    apache, own = Licence("apache-2.0"), Licence("other", "qwen-research", "https://example.org/LICENSE")
    assert licences(apache, apache, apache) == {"license": "apache-2.0"}
    assert licences(own, own, own) == {
        "license": "other", "license_name": "qwen-research", "license_link": "https://example.org/LICENSE",
    }  # fmt: skip
    assert licences(apache, own, apache) == {"license": "other"}
    assert licences(apache, None, apache) == {} == licences(None, None, None)
    text = card(HUB, licences={"org/sft": own})
    assert "[other (qwen-research)](https://example.org/LICENSE) |" in text and "|  | unknown |" in text


def test_a_licence_is_read_where_a_card_says_it(tmp_path):
    def read(text: str) -> Licence | None:
        (tmp_path / "README.md").write_bytes(text.encode())
        return licence_of(tmp_path)

    assert licence_of(tmp_path) is None
    assert read("---\nlicense: mit\n---\n# Title") == read("---\r\nlicense: mit\r\n---\r\n") == Licence("mit")
    assert read("---\nlicense: [mit, gpl]\n---\n") == Licence("mit, gpl")
    assert read("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n") == Licence("other", "own")
    for nothing in ("# Title\nlicense: mit", "---\nlicense: 3\n---\n", "---\n- a\n---\n", "---\na: [\n---\n", "---\n"):
        assert read(nothing) is None


HOSTILE = "a|b\n---\nlicense: evil\n---\n# <script>x</script> [y](javascript:z) ``` \u202e&lt;"


def test_hostile_names_stay_where_they_are():
    point = WeightPoint(f"/x/{HOSTILE}", (Term(1.0, Vector(f"/y/{HOSTILE}", f"/z/{HOSTILE}")),))
    said = Licence(HOSTILE, HOSTILE)
    text = card(
        point, {f"/y/{HOSTILE}": HOSTILE}, [HOSTILE], name=f"me/{HOSTILE}", results=[result(HOSTILE, HOSTILE)],
        licences=dict.fromkeys(point.sources(), said),
    )  # fmt: skip
    data = ModelCard(text).data
    assert data.license == "other" and data.tags == ["merge", "task-arithmetic", "rvdist"]
    (scored,) = data.eval_results
    assert scored.dataset_name == printable(HOSTILE) and "\n" not in scored.task_name
    body = text.split("\n---\n", 1)[1]
    assert "\n---" not in body
    prose = re.sub(r"^```.*?^```$", "", body, flags=re.DOTALL | re.MULTILINE)
    assert (
        prose.count("## ") == 4
        and "<" not in prose
        and "[y](" not in prose.replace(r"\[y\](", "")
        and "\u202e" not in text
    )
    lengths = {line.count("|") - line.count(r"\|") for line in prose.splitlines() if line.startswith("| ")}
    assert lengths == {5, 8}


def test_the_card_of_a_vector():
    description = {
        "formula": "v = plus − minus", "exact_for": None, "bytes": 1000, "relative_error": 0.0123, "max_error": 0.5,
        "storage": {"dtype": "BF16", "rank": 8, "density": None, "max_shard_size": None}, "skipped": {"step": "I64"},
        "donors": {
            "plus": {"name": "org/grpo", "revision": "a" * 40, "digest": "d"},
            "minus": {"name": HOSTILE, "revision": None, "digest": "e"},
        },
        "tensors": {"w": {}, "b": {}},
    }  # fmt: skip
    text = vector_card(description, versions={"rvdist": "0.1.0"}, licences={"plus": Licence("mit")}, name="me/v")
    data = ModelCard(text).data
    assert data.base_model == ["org/grpo"] and data["base_model_relation"] == "merge" and data.license is None
    assert "2 tensors in 1,000 bytes, matrices as two factors of rank 8, in bfloat16." in text
    assert "is 0.0123, the largest of an element 0.5; it is not exact. 1 tensors that are" in text
    assert "vector.path=me/v" in text and "| org/grpo | plus | aaaa" in text and "<script" not in text


@pytest.mark.parametrize(
    "text",
    [
        HOSTILE, "*a* **b** _c_ __d__ ~~e~~ `f` \\*g",
        "![x](y) [a][b] <http://x.y> https://evil.example www.evil.example",
        "&lt;b&gt; &#42;x&#42;", "a_b_c gsm8k_cot _x", "\\`", "a|b", "\\_x_", "\\",
    ],
)  # fmt: skip
def test_a_line_of_markdown_shows_as_it_is_written(text):
    parsed = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(f"x {_line(text)} x")
    (inline,) = [token for token in parsed if token.type == "inline"]
    assert {token.type for token in inline.children} <= {"text", "text_special"}
    assert not re.search(r"https?://|www[.]", _line(text))
    if text != HOSTILE:
        assert "".join(token.content for token in inline.children) == f"x {text} x"
