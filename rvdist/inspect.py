"""python -m rvdist.inspect PATH [--json]: what is this, how large, made of what, how far along?

PATH is a checkpoint, a stored vector or a LoRA adapter (a directory, or org/name@revision), a run directory, or what an
unfinished merge left (OUTPUT.partial). Headers and small files are read, never a tensor. What is found is one nested
mapping: `--json` prints it, and the tree shows the same. Exit status 0 shown, 1 out of reach, 2 bad input.
"""

from __future__ import annotations

import sys

from rvdist.core.early import end_quietly

if __name__ == "__main__":
    end_quietly()

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from rvdist.core.config import Config
from rvdist.core.errors import BadInput, sentence_at_the_end
from rvdist.core.foreign import parse_json, parse_yaml
from rvdist.core.point import layer_count
from rvdist.core.regular import open_regular, read_regular
from rvdist.core.text import reason
from rvdist.core.timing import Timing
from rvdist.report.summary import Row
from rvdist.report.wording import printable
from rvdist.weights.checkpoint.difference import FORMS, Difference, Dora, Form, LowRank, Rows, Whole, stored_parts
from rvdist.weights.checkpoint.directory import Checkpoint, read_json
from rvdist.weights.checkpoint.fp8 import Scaled
from rvdist.weights.checkpoint.header import TensorSpec, read_header, unreadable
from rvdist.weights.checkpoint.journal import JOURNAL, MANIFEST, Manifest, Written, read_journal
from rvdist.weights.checkpoint.pieces import parts_of
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.checkpoint.stored_vector import DESCRIPTION

Facts = dict[str, Any]  # of what JSON has

_FORMS = FORMS | {"whole": Whole, "rows": Rows, "dora": Dora}
_RUN_FILES = ("timing.json", "summary.json", "config.yaml")
_MODEL_KEYS = ("model_type", "dtype", "torch_dtype", "hidden_size", "vocab_size", "tie_word_embeddings")
_SCORE_KEYS = ("value", "ci_low", "ci_high", "p_adjusted", "verdict")
_UNWRAPPED = 10_000  # columns, where no terminal says how many there are
_FORMULA = re.compile(r"^    θ = (.+)$", re.MULTILINE)  # on the card that report.card writes
_MOST = 64 << 20  # bytes of a file of a run that are read
_CARD = 1 << 20  # bytes of a card
_LINE = 1 << 16  # bytes of the first line of a journal, at most
_ON_ONE_LINE, _BRANCHES = 6, 40  # entries at most: of a mapping that stands on one line; under one branch of the tree


def inspect(source: str) -> Facts:
    """What `source` is; `kind` is "checkpoint", "vector", "adapter", "run" or "unfinished output". Raises BadInput,
    and Failed where the Hub cannot be reached."""
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            names = {entry.name for entry in path.iterdir()}
            if JOURNAL in names or path.name.endswith(".partial"):
                return _partial_output(path)
            if names.intersection(_RUN_FILES) and not any(name.endswith(".safetensors") for name in names):
                return _run(path)
        elif path.exists():
            raise BadInput(f"{path}: is not a directory; give the directory it stands in")
        elif (partial := path.with_name(path.name + ".partial")).is_dir():
            raise BadInput(f"{path}: is not written yet; inspect {partial}")
        return _weights(open_source(source))
    except OSError as error:
        raise BadInput(f"{error.filename or path}: cannot be read ({error.strerror})") from None
    except RecursionError:
        raise BadInput(f"{path}: has JSON that is nested too deep to be what it should be") from None


def _weights(checkpoint: Checkpoint) -> Facts:
    stored = list(_stored_tensors(checkpoint))
    kind = checkpoint.kind if isinstance(checkpoint, Difference) else "checkpoint"
    made_of: Facts = {"hub": str(checkpoint.hub)} if checkpoint.hub else {}
    if isinstance(checkpoint, Difference):
        made_of |= {"trained_on": checkpoint.trained_on} if checkpoint.kind == "adapter" else _donors(checkpoint)
        made_of |= {"stored": _forms(checkpoint.forms.values())}
    elif isinstance(checkpoint, Scaled):
        codes = checkpoint.kind.name.replace(" ", "_")
        made_of |= {f"{codes}_tensors": len(checkpoint.scales), "block": list(checkpoint.block)}
    return {
        "path": str(checkpoint.path),
        "kind": kind,
        "model": _model(checkpoint.config),
        "bytes": sum(stamp.size for stamp in checkpoint.stamps.values()),
        "tensors": len(checkpoint.tensors),
        "elements": sum(spec.numel for spec in checkpoint.tensors.values()),
        "layers": layer_count(checkpoint.tensors),
        "dtypes": _totals(stored, lambda spec: spec.dtype),
        "files": _totals([part for spec in stored for part in parts_of(spec)], lambda spec: spec.file),
        "names": _names(checkpoint.tensors.values()),
        "made_of": _manifest(checkpoint.path) | made_of,
    }


def _stored_tensors(checkpoint: Checkpoint) -> Iterable[TensorSpec]:
    """The tensors as the files hold them: factors, indices and scales are tensors of their own."""
    if not isinstance(checkpoint, Difference):
        own = checkpoint.stored if isinstance(checkpoint, Scaled) else {}
        yield from (own.get(name, spec) for name, spec in checkpoint.tensors.items())
        if isinstance(checkpoint, Scaled):
            yield from [*checkpoint.scales.values(), *checkpoint.companions_of_codes.values()]
        return
    for form in checkpoint.forms.values():
        yield from stored_parts(form)


def _totals(specs: Iterable[TensorSpec], key: Any) -> dict[str, Facts]:
    totals: dict[str, Facts] = {}
    for spec in specs:
        total = totals.setdefault(key(spec), {"tensors": 0, "bytes": 0})
        total["tensors"] += 1
        total["bytes"] += spec.nbytes
    return dict(sorted(totals.items()))


def _names(specs: Iterable[TensorSpec]) -> dict[str, Facts]:
    """Tensors whose names differ in a number only (of a layer, of an expert) stand together, with `*` in its place."""
    patterns: dict[str, Facts] = {}
    for spec in specs:
        pattern = ".".join("*" if part.isdecimal() else part for part in spec.name.split("."))
        alike = patterns.setdefault(pattern, {"count": 0, "dtypes": [], "shapes": []})
        alike["count"] += 1
        for key, value in (("dtypes", spec.dtype), ("shapes", list(spec.shape))):
            alike[key] += [value] if value not in alike[key] else []
    return patterns


def _model(config: Mapping[str, Any]) -> Facts:
    architectures = config.get("architectures")
    named = {"architecture": architectures[0]} if isinstance(architectures, list) and architectures else {}
    told = named | {key: config[key] for key in _MODEL_KEYS if key in config}
    return {key: value for key, value in told.items() if isinstance(value, str | int | float)}


def _forms(forms: Iterable[Form]) -> Facts:
    kinds: Counter[str] = Counter()
    ranks, scales = set(), set()
    for form in forms:
        kinds[next(name for name, kind in _FORMS.items() if type(form) is kind)] += 1
        if isinstance(form, LowRank):
            ranks.add(form.right.shape[0] // form.count)
            scales.add(form.scale)
    return {**kinds, "ranks": sorted(ranks), "scales": sorted(scales)}


def _donors(vector: Checkpoint) -> Facts:
    """What vector.json says the vector is, and how exactly it is held."""
    said = read_json(vector.path / DESCRIPTION)
    donors = said.get("donors")
    told = {key: said.get(key) for key in ("formula", "exact_for", "relative_error")}
    told["equal_elements"] = said.get("zeros")  # of both donors; vectors of earlier versions do not say
    if isinstance(donors, dict):
        told |= {part: donor.get("name") for part, donor in donors.items() if isinstance(donor, dict)}
    return {key: value for key, value in told.items() if isinstance(value, str | int | float)}


def _manifest(path: Path) -> Facts:
    """What rvdist.json and the card beside it say of an output of ours."""
    if not (path / MANIFEST).exists():
        return {}
    manifest = Manifest.read(path)
    card, formula = path / "README.md", None
    with suppress(OSError):
        formula = _FORMULA.search(read_regular(card, _CARD).decode("utf-8", "replace"))
    return {
        "formula": f"θ = {formula[1]}" if formula else None,
        "plan": manifest.plan,
        "digested_ranges": len(manifest.ranges),
        "digested_bytes": sum(written.nbytes for written in manifest.ranges),
    }


def _run(path: Path) -> Facts:
    facts: Facts = {"path": str(path), "kind": "run"}
    if (file := path / "config.yaml").exists():
        facts["settings"] = _settings(file)
    if (file := path / "summary.json").exists():
        facts |= _scores(file)
    if (file := path / "timing.json").exists():
        facts["timing"] = _timing(file)
    return facts | {"files": sorted(entry.name for entry in path.iterdir())}


def _settings(file: Path) -> Facts:
    """What was set otherwise than by default."""
    from omegaconf import OmegaConf

    try:
        said = parse_yaml(read_regular(file, _MOST))
        if not isinstance(said, dict):
            raise ValueError("it is not a mapping")
    except ValueError as error:
        raise BadInput(f"{file}: is not the configuration of a run ({reason(error)})") from None
    default = OmegaConf.to_container(OmegaConf.structured(Config))
    assert isinstance(default, dict)
    return _differences(said, default)


def _differences(said: Mapping[Any, Any], default: Mapping[Any, Any], prefix: str = "") -> Facts:
    facts: Facts = {}
    for key, value in said.items():
        usual = default.get(key)
        if isinstance(value, dict) and isinstance(usual, dict):
            facts |= _differences(value, usual, f"{prefix}{key}.")
        elif value != usual:
            facts[f"{prefix}{key}"] = value
    return facts


def _scores(file: Path) -> Facts:
    """The primary scores of summary.json, task by task."""
    arms: dict[str, None] = {}
    tasks: dict[str, Facts] = {}
    scores: dict[str, dict[str, Facts]] = {}
    try:
        rows = [Row(**_plain(row)) for row in parse_json(read_regular(file, _MOST))]
    except OSError as error:
        raise unreadable(file, error) from None
    except (ValueError, TypeError) as error:
        raise BadInput(f"{file}: is not the summary of a run ({error}); run its evaluation again") from None
    for row in rows:
        if row.primary:
            arms[row.arm] = None
            tasks[row.task] = {"metric": row.metric, "filter": row.filter, "documents": row.n}
            scores.setdefault(row.task, {})[row.arm] = {key: getattr(row, key) for key in _SCORE_KEYS}
    return {"arms": list(arms), "tasks": tasks, "scores": scores}


def _timing(file: Path) -> Facts:
    try:
        timing = vars(Timing(**read_json(file)))
        for key, value in timing.items():
            _plain(value if isinstance(value, dict) else {key: value})
        return timing
    except (ValueError, TypeError) as error:
        raise BadInput(f"{file}: is not the timing of a run ({error})") from None


def _plain(mapping: Mapping[str, Any]) -> Facts:
    """A mapping of plain values, as it is. Raises ValueError for any other."""
    if not isinstance(mapping, dict):
        raise ValueError(f"{str(mapping)[:40]} stands where a mapping belongs")
    for key, value in mapping.items():
        if not isinstance(value, str | int | float | None):
            raise ValueError(f"{key} has no plain value")
    return mapping


def _partial_output(path: Path) -> Facts:
    """How much of its weight files the journal claims. Their headers are written first, so the whole is known."""
    plan, claims = _claims(path)
    files: dict[str, Facts] = {}
    sizes: dict[str, int] = {}
    for file in sorted(path.glob("*.safetensors")):
        specs, _, stamp = read_header(file)
        sizes[file.name] = stamp.size
        files[file.name] = {"ranges_done": 0, "bytes_done": 0, "bytes": sum(spec.nbytes for spec in specs)}
    for claim in claims:
        if not 0 <= claim.start <= claim.start + claim.nbytes <= sizes.get(claim.file, -1):
            raise BadInput(f"{path / JOURNAL}: speaks of bytes that {claim.file} does not have; delete {path}")
        files[claim.file]["ranges_done"] += 1
        files[claim.file]["bytes_done"] += claim.nbytes
    done, whole = (sum(file[key] for file in files.values()) for key in ("bytes_done", "bytes"))
    last = max((entry.stat().st_mtime for entry in (path / JOURNAL, path / MANIFEST) if entry.exists()), default=None)
    return {
        "path": str(path),
        "kind": "unfinished output",
        "plan": plan,
        "ranges_done": len(claims),
        "bytes_done": done,
        "bytes": whole,
        "done": f"{done / whole:.1%}" if whole else None,
        "journalled": datetime.fromtimestamp(last).isoformat(" ", "seconds") if last is not None else None,
        "files": files,
    }


def _claims(path: Path) -> tuple[str | None, list[Written]]:
    """The plan whose output is under construction, and what is done of it."""
    if not (path / JOURNAL).exists():
        if not (path / MANIFEST).exists():
            return None, []
        manifest = Manifest.read(path)
        return manifest.plan, list(manifest.ranges)
    try:
        with open(open_regular(path / JOURNAL), "rb") as file:
            _, (_, plan) = json.loads(file.readline(_LINE))
        if not isinstance(plan, str):
            raise TypeError("it names no plan")
        claims = list(read_journal(path, plan, key=None))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise BadInput(f"{path / JOURNAL}: is not the journal of an output ({error}); delete {path}") from None
    return plan, claims


def tree(facts: Facts) -> Tree:
    """The same for people: what is plain stands on one line, what is many is cut short. Nothing in it is markup."""
    root = Tree(Text(printable(f"{facts['path']}: {facts['kind']}"), style="bold"))
    _grow(root, {key: value for key, value in facts.items() if key not in ("path", "kind")})
    return root


def _grow(branch: Tree, facts: Mapping[str, Any] | list[Any]) -> None:
    items = list(facts.items()) if isinstance(facts, Mapping) else [("", value) for value in facts]
    items = [(key, value) for key, value in items if value is not None and value != {} and value != []]
    for key, value in items[:_BRANCHES]:
        line = _line(value)
        label = Text(printable(str(key)), style="cyan")
        child = branch.add(Text("  " if key and line else "").join((label, Text(printable(line or "")))))
        if line is None:
            _grow(child, value)
    if len(items) > _BRANCHES:
        branch.add(Text(f"… and {len(items) - _BRANCHES:,} more (--json has them all)", style="dim"))


def _line(value: Any) -> str | None:
    """A value on one line; None for what needs a branch."""
    if isinstance(value, Mapping):
        told = {key: entry for key, entry in value.items() if entry is not None and entry != []}
        lines = {key: _line(entry) for key, entry in told.items() if not isinstance(entry, Mapping)}
        if len(lines) < len(told) or len(lines) > _ON_ONE_LINE or None in lines.values():
            return None
        return ", ".join(f"{key.replace('_', ' ')} {line}" for key, line in lines.items())
    if isinstance(value, list):
        if any(isinstance(entry, Mapping) for entry in value):
            return None
        return ", ".join(str(entry) for entry in value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rvdist.inspect", description=__doc__)
    parser.add_argument("path", help="a directory, or org/name@revision")
    parser.add_argument("--json", action="store_true", help="print what is found as JSON")
    arguments = parser.parse_args()
    with sentence_at_the_end():
        facts = inspect(arguments.path)
    if arguments.json:
        print(json.dumps(facts, indent=2, default=str))
    else:
        Console(width=None if sys.stdout.isatty() else _UNWRAPPED).print(tree(facts))


if __name__ == "__main__":
    main()
