"""Where a Ray of our own listens, and who can read the token of one: loopback alone, and its user alone."""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TOKEN = "0123456789abcdef" * 4


def descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(process))
    found, left = [], [root]
    while left:
        found.append(left.pop())
        left += children.get(found[-1], [])
    return found


def listening(root: int) -> Iterator[tuple[str, str]]:
    """(address, command) of every TCP socket on which a process or one below it listens."""
    holders = {}
    for process in descendants(root):
        try:
            command = Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")
            for descriptor in Path(f"/proc/{process}/fd").iterdir():
                holders[os.readlink(descriptor)] = command[:100]
        except OSError:
            continue
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and (holder := holders.get(f"socket:[{rest[5]}]")):
                words = bytes.fromhex(local.partition(":")[0])
                packed = b"".join(words[k : k + 4][::-1] for k in range(0, len(words), 4))
                address = ipaddress.ip_address(packed)
                yield str(getattr(address, "ipv4_mapped", None) or address), holder


def test_a_ray_of_our_own_listens_on_loopback_alone(ray_local: None) -> None:
    import ray

    ray.get(ray.remote(num_cpus=0)(lambda: 7).remote())  # a worker, which listens too
    found = list(listening(os.getpid()))
    assert any("gcs_server" in command for _, command in found) and any("raylet" in command for _, command in found)
    assert not [one for one in found if not ipaddress.ip_address(one[0]).is_loopback]


def without_tokens() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}


STARTING = """
import os, json
os.umask(0)
from rvdist.core import cluster
cluster.connect("local")
import ray
print(json.dumps([ray.get(ray.remote(lambda: 7).remote()), os.environ.get("RAY_AUTH_MODE")]))
"""


@pytest.mark.heavy
@pytest.mark.parametrize("before", ["none", pytest.param("one that others read", marks=pytest.mark.slow)])
def test_the_token_of_a_ray_of_our_own_is_its_user_s_alone(before: str, tmp_path: Path) -> None:
    file = tmp_path / ".ray" / "auth_token"
    if before != "none":
        file.parent.mkdir()
        file.write_text(TOKEN)
        file.chmod(0o644)
    asked = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")} | {
        "HOME": str(tmp_path)
    }
    done = subprocess.run([sys.executable, "-c", STARTING], env=asked, capture_output=True, text=True, timeout=180)
    assert json.loads(done.stdout.splitlines()[-1]) == [7, "token"], done.stderr
    assert file.stat().st_mode & 0o777 == 0o600 and len(file.read_text()) == 64
    assert not [name for name in os.listdir(file.parent) if name != file.name and "token" in name]


def test_what_others_could_read_of_our_own_token_they_cannot_any_more(tmp_path, monkeypatch) -> None:
    from rvdist.core import cluster

    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text(TOKEN)
    file.chmod(0o644)
    cluster._guard_token("local")
    assert file.stat().st_mode & 0o777 == 0o600 and file.read_text() == TOKEN


JOINING = """
import os, socket, sys
from rvdist.core import cluster
from rvdist.core.errors import BadInput
with socket.create_server(("127.0.0.1", 0)) as server:
    for address in ("auto", f"127.0.0.1:{server.getsockname()[1]}"):
        for mode in (0o640, 0o604, 0o620):
            os.chmod(os.environ["RAY_AUTH_TOKEN_PATH"], mode)
            try:
                cluster.connect(address)
            except BadInput as error:
                print(error)
        os.environ["RAY_AUTH_MODE"] = "token"
"""


@pytest.mark.heavy
def test_a_cluster_whose_token_others_can_read_is_not_joined(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    asked = without_tokens() | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    done = subprocess.run([sys.executable, "-c", JOINING], env=asked, capture_output=True, text=True, timeout=120)
    said = done.stdout.splitlines()
    assert [line.partition("(")[2][:9] for line in said] == ["mode 0640", "mode 0604", "mode 0620"] * 2, done.stderr
    assert all(line.startswith(f"{tmp_path}/token: others can read the token in it") for line in said)
