"""What a server may do to who asks it: how much it sends, how slowly, from where, and what counts as an answer.

In place of the socket and the transport of the Hub's client; without a guard in the thread that asks, both are as they
were.
"""

from __future__ import annotations

import importlib
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants

from rvdist.weights.checkpoint.private_huggingface_hub import wrap_connections, wrap_transports

_PATIENCE = 60.0  # seconds of waiting for bytes that are owed
_SLOWEST = 8 << 10  # bytes that make up for a second of it
_REQUESTS = 64  # of one act, redirects and second attempts among them
_LONGEST_WAIT = 300  # seconds that a server may ask for: the Hub counts requests over five minutes
_ANSWER = 32 << 20  # bytes of an answer to what is sent
_SENT_PATIENCE = 120.0  # seconds of waiting for it
_HEAD = 128 << 10  # bytes of headers; of a body as many again, and an eighth, for what stands around its pieces
_LOOPBACK = {"127.0.0.1", "::1", "localhost"}
_current = threading.local()
_sending = False
_xet_is_disabled = False  # as the user wants it


class Refused(Exception):
    """Why an answer is not taken."""


class _Guard:
    def __init__(self, most: int, patience: float) -> None:
        self.most, self.requests, self.left = most, 0, 0
        self._whole_patience = self.patience = patience

    def begin(self) -> None:
        self.requests += 1
        if self.requests > _REQUESTS:
            raise Refused(f"it takes more than {_REQUESTS} requests")
        self.left = _HEAD

    def has_head(self) -> None:
        self.left = self.most + self.most // 8 + _HEAD

    def count(self, nbytes: int, seconds: float) -> None:
        self.left -= nbytes
        self.patience = min(self._whole_patience, self.patience - seconds + nbytes / _SLOWEST)
        if self.left < 0:
            raise Refused(f"it sends more than the {self.most:,} bytes that are due, or endless headers")
        if self.patience <= 0:
            raise Refused(f"it is slower than {_SLOWEST / 1024:g} KiB a second")


@contextmanager
def at_most(nbytes: int) -> Iterator[None]:
    """What this thread asks a server for has at most so many bytes, and comes in time. Raises Refused."""
    before, _current.guard = getattr(_current, "guard", None), _Guard(nbytes, _PATIENCE)
    try:
        yield
    finally:
        _current.guard = before


@contextmanager
def sending() -> Iterator[None]:
    """Whatever a thread of this process sends or asks for meanwhile goes by https, or to the endpoint, and is answered
    in time, with no more bytes than any answer has. Raises Refused, in that thread. Xet is used as the user wants."""
    global _sending
    install()
    before, _sending = _sending, True
    disabled, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, _xet_is_disabled
    try:
        yield
    finally:
        _sending, constants.HF_HUB_DISABLE_XET = before, disabled


def _active() -> _Guard | None:
    """The guard of what this thread asks, or of its last request while something is sent."""
    guard: _Guard | None = getattr(_current, "guard", None)
    return getattr(_current, "of_sent", None) if guard is None and _sending else guard


class _Stream:
    """A connection's bytes, counted."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        guard = _active()
        if guard is None:
            return bytes(self._stream.read(max_bytes, timeout))
        began = time.monotonic()
        got = bytes(self._stream.read(max_bytes, timeout))
        guard.count(len(got), time.monotonic() - began)
        return got

    def start_tls(self, *arguments: Any, **named: Any) -> _Stream:
        return _Stream(self._stream.start_tls(*arguments, **named))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Backend:
    """What opens connections."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def connect_tcp(self, *arguments: Any, **named: Any) -> _Stream:
        return _Stream(self._backend.connect_tcp(*arguments, **named))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def _transport(inner: Any) -> Any:
    """`inner`, where a guard looks at what is asked and at the head of what is answered."""
    wrap_connections(inner, _Backend)
    base = importlib.import_module(type(inner).__module__.partition(".")[0]).BaseTransport

    class Transport(base):  # type: ignore[misc, valid-type]
        def handle_request(self, request: Any) -> Any:
            guard: _Guard | None = getattr(_current, "guard", None)
            if guard is not None or _sending:
                _require_place(str(request.url))
            if guard is None and _sending:
                guard = _current.of_sent = _Guard(_ANSWER, _SENT_PATIENCE)
            if guard is None:
                return inner.handle_request(request)
            request.headers["Accept-Encoding"] = "identity"
            guard.begin()
            response = inner.handle_request(request)
            try:
                _require_answer(request, response, guard.most)
                guard.has_head()
            except BaseException:
                response.close()
                raise
            return response

        def close(self) -> None:
            inner.close()

    return Transport()


def _require_place(url: str) -> None:
    """Raises Refused for what is asked for in the open, unless that is how the endpoint was given."""
    asked, endpoint = urlsplit(url), urlsplit(constants.ENDPOINT)
    if asked.scheme == "https":
        return
    near = asked.hostname == endpoint.hostname or {asked.hostname, endpoint.hostname} <= _LOOPBACK
    if asked.scheme != "http" or endpoint.scheme != "http" or not near:
        raise Refused(f"it leads to {asked.scheme}://{asked.netloc}, and only https is followed")


def _require_answer(request: Any, response: Any, most: int) -> None:
    """Raises Refused for another range than was asked for, what is packed, and what announces more than is due."""
    headers = response.headers
    for name, pattern in (("Retry-After", r"\d{1,9}"), ("RateLimit", r".{0,100}t=\d{1,9}\D?")):
        wait = headers.get(name)
        if wait is not None and (not re.fullmatch(pattern, wait, re.ASCII) or _seconds(wait) > _LONGEST_WAIT):
            del headers[name]
            headers["Retry-After"] = str(_LONGEST_WAIT)
    if headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Refused(f"it packs its answer ({headers['Content-Encoding'][:50]!r}) though it is asked not to")
    if request.method == "HEAD" or not response.is_success:
        return
    length = headers.get("Content-Length", "0")
    if not re.fullmatch(r"\d{1,18}", length, re.ASCII) or int(length) > most:
        raise Refused(f"it announces {length[:30]} bytes where {most:,} are due")
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""), re.ASCII)
    if asked and response.status_code == 206:
        _require_range(int(asked[1]), asked[2], headers)


def _require_range(start: int, last: str, headers: Any) -> None:
    gave = headers.get("Content-Range", "none")
    given = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", gave, re.ASCII)
    if given:
        first, end, size = map(int, given.groups())
        due = min(int(last), size - 1) if last else size - 1
        length = headers.get("Content-Length")
        if (first, end) == (start, due) and length in (None, str(end - first + 1)):
            return
    raise Refused(f"asked for the bytes {start}-{last}, it gives {gave[:50]!r}")


def _seconds(wait: str) -> int:
    return int(re.findall(r"\d+", wait)[-1])


@lru_cache(maxsize=1)
def install() -> None:
    """From now on this process's clients of the Hub know guards. What comes by hf_xet would know none: it is not asked,
    unless HF_HUB_DISABLE_XET is set, to 0."""
    global _xet_is_disabled
    wrap_transports(_transport)
    _xet_is_disabled = constants.HF_HUB_DISABLE_XET
    if "HF_HUB_DISABLE_XET" not in os.environ:
        constants.HF_HUB_DISABLE_XET = True
