"""Ray's workers without their imports: one process has them and forks one for every worker of a Ray that tests share.

Ray starts a worker by a script of its own. Where `forking` has it start this file in that one's place, this asks the
process that forks, and lives as long as the worker, which is Ray's own from there on.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_LINE = "RVDIST_TESTS_WORKERS"  # where the process that forks listens, no file
_RAYS_OWN = ("--language", "--serialized-runtime-env-context")  # for Ray's own script, which takes them away
EARLY = ["torch", "transformers"]
LATE = [  # what they import reads settings that Ray gives to its workers alone
    *("ray", "rvdist.merge.actor", "rvdist.merge.worker", "rvdist.evaluate.fleet.actor", "rvdist.evaluate.fleet.swap"),
    *("vllm.entrypoints.llm", "vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker"),
    *("vllm.model_executor.models.qwen2", "vllm.model_executor.models.llama"),
]
_ANY_JOB = {"RAY_JOB_ID": "ffffffff"}  # a worker that the first to need one gets


@contextmanager
def forking() -> Iterator[None]:
    """A Ray that is started meanwhile has its workers forked, until this process ends."""
    import secrets
    import subprocess

    import ray
    from ray._private import ray_constants

    before = ray_constants.SETUP_WORKER_FILENAME
    name = f"rvdist-tests-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
        line.bind(f"\0{name}")
        line.listen(64)
        command = [sys.executable, __file__, "fork", str(line.fileno())]
        subprocess.Popen(command, pass_fds=[line.fileno()], stdin=subprocess.DEVNULL)
    ray_constants.SETUP_WORKER_FILENAME = __file__
    os.environ[_LINE] = name
    try:
        yield
        ray.get(ray.remote(num_cpus=0)(lambda: None).remote())  # what forks has imported what it wants by then
    finally:
        ray_constants.SETUP_WORKER_FILENAME = before
        del os.environ[_LINE]


def _ask() -> None:
    arguments = [one for one in sys.argv[1:] if not one.startswith(_RAYS_OWN)]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
        line.connect("\0" + os.environ.pop(_LINE))
        socket.send_fds(line, [json.dumps([arguments, dict(os.environ)]).encode()], [0, 1, 2])
        line.recv(1)


def _fork(line: socket.socket) -> None:
    """Ends with whoever started it. A forked process comes back from here as well, and goes on to be the worker."""
    import ctypes
    import gc
    import signal
    from importlib import import_module

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    gc.disable()
    from rvdist.evaluate.fleet.arguments import ENVIRONMENT, ENVIRONMENT_CPU, ENVIRONMENT_CPU_EAGER

    before = ENVIRONMENT | ENVIRONMENT_CPU | ENVIRONMENT_CPU_EAGER | os.environ  # as an engine has it
    os.environ.update(before)
    for name in EARLY:
        import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    is_ready = False
    while True:
        asking, _ = line.accept()
        message, descriptors, *_ = socket.recv_fds(asking, 1 << 20, 3)
        arguments, environment = json.loads(message)
        if not is_ready:
            os.environ.update(before | environment | _ANY_JOB)
            for name in LATE:
                import_module(name)
            gc.freeze()
            is_ready = True
        if not os.fork():
            break
        asking.close()
        for descriptor in descriptors:
            os.close(descriptor)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    gc.enable()
    os.setsid()  # Ray ends a worker's whole group
    line.close()
    asking.detach()  # open until the worker ends
    for stream, descriptor in enumerate(descriptors):
        os.dup2(descriptor, stream)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0] = os.path.dirname(arguments[0])
    sys.argv[:] = arguments


if __name__ == "__main__":
    if sys.argv[1] == "fork":
        import runpy

        _fork(socket.socket(fileno=int(sys.argv[2])))
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        _ask()
