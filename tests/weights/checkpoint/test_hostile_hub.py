"""Whatever a server does, it takes little of this machine's time, memory and disk, and gets one sentence."""

from __future__ import annotations

import json
import resource
import time
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from huggingface_hub import constants
from test_hub import SHARD, hub, server, weights  # noqa: F401  # fixtures

from rvdist.core.errors import BadInput, Failed
from rvdist.weights.checkpoint import guard
from rvdist.weights.checkpoint import hub as hub_module
from rvdist.weights.checkpoint.hub import download, fetch_range
from rvdist.weights.checkpoint.source import open_source

pytestmark = pytest.mark.heavy

MIB = b"x" * (1 << 20)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("sound") / "published", weights(), shards=2)


@pytest.fixture
def published(hub, sound):  # noqa: F811
    hub.publish("org/name", sound)
    return sound


@pytest.fixture(autouse=True)
def impatient(monkeypatch, hub):  # noqa: F811
    monkeypatch.setattr(guard, "_PATIENCE", 2.0)
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    hub.stopped.set()
    assert time.monotonic() - began < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 << 10


def raw(handler, head: str, *pieces: bytes, pause: float = 0.0, endless: bytes = b"") -> bool:
    if head.startswith("HTTP/1.1 "):
        head = head.replace("\n", "\nConnection: close\n", 1)  # as it is: else the next request may come too late
    try:
        handler.wfile.write(head.replace("\n", "\r\n").encode("latin-1"))
        for piece in pieces:
            handler.wfile.write(piece)
            time.sleep(pause)
        while endless and not handler.server.hub.stopped.is_set():
            handler.wfile.write(endless)
            time.sleep(pause)
    except OSError:
        pass  # the client has had enough
    return True


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(content), content)


OK, CHUNKED = "HTTP/1.1 200 OK\n", "Transfer-Encoding: chunked\n\n"
LISTING = {
    "that never ends": lambda h: raw(h, OK + CHUNKED, endless=chunk(MIB)),
    "announced as endless": lambda h: raw(h, OK + "Content-Length: 99999999999\n\n", endless=MIB),
    "without an end or a length": lambda h: raw(h, OK + "\n", endless=MIB),
    "byte by byte": lambda h: raw(h, OK + "Content-Length: 100\n\n", pause=0.2, endless=b"["),
    "whose headers come byte by byte": lambda h: raw(h, OK, pause=0.2, endless=b"a"),
    "with endless headers": lambda h: raw(h, OK, endless=b"A: " + MIB[:1000] + b"\r\n"),
    "that is always about to come": lambda h: raw(h, "", pause=0.001, endless=b"HTTP/1.1 100 Continue\r\n\r\n"),
    "packed": lambda h: raw(h, OK + "Content-Encoding: gzip\n" + CHUNKED, endless=chunk(MIB)),
    "to the next address": lambda h: raw(h, f"HTTP/1.1 307 R\nLocation: {h.path}x\nContent-Length: 0\n\n"),
    "in the open elsewhere": lambda h: raw(h, "HTTP/1.1 302 R\nLocation: http://192.0.2.1/x\nContent-Length: 0\n\n"),
    "in a file": lambda h: raw(h, "HTTP/1.1 302 R\nLocation: file:///etc/passwd\nContent-Length: 0\n\n"),
    "that is no answer": lambda h: raw(h, "SSH-2.0-x\n"),
}  # fmt: skip


SAID = {
    "announced as endless": "announces 99999999999 bytes", "packed": "packs its answer", "byte by byte": "slower than",
    "whose headers come byte by byte": "slower than", "to the next address": "more than 9 requests",
    "in the open elsewhere": "only https is followed", "with endless headers": "",
}  # fmt: skip


@pytest.mark.parametrize("how", LISTING)
def test_an_answer(how, hub, monkeypatch):  # noqa: F811
    monkeypatch.setattr(guard, "_REQUESTS", 9)
    hub.tricks["/api/models"] = LISTING[how]
    with pytest.raises(Failed, match="org/name: no such directory, and not to be had from the Hub") as caught:
        open_source("org/name")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 and SAID.get(how, "") in str(caught.value)


DEEP = "[" * 100_000 + "]" * 100_000
WRONG = [
    DEEP, "[]", "{}", "null", '"', '{"sha": 7, "siblings": []}', '{"sha": "%s", "siblings": 3}' % ("a" * 40),
    "[" + "{}," * 8_000_000 + "{}]",
    *(
        json.dumps({"sha": "a" * 40, "siblings": [{"rfilename": "a.json", "size": 3, "blobId": "b" * 40} | change]})
        for change in (
            {"size": -1}, {"size": None}, {"size": 1.5}, {"size": 10**400}, {"size": "3"}, {"blobId": 7}, {"lfs": 7},
            {"blobId": "../../x"}, {"rfilename": "../x.json"}, {"rfilename": "/x.json"}, {"rfilename": "a\0.json"},
            {"rfilename": 3}, {"rfilename": "a//b.json"}, {"rfilename": "x" * 5000 + ".json"}, {"rfilename": "\ud800"},
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("k", range(len(WRONG)))
def test_a_listing_that_is_none(k, hub):  # noqa: F811
    body = WRONG[k].encode()
    hub.tricks["/api/models"] = lambda h: raw(h, OK + f"Content-Length: {len(body)}\n\n", body)
    with pytest.raises(Failed, match="it lists its files wrongly|bytes where"):
        open_source("org/name")


@pytest.mark.parametrize("change", [{"size": 1 << 40}, {"size": 1 << 20, "many": 2000}, {"many": 1100}])
def test_what_is_announced_is_looked_at_before_it_is_asked_for(change, hub):  # noqa: F811
    file = {"size": 3, "blobId": "b" * 40} | change
    files = [{"rfilename": f"{k}.json", **file} for k in range(change.get("many", 1))]
    body = json.dumps({"sha": "a" * 40, "siblings": files}).encode()
    hub.tricks["/api/models"] = lambda h: raw(h, OK + f"Content-Length: {len(body)}\n\n", body)
    with pytest.raises(BadInput, match="beside its weights.*are fetched"):
        open_source("org/name")
    assert len(hub.requests) == 1


def ranged(first, last, size, *pieces, length=None, extra="", **more):
    length = f"Content-Length: {length}\n" if length is not None else ""
    head = f"HTTP/1.1 206 P\nContent-Range: bytes {first}-{last}/{size}\n{length}{extra}\n"
    return lambda h: raw(h, head, *pieces, **more)


RANGES = {
    "another": lambda size: ranged(1001, 2000, size, MIB[:1000], length=1000),
    "a shorter one": lambda size: ranged(1000, 1500, size, MIB[:501], length=501),
    "a longer one": lambda size: ranged(1000, 2000, size, MIB[:1001], length=1001),
    "of another file": lambda size: ranged(1000, 1999, size + 1, MIB[:1000], length=1000),
    "another length": lambda size: ranged(1000, 1999, size, MIB[:999], length=999),
    "without end": lambda size: ranged(1000, 1999, size, extra=CHUNKED[:-1], endless=chunk(MIB)),
    "of no number": lambda size: ranged("1e3", "²", size, MIB[:1000], length=1000),
    "of a huge number": lambda size: ranged("9" * 5000, "9" * 5000, size, MIB[:1000], length=1000),
    "byte by byte": lambda size: ranged(1000, 1999, size, length=1000, pause=0.2, endless=b"x"),
    "of many": lambda size: (
        lambda h: raw(
            h, "HTTP/1.1 206 P\nContent-Type: multipart/byteranges; boundary=a\nContent-Length: 9\n\n", b"--a\r\n\r\n--"
        )
    ),
}


@pytest.mark.parametrize("kind", RANGES)
def test_a_range_that_was_not_asked_for(kind, hub, published):  # noqa: F811
    checkpoint = open_source("org/name")
    stamp = checkpoint.stamps[SHARD]
    hub.tricks["/warehouse/"] = RANGES[kind](stamp.size)
    with pytest.raises(Failed, match=f"org/name@{checkpoint.hub.commit}: {SHARD} is not to be had") as caught:
        fetch_range(checkpoint.hub, SHARD, stamp, 1000, 2000)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("header", "value"), [("X-Repo-Commit", "b" * 40), ("X-Linked-Etag", '"' + "c" * 64 + '"'), ("X-Repo-Commit", None)]
)
def test_another_commit_s_bytes(header, value, hub, published):  # noqa: F811
    checkpoint = open_source("org/name")
    stamp = checkpoint.stamps[SHARD]

    def other(handler) -> bool:
        headers = {"X-Repo-Commit": checkpoint.hub.commit, "X-Linked-Etag": f'"{stamp.etag}"'} | {header: value}
        lines = "".join(f"{name}: {value}\n" for name, value in headers.items() if value)
        address = f"{hub.warehouse}/warehouse/{stamp.etag}"
        return raw(handler, f"HTTP/1.1 302 R\n{lines}Location: {address}\nContent-Length: 0\n\n")

    fetch_range(checkpoint.hub, SHARD, stamp, 1000, 2000)
    hub.tricks["/resolve/"] = other
    with pytest.raises(Failed, match="announced|does not say of which commit"):
        fetch_range(checkpoint.hub, SHARD, stamp, 1000, 2000)


FILES = {
    "longer than announced": lambda h: raw(h, OK + CHUNKED, endless=chunk(MIB)),
    "announced longer": lambda h: raw(h, OK + "Content-Length: 99999999999\n\n", endless=MIB),
    "byte by byte": lambda h: raw(h, OK + "Content-Length: 50000\n\n", pause=0.2, endless=b"x"),
    "packed": lambda h: raw(h, OK + "Content-Encoding: br\n" + CHUNKED, endless=chunk(MIB)),
    "in the open elsewhere": lambda h: raw(h, "HTTP/1.1 302 R\nLocation: http://192.0.2.1/x\nContent-Length: 0\n\n"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_download(kind, hub, published, tmp_path):  # noqa: F811
    checkpoint = open_source("org/name")
    hub.tricks["/warehouse/"] = FILES[kind]
    with pytest.raises(Failed, match="is not to be had from the Hub"):
        download(checkpoint.hub, SHARD, checkpoint.stamps[SHARD])
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file()) < 32 << 20


def test_nothing_is_fetched_by_a_client_without_bounds(hub, published, monkeypatch):  # noqa: F811
    hub.has_xet = True
    checkpoint = open_source("org/name")
    stamp = checkpoint.stamps[SHARD]
    path = download(checkpoint.hub, SHARD, stamp)
    assert path.stat().st_size == stamp.size and not any("xet" in request.path for request in hub.requests)
    path.resolve().unlink()
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)  # as HF_HUB_DISABLE_XET=0 leaves it
    with pytest.raises(BadInput, match="is not to be had from the Hub"):
        download(checkpoint.hub, SHARD, stamp)
    assert any("xet" in request.path for request in hub.requests)


def test_another_file_than_announced_is_not_taken(hub, published):  # noqa: F811
    checkpoint = open_source("org/name")
    stamp = checkpoint.stamps[SHARD]
    for wrong in (replace(stamp, etag="c" * 64), replace(stamp, size=stamp.size + 1)):
        with pytest.raises(Failed, match="not what the Hub announced"):
            download(checkpoint.hub, SHARD, wrong)
    assert download(checkpoint.hub, SHARD, stamp).stat().st_size == stamp.size


@pytest.mark.parametrize("header", ["Retry-After", "RateLimit"])
@pytest.mark.parametrize("wait", ["9" * 5000, "²", "86400", "-1", "Wed, 21 Oct 2065 07:28:00 GMT"])
def test_no_server_makes_us_wait_for_long(wait, header, hub, published, monkeypatch):  # noqa: F811
    waits = []
    checkpoint = open_source("org/name")
    monkeypatch.setattr(hub_module.time, "sleep", waits.append)
    asks = f"Retry-After: {wait}" if header == "Retry-After" else f'RateLimit: "api";r=0;t={wait}'
    head = f"HTTP/1.1 429 T\n{asks}\nContent-Length: 0\n\n"
    hub.tricks["/resolve/"] = lambda h: raw(h, head)
    for act in (fetch_range, lambda *a: download(a[0], a[1], a[2])):
        with pytest.raises(Failed, match="HTTP status 429|64 requests"):
            act(checkpoint.hub, SHARD, checkpoint.stamps[SHARD], 0, 10)
    assert waits and max(waits) <= 301


def test_what_is_not_the_hub_s_is_not_guarded(hub, published):  # noqa: F811
    """Other libraries share its client: without a guard of ours in their thread they have what they had."""
    from huggingface_hub.utils import get_session

    hub.tricks["/theirs"] = lambda h: raw(h, OK + f"Content-Length: {len(MIB)}\n\n", MIB)
    assert get_session().get(f"{hub.endpoint}/theirs").content == MIB
    assert not hasattr(guard._current, "guard") or guard._current.guard is None


def test_the_cache_keeps_nothing_outside_of_itself(hub, published, tmp_path):  # noqa: F811
    open_source("org/name")
    assert {path.name for path in Path(tmp_path).iterdir()} == {"cache"}


@pytest.mark.parametrize(
    ("endpoint", "address", "followed"),
    [
        ("https://hub.example", "https://cdn.example/x", True), ("https://hub.example", "http://hub.example/x", False),
        ("https://hub.example", "http://cdn.example/x", False), ("http://hub.example", "http://hub.example:81/x", True),
        ("http://hub.example", "http://cdn.example/x", False), ("http://hub.example", "https://cdn.example/x", True),
        ("http://127.0.0.1:1", "http://localhost:2/x", True), ("https://127.0.0.1:1", "http://localhost:2/x", False),
        ("http://hub.example", "ftp://hub.example/x", False),
        ("http://hub.example", "http://hub.example@evil/x", False),
    ],
)  # fmt: skip
def test_only_https_or_the_endpoint_s_own_host_is_followed(endpoint, address, followed, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    if followed:
        guard._require_place(address)
        return
    with pytest.raises(guard.Refused, match="only https is followed"):
        guard._require_place(address)
