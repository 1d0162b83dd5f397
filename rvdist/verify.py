"""python -m rvdist.verify PATH [--json]: is this checkpoint whole, finite, and what was written?

Checks the index and every header, the digest of every range the manifest (rvdist.json) lists, that values are
finite, and that names and shapes are those transformers would ask for. Exit status 0 sound, 1 not, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rvdist.checkpoint.directory import Checkpoint, open_checkpoint
from rvdist.checkpoint.journal import MANIFEST, Manifest
from rvdist.errors import BadInput, Failed

_CHUNK = 1 << 20  # elements


@dataclass
class Verdict:
    """`problems`: why the checkpoint must not be used; `unchecked`: what could not be judged, and why."""

    path: str
    tensors: int
    nbytes: int
    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)


def verify(path: Path) -> Verdict:
    """Reads all of the checkpoint in the directory `path`, in constant memory. Raises BadInput where the headers or
    the index cannot be used at all, Failed where a file cannot be read."""
    checkpoint = open_checkpoint(path)
    verdict = Verdict(str(path), len(checkpoint.tensors), checkpoint.nbytes)
    if (path / MANIFEST).exists():
        verdict.problems += _digests(checkpoint, Manifest.read(path))
    else:
        verdict.unchecked.append(f"there is no {MANIFEST}: not written by rvdist, digests were not checked")
    verdict.problems += _nonfinite(checkpoint)
    try:
        verdict.problems += _layout(checkpoint)
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
    import torch

    from rvdist.arithmetic.method import Scratch, count_nonfinite
    from rvdist.checkpoint.stream import TensorFiles

    files, buffer, scratch = TensorFiles(checkpoint), torch.empty(_CHUNK * 8, dtype=torch.uint8), Scratch(_CHUNK)
    for name, spec in checkpoint.tensors.items():
        found = sum(
            count_nonfinite(files.read(spec, begin, min(begin + _CHUNK, spec.numel), buffer), scratch)
            for begin in range(0, spec.numel, _CHUNK)
        )
        if found:
            yield f"{spec.file}: tensor {name} has {found} values that are infinite or not a number"
    files.close()


def _layout(checkpoint: Checkpoint) -> Iterator[str]:
    """What differs from the names and shapes of the model that transformers builds for the config, on no device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for name, parameter in model.named_parameters():
        spec = checkpoint.tensors.get(name)
        if spec is None and name not in tied:
            yield f"tensor {name} is missing, which {type(model).__name__} needs"
        elif spec is not None and spec.shape != tuple(parameter.shape):
            yield f"tensor {name} has shape {list(spec.shape)} where the config says {list(parameter.shape)}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rvdist.verify", description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")
    arguments = parser.parse_args()
    try:
        verdict = verify(arguments.path)
    except (BadInput, Failed) as error:
        print(f"rvdist: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, BadInput) else 1)
    if arguments.json:
        print(json.dumps(asdict(verdict), indent=2))
    else:
        for line in verdict.problems + verdict.unchecked:
            print(line)
        state = f"{len(verdict.problems)} problems" if verdict.problems else "sound"
        print(f"{verdict.path}: {state} ({verdict.tensors} tensors, {verdict.nbytes:,} bytes)")
    sys.exit(1 if verdict.problems else 0)


if __name__ == "__main__":
    main()
