"""Ray's workers without their imports, as tests/forked.py has commands without theirs: one process has what merge
workers and engines import, seconds of it, and forks one for every worker that Ray starts.

A worker's own start, its arguments, settings, log, death and end are those of a process of its own.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

# Not Ray itself, nor what imports it: Ray reads settings that are a worker's own when it is imported.
MODULES = [
    *(
        "torch",
        "rvdist.merge.worker",
        "rvdist.weights.arithmetic.fused",
        "vllm",
        "vllm.engine.arg_utils",
        "vllm.v1.worker.cpu_worker",
    ),
    *("vllm.model_executor.models.qwen2", "rvdist.evaluate.fleet.actor", "rvdist.evaluate.fleet.swap"),
]
_COMMAND = "--python_worker_command="


@cache
def fork() -> None:
    """Every Ray that this process starts from now on has its workers forked."""
    from ray._private import services

    place = Path(tempfile.mkdtemp())
    over, _held = os.pipe()  # whose other end goes with this process
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
        line.bind(f"{place}/line")
        line.listen(99)
        command = [sys.executable, __file__, str(line.fileno()), str(over), str(place)]
        forks = subprocess.Popen(command, pass_fds=[line.fileno(), over], stdout=subprocess.PIPE)
    os.close(over)
    assert forks.stdout and forks.stdout.read() == b"ready", "what workers import could not be imported"
    start = services.start_ray_process
    ours = f"{sys.executable} -IS {Path(__file__).with_name('ray_worker.py')} {place}/line"

    def starting(command: Sequence[str], *given: Any, **named: Any) -> Any:
        return start([part.replace(_COMMAND + sys.executable, _COMMAND + ours) for part in command], *given, **named)

    services.start_ray_process = starting


def _serve(line: socket.socket, over: int, place: Path) -> None:
    """Ends with who started it. A forked process comes back from here, and goes on to be the worker."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    os.write(1, b"ready")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    while True:
        ready, _, _ = select.select([line, over], [], [])
        if over in ready:
            (place / "line").unlink()
            place.rmdir()
            sys.exit()
        asks, _ = line.accept()
        message, descriptors, *_ = socket.recv_fds(asks, 1 << 20, 2)
        if not os.fork():
            break
        asks.close()
        for descriptor in descriptors:
            os.close(descriptor)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    line.close()
    os.close(over)
    asks.detach()  # stays open until the worker ends
    for stream, descriptor in enumerate(descriptors, 1):
        os.dup2(descriptor, stream)
        os.close(descriptor)
    asked = json.loads(message)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    program, *arguments = asked["arguments"]
    if not any(argument.startswith("--serialized-runtime-env-context") for argument in arguments):
        program, *arguments = (one for one in arguments if not one.startswith("--language="))  # what it would start
    sys.path[0] = str(Path(program).parent)
    sys.argv[:] = [program, *arguments]
    signal.pthread_sigmask(signal.SIG_SETMASK, asked["blocked"])


if __name__ == "__main__":
    from rvdist.evaluate.fleet.arguments import ENVIRONMENT, ENVIRONMENT_CPU, ENVIRONMENT_CPU_EAGER
    from rvdist.evaluate.fleet.private_vllm import without_sklearn

    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # as where engines start
    os.environ.update({**ENVIRONMENT, **ENVIRONMENT_CPU, **ENVIRONMENT_CPU_EAGER, "OMP_NUM_THREADS": "1"})
    gc.disable()
    with without_sklearn():
        for name in MODULES:
            import_module(name)
    assert "ray" not in sys.modules
    gc.freeze()
    gc.enable()
    _serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), Path(sys.argv[3]))
    runpy.run_path(sys.argv[0], run_name="__main__")
