"""Hub repositories: what is in one at a revision, and its bytes, from the cache or the network, whole or by ranges.

The only module that talks to a network. Only weights, JSON and plain text, code among it, are ever fetched; nothing is
run.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import quote

from huggingface_hub import constants, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: the transport's, httpx or httpx2
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # it loads its names lazily
    build_hf_headers,
    disable_progress_bars,
    get_session,
    hf_raise_for_status,
    parse_ratelimit_headers,
)

from rvdist.core.errors import BadInput, Failed
from rvdist.core.foreign import parse_json
from rvdist.core.text import reason
from rvdist.weights.checkpoint import guard
from rvdist.weights.checkpoint.directory import COMPANIONS, INDEX, Checkpoint, Hub, assemble
from rvdist.weights.checkpoint.header import Header, HubStamp, TensorSpec, header_end, parse_header, read_header
from rvdist.weights.checkpoint.private_huggingface_hub import cache_folder

BLOCK = 8 << 20  # bytes fetched at a time by ranges
_PREFIX = 128 << 10  # bytes in which most headers end
_PARALLEL = 8  # requests at a time for what is small
_SMALL_ARE_IN = (Path("."), Path("additional_chat_templates"))
_MOST_SMALL, _SMALL_FILES = 1 << 30, 1000  # bytes, of one and of all together; how many
_MOST_LISTING, _LONGEST_NAME = 32 << 20, 1000  # bytes; characters
_ATTEMPTS = 5
_FIRST_WAIT = 1.0  # seconds

T = TypeVar("T")
guard.install()


def open_repository(repository: str, revision: str | None) -> Checkpoint:
    """The checkpoint in a Hub repository. Small files are fetched into the cache, of weight files no more than the
    headers. With HF_HUB_OFFLINE=1 all of it must be cached. Raises BadInput, Failed."""
    what = f"{repository}@{revision}" if revision else repository
    hub, files = _find(f"{what}: no such directory, and", repository, revision or constants.DEFAULT_REVISION)
    small = [name for name in files if name.endswith(COMPANIONS) and Path(name).parent in _SMALL_ARE_IN]

    def header(file: str) -> Header:
        if file in files:
            return _header(hub, file, files[file])
        if constants.HF_HUB_OFFLINE:
            raise BadInput(_offline(f"{hub}: {file} is"))
        raise BadInput(f"{hub}: lacks {file}, which its index names; choose another revision")

    if constants.HF_HUB_OFFLINE and not any(name == INDEX or name.endswith(".safetensors") for name in files):
        raise BadInput(_offline(f"{hub}: model.safetensors is"))
    nbytes = sum(files[name].size for name in small)
    if len(small) > _SMALL_FILES or nbytes > _MOST_SMALL:
        raise BadInput(
            f"{hub}: has {len(small):,} files beside its weights, {nbytes:,} bytes; at most {_SMALL_FILES:,} and "
            f"{_MOST_SMALL:,} bytes are fetched; give a directory with those that it needs"
        )
    with ThreadPoolExecutor(_PARALLEL) as pool:
        list(pool.map(lambda file: download(hub, file, files[file]), small))
        _snapshot(hub).mkdir(parents=True, exist_ok=True)
        return assemble(_snapshot(hub), files, lambda weights: pool.map(header, weights), hub)


def download(hub: Hub, file: str, stamp: HubStamp | None = None) -> Path:
    """Where a file lies in this node's cache; downloads it if it is not there yet: no more than was announced of it in
    `stamp`. Processes of one node that want the same file download it once. Raises BadInput, Failed."""
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()
    what, most = f"{hub}: {file} is", stamp.size if stamp else _MOST_SMALL
    path = Path(_persistently(what, lambda: hf_hub_download(hub.repository, file, revision=hub.commit), most))
    if stamp and (
        path.stat().st_size != stamp.size or _cached_stamp(hub, path).etag not in (stamp.etag, _etag_by_name(hub, path))
    ):
        raise Failed(f"{what} not what the Hub announced; delete {path} and run again")
    return path


def download_weights(checkpoint: Checkpoint) -> None:
    """Puts every weight file of a Hub checkpoint into this node's cache, for who wants a directory, as an engine does.
    Raises BadInput, Failed."""
    hub = checkpoint.hub
    assert hub is not None
    with ThreadPoolExecutor(_PARALLEL) as pool:
        list(pool.map(lambda file: download(hub, file, hub_stamp(checkpoint, file)), checkpoint.files))


def hub_stamp(checkpoint: Checkpoint, file: str) -> HubStamp:
    """What the Hub announced of a weight file."""
    stamp = checkpoint.stamps[file]
    assert isinstance(stamp, HubStamp)
    return stamp


def download_card(checkpoint: Checkpoint) -> None:
    """Puts README.md of a Hub checkpoint beside its small files in this node's cache, if it is to be had."""
    if checkpoint.hub:
        with suppress(BadInput, Failed):
            download(checkpoint.hub, "README.md")


def obtainable(hub: Hub, file: str) -> bool:
    """Whether this node can have a file: it is in the cache, or may be asked for."""
    return not constants.HF_HUB_OFFLINE or _find_cached(hub, file) is not None


def by_ranges(checkpoint: Checkpoint, needed: Mapping[str, int]) -> Checkpoint:
    """`checkpoint` with those weight files marked to be read by ranges of which less than half is needed and which
    are not cached here. `needed`: the bytes of each file that will be read; of a file not named, none."""
    if checkpoint.hub is None:
        return checkpoint
    ranged = frozenset(
        file
        for file, stamp in checkpoint.stamps.items()
        if 2 * needed.get(file, 0) < stamp.size and not _find_cached(checkpoint.hub, file)
    )
    return replace(checkpoint, hub=replace(checkpoint.hub, ranged=ranged))


def read_bytes(checkpoint: Checkpoint, file: str, start: int, stop: int) -> bytes:
    """A few bytes of a weight file of a Hub checkpoint, which is not downloaded for them. Raises BadInput, Failed."""
    hub = checkpoint.hub
    assert hub is not None
    if path := _find_cached(hub, file):
        with open(path, "rb", buffering=0) as opened:
            return os.pread(opened.fileno(), stop - start, start)
    fetch = _remembered_range if stop - start <= _REMEMBERED_BYTES else fetch_range
    return bytes(fetch(hub, file, hub_stamp(checkpoint, file), start, stop))


class RangeReader:
    """Reads weight files of a Hub checkpoint by ranges, ahead of what is asked for; holds two blocks at most.
    Not thread-safe."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.hub is not None
        self.files = checkpoint.hub.ranged
        self._hub = checkpoint.hub
        self._stamps = {file: hub_stamp(checkpoint, file) for file in self.files}
        self._blocks: dict[tuple[str, int], memoryview] = {}  # by file and first byte, the older one first

    def read(self, spec: TensorSpec, offset: int, view: memoryview) -> None:
        """Fills `view` with the bytes of the tensor's file from `offset`. Raises BadInput, Failed."""
        while view:
            begin, block = self._block(spec, offset)
            piece = block[offset - begin : offset - begin + len(view)]
            view[: len(piece)] = piece
            view, offset = view[len(piece) :], offset + len(piece)

    def _block(self, spec: TensorSpec, offset: int) -> tuple[int, memoryview]:
        """A block that holds the byte at `offset`, and where it begins. None reaches beyond its tensor: what is next
        in the file may not be needed."""
        for (file, begin), block in self._blocks.items():
            if file == spec.file and begin <= offset < begin + len(block):
                return begin, block
        if len(self._blocks) == 2:
            del self._blocks[next(iter(self._blocks))]
        stop = min(offset + BLOCK, spec.offset + spec.nbytes)
        block = memoryview(fetch_range(self._hub, spec.file, self._stamps[spec.file], offset, stop))
        self._blocks[spec.file, offset] = block
        return offset, block


def fetch_range(hub: Hub, file: str, stamp: HubStamp, start: int, stop: int) -> bytearray:
    """Bytes [start, stop) of a file, from the network. What has come when a connection breaks is kept.
    Raises BadInput, Failed, also where the Hub gives another file than it announced."""
    url = hf_hub_url(hub.repository, file, revision=hub.commit)
    body = bytearray()

    def go_on() -> bytearray:
        begin = start + len(body)
        headers = build_hf_headers() | {"Range": f"bytes={begin}-{stop - 1}"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
            hf_raise_for_status(response)
            got = response.headers.get("Content-Range", "no range")
            if response.status_code != 206 or not got.endswith(f"/{stamp.size}"):
                asked = f"asked for a range from {begin} of {stamp.size} bytes"
                raise guard.Refused(f"{asked}, it gives {got[:50]} of another file or none")
            _require_announced(hub, stamp, [*response.history, response])
            for piece in response.iter_raw():
                body.extend(piece[: stop - start - len(body)])
        if len(body) < stop - start:
            raise EOFError("the answer ended too early")
        return body

    return _persistently(f"{hub}: {file} is", go_on, stop - start) if start < stop else body


def _require_announced(hub: Hub, stamp: HubStamp, answers: list[Any]) -> None:
    """Raises Refused where the Hub does not say that what it gives is the file of this commit. The last answer may be
    of a warehouse, which has names of its own."""
    for answer in answers:
        if commit := answer.headers.get("X-Repo-Commit"):
            etag = answer.headers.get("X-Linked-Etag") or answer.headers.get("ETag", "none")
            if (commit, etag.removeprefix("W/").strip('"')) == (hub.commit, stamp.etag):
                return
            raise guard.Refused(f"it gives the file {etag[:80]} of commit {commit[:40]}, and announced {stamp.etag}")
    raise guard.Refused("it does not say of which commit its answer is")


_REMEMBERED_BYTES = 1 << 20  # at most, of one range: samples are small
_remembered_range = lru_cache(maxsize=256)(fetch_range)


def _find(what: str, repository: str, revision: str) -> tuple[Hub, dict[str, HubStamp]]:
    """The commit that a revision is, and its files; offline, the commit that it was when last asked for, and which of
    its files are cached."""
    ref = cache_folder(repository) / "refs" / revision
    if constants.HF_HUB_OFFLINE:
        commit = ref.read_text(errors="replace") if ref.is_file() else revision
        hub = Hub(repository, commit)
        if not re.fullmatch(r"[0-9a-f]{40}", commit) or not _snapshot(hub).is_dir():
            raise BadInput(_offline(what))
        return hub, {path.name: _cached_stamp(hub, path) for path in _snapshot(hub).iterdir() if path.is_file()}
    commit, files = _persistently(what, lambda: _listing(repository, revision), _MOST_LISTING)
    with suppress(OSError):  # a cache that is read-only serves as well
        if revision != commit and not (ref.is_file() and ref.read_text(errors="replace") == commit):
            ref.parent.mkdir(parents=True, exist_ok=True)
            temporary = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
            temporary.write_text(commit)
            temporary.replace(ref)
    return Hub(repository, commit), files


def _listing(repository: str, revision: str) -> tuple[str, dict[str, HubStamp]]:
    """The commit that a revision is, and its files."""
    url = f"{constants.ENDPOINT}/api/models/{repository}/revision/{quote(revision, safe='')}"
    response = get_session().get(
        url, params={"blobs": True}, headers=build_hf_headers(), timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
    )
    hf_raise_for_status(response)
    try:
        listing = parse_json(response.content)
        commit, siblings = listing["sha"], listing["siblings"]
        if not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise ValueError(f"its commit is {str(commit)[:50]!r}")
        return commit, {_file_name(file["rfilename"]): _announced_stamp(file) for file in siblings}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise guard.Refused(f"it lists its files wrongly: {reason(error)}") from None


def _file_name(name: str) -> str:
    if not name or name != PurePosixPath(name).as_posix() or name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise ValueError(f"a file is called {name[:100]!r}")
    if "\0" in name or len(name) > _LONGEST_NAME:
        raise ValueError("a file has a name that none can have")
    return name


def _announced_stamp(file: dict[str, Any]) -> HubStamp:
    """Raises ValueError, KeyError, TypeError where no size or hash is announced."""
    size, etag = file["size"], file["lfs"]["sha256"] if file.get("lfs") else file["blobId"]
    if type(size) is not int or not 0 <= size < 1 << 60 or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag):
        raise ValueError(f"{file['rfilename'][:100]} has the size {str(size)[:30]} and the hash {str(etag)[:80]}")
    return HubStamp(etag, size)


def _header(hub: Hub, file: str, stamp: HubStamp) -> Header:
    if path := _find_cached(hub, file):
        tensors, metadata, _ = read_header(path)
        return tensors, metadata, stamp
    where = f"{hub}: {file}"
    prefix = bytes(fetch_range(hub, file, stamp, 0, min(_PREFIX, stamp.size)))
    prefix += fetch_range(hub, file, stamp, len(prefix), header_end(where, prefix, stamp.size))
    return *parse_header(where, file, prefix, stamp.size), stamp


def _snapshot(hub: Hub) -> Path:
    return cache_folder(hub.repository) / "snapshots" / hub.commit


def _find_cached(hub: Hub, file: str) -> Path | None:
    path = _snapshot(hub) / file
    return path if path.is_file() else None


def _cached_stamp(hub: Hub, path: Path) -> HubStamp:
    """What `_find` says of the file online: the cache names contents by their etag, and snapshots link to them.
    A cache without links has forgotten the etag; the commit and the name say as much, if only of this commit."""
    etag = os.path.basename(os.readlink(path)) if path.is_symlink() else _etag_by_name(hub, path)
    return HubStamp(etag, path.stat().st_size)


def _etag_by_name(hub: Hub, path: Path) -> str:
    return f"{hub.commit}/{path.name}"


def _persistently(what: str, act: Callable[[], T], most: int) -> T:
    """Acts again, after a while, where it failed for a reason that passes. Raises Failed when it does not pass, or an
    answer is not what was asked for or has more than `most` bytes, and BadInput when the Hub refuses."""
    for attempt in range(_ATTEMPTS):
        try:
            with guard.at_most(most):
                return act()
        except guard.Refused as error:
            raise Failed(f"{what} not to be had from the Hub ({error}); choose another revision or endpoint") from None
        except Exception as error:  # the client's errors share no base class with those of its transports
            if constants.HF_HUB_OFFLINE:
                raise BadInput(_offline(what)) from None
            if not _passes(error):
                kind = BadInput if isinstance(error, HfHubHTTPError | ValueError) else Failed
                raise kind(f"{what} not to be had from the Hub ({_reason(error)})") from None
            last = error
        if attempt < _ATTEMPTS - 1:
            time.sleep(_wait(last, attempt))
    raise Failed(
        f"{what} not to be had from the Hub in {_ATTEMPTS} attempts ({_reason(last)}); run the same command again"
    )


def _passes(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return isinstance(error, HTTPError | EOFError)


def _wait(error: Exception, attempt: int) -> float:
    """Seconds: what the Hub asks for, else twice as long each time."""
    if isinstance(error, HfHubHTTPError):
        asked = error.response.headers.get("Retry-After", "")
        if asked.isdigit():
            return float(asked)
        if limit := parse_ratelimit_headers(error.response.headers):
            return float(limit.reset_in_seconds)
    return _FIRST_WAIT * 2.0**attempt


def _reason(error: BaseException) -> str:
    if isinstance(error, GatedRepoError):
        return "it is gated; ask for access to it, and log in"
    if isinstance(error, RepositoryNotFoundError):
        return "no such repository, or a private one; check its name, or log in"
    if isinstance(error, RevisionNotFoundError):
        return "no such revision"
    if isinstance(error, HfHubHTTPError):
        return f"HTTP status {error.response.status_code}"
    if error.__cause__ is not None:
        return _reason(error.__cause__)
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _offline(what: str) -> str:
    return (
        f"{what} not to be had from the Hub (HF_HUB_OFFLINE=1, and it is not in the cache {constants.HF_HUB_CACHE}); "
        "run once without HF_HUB_OFFLINE"
    )
