"""The table of methods: what is made of it, and that the docs have every row."""

from pathlib import Path

import pytest

import rvdist
from rvdist.core.method import FACTS, METHODS, MethodSpec, facts
from rvdist.core.point import Term, Vector, WeightPoint
from rvdist.report.wording import formula
from rvdist.weights.arithmetic import registry

ROOT = Path(rvdist.__file__).parent.parent
TERMS = (Term(0.5, Vector("p", "m")), Term(-1, Vector("q", "m")))
SUM = "t + 0.5 · (p − m) − 1 · (q − m)"
FORMULAS = {
    "linear": SUM,
    "ties": f"TIES({SUM}; density 0.3)",
    "dare": f"DARE({SUM}; density 0.3, seed 7)",
    "slerp": f"SLERP({SUM})",
    "ties_sum": f"TIES-SUM({SUM}; density 0.3)",
    "ties_mean": f"TIES-MEAN({SUM}; density 0.3)",
    "dare_ties_sum": f"DARE-TIES-SUM({SUM}; density 0.3, seed 7)",
    "dare_ties_mean": f"DARE-TIES-MEAN({SUM}; density 0.3, seed 7)",
}
DIGESTS = {
    "linear": "5d4dbf9ad40b3ebc04deec24c5b2a267",
    "ties": "877ffd407d2643eabcdebf60955f20af",
    "dare": "fe3e781764bb881f718203ca78743042",
    "slerp": "68a6250afeccbef076101763cc1faafd",
    "ties_sum": "61f4a4d91a0448cba8e98fac66877f04",
    "ties_mean": "f1b30ee783ebda672ccd64547aa45b41",
    "dare_ties_sum": "ba0534692eac196cdb35c5a6b3710e2e",
    "dare_ties_mean": "44233ceabddd61c09a0cbc74fb090c05",
}


@pytest.mark.parametrize("name", FORMULAS)
def test_names_and_digests_of_points_stay_what_they_are(name):
    point = WeightPoint("t", TERMS, MethodSpec(name, 0.3, 7))
    assert formula(point) == FORMULAS[name]
    assert point.to_json()["method"] == {"name": name, "density": 0.3, "seed": 7}
    assert WeightPoint.from_json(point.to_json()) == point
    assert point.digest({"t": "1", "p": "2", "m": "3", "q": "4"}) == DIGESTS[name]


def test_options_are_part_of_a_point():
    """Those that are not at their defaults; a method without such an option refuses it."""
    usual = MethodSpec("breadcrumbs", 0.3, options=(("gamma", 0.01),))
    other = MethodSpec("breadcrumbs", 0.3, options=(("gamma", 0.2),))
    assert usual.without_unused() == MethodSpec("breadcrumbs", 0.3) and other.without_unused() == other
    points = [WeightPoint("t", TERMS, method) for method in (usual.without_unused(), other)]
    assert len({point.digest({"t": "1", "p": "2", "m": "3", "q": "4"}) for point in points}) == 2
    assert WeightPoint.from_json(points[1].to_json()) == points[1]
    assert formula(points[1]) == f"BREADCRUMBS({SUM}; density 0.3, gamma 0.2)"
    with pytest.raises(ValueError, match="linear has no option 'gamma'"):
        MethodSpec("linear", options=(("gamma", 0.2),)).check()


@pytest.mark.parametrize("row", FACTS, ids=lambda row: row.name)
def test_what_a_row_says_is_what_its_method_does(row):
    method = registry.build(MethodSpec(row.name, 0.5, 3))
    assert bool(row.sentence) != method.elementwise_sum, "what is simply added is said by the formula alone"
    assert MethodSpec(row.name, 0.5, 3).without_unused() == MethodSpec(
        row.name, 0.5 if "density" in row.parameters else 1.0, 3 if "seed" in row.parameters else 0
    )
    filled = row.sentence.format(density="<density>", seed="<seed>", **dict(row.options))
    assert {key for key in ("density", "seed") if f"<{key}>" in filled} <= set(row.parameters)


def test_the_docs_have_a_row_for_every_method():
    """| name | formula | density | seed | paper |, with "not used" just where that is so."""
    lines = (ROOT / "docs/methods.md").read_text().splitlines()
    rows = {cells[0]: cells[1:] for line in lines if len(cells := line.strip("| ").split(" | ")) == 5}
    del rows["method"]
    assert list(rows) == [f"`{name}`" for name in METHODS], "docs/methods.md and the table of methods differ"
    for name in METHODS:
        said, row = rows[f"`{name}`"], facts(name)
        assert said[0] == row.formula
        assert {key for key, use in zip(("density", "seed"), said[1:3], strict=True) if use != "not used"} == set(
            row.parameters
        )


def test_the_presets_are_methods():
    presets = {file.stem for file in (ROOT / "conf/method").glob("*.yaml")}
    assert presets <= set(METHODS) and presets >= {"linear", "ties", "dare"}
