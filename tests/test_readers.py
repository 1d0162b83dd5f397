"""Every file of a stranger's that is read, and whatever stands in its place: one sentence, in time and in memory."""

from __future__ import annotations

import ast
import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from adapters import factors, write_adapter
from checkpoints import POCKET, near, tensors, write_checkpoint
from hostile import SECONDS, outcomes

import rvdist
from rvdist.core.point import Vector
from rvdist.weights.checkpoint.journal import JOURNAL
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.store import Storage, save

pytestmark = pytest.mark.heavy

# Each: what reads (tests/hostile.py), what it is given, and the file of it in whose place something else is put.
READERS = {
    "a checkpoint's configuration": ("config", "checkpoint", "config.json"),
    "an index": ("config", "checkpoint", "model.safetensors.index.json"),
    "weights": ("config", "whole", "model.safetensors"),
    "an adapter's configuration": ("config", "adapter", "adapter_config.json"),
    "a vector's description": ("config", "vector", "vector.json"),
    "a manifest": ("manifest", "vector", "rvdist.json"),
    "a journal, inspected": ("seen", "partial", JOURNAL),
    "a journal, gone on from": ("journal", "partial", JOURNAL),
    "settings of a run": ("seen", "run", "config.yaml"),
    "a summary, inspected": ("seen", "run", "summary.json"),
    "a timing": ("seen", "run", "timing.json"),
    "a summary, loaded": ("records", "run", "summary.json"),
    "records": ("records", "samples/a.jsonl", None),
    "recorded answers": ("recording", "samples/a.jsonl", None),
    "rows in JSON": ("rows", "rows.json", None),
    "rows in JSON Lines": ("rows", "rows.jsonl", None),
    "packed rows": ("rows", "rows.jsonl.gz", None),
    "rows in Parquet": ("rows", "rows.parquet", None),
    "a text": ("text", "text.txt", None),
    "a recipe": ("recipe", "recipe.yml", None),
    "results of a text": ("bits", "results.json", None),
    "a tokenizer": ("tokens", "tokenizer", "tokenizer.json"),
    "a tokenizer's configuration": ("tokens", "tokenizer", "tokenizer_config.json"),
    "a chat template": ("tokens", "tokenizer", "chat_template.jinja"),
    "a vocabulary": ("vocabularies", "tokenizer", "tokenizer.json"),
    "a card": ("licence", "vector", "README.md"),
    "rates of merges": ("rate", "rates.json", None),
    "rates of engines": ("speeds", "remembered", "speeds.json"),
    "what vLLM chose": ("chosen", "remembered", "engines/a.json"),
    "a key": ("key", "keys", f"key-{os.geteuid()}"),
    "a sample cache": ("cache", "cache", "samples.sqlite"),
}  # fmt: skip
# What is as good as none where it cannot be used: it is made anew, or nothing is said of it.
FORGOTTEN = {"a journal, gone on from", "a card", "rates of merges", "rates of engines", "what vLLM chose", "a key"}
TEXTS = {"a text", "a chat template"}  # whose content may be anything in UTF-8

DEEP = 200_000
CONTENTS: dict[str, bytes] = {
    "nothing": b"",
    "zeros": bytes(5000),
    "no UTF-8": b'{"a": "\xff\xfe"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "half a surrogate": b'{"a": "\\ud800"}',
    "deep lists": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "a list": b"[]",
    "null": b"null",
    "a text": b'"x"',
    "an infinity": b"1e9999",
    "digits": b"9" * 200_000,
    "an infinity in an object": b'{"a": 1e9999}',
    "a key twice": b'{"a": 1, "a": {"b": 2, "b": 3}}',
    "one long line": b'{"a": "' + b"x" * (70 << 20) + b'"}',
    "many lists": b"[" + b"[]," * (15 << 20) + b"[]]",
    "many objects": b"[" + b"{}," * (15 << 20) + b"{}]",
    "aliases": b"a0: &a0 [x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (k, k, k - 1, k - 1) for k in range(1, 40)),
}
PLACES: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a directory": Path.mkdir,
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a terminal": lambda path: path.symlink_to("/dev/tty"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to nothing": lambda path: path.symlink_to(path.parent / "nothing"),
    "a terabyte": lambda path: path.touch() or os.truncate(path, 1 << 40),
}
# What is no fault where it stands: one of two equal keys, no rows, a long one, a file that need not be there.
_NONE = ["a link to nothing", "a link to itself"]
TAKEN = {
    "a checkpoint's configuration": ["an infinity in an object", "a key twice", *_NONE],
    "a journal, inspected": _NONE,
    "settings of a run": ["an infinity in an object", "a key twice", *_NONE],
    "a summary, inspected": ["a list", *_NONE],
    "a summary, loaded": ["a list"],
    "a timing": _NONE,
    "records": ["nothing"],
    "rows in JSON": ["one long line"],
    "rows in JSON Lines": ["one long line"],
    "packed rows": ["one long line"],
    "a tokenizer's configuration": ["half a surrogate", "an infinity in an object", "a key twice"],
    "a vocabulary": ["an infinity in an object", "a key twice", *_NONE],
    "a sample cache": ["nothing", "a link to nothing"],
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each thing one that is taken."""
    place = tmp_path_factory.mktemp("sound")
    base = {name: tensor for name, tensor in tensors(0).items() if "layers.1" not in name and "layers.2" not in name}
    write_checkpoint(place / "checkpoint", base, shards=2)
    write_checkpoint(place / "whole", base)
    plus = write_checkpoint(place / "plus", near(base, 1))
    write_adapter(place / "adapter", factors())
    vector = Vector(str(plus), str(place / "checkpoint"))
    save(vector, {source: open_source(source) for source in vector.sources()}, place / "vector", Storage())
    (place / "partial").mkdir()
    shutil.copy(place / "whole/model.safetensors", place / "partial")
    (place / "partial" / JOURNAL).write_text('["", [1, "plan"]]\n')
    record = {
        "arm": "a", "point": "p", "alpha": None, "prompt": "", "task": "t", "filter": "none", "seed": 0, "doc_id": 1,
        "doc": "h", "metrics": {"m": 1.0}, "prompt_text": "p", "target": "x", "response": "r", "filtered": "f",
    }  # fmt: skip
    (place / "samples").mkdir()
    (place / "samples/a.jsonl").write_text(json.dumps(record) + "\n")
    shutil.copytree(place / "samples", place / "run/samples")
    for name, content in (("config.yaml", "alpha: 1.0\n"), ("summary.json", "[]"), ("timing.json", "{}")):
        (place / "run" / name).write_text(content)
    (place / "rows.json").write_text('[{"a": "x"}]')
    (place / "rows.jsonl").write_text('{"a": "x"}\n')
    (place / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"a": "x"}\n'))
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x"]}), place / "rows.parquet")
    (place / "text.txt").write_text("one\n\ntwo\n")
    recipe = {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1.0}}], "dtype": "float32"}
    (place / "recipe.yml").write_text(json.dumps(recipe))
    (place / "results.json").write_text('{"results": {"text:x": {"bits_per_byte,none": 1.5}}}')
    shutil.copytree(POCKET / "target", place / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    (place / "remembered").mkdir()
    (place / "remembered" / "speeds.json").write_text('{"rates": {"H100": [1.0, 1.0]}, "lengths": {"a": 1.0}}')
    (place / "remembered" / "engines").mkdir()
    (place / "remembered" / "engines" / "a.json").write_text('{"runner": "b"}')
    (place / "rates.json").write_text('{"cpu": {"bytes_per_second": 1.0, "anonymous_bytes": 1}}')
    (place / "keys").mkdir()
    (place / "cache").mkdir()
    return place


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("contents")
    for name, content in CONTENTS.items():
        (place / name).write_bytes(content)
    return place


def spoiled(sound: Path, contents: Path, into: Path, given: str, file: str | None) -> dict[str, Path]:
    """What a reader is given, once for each thing that can stand in the place of its file."""
    found = {}
    for kind in [*CONTENTS, *PLACES]:
        path = into / kind.replace(" ", "-") / given
        path.parent.mkdir(parents=True)
        if file is None:
            place = path
        else:
            shutil.copytree(sound / given, path, copy_function=os.link)
            place = path / file
            place.unlink(missing_ok=True)
        if kind in PLACES:
            PLACES[kind](place)
        elif given.endswith(".gz"):
            place.write_bytes(gzip.compress(CONTENTS[kind], 1))
        else:
            os.link(contents / kind, place)
        found[kind] = path
    return found


LONG = ["a tokenizer's configuration", "a chat template"]  # they take as long as the tokenizer's own


@pytest.mark.parametrize("reader", [*(pytest.param(r, marks=pytest.mark.slow if r in LONG else ()) for r in READERS)])
def test_whatever_stands_in_place_of_a_file_ends_in_one_sentence(
    reader: str, sound: Path, contents: Path, tmp_path: Path
) -> None:
    name, given, file = READERS[reader]
    paths = spoiled(sound, contents, tmp_path, given, file)
    wrong = {}
    for kind, (said, seconds) in zip(paths, outcomes(f"hostile.{name}", sound / given, [*paths.values()]), strict=True):
        if said is None:
            fine = reader in FORGOTTEN or kind in TAKEN.get(reader, []) or (reader in TEXTS and kind in CONTENTS)
        else:
            fine = not said.startswith("NOT OURS") and said.isprintable() and len(said) < 5000
        if not fine or seconds > SECONDS:
            wrong[kind] = f"{said and said[:300]} ({seconds:.1f} s)"
    assert not wrong, json.dumps(wrong, indent=1)


# What opens files in another way than core.regular, and why it may.
OWN = {
    "core.cluster": "what the command has just written", "core.log": "appends", "core.session": "its own lock",
    "core.ends": "/proc", "core.private_ray": "/proc", "core.upkeep": "/dev/null",
    "core.standing": "follows no link, and looks at kind, owner and mode of what it opened",
    "evaluate.fleet.start": "its own lock",
    "core.timing": "/proc", "core.record": "writes", "core.regular": "the one place",
    "evaluate.fleet.actor": "the end of its own log", "evaluate.fleet.device": "/proc",
    "evaluate.fleet.private_vllm": "/proc",
    "evaluate.scorers": "its own standard output",
    "evaluate.fleet.served": "its own directory", "evaluate.sandbox.box": "a pipe", "evaluate.sandbox.jail": "/proc",
    "evaluate.templates": "a file of transformers", "evaluate.cache": "SQLite, in which every row is checked",
    "report.anatomy": "writes", "report.page.page": "the page's own parts", "report.paper": "writes",
    "report.statistics.robustness": "writes", "report.statistics.seeds": "writes", "report.summary": "writes",
    "report.card.metadata": "through open_regular", "inspect": "through open_regular",
    "stages.publish": "what is uploaded, after it was read and compared", "verify": "weights, whose headers were read",
    "weights.checkpoint.digest": "weights, whose headers were read",
    "weights.checkpoint.header": "through open_regular", "core.foreign": "parses bytes",
    "weights.checkpoint.elements": "weights, whose headers were read",
    "weights.checkpoint.stream": "weights, whose headers were read", "weights.checkpoint.direct": "writes",
    "weights.checkpoint.journal": "through a handle", "weights.checkpoint.key": "through a handle",
    "weights.checkpoint.staging": "through a handle", "weights.checkpoint.hub": "the cache's own name of a commit",
    "weights.writer": "through a handle", "weights.checkpoint.trained": "through open_regular",
}  # fmt: skip


def test_no_other_module_opens_files_by_itself() -> None:
    package = Path(rvdist.__file__).parent
    found = set()
    for file in package.rglob("*.py"):
        name = ".".join(file.relative_to(package).with_suffix("").parts)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                of = getattr(getattr(node.func, "value", None), "id", "")
                plain = called == "open" and (isinstance(node.func, ast.Name) or of == "os")
                loads = called in ("load", "safe_load") and of in ("json", "yaml", "torch", "pickle", "np", "numpy")
                if plain or loads or (called in ("read_text", "read_bytes") and of not in ("hub",)):
                    found.add(name)
    found = {name for name in found if not name.startswith("pocket")}
    assert found - OWN.keys() == set(), "read through core.regular, or say here why not"
