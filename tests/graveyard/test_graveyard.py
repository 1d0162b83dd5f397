"""Every situation of the graveyard comes out right or refused in one sentence. What is neither is silent: a failure."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import table
from catalogue import SITUATIONS
from checkpoints import launch
from judge import companions, differing, index_errors, weights_of
from runner import Outcome, contents, run
from situations import Refused, Right, Said, Situation

from rvdist.core.errors import BadInput


def wanted(request: pytest.FixtureRequest) -> list[Situation]:
    """Those that this session asks for."""
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    names = {call.params["situation"].name for call in calls if call and "situation" in call.params}
    return [situation for situation in SITUATIONS if situation.name in names]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Outcome]]:
    root = tmp_path_factory.mktemp("graveyard")
    yield run(wanted(request), root)
    shutil.rmtree(root, ignore_errors=True)


def marked(situation: Situation) -> object:
    marks = [pytest.mark.xfail(reason=situation.todo, strict=True)] if situation.todo else []
    marks += [pytest.mark.heavy] if situation.heavy else []
    return pytest.param(situation, id=situation.name, marks=marks)


@pytest.mark.parametrize("situation", [marked(situation) for situation in SITUATIONS if not situation.slow])
def test_nothing_is_silent(situation: Situation, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[situation.name]
    verdict = outcome.asked.verdict
    if isinstance(verdict, Refused):
        assert situation.refused, "the table would say otherwise"
        require_refused(verdict, outcome)
    elif isinstance(verdict, Said):
        assert situation.right, "the table would say otherwise"
        ended = launch(*outcome.asked.typed, "hydra.run.dir=run", cwd=outcome.place / verdict.where)
        assert ended.returncode == 0, ended.stderr
        assert all(re.search(words, ended.stdout) for words in verdict.words), ended.stdout
    else:
        assert situation.right and isinstance(verdict, Right), "the table would say otherwise"
        require_right(verdict, outcome)


def require_refused(verdict: Refused, outcome: Outcome) -> None:
    """One sentence that names what is wrong, and nothing written."""
    if outcome.asked.typed:
        ended = launch(*outcome.asked.typed, "hydra.run.dir=run", cwd=outcome.place, **outcome.asked.environment)
        assert ended.returncode == 2, ended.stderr
        (line,) = ended.stderr.strip().splitlines()
        sentence = line.removeprefix("rvdist: ")
    else:
        assert isinstance(outcome.error, BadInput), f"silent, or not a refusal: {outcome.error!r}"
        sentence = str(outcome.error)
    assert "\n" not in sentence
    for words in verdict.words:
        assert re.search(words, sentence), f"{words!r} is not in {sentence!r}"
    written = contents(outcome.place) - outcome.before
    assert not {path for path in written if path.parts[0] != "run" or not verdict.underway}, "something was written"


def require_right(verdict: Right, outcome: Outcome) -> None:
    """The tensors, what stands beside them, and what is said."""
    if outcome.error:
        raise outcome.error
    out, target = Path(str(outcome.asked.settings.output)), Path(outcome.asked.settings.target)
    found = weights_of(out)
    wanted = dict(verdict.weights) | {name: tensor for name, tensor in verdict.may.items() if name in found}
    assert differing(found, wanted) == []
    assert index_errors(out) == []
    require_companions(verdict, out, target)
    for note in outcome.notes:
        assert any(re.search(pattern, note) for pattern in verdict.notes), f"nobody expects {note!r}"
    for pattern in verdict.notes:
        assert any(re.search(pattern, note) for note in outcome.notes), f"{pattern!r} is not said: {outcome.notes}"
    assert not (outcome.place / "executed").exists(), "remote code was run"


def require_companions(verdict: Right, out: Path, target: Path) -> None:
    """Everything beside the target's weights, byte for byte, but for pickles and what the config must say otherwise."""
    ours, theirs = companions(out), companions(target)
    left = (".pt", ".pth", ".bin", *verdict.left)
    theirs = {name: content for name, content in theirs.items() if not name.endswith(left)}
    if verdict.config:
        said = json.loads(theirs["config.json"]) | dict(verdict.config)
        assert json.loads(ours.pop("config.json")) == {key: value for key, value in said.items() if value is not ...}
        del theirs["config.json"]
    assert ours == theirs


def test_the_page_is_up_to_date() -> None:
    assert table.PAGE.read_text(encoding="utf-8") == table.page(), "run python tests/graveyard/table.py"


def test_every_situation_has_a_name_a_report_and_a_verdict() -> None:
    names = [situation.name for situation in SITUATIONS]
    assert len(names) == len(set(names)) >= 45
    for situation in SITUATIONS:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+#\d+|none found", situation.report), situation.name
