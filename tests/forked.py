"""Commands without their imports: one process has them and forks one for every command, as `python -m` would make it.

A command's own start, its arguments, streams, status and end are those of a process of its own; only what modules do
when they are imported is done once. Who wants that too, or other settings for it, starts a process instead.

Where `is_ray_shared`, commands join one Ray, as jobs that were submitted to it do, instead of starting one each: all
but those with settings of their own, which its workers would not have.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path

# What commands import, the dear ones; without Ray (tests/without), only what those that need none do.
LIGHT = ["hydra", "torch", "rvdist.stages.jobs", "rvdist.weights.lanes", "ray", "rvdist.merge.driver"]
MODULES = [
    *LIGHT,
    *("transformers.models.auto.tokenization_auto", "lm_eval.evaluator", "matplotlib.pyplot", "rvdist.evaluate.suite"),
    *("rvdist.evaluate.fleet.fleet", "rvdist.report.statistics.compare", "rvdist.report.page.page"),
]
# Settings that are read by modules when they are imported: the first by any, the others by none of the light ones.
_BY_ANY, _BY_OTHERS = ("PYTHON", "TORCH"), ("HF_", "TRANSFORMERS_")
_SHOWN = {"COLUMNS", "PYTEST_CURRENT_TEST"}  # settings that no worker minds
is_ray_shared = False


@cache
def settings() -> dict[str, str]:
    """Of the processes that fork."""
    return dict(os.environ)


@cache
def _server(light: bool) -> socket.socket:
    return serve(LIGHT if light else MODULES, settings())


def serve(modules: Sequence[str], environment: Mapping[str, str]) -> socket.socket:
    """Our end of the line to a process that has imported these and forks; it ends when that is closed."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        command = [sys.executable, __file__, str(its.fileno()), *modules]
        subprocess.Popen(command, pass_fds=[its.fileno()], stdout=subprocess.DEVNULL, env=environment)
    return ours


@cache
def ray() -> dict[str, str]:
    """What makes a command join the one Ray, which is started for the first and ends with this process."""
    command = [sys.executable, str(Path(__file__).with_name("hold_ray.py"))]
    held = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=settings(), text=True)
    assert held.stdout
    address = held.stdout.readline().strip()
    assert address, "no Ray could be started"
    return {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token", "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}


def run(
    module: str, arguments: Sequence[str], cwd: Path, environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """`python -m module arguments…` in `cwd`, and what it printed."""
    other = {key for key, _ in settings().items() ^ environment.items()}
    if any(key.startswith(_BY_ANY) for key in other):
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    line = _server(any(key.startswith(_BY_OTHERS) for key in other))
    joining = ray() if is_ray_shared and other <= _SHOWN else {}
    return ask(line, module, arguments, cwd, {**environment, **joining}, timeout)


def ask(
    line: socket.socket,
    module: str,
    arguments: Sequence[str],
    cwd: Path,
    environment: Mapping[str, str],
    timeout: float,
) -> subprocess.CompletedProcess[str]:
    """The same of a process at the other end of a `line`."""
    asked = {"module": module, "arguments": arguments, "cwd": str(cwd), "environment": dict(environment)}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        line.settimeout(timeout)
        socket.send_fds(line, [json.dumps(asked).encode()], [out.fileno(), errors.fileno()])
        pid = int(line.recv(99))
        try:
            status = int(line.recv(99))
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            line.recv(99)
            raise subprocess.TimeoutExpired([module, *arguments], timeout) from None
        out.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess([module, *arguments], status, out.read(), errors.read())


def _answer(line: socket.socket) -> None:
    """Ends with whoever asks. A forked process comes back from here as well, and goes on to be the command."""
    while True:
        message, descriptors, *_ = socket.recv_fds(line, 1 << 20, 2)
        if not message:
            sys.exit()
        pid = os.fork()
        if not pid:
            break
        for descriptor in descriptors:
            os.close(descriptor)
        line.send(str(pid).encode())
        line.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
    line.close()
    asked = json.loads(message)
    for stream, descriptor in enumerate(descriptors, 1):
        os.dup2(descriptor, stream)
        os.close(descriptor)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    if raylet := sys.modules.get("ray._raylet"):
        raylet.Config.initialize("")  # it read RAY_AUTH_MODE when it was imported
    sys.path[0] = asked["cwd"]
    sys.argv[:] = [asked["module"], *asked["arguments"]]


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"  # as the command has it before it imports
    sys.path[0] = os.getcwd()  # not the tests'
    try:
        for name in sys.argv[2:]:
            import_module(name)
    except ImportError as error:
        if "needs no" not in str(error):  # tests/without
            raise
    gc.freeze()
    _answer(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
