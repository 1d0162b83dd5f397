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
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: the transport's, httpx or httpx2
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # it loads its names lazily
    build_hf_headers,
    disable_progress_bars,
    get_session,
    hf_raise_for_status,
    parse_ratelimit_headers,
)

from rvdist.core.errors import BadInput, Failed
from rvdist.weights.checkpoint.directory import COMPANIONS, INDEX, Checkpoint, Hub, assemble
from rvdist.weights.checkpoint.header import Header, HubStamp, TensorSpec, header_end, parse_header, read_header

BLOCK = 8 << 20  # bytes fetched at a time by ranges
_PREFIX = 128 << 10  # bytes in which most headers end
_PARALLEL = 8  # requests at a time for what is small
_SMALL_ARE_IN = (Path("."), Path("additional_chat_templates"))
_ATTEMPTS = 5
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 300.0  # seconds; the Hub counts requests over five minutes

T = TypeVar("T")


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
    with ThreadPoolExecutor(_PARALLEL) as pool:
        list(pool.map(lambda file: download(hub, file), small))
        _snapshot(hub).mkdir(parents=True, exist_ok=True)
        return assemble(_snapshot(hub), files, lambda weights: pool.map(header, weights), hub)


def download(hub: Hub, file: str) -> Path:
    """Where a file lies in this node's cache; downloads it if it is not there yet. Processes of one node that want
    the same file download it once. Raises BadInput, Failed."""
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()
    path = _persistently(f"{hub}: {file} is", lambda: hf_hub_download(hub.repository, file, revision=hub.commit))
    return Path(path)


def download_weights(checkpoint: Checkpoint) -> None:
    """Puts every weight file of a Hub checkpoint into this node's cache, for who wants a directory, as an engine does.
    Raises BadInput, Failed."""
    hub = checkpoint.hub
    assert hub is not None
    with ThreadPoolExecutor(_PARALLEL) as pool:
        list(pool.map(lambda file: download(hub, file), checkpoint.files))


def download_card(checkpoint: Checkpoint) -> None:
    """Puts README.md of a Hub checkpoint beside its small files in this node's cache, if it is to be had."""
    if checkpoint.hub:
        with suppress(BadInput, Failed):
            download(checkpoint.hub, "README.md")


def obtainable(hub: Hub, file: str) -> bool:
    """Whether this node can have a file: it is in the cache, or may be asked for."""
    return not constants.HF_HUB_OFFLINE or _cached(hub, file) is not None


def by_ranges(checkpoint: Checkpoint, needed: Mapping[str, int]) -> Checkpoint:
    """`checkpoint` with those weight files marked to be read by ranges of which less than half is needed and which
    are not cached here. `needed`: the bytes of each file that will be read; of a file not named, none."""
    if checkpoint.hub is None:
        return checkpoint
    ranged = frozenset(
        file
        for file, stamp in checkpoint.stamps.items()
        if 2 * needed.get(file, 0) < stamp.size and not _cached(checkpoint.hub, file)
    )
    return replace(checkpoint, hub=replace(checkpoint.hub, ranged=ranged))


def read_bytes(checkpoint: Checkpoint, file: str, start: int, stop: int) -> bytes:
    """A few bytes of a weight file of a Hub checkpoint, which is not downloaded for them. Raises BadInput, Failed."""
    hub = checkpoint.hub
    assert hub is not None
    if path := _cached(hub, file):
        with open(path, "rb", buffering=0) as opened:
            return os.pread(opened.fileno(), stop - start, start)
    fetch = _remembered_range if stop - start <= _REMEMBERED_BYTES else fetch_range
    return bytes(fetch(hub, file, checkpoint.stamps[file].size, start, stop))


class RangeReader:
    """Reads weight files of a Hub checkpoint by ranges, ahead of what is asked for; holds two blocks at most.
    Not thread-safe."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.hub is not None
        self.files = checkpoint.hub.ranged
        self._hub = checkpoint.hub
        self._sizes = {file: stamp.size for file, stamp in checkpoint.stamps.items()}
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
        block = memoryview(fetch_range(self._hub, spec.file, self._sizes[spec.file], offset, stop))
        self._blocks[spec.file, offset] = block
        return offset, block


def fetch_range(hub: Hub, file: str, size: int, start: int, stop: int) -> bytearray:
    """Bytes [start, stop) of a file of `size` bytes, from the network. What has come when a connection breaks is kept.
    Raises BadInput, Failed."""
    url = hf_hub_url(hub.repository, file, revision=hub.commit)
    found = bytearray()

    def go_on() -> bytearray:
        begin = start + len(found)
        headers = build_hf_headers() | {"Range": f"bytes={begin}-{stop - 1}", "Accept-Encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
            hf_raise_for_status(response)
            got = response.headers.get("Content-Range", "no range")
            if response.status_code != 206 or not re.fullmatch(rf"bytes {begin}-\d+/{size}", got):
                raise Failed(f"{hub}: {file}: asked for a range from {begin} of {size} bytes, the Hub gave {got}")
            for piece in response.iter_raw():
                found.extend(piece[: stop - start - len(found)])
        if len(found) < stop - start:
            raise EOFError("the answer ended too early")
        return found

    return _persistently(f"{hub}: {file} is", go_on) if start < stop else found


_REMEMBERED_BYTES = 1 << 20  # at most, of one range: samples are small
_remembered_range = lru_cache(maxsize=256)(fetch_range)


def _find(what: str, repository: str, revision: str) -> tuple[Hub, dict[str, HubStamp]]:
    """The commit that a revision is, and its files; offline, the commit that it was when last asked for, and which of
    its files are cached."""
    ref = _folder(repository) / "refs" / revision
    if constants.HF_HUB_OFFLINE:
        commit = ref.read_text(errors="replace") if ref.is_file() else revision
        hub = Hub(repository, commit)
        if not re.fullmatch(r"[0-9a-f]{40}", commit) or not _snapshot(hub).is_dir():
            raise BadInput(_offline(what))
        return hub, {path.name: _cached_stamp(hub, path) for path in _snapshot(hub).iterdir() if path.is_file()}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    info = _persistently(
        what, lambda: HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=timeout)
    )
    if not info.sha or not re.fullmatch(r"[0-9a-f]{40}", info.sha):
        raise Failed(f"{what} not to be had from the Hub (it names no commit)")
    with suppress(OSError):  # a cache that is read-only serves as well
        if revision != info.sha and not (ref.is_file() and ref.read_text(errors="replace") == info.sha):
            ref.parent.mkdir(parents=True, exist_ok=True)
            temporary = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
            temporary.write_text(info.sha)
            temporary.replace(ref)
    return Hub(repository, info.sha), {
        file.rfilename: HubStamp(file.lfs.sha256 if file.lfs else str(file.blob_id), file.size or 0)
        for file in info.siblings or []
    }


def _header(hub: Hub, file: str, stamp: HubStamp) -> Header:
    if path := _cached(hub, file):
        tensors, metadata, _ = read_header(path)
        return tensors, metadata, stamp
    where = f"{hub}: {file}"
    prefix = bytes(fetch_range(hub, file, stamp.size, 0, min(_PREFIX, stamp.size)))
    prefix += fetch_range(hub, file, stamp.size, len(prefix), header_end(where, prefix, stamp.size))
    return *parse_header(where, file, prefix, stamp.size), stamp


def _folder(repository: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")


def _snapshot(hub: Hub) -> Path:
    return _folder(hub.repository) / "snapshots" / hub.commit


def _cached(hub: Hub, file: str) -> Path | None:
    path = _snapshot(hub) / file
    return path if path.is_file() else None


def _cached_stamp(hub: Hub, path: Path) -> HubStamp:
    """What `_find` says of the file online: the cache names contents by their etag, and snapshots link to them.
    A cache without links has forgotten the etag; the commit and the name say as much, if only of this commit."""
    etag = os.path.basename(os.readlink(path)) if path.is_symlink() else f"{hub.commit}/{path.name}"
    return HubStamp(etag, path.stat().st_size)


def _persistently(what: str, act: Callable[[], T]) -> T:
    """Acts again, after a while, where it failed for a reason that passes. Raises Failed when it does not pass, and
    BadInput when the Hub refuses."""
    for attempt in range(_ATTEMPTS):
        try:
            return act()
        except Failed:
            raise
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
            return min(float(asked), _LONGEST_WAIT)
        if limit := parse_ratelimit_headers(error.response.headers):
            return min(float(limit.reset_in_seconds), _LONGEST_WAIT)
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
