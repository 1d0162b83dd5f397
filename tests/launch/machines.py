"""Machines on this machine: each is a process with a network, mounts and a host name of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

NAMES = ("rv1", "rv2")
ADDRESSES = ("10.213.0.1", "10.213.0.2")
_INSIDE = """
set -e
hostname {name}
mount --bind {hosts} /etc/hosts
mount -t tmpfs none /dev/shm
ip address add {address}/24 dev eth0
ip link set lo up
ip link set eth0 up
ip route add default dev eth0
"""


class Machine:
    """The namespaces of the process `pid`. They see the files of this machine, but for /dev/shm and what is hidden."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._holder = subprocess.Popen(["unshare", "--net", "--mount", "--uts", "sleep", "infinity"])
        self.pid = self._holder.pid
        deadline = time.monotonic() + 10
        while self._holder.poll() is None and self.network == os.readlink("/proc/self/ns/net"):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    @property
    def network(self) -> str:
        return os.readlink(f"/proc/{self.pid}/ns/net")

    def enter(self, *command: str, wd: Path = Path("/")) -> list[str]:
        """`command` as it is run on this machine."""
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--uts", f"--wd={wd}", *command]

    def do(self, script: str) -> None:
        subprocess.run(self.enter("sh", "-c", script), check=True, capture_output=True)

    def end(self) -> None:
        """Ends whatever runs on it."""
        for process in [*processes_in(self.network), self.pid]:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._holder.wait()


def processes_in(network: str) -> Iterator[int]:
    """The processes of a network namespace."""
    for entry in os.listdir("/proc"):
        with suppress(OSError):
            if entry.isdigit() and os.readlink(f"/proc/{entry}/ns/net") == network:
                yield int(entry)


def connected(place: Path) -> list[Machine]:
    """Two machines with a cable between them; none where this is not permitted. Keeps files of theirs in `place`."""
    made: list[Machine] = []
    try:
        made = [Machine(name) for name in NAMES]
        one, two = made
        one.do(f"ip link add eth0 type veth peer name eth0 netns {two.pid}")
        for machine, address in zip(made, ADDRESSES, strict=True):
            hosts = place / f"hosts-{machine.name}"
            known = "".join(f"{address} {name}\n" for name, address in zip(NAMES, ADDRESSES, strict=True))
            hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {machine.name}\n{known}")
            machine.do(_INSIDE.format(name=machine.name, hosts=hosts, address=address))
    except (OSError, subprocess.CalledProcessError):
        for machine in made:
            machine.end()
        return []
    return made
