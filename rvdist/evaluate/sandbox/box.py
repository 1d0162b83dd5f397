"""What happens inside the sandbox: three processes that trust each other in one direction only.

The *keeper* builds the walls and waits. The *checker* holds the tests and is the only one that can speak to the
caller. The *candidate* runs the model's code and holds nothing else: not the tests, not the pipe to the caller. The
checker calls functions of the candidate through a pipe and gets plain data back, by value. `sandbox.run` starts this
module in a fresh interpreter; nothing else imports it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable, Iterable
from types import CodeType
from typing import Any, NoReturn

from rvdist.evaluate.sandbox import jail

_REASON_CHARACTERS = 300


class Raised(Exception):
    """The candidate's function raised: the type and message of what it raised."""


class Opaque:
    """Stands for a value that is not plain data; equal to nothing but itself."""

    def __init__(self, type_name: str) -> None:
        self.type_name = type_name

    def __repr__(self) -> str:
        return f"<a value of type {self.type_name}>"


def encode(value: Any) -> Any:
    """Plain data as JSON. Subclasses go as what they extend, other iterables as iterators, the rest as Opaque."""
    if value is None or isinstance(value, bool | str | float):
        return value
    if isinstance(value, int):
        return int(value) if value.bit_length() <= 64 else ["int", hex(value)]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, range):
        return ["range", value.start, value.stop, value.step]
    if isinstance(value, dict):
        return ["dict", [[encode(key), encode(item)] for key, item in value.items()]]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, [encode(item) for item in value]]
    if hasattr(value, "dtype") and getattr(value, "ndim", None) == 0:  # a number of numpy's
        return encode(value.item())
    if isinstance(value, Iterable):
        return ["iterator", [encode(item) for item in value]]
    return ["opaque", type(value).__name__]


def decode(value: Any) -> Any:
    """What `encode` made into JSON, built anew from built-in types only. Raises ValueError or TypeError."""
    if not isinstance(value, list):
        return value
    match value:
        case ["int", str(digits)]:
            return int(digits, 16)
        case ["complex", real, imaginary]:
            return complex(real, imaginary)
        case ["bytes", str(digits)]:
            return bytes.fromhex(digits)
        case ["range", start, stop, step]:
            return range(start, stop, step)
        case ["dict", list(pairs)]:
            return {decode(key): decode(item) for key, item in pairs}
        case ["list", list(items)]:
            return [decode(item) for item in items]
        case ["tuple", list(items)]:
            return tuple(decode(item) for item in items)
        case ["set", list(items)]:
            return {decode(item) for item in items}
        case ["frozenset", list(items)]:
            return frozenset(decode(item) for item in items)
        case ["iterator", list(items)]:
            return iter([decode(item) for item in items])
        case ["opaque", str(name)]:
            return Opaque(name)
    raise ValueError("not plain data")


def main(options: dict[str, Any]) -> NoReturn:
    """The keeper: build the walls, start the checker, wait until nobody is left."""
    try:
        if options["mode"] == "namespaces":
            jail.enter_namespaces(options["readable"], options["scratch_bytes"])
        else:
            jail.see_only(options["readable"], options["packages"])
        jail.adopt_orphans()
        jail.die_with_parent()
        if os.fork() == 0:
            _check(options)
        signal.setitimer(signal.ITIMER_REAL, options["wall_seconds"] + 5)  # ends the keeper, which ends the rest
    except OSError as error:
        _say(1, refused=error.strerror or str(error))
    while True:
        try:
            os.wait()
        except ChildProcessError:
            os._exit(0)


def _say(pipe: int, **message: str) -> None:
    os.write(pipe, json.dumps(message).encode())


def _no_streams() -> None:
    for stream in range(3):
        os.dup2(_NULL, stream)


_NULL = os.open(os.devnull, os.O_RDWR)


def _check(options: dict[str, Any]) -> NoReturn:
    """The checker: fork the candidate before a byte of the tests is read, then run the tests against it."""
    answer_bytes: int = options["answer_bytes"]
    caller = os.dup(1)

    def verdict(outcome: str, reason: str) -> NoReturn:
        words = " ".join(reason.split())[:_REASON_CHARACTERS]
        _say(caller, outcome=outcome, reason=words.encode(errors="replace").decode())  # no half characters
        os._exit(0)

    try:
        if options["mode"] == "namespaces":  # without them, Python itself may lie where only the caller may look
            jail.become_nobody()
        jail.drop_capabilities()
        (asked, ask), (answered, answer) = os.pipe(), os.pipe()
        candidate = os.fork()
        if candidate == 0:
            try:
                for pipe in (ask, answered, caller):
                    os.close(pipe)
                _no_streams()
                jail.confine(options["cpu_seconds"], options["memory_bytes"], options["file_bytes"])
                _serve(asked, answer)
            finally:
                os._exit(1)
        os.close(asked)
        os.close(answer)
        with open(0, "rb", closefd=False) as stream:
            program = json.loads(stream.read())
        _no_streams()
        wall, cpu = options["wall_seconds"], options["cpu_seconds"]
        signal.signal(signal.SIGALRM, lambda *_: verdict("timed out", f"more than {wall:g} s"))
        signal.signal(signal.SIGXCPU, lambda *_: verdict("timed out", f"the tests took more than {cpu} s of processor"))
        signal.setitimer(signal.ITIMER_REAL, wall)
        jail.confine(cpu, options["memory_bytes"], options["file_bytes"])
    except OSError as error:
        _say(caller, refused=error.strerror or str(error))
        os._exit(0)

    questions, answers = os.fdopen(ask, "wb"), os.fdopen(answered, "rb")

    def judge_end() -> NoReturn:
        _, status, used = os.wait4(candidate, 0)
        if not os.WIFSIGNALED(status):
            verdict("failed", f"the program ended itself with status {os.waitstatus_to_exitcode(status)}")
        by = signal.Signals(os.WTERMSIG(status))
        if by is signal.SIGXCPU or (by is signal.SIGKILL and used.ru_utime + used.ru_stime >= cpu):
            verdict("timed out", f"more than {cpu} s of processor")
        verdict("killed", f"by {by.name}")

    def put(question: Any) -> Any:
        try:
            questions.write(json.dumps(question).encode() + b"\n")
            questions.flush()
        except BrokenPipeError:
            judge_end()
        line = answers.readline(answer_bytes)
        if not line.endswith(b"\n"):
            if len(line) < answer_bytes:
                judge_end()
            verdict("killed", f"an answer of more than {answer_bytes} bytes")
        try:
            match json.loads(line):
                case {"returned": value}:
                    return decode(value)
                case {"raised": str(what)}:
                    pass
                case _:
                    raise ValueError
        except (ValueError, TypeError, RecursionError, MemoryError):
            verdict("failed", "an answer that is not plain data")
        raise Raised(what)

    def function(*args: Any, **kwargs: Any) -> Any:
        return put([encode(args), encode(kwargs)])

    random.seed(0)  # tests that draw their cases draw the same ones each time
    names = {"__name__": "tests"}
    try:
        put([program["prompt"] + program["completion"], program["entry_point"]])
        exec(_definitions(program["prompt"]), names)
        names[program["entry_point"]] = function  # type: ignore[assignment]
        exec(compile(program["test"], "<test>", "exec"), names)
    except BaseException as error:
        verdict("failed", _why(error, program["test"]))
    verdict("passed", "")


def _definitions(prompt: str) -> CodeType:
    """A prompt without an answer. Where nothing but its header stands of the last function, that has no body yet."""
    try:
        return compile(prompt, "<prompt>", "exec")
    except IndentationError:
        return compile(f"{prompt}\n    pass\n", "<prompt>", "exec")


def _why(error: BaseException, test: str) -> str:
    """What was raised; for a bare assertion, the assertion."""
    said = str(error)
    if isinstance(error, Raised):
        return said
    frame = error.__traceback__
    while frame and not said:
        if frame.tb_next is None and frame.tb_frame.f_code.co_filename == "<test>":
            said = test.splitlines()[frame.tb_lineno - 1].strip()
        frame = frame.tb_next
    return f"{type(error).__name__}: {said}"


def _serve(asked: int, answer: int) -> None:
    """The candidate: run the code, then its function as often as it is asked for. Nothing here is trusted."""
    random.seed(0)
    questions, answers = os.fdopen(asked, "rb"), os.fdopen(answer, "wb")

    def reply(work: Callable[[], Any]) -> None:
        try:
            message = json.dumps({"returned": encode(work())})
        except BaseException as error:
            message = json.dumps({"raised": f"{type(error).__name__}: {error}"[:_REASON_CHARACTERS]})
        answers.write(message.encode() + b"\n")
        answers.flush()

    names: dict[str, Any] = {"__name__": "candidate"}
    code, entry_point = json.loads(questions.readline())
    reply(lambda: exec(compile(code, "<completion>", "exec"), names))
    for line in questions:
        args, kwargs = (decode(part) for part in json.loads(line))
        reply(lambda args=args, kwargs=kwargs: names[entry_point](*args, **kwargs))  # type: ignore[misc]


if __name__ == "__main__":
    sys.exit("this module is started by rvdist.evaluate.sandbox.sandbox")
