"""The publish stage: a finished checkpoint or vector becomes a Hub repository, after showing what will be public.

Knows directories and the Hub's client, which has the token and does all traffic. Nothing is sent before somebody has
agreed. What the Hub then has is compared with what lies here. `checkpoint.hub` is the way back.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rvdist import __version__
from rvdist.core.config import PLACEHOLDERS
from rvdist.core.errors import BadInput, Failed
from rvdist.core.foreign import parse_json
from rvdist.core.regular import read_regular
from rvdist.report.card.metadata import Result
from rvdist.report.wording import printable
from rvdist.stages.job import Job
from rvdist.weights.checkpoint.directory import open_checkpoint, read_json
from rvdist.weights.checkpoint.journal import JOURNAL, MANIFEST, Manifest
from rvdist.weights.checkpoint.staging import discards

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from rvdist.report.findings import Findings

Contents = dict[str, Path | bytes]  # by name in the repository

CARD = "README.md"
_TEXT = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
_TEXT_IS_IN = (Path("."), Path("additional_chat_templates"))
_VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
_MOST_JSON, _MOST_LISTING = 64 << 20, 32 << 20  # bytes
_PATIENCE = 120.0  # seconds without a byte
_LOCAL_PATH = re.compile(r"(?:(?:file://|~)?(?:/[^/\n]+){2,}|[A-Za-z]:\\[^\n]+)/?")
_REASONS = {
    401: "the token is not accepted; log in again with `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there; give it write access to this repository",
    404: "no such repository or branch, or not for this token",
    409: "something else is changing the repository at this moment",
    412: "something else has changed the repository meanwhile",
    413: "a file is too large for it",
    429: "too many requests; wait some minutes",
}


def require(job: Job, published: Mapping[Path, str], others: Mapping[Path, str]) -> None:
    """Raises BadInput where the directories could not be uploaded, whatever will be in them; `others` are what other
    jobs upload. Asks nobody and sends nothing."""
    from huggingface_hub import constants, get_token

    for directory, repository in published.items():
        if discards(directory):
            raise BadInput(f"output: nothing is kept at {directory}, and publish uploads it; set output=DIRECTORY")
        if any(name.casefold() == repository.casefold() and place != directory for place, name in others.items()):
            raise BadInput(f"publish: several jobs would upload to {repository}; put {PLACEHOLDERS} into the name")
    if constants.HF_HUB_OFFLINE:
        raise BadInput("publish: HF_HUB_OFFLINE=1 is set, and nothing can be uploaded with it; unset it")
    if not get_token():
        raise BadInput("publish: no token of the Hub was found; log in with `hf auth login`, or set HF_TOKEN")
    if not job.settings.hub.confirmed and not _on_a_terminal(job):
        job.note(f"what goes to {', '.join(published.values())} will be shown only, as hub.confirmed is not set")


def results(directory: Path, findings: Findings | None, digest: str | None) -> list[Result]:
    """What the run in a directory found of the point with this digest, with the baseline's score beside it: the rows
    of the main table."""
    if findings is None or digest is None:
        return []
    baseline = findings.arms[0].name
    reference = {row.task: row for row in findings.benchmarks if row.arm == baseline}
    members = {group.name: group.tasks for group in findings.groups}
    said = read_json(directory / "results" / f"{baseline}.json")
    listed = []
    for row in findings.benchmarks:
        if row.point == digest:
            asked = {json.dumps(_ask(said, task)) for task in members.get(row.task, (row.task,))}
            what = json.loads(asked.pop()) if len(asked) == 1 else {}
            other = reference.get(row.task) if row.arm != baseline else None
            listed.append(Result(row, other, dissent=findings.dissent.get((row.task, row.arm), ()), **what))
    return listed


def _ask(said: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Data set, configuration, split and number of examples of a task in lm-eval's results; of a data set that is not
    from the Hub only the last."""
    given = said.get("configs", {}).get(task, {})
    dataset, shots = given.get("dataset_path"), said.get("n-shot", {}).get(task)
    if not isinstance(dataset, str) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", dataset) or Path(dataset).exists():
        return {"shots": shots}
    split = given.get("test_split") or given.get("validation_split")
    return {"dataset": dataset, "config": given.get("dataset_name"), "split": split, "shots": shots}


def publish(job: Job, directory: Path, repository: str, card: str) -> None:
    """Shows what is in `directory`, its README.md being `card`, asks, uploads it to `org/name` or `org/name@branch`,
    and compares. Raises BadInput, Failed; the same call goes on from there."""
    with job.timing.phase("publish"):
        contents, notes = _contents(directory)
    contents = dict(sorted({**contents, CARD: card.encode()}.items()))
    _show(job, directory, repository, contents, notes)
    _require_consent(job, repository)
    with job.timing.phase("publish"):
        commit = _send(repository, job.settings.hub.private, contents, job.console.is_terminal)
    job.say(f"published {repository.partition('@')[0]}@{commit}")


def _contents(directory: Path) -> tuple[Contents, list[str]]:
    """The files of a finished output, and what a reader of the list must know. Raises BadInput for one that is not
    what was written, or that holds a link to elsewhere."""
    manifest, weights = Manifest.read(directory), open_checkpoint(directory).files
    for written in manifest.ranges:
        if written.file not in weights or not written.holds(directory):
            raise BadInput(f"{directory / written.file}: is not what was written; merge again with overwrite=true")
    contents: Contents = {}
    notes = []
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        if path.is_symlink() and not path.resolve().is_relative_to(directory.resolve()):
            raise BadInput(f"{path}: is a link to elsewhere, and would be uploaded; remove it")
        if path.is_dir():
            continue
        if not path.is_file():
            raise BadInput(f"{path}: is neither a file nor a directory; remove it")
        if str(name) in weights:
            contents[str(name)] = path
        elif name.suffix in _TEXT and name.parent in _TEXT_IS_IN and not name.name.startswith("."):
            contents[str(name)], cut = _without_paths(path)
            notes += [f"{name}: the local path in {key} is cut to its last component" for key in cut]
        elif name.name not in (CARD, JOURNAL):
            notes.append(f"{name}: is not of the output and stays here")
    return contents, notes


def _without_paths(path: Path) -> tuple[Path | bytes, list[str]]:
    """JSON as it goes out, and its keys that named files of this machine; any other file as it is."""
    if path.suffix != ".json" or path.name in _VOCABULARIES:
        return path, []
    try:
        said = parse_json(read_regular(path, _MOST_JSON))
    except (OSError, ValueError):
        return path, []
    if not isinstance(said, dict | list) or not (cut := list(_cut(said))):
        return path, []
    return (json.dumps(said, indent=2, ensure_ascii=False) + "\n").encode(), cut


def _cut(said: Any) -> Iterator[str]:
    """Leaves of local paths in JSON's dictionaries and lists the last component; gives their keys."""
    for key, value in list(said.items() if isinstance(said, dict) else enumerate(said)):
        if isinstance(value, dict | list):
            yield from _cut(value)
        elif isinstance(value, str) and _LOCAL_PATH.fullmatch(value):
            said[key] = re.split(r"[/\\]", value.rstrip("/\\"))[-1]
            yield str(key)


def _show(job: Job, directory: Path, repository: str, contents: Contents, notes: Sequence[str]) -> None:
    name, _, branch = repository.partition("@")
    private = job.settings.hub.private
    job.say(
        f"publish: {directory} to the {'private' if private else 'public'} repository {name}"
        + (f", branch {branch}" if branch else "")
        + (", where only its members see" if private else ", where everybody sees")
    )
    sizes = {file: _size(content) for file, content in contents.items()}
    width = len(f"{max(sizes.values()):,}")
    for file, size in sizes.items():
        job.say(f"  {size:>{width},} bytes  {printable(file)}")
    job.say(f"  in all {len(sizes)} files, {sum(sizes.values()):,} bytes; the metadata of {CARD}:")
    card = contents[CARD]
    assert isinstance(card, bytes)
    for line in card.decode().split("\n---", 1)[0].splitlines()[1:]:
        job.say(f"    {printable(line)}")
    for note in notes:
        job.say(f"  note: {printable(note)}")


def _on_a_terminal(job: Job) -> bool:
    return sys.stdin is not None and sys.stdin.isatty() and job.console.is_terminal


def _require_consent(job: Job, repository: str) -> None:
    if job.settings.hub.confirmed:
        return
    if not _on_a_terminal(job):
        raise BadInput(
            f"publish: nothing was uploaded to {repository}, there is no terminal to ask at; if all that is listed may "
            "be there, run the same command with hub.confirmed=true"
        )
    try:
        answer = job.console.input(f"upload this to {repository}? [y/N] ", markup=False)
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise Failed(f"publish: nothing was uploaded to {repository}, as was answered; {CARD} and weights stay here")


def _send(repository: str, private: bool, contents: Contents, bars: bool) -> str:
    """Uploads, and returns the commit. Raises BadInput where the repository is no place for it, Failed."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # it loads its names lazily
        disable_progress_bars,
        get_session,
    )

    from rvdist.weights.checkpoint import guard

    # What the client would warn of holds addresses that are as good as a token for a while.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not bars:
        disable_progress_bars()
    try:
        with guard.sending():
            get_session().timeout = _PATIENCE
            return _upload(HfApi(), repository, private, contents)
    except (BadInput, Failed):
        raise
    except Exception as error:  # the client's errors share no base class with those of its transports
        reason = _reason(error).replace(get_token() or "\0", "…")
        raise Failed(
            f"publish: {repository} could not be uploaded ({reason}); nothing is lost, the same command goes on"
        ) from None


def _upload(api: HfApi, repository: str, private: bool, contents: Contents) -> str:
    """One commit has all files, so that the repository never holds a part of them; files that had arrived before are
    not sent again."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    from rvdist.weights.checkpoint import guard

    name, _, branch = repository.partition("@")
    api.create_repo(name, private=private, exist_ok=True)
    if branch:
        api.create_branch(name, branch=branch, exist_ok=True)
    with guard.at_most(_MOST_LISTING):
        there = api.model_info(name, revision=branch or None, timeout=_PATIENCE)
    if bool(there.private) != private:
        raise BadInput(
            f"publish: {name} exists and is {'private' if there.private else 'public'}; set "
            f"hub.private={'true' if there.private else 'false'}, or give another name"
        )
    held = {file.rfilename for file in there.siblings or []}
    weights = {file for file in held if file.endswith(_WEIGHTS)}
    if weights and MANIFEST not in held:
        raise BadInput(
            f"publish: {repository} holds {min(weights)}, which rvdist did not publish; give another name or branch"
        )
    added = [CommitOperationAdd(file, content) for file, content in contents.items()]
    stale = [CommitOperationDelete(file) for file in sorted(weights - contents.keys())]
    commit = api.create_commit(
        name,
        [*added, *stale],
        commit_message=f"Upload by rvdist {__version__}",
        revision=branch or None,
        parent_commit=there.sha,
    ).oid
    _require_equal(api, name, commit, {one.path_in_repo: one for one in added})
    return commit


def _require_equal(api: HfApi, name: str, commit: str, added: Mapping[str, Any]) -> None:
    """Raises Failed unless the commit has every file, with the size and the digest of ours."""
    from rvdist.weights.checkpoint import guard

    with guard.at_most(_MOST_LISTING):
        info = api.model_info(name, revision=commit, files_metadata=True, timeout=_PATIENCE)
    there = {file.rfilename: file for file in info.siblings or []}
    for path, operation in added.items():
        file, ours = there.get(path), operation.path_or_fileobj
        if file is None:
            raise Failed(f"publish: {name}@{commit} lacks {path}; run the same command again")
        if file.lfs:
            same = file.lfs.sha256 == operation.upload_info.sha256.hex()
        else:
            content = ours if isinstance(ours, bytes) else Path(ours).read_bytes()
            same = file.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if not same or file.size != operation.upload_info.size:
            raise Failed(f"publish: {path} of {name}@{commit} is not what was sent; run the same command again")


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _reason(error: BaseException) -> str:
    """The first error of a chain that says something, in a few words."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        said = printable(getattr(error, "server_message", None) or "").strip()[:200]
        return _REASONS.get(status, f"HTTP status {status}") + (f": {said}" if said else "")
    if error.__cause__ is not None:
        return _reason(error.__cause__)
    return printable((str(error).strip() or type(error).__name__).splitlines()[0])[:200]
