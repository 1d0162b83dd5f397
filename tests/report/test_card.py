from __future__ import annotations

import json
import subprocess
import sys

import yaml

from rvdist.point import Mask, Term, Vector, WeightPoint
from rvdist.report.card import model_card
from rvdist.report.wording import is_hub_id, source_name

HUB = WeightPoint("Qwen/Qwen2.5-1.5B-Instruct", (Term(-0.5, Vector("org/grpo@main", "org/sft")),))


def card(point: WeightPoint, sources=None, notes=()) -> str:
    return model_card(
        point, digest="f00d", sources=sources or {}, dtype="bfloat16", notes=notes, versions={"rvdist": "0.1.0"}
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
    assert "θ = target + 1 · (checkpoint-100 − checkpoint-100 (2))" in text
    assert "https://example.org/a/b.html" in text and "see log.txt" in text


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
    code = f"import sys, rvdist.report.card; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
