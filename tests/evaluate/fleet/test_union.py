"""An engine at a point with the tokens of several models, against a fresh one on what is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import launch
from families import Family, answers, start
from moved import move

from rvdist.core.point import WeightPoint
from rvdist.core.vocabulary import Vocabulary
from rvdist.weights.checkpoint import kept


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_swapped_to_a_union_equals_fresh(
    kind: str, families: dict[str, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = families[kind]
    family = Family(own.target, *(move(path, tmp_path / path.name, f"<{path.name}>") for path in (own.plus, own.minus)))
    given = (f"target={family.target}", f"vector.plus={family.plus}", f"vector.minus={family.minus}")
    written = ("alpha=[0,0.5]", "output=out-{alpha}", "tokenizer=union", "compat.force=true", "cache.dir=c")
    done = launch(*given, *written, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    engine = start(WeightPoint(str(tmp_path / "out-0")))
    base = answers(engine)
    remapped = []
    monkeypatch.setattr(kept, "remap", lambda *asked, remap=kept.remap: remapped.append(1) or remap(*asked))
    models = tuple(map(str, (family.target, family.plus, family.minus)))
    for alpha, where in ((0.5, "out-0.5"), (0.0, "out-0")):
        engine.swap(replace(family.point(alpha), vocabulary=Vocabulary("union", models)))
        swapped = answers(engine)
        assert swapped == (base if not alpha else answers(start(WeightPoint(str(tmp_path / where)))))
    assert swapped == base and len(remapped) == 1, "tokenizers are read once"
