"""python -m rvdist.verify PATH [--model] [--json]: is this checkpoint whole, finite, and what was written?

Checks the index and every header, the digest of every range the manifest (rvdist.json) lists, that values are
finite, and that layers are alike and as many as the config says; with --model, that names and shapes are those which
transformers would ask for. Exit status 0 sound, 1 not, 2 bad input. Imports neither torch nor, without --model,
transformers: a small checkpoint is read in a second.
"""

from __future__ import annotations

import sys

from rvdist.core.early import end_quietly

if __name__ == "__main__":
    end_quietly()

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rvdist.core.errors import BadInput, Failed, sentence_at_the_end
from rvdist.core.text import printable
from rvdist.weights.checkpoint.directory import Checkpoint, open_checkpoint
from rvdist.weights.checkpoint.journal import MANIFEST, Manifest
from rvdist.weights.checkpoint.private_transformers import tied_names
from rvdist.weights.checkpoint.stored_vector import DESCRIPTION

_CHUNK = 1 << 20  # elements
_EXPONENT = {  # the bits that are all set in infinities and NaNs, and in nothing else
    "F8_E4M3": ("u1", 0x7F), "F8_E5M2": ("u1", 0x7C), "F8_E8M0": ("u1", 0xFF), "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F80_0000), "C64": ("<u4", 0x7F80_0000),
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
}  # fmt: skip
_SHAPES = {"model.embed_tokens.weight": ("vocab_size", "hidden_size"), "model.norm.weight": ("hidden_size",)}
_IN_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.(.+)")


@dataclass
class Verdict:
    """`problems`: why the checkpoint must not be used; `unchecked`: what could not be judged, and why."""

    path: str
    tensors: int
    nbytes: int
    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)


def verify(path: Path, model: bool = False) -> Verdict:
    """Reads all of the checkpoint in the directory `path`, in constant memory; with `model`, its names and shapes are
    compared with those of the model that transformers builds for its config, which takes seconds to import. Raises
    BadInput where the headers or the index cannot be used at all, Failed where a file cannot be read."""
    checkpoint = open_checkpoint(path)
    verdict = Verdict(str(path), len(checkpoint.tensors), checkpoint.nbytes)
    if (path / MANIFEST).exists():
        verdict.problems += _digests(checkpoint, Manifest.read(path))
    else:
        verdict.unchecked.append(f"there is no {MANIFEST}: not written by rvdist, digests were not checked")
    verdict.problems += _nonfinite(checkpoint)
    if not (path / DESCRIPTION).exists():  # a vector may be of some layers only
        verdict.problems += _layout(checkpoint)
    if not model:
        return verdict
    try:
        verdict.problems += [problem for problem in _compare_with_model(checkpoint) if problem not in verdict.problems]
    except Exception as error:  # transformers raises what it likes for a config it does not know
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        verdict.unchecked.append(f"transformers has no model for its config.json, names were not compared ({reason})")
    return verdict


def _digests(checkpoint: Checkpoint, manifest: Manifest) -> Iterator[str]:
    for file, stamp in checkpoint.stamps.items():
        ranges = sorted((w for w in manifest.ranges if w.file == file), key=lambda w: w.start)
        end = min((s.offset for s in checkpoint.tensors.values() if s.file == file), default=stamp.size)
        for written in ranges:
            if written.start != end:
                break
            end += written.nbytes
        if end != stamp.size:
            yield f"{file}: {MANIFEST} does not speak of every byte; the file is not the one that was written"
        for written in ranges:
            try:
                held = written.holds(checkpoint.path)
            except OSError as error:
                raise Failed(f"{checkpoint.path / file}: cannot be read ({error.strerror})") from None
            if not held:
                yield f"{file}: bytes {written.start} to {written.start + written.nbytes} are not what was written"
    if missing := {w.file for w in manifest.ranges} - checkpoint.stamps.keys():
        yield f"{min(missing)}: was written but is not in the checkpoint any more"


def _nonfinite(checkpoint: Checkpoint) -> Iterator[str]:
    """Looks at bits: importing torch would take longer than reading a small checkpoint."""
    import numpy as np

    for file in checkpoint.files:
        try:
            with open(checkpoint.path / file, "rb", buffering=0) as opened:
                for spec in (spec for spec in checkpoint.tensors.values() if spec.file == file):
                    integer, exponent = _EXPONENT.get(spec.dtype, ("", 0))
                    if not integer:
                        continue
                    odd, left, itemsize = 0, spec.nbytes, np.dtype(integer).itemsize
                    opened.seek(spec.offset)
                    while left:
                        values = np.fromfile(opened, integer, min(left // itemsize, _CHUNK))
                        if not len(values):
                            raise BadInput(f"{checkpoint.path / file}: ends inside tensor {spec.name}; it changed")
                        odd += int(np.count_nonzero(values & exponent == exponent))
                        left -= values.nbytes
                    if odd:
                        yield f"{file}: tensor {spec.name} has {odd} values that are infinite or not a number"
        except OSError as error:
            raise Failed(f"{checkpoint.path / file}: cannot be read ({error.strerror})") from None


def _layout(checkpoint: Checkpoint) -> Iterator[str]:
    """What a config and the other layers say that a tensor should be, as far as that is the same in all families."""
    config = checkpoint.config.get("text_config") or checkpoint.config
    sizes = {key: value for key, value in config.items() if type(value) is int} if isinstance(config, dict) else {}
    for name, keys in _SHAPES.items():
        spec, wanted = checkpoint.tensors.get(name), [sizes.get(key) for key in keys]
        if spec and None not in wanted and list(spec.shape) != wanted:
            yield f"tensor {name} has shape {list(spec.shape)} where the config says {wanted}"
    layers: dict[int, set[str]] = {}
    for name in checkpoint.tensors:
        if match := _IN_LAYER.fullmatch(name):
            layers.setdefault(int(match[1]), set()).add(match[2])
    count = max(len(layers), sizes.get("num_hidden_layers", 0)) if layers else 0
    for number in range(count):
        if number not in layers:
            yield f"layer {number} is missing, of the {count} there should be"
    for part in sorted(set().union(*layers.values())):
        lacking = [number for number, parts in layers.items() if part not in parts]
        if len(lacking) == 1 and len(layers) > 2:
            others = set().union(*(parts for number, parts in layers.items() if number != lacking[0]))
            if layers[lacking[0]] < others:  # one that has parts of its own is of another kind
                yield f"tensor model.layers.{lacking[0]}.{part} is missing, which every other layer has"


def _compare_with_model(checkpoint: Checkpoint) -> Iterator[str]:
    """What differs from the names and shapes of the model that transformers builds for the config, on no device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    tied = tied_names(model)
    for name, parameter in model.named_parameters():
        spec = checkpoint.tensors.get(name)
        if spec is None and name not in tied:
            yield f"tensor {name} is missing, which {type(model).__name__} needs"
        elif spec is not None and spec.shape != tuple(parameter.shape):
            yield f"tensor {name} has shape {list(spec.shape)} where the config says {list(parameter.shape)}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rvdist.verify", description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--model", action="store_true", help="compare names and shapes with transformers' model")
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")
    arguments = parser.parse_args()
    with sentence_at_the_end():
        verdict = verify(arguments.path, arguments.model)
    if arguments.json:
        print(json.dumps(asdict(verdict), indent=2))
    else:
        for line in verdict.problems + verdict.unchecked:
            print(printable(line))
        state = f"{len(verdict.problems)} problems" if verdict.problems else "sound"
        print(f"{printable(verdict.path)}: {state} ({verdict.tensors} tensors, {verdict.nbytes:,} bytes)")
    sys.exit(1 if verdict.problems else 0)


if __name__ == "__main__":
    main()
