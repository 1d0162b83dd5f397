"""`rvdist up` and `rvdist down`: a Ray of this machine that stays up between commands, and its end.

A process of its own holds it, as a command holds its own Ray: it ends with that process, whatever ends it, and leaves
nothing. Beside it runs a process of which those fork that merge. Commands find it by rvdist.core.standing.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from typing import IO

from rvdist.core import cluster, session, standing
from rvdist.core.ends import Watch, leave
from rvdist.core.errors import BadInput, Failed

_PATIENCE = 20.0  # seconds for its end


def up(beside: str) -> str:
    """Begins it, with this module beside it, and returns what to say when it is up. Raises BadInput and Failed."""
    if (pid := standing.holder()) is not None:
        return f"Ray is up already (process {pid}); `rvdist down` ends it"
    command = [sys.executable, "-m", "rvdist.core.upkeep", beside]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=-1, stderr=subprocess.DEVNULL, start_new_session=True, text=True
    ) as holding:
        assert holding.stdout
        try:
            said = holding.stdout.readline().strip()
        except KeyboardInterrupt:
            holding.terminate()
            raise
        holding.stdout.close()
        if said.startswith("up "):
            holding.returncode = 0  # it stays: nobody waits for it
    kind, _, sentence = said.partition(" ")
    if kind == "refused":
        raise BadInput(sentence)
    if kind != "up":
        raise Failed(sentence or "the process that was to hold Ray ended; run `rvdist up` again")
    return sentence


def down() -> str:
    """Ends it, and returns what to say when nothing is left of it. Raises BadInput and Failed."""
    pid = standing.holder()
    if pid is None:
        return "Ray is not up: nothing to end"
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return "Ray is not up: nothing to end"
    try:
        if standing.holder() != pid:  # it ended, and the number is another's
            return "Ray is not up: nothing to end"
        signal.pidfd_send_signal(descriptor, signal.SIGTERM)
        if not select.select([descriptor], [], [], _PATIENCE)[0]:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)  # its keeper ends the rest
    except OSError:
        pass  # it ended meanwhile
    finally:
        os.close(descriptor)
    until = time.monotonic() + _PATIENCE
    while standing.holder() is not None:
        if time.monotonic() > until:
            raise Failed(f"the process that holds Ray ({pid}) does not end; kill it")
        time.sleep(0.05)
    return "Ray is down"


def main() -> None:
    """Of the process that holds it. Says in one line on standard output whether it is up."""
    os.chdir("/")  # stands in nobody's way
    session.last_word = ""
    state: IO[bytes] | None = None
    kept: subprocess.Popen[bytes] | None = None

    def forget(sentence: str = "", status: int = 1) -> None:
        if state is not None and status == 1:  # of a signal, there is an end to come
            with suppress(OSError, ValueError):
                standing.forget(state)

    watch, here = Watch(forget), standing.Standing.here("")
    watch.begin()
    try:
        state = standing.hold()
        if state is None:
            return _say("up", f"Ray is up already (process {standing.holder()}); `rvdist down` ends it")
        cores = cluster.connect("local", fresh=True).cpus
        import ray

        path = ""
        if directory := cluster.own_files():
            kept, path = _keep_beside(sys.argv[1], directory)
        standing.tell(state, replace(here, address=ray.get_runtime_context().gcs_address, beside=path))
        _say(
            "up", f"Ray is up, on {cores} cores (process {os.getpid()}); commands of this user's find it by themselves"
        )
        while True:
            signal.pause()
    except KeyboardInterrupt:
        pass
    except BadInput as error:
        _say("refused", str(error))
    except Failed as error:
        _say("failed", str(error))
    if kept is not None:
        kept.kill()
        kept.wait()
    cluster.disconnect()
    forget()
    leave(watch.status or 0)


def _keep_beside(module: str, directory: str) -> tuple[subprocess.Popen[bytes], str]:
    """Runs a module that is given the number of a listening socket, whose path is returned too, and that ends with its
    standard input; or as Ray's processes do, where this one is killed."""
    path = os.path.join(directory, "beside")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(64)
        kept = subprocess.Popen(
            [sys.executable, "-m", module, str(listening.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[listening.fileno()],
            env={**os.environ, session.MARK: directory},
        )
    return kept, path


def _say(kind: str, sentence: str) -> None:
    with suppress(OSError):
        os.write(1, f"{kind} {sentence}\n".encode())
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)  # whoever began it hears no more
    os.close(nowhere)


if __name__ == "__main__":
    main()
