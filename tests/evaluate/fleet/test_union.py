"""An engine at a point with the tokens of several models, against a fresh one on what is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapters import write_adapter
from checkpoints import launch
from families import Family, answers, start
from moved import move

from rvdist.core.point import Term, Vector, WeightPoint
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


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_swapped_to_rows_that_an_adapter_trained_equals_fresh(
    kind: str, families: dict[str, Family], tmp_path: Path
) -> None:
    """Of a new token, which the prompts have, in a row that the base has to spare, and of old ones, and of a head."""
    target = families[kind].target
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    new = 1 + max(tokenizer["model"]["vocab"].values())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"].append({"id": new, "content": "what"} | flags)
    rows = {"embed_tokens": [new, 12, 30]} | ({} if kind == "tied" else {"lm_head": [21, new]})
    generator = torch.Generator().manual_seed(7)
    prefix = {"embed_tokens": "base_model.model.model.embed_tokens", "lm_head": "base_model.model.lm_head"}
    stored = {
        f"{prefix[name]}.token_adapter.trainable_tokens_delta": torch.randn(len(own), 128, generator=generator)
        for name, own in rows.items()
    }
    for side, shape in (("A", (4, 128)), ("B", (256, 4))):
        name = f"base_model.model.model.layers.0.mlp.up_proj.lora_{side}.weight"
        stored[name] = torch.randn(shape, generator=generator) * 0.3
    adapter = write_adapter(tmp_path / "adapter", stored, target_modules=["up_proj"], trainable_token_indices=rows)
    (adapter / "tokenizer.json").write_text(json.dumps(tokenizer))
    given = (f"target={target}", f"vector.path={adapter}", "tokenizer=union")
    done = launch(*given, "alpha=[0,0.5,1]", "output=out-{alpha}", "cache.dir=c", cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    models = (str(target), str(adapter))
    point = WeightPoint(models[0], (Term(1.0, Vector(models[1])),), vocabulary=Vocabulary("union", models))
    engine = start(WeightPoint(str(tmp_path / "out-0")))
    base, seen = answers(engine), []
    for alpha in ("0.5", "1"):
        engine.swap(replace(point, terms=(replace(point.terms[0], alpha=float(alpha)),)))
        seen.append(answers(engine))
        assert seen[-1] == answers(start(WeightPoint(str(tmp_path / f"out-{alpha}"))))
    engine.swap(replace(point, terms=(replace(point.terms[0], alpha=0.0),)))
    assert answers(engine) == base and base not in seen and seen[0] != seen[1]
