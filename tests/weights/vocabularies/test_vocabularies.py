"""Checkpoints with different tokenizers: token maps, rows and results against what record.py recorded of mergekit; and
refusals."""

import json
from contextlib import closing
from pathlib import Path

import pairs
import pytest
import torch
import yaml
from checkpoints import launch, load_checkpoint
from transformers import AutoTokenizer

from rvdist.core.point import WeightPoint
from rvdist.core.recipe import read_recipe
from rvdist.weights.checkpoint.kept import KeptSources
from rvdist.weights.checkpoint.remapped import Remapped
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.checkpoint.vocabulary import remap
from rvdist.weights.operand import open_operand
from rvdist.weights.reader import open_point

EXPECTED = json.loads((Path(__file__).parent / "expected.json").read_text())
ROWS = {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name, here):
    pairs.write(name, here)
    (here / "recipe.yml").write_text(yaml.safe_dump(pairs.recipe(name), sort_keys=False))
    return read_recipe(here / "recipe.yml", lambda base: open_source(base).tensors).point


def opened(point):
    sources = {source: open_source(source) for source in point.sources()}
    return sources | remap(point, sources, open_source)


def read(checkpoint, name):
    spec = checkpoint.tensors[name]
    with closing(open_operand(checkpoint)) as operand:
        room = torch.empty(8 * spec.numel, dtype=torch.uint8)
        return operand.read(name, 0, spec.numel, room).clone().view(spec.shape)


@pytest.mark.parametrize("name", pairs.PAIRS)
def test_tokens_and_rows_equal_mergekit_s(name, here):
    expected, point = EXPECTED[name], write(name, here)
    sources = opened(point)
    base = sources["base"]
    tokens = base.tokenizer.ids if isinstance(base, Remapped) else None
    assert tokens is None or dict(sorted(tokens.items(), key=lambda pair: pair[1])) == expected["tokens"]
    for tensor, of_models in expected["rows"].items():
        assert of_models.keys() == {model for model in sources if tensor in sources[model].tensors}
        for model, rows in of_models.items():
            assert read(sources[model], tensor).tolist() == rows, (model, tensor)


@pytest.mark.parametrize("name", pairs.PAIRS)
def test_ids_equal_mergekit_s_permutations(name, here):
    """But for tokens that a rule gives to all models, each row that a model has is where mergekit finds it."""
    expected, point = EXPECTED[name], write(name, here)
    rules = {rule.token: rule for rule in point.vocabulary.rules}
    for model, source in opened(point).items():
        rows = source.rows["model.embed_tokens.weight"] if isinstance(source, Remapped) else None
        for token, number in expected["tokens"].items():
            if (row := expected["ids"][model][number]) >= 0 and not (token in rules and rules[token].force):
                found = number if rows is None else int(rows.row[number]) if rows.owner[number] == 0 else None
                assert found == row, (model, token)


@pytest.mark.parametrize("name", pairs.PAIRS)
def test_an_engine_reads_what_mergekit_writes(name, here, monkeypatch):
    """It is told the point as JSON, and finds out by itself whose rows are whose."""
    point = write(name, here)
    places = {source: str(here / source) for source in point.vocabulary.places() if (here / source).is_dir()}
    told = WeightPoint.from_json(json.loads(json.dumps(point.relocate(places).to_json())))
    monkeypatch.chdir("/")
    kept = KeptSources()
    for _ in range(2):
        with closing(open_point(told, kept.open, remap=kept.remap)) as reader:
            for tensor, rows in EXPECTED[name]["merged"].items():
                out = torch.empty(reader.base.tensors[tensor].numel)
                reader.fill(tensor, 0, out)
                assert out.view(reader.base.tensors[tensor].shape).tolist() == rows, tensor


@pytest.mark.parametrize("name", pairs.PAIRS)
def test_the_command_writes_what_mergekit_writes(name, here):
    expected = EXPECTED[name]
    write(name, here)
    done = launch("recipe=recipe.yml", "output=out", "cache.dir=cache", "compat.force=true", cwd=here)
    assert done.returncode == 0, done.stderr
    written = load_checkpoint(here / "out")
    for tensor, rows in expected["merged"].items():
        assert written[tensor].tolist() == rows, tensor
    assert json.loads((here / "out" / "config.json").read_text())["vocab_size"] == expected["vocab_size"]
    assert AutoTokenizer.from_pretrained(here / "out").get_vocab() == expected["tokens"]
