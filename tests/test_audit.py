"""The audit fails where an advisory is known, and says so where it knows nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from audit import pinned

ROOT = Path(__file__).resolve().parent.parent
PINS = "# a comment\ntorch==2.13.0+cpu\nvllm-cpu==0.32.0\nattrs==26.1.0\n"


class Advisories(BaseHTTPRequestHandler):
    """Advisory data of our own: `answer`, given what is asked."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
        body = json.dumps(self.server.answer(asked)).encode()  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def data() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Advisories)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def audit(tmp_path: Path, data: str, pins: str = PINS) -> subprocess.CompletedProcess[str]:
    (tmp_path / "pins.txt").write_text(pins)
    command = [sys.executable, str(ROOT / "tests/audit.py"), "--data", data, "--pins", str(tmp_path / "pins.txt")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def address(server: HTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/"


def test_a_version_with_an_advisory_fails_it(data: HTTPServer, tmp_path: Path) -> None:
    seen = []

    def answer(asked: list[dict[str, object]]) -> dict[str, object]:
        seen.extend((one["package"]["name"], one["version"]) for one in asked)  # type: ignore[index]
        known = {"vulns": [{"id": "GHSA-1"}, {"id": "CVE-2"}]}
        return {"results": [known if one["version"] == "2.13.0" else {} for one in asked]}

    data.answer = answer  # type: ignore[attr-defined]
    done = audit(tmp_path, address(data))
    assert done.returncode == 1 and done.stdout.splitlines() == [
        "audit: torch 2.13.0: GHSA-1, CVE-2", "audit: advisories are known against 1 of 3 versions",
    ]  # fmt: skip
    assert seen == [("torch", "2.13.0"), ("vllm", "0.32.0"), ("attrs", "26.1.0")]


# What OSV answered of jinja2 2.4.1 (https://google.github.io/osv.dev/post-v1-querybatch/, "Sample 200 response"), word
# for word but for white space; of a version against which nothing is known it answers {}.
RECORDED = """
{"vulns": [{"id": "GHSA-462w-v97r-4m45", "modified": "2023-03-10T05:23:41.874079Z"},
{"id": "GHSA-8r7q-cvjq-x353", "modified": "2023-03-08T05:47:11.461578Z"},
{"id": "GHSA-fqh9-2qgg-h84h", "modified": "2023-03-09T05:31:42.262435Z"},
{"id": "GHSA-g3rq-g295-4j3m", "modified": "2023-03-12T05:29:26.243227Z"},
{"id": "GHSA-hj2j-77xm-mc5v", "modified": "2023-03-12T05:32:53.675797Z"},
{"id": "PYSEC-2014-8", "modified": "2021-07-05T00:01:22.043149Z"},
{"id": "PYSEC-2014-82", "modified": "2021-08-27T03:22:05.027573Z"},
{"id": "PYSEC-2019-217", "modified": "2021-11-22T04:57:52.862665Z"},
{"id": "PYSEC-2019-220", "modified": "2021-11-22T04:57:52.929678Z"},
{"id": "PYSEC-2021-66", "modified": "2021-03-22T16:34:00Z"}]}
"""
VULNERABLE = {"package": {"name": "jinja2", "ecosystem": "PyPI"}, "version": "2.4.1"}


@pytest.mark.parametrize("pages", [1, 2, 3])
def test_what_osv_has_recorded_against_a_version_fails_it(data: HTTPServer, tmp_path: Path, pages: int) -> None:
    """And is all read where it comes on several pages, the first of them empty."""
    ids, asked_in_all = [one["id"] for one in json.loads(RECORDED)["vulns"]], []

    def answer(asked: list[dict[str, object]]) -> dict[str, object]:
        asked_in_all.append(asked)
        page = len(asked_in_all)
        recorded = json.loads(RECORDED) if page == pages else {}
        more = {"next_page_token": f"page {page + 1}"} if page < pages else {}
        expected = VULNERABLE | ({"page_token": f"page {page}"} if page > 1 else {})
        return {"results": [{**recorded, **more} if one == expected else {} for one in asked]}

    data.answer = answer  # type: ignore[attr-defined]
    done = audit(tmp_path, address(data), "jinja2==2.4.1\nattrs==26.1.0\n")
    assert done.returncode == 1 and done.stdout.splitlines() == [
        f"audit: jinja2 2.4.1: {', '.join(ids)}", "audit: advisories are known against 1 of 2 versions",
    ]  # fmt: skip
    assert [len(asked) for asked in asked_in_all] == [2, 1, 1][:pages]


def test_pages_without_end_are_no_data(data: HTTPServer, tmp_path: Path) -> None:
    data.answer = lambda asked: {"results": [{"next_page_token": "x"} for _ in asked]}  # type: ignore[attr-defined]
    done = audit(tmp_path, address(data))
    assert done.returncode == 0 and "the answer has no end" in done.stderr


def test_versions_without_any_pass(data: HTTPServer, tmp_path: Path) -> None:
    data.answer = lambda asked: {"results": [{} for _ in asked]}  # type: ignore[attr-defined]
    done = audit(tmp_path, address(data))
    assert done.returncode == 0 and done.stdout == "audit: advisories are known against 0 of 3 versions\n"


@pytest.mark.parametrize("answer", [{}, {"results": []}, {"results": [3, 4, 5]}, {"results": None}, []])
def test_what_is_no_advisory_data_is_said(answer: object, data: HTTPServer, tmp_path: Path) -> None:
    data.answer = lambda asked: answer  # type: ignore[attr-defined]
    done = audit(tmp_path, address(data))
    assert done.returncode == 0 and done.stderr.startswith("audit: nothing was checked: ") and not done.stdout


def test_where_there_is_no_data_it_is_said(tmp_path: Path) -> None:
    done = audit(tmp_path, "http://127.0.0.1:1/")
    assert done.returncode == 0
    where = "http://127.0.0.1:1/ cannot be had ([Errno 111] Connection refused)"
    assert done.stderr == f"audit: nothing was checked: the advisory data at {where}\n"


def test_every_pin_is_asked_for() -> None:
    text = (ROOT / "constraints.txt").read_text()
    pins = pinned(text)
    assert len(pins) == sum("==" in line for line in text.splitlines()) > 200
    assert pins["torch"] == "2.13.0" and pins["vllm"] == "0.32.0"
