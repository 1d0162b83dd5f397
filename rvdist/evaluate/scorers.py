"""Scoring beside the thread that feeds engines: of many answers in processes of their own, which have the tasks too.

lm-eval's tasks are not to be sent: a process loads them itself, and one that would ask anything else than was asked
here is not used. What a process cannot score is scored here, an arm at a time. Knows nothing of Ray, engines or jobs.
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import IO, Any, TypeVar

from rvdist.core.point import Arm
from rvdist.core.record import Record
from rvdist.evaluate.asking import Asking
from rvdist.evaluate.request import Answer
from rvdist.evaluate.suite import Suite

T = TypeVar("T")
Scored = tuple[dict[str, Any], list[Record]]  # lm-eval's results, and the records
Answers = Mapping[str, Sequence[Answer]]  # by task

_WORTH = 100_000  # answers: scoring them takes as long as a process takes to load its tasks
_MOST = 4  # processes
_TOGETHER = 2000  # records at once: while they are read here, nothing else is done
_PIPE = 1 << 20  # bytes: after each read, a thread that has nothing to wait for keeps Python's lock for 5 ms
_DEATH_SIGNAL = 1  # of prctl: a process ends with the thread that started it

_SERVE = "import sys; sys.path[:] = sys.argv[1:]; from rvdist.evaluate.scorers import serve; serve()"


class Scorers:
    """Scores what is submitted; `answers` is how many there will be. Close it as a context."""

    def __init__(self, answers: int) -> None:
        count = min(_MOST, max(1, len(os.sched_getaffinity(0)) // 2)) if answers >= _WORTH else 0
        self._threads = ThreadPoolExecutor(2 * count + 1)  # of a process one asks while another reads
        self._alone = threading.Lock()  # lm-eval's tasks are for one thread at a time
        self._processes = [_Process() for _ in range(count)]
        self._idle = SimpleQueue[_Process | None]()  # None: this one
        for process in self._processes:
            self._idle.put(process)
        self._over = False

    def __enter__(self) -> Scorers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over = kind is not None  # then nobody waits for what is not scored yet
        if self._over:
            for process in self._processes:
                process.end()
        self._threads.shutdown(cancel_futures=self._over)
        for process in self._processes:
            process.close()

    def expect(self, asking: Asking) -> None:
        """Lets the processes load its tasks beside what else takes time."""
        for process in self._processes:
            process.begin(asking)

    def take_part(self) -> None:
        """Scores in this process beside the others from now on: nothing else is to be done in it."""
        if self._processes:
            self._idle.put(None)

    def submit(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Calls it beside, soon; it may `score`."""
        return self._threads.submit(function, *args)

    def score(self, asking: Asking, arm: Arm, digest: str, answers: Answers, seed: int) -> Scored:
        """What the suite's own `score` returns, to the bit."""
        if not self._processes:
            return self._score_here(asking, arm, digest, answers, seed)
        process = self._idle.get()
        if process is not None:
            scored = process.score(asking, arm, digest, answers, seed, partial(self._idle.put, process))
            return scored or self._score_here(asking, arm, digest, answers, seed)
        try:
            return self._score_here(asking, arm, digest, answers, seed)
        finally:
            self._idle.put(None)

    def _score_here(self, asking: Asking, arm: Arm, digest: str, answers: Answers, seed: int) -> Scored:
        with self._alone:
            if self._over:
                raise RuntimeError("it is over")
            with nullcontext() if asking.suite.walls else _keeping_garbage():  # code that is run may take long
                return asking.suite.score(arm, digest, asking.tokenizer, asking.requests, answers, seed)


@contextmanager
def _keeping_garbage() -> Iterator[None]:
    """While many records are made, all of which are kept: a collector would look at every one of them again and
    again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _Process:
    """One of them. One thread at a time asks it, while another may still read what it answered before."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._process.stdout
        with suppress(OSError):  # where users may have only so much
            fcntl.fcntl(self._process.stdout, fcntl.F_SETPIPE_SZ, _PIPE)
        self._loads = deque[Asking]()  # of which it has not said yet whether they are the same there
        self._serves: dict[Asking, bool] = {}
        self._numbers: dict[Asking, int] = {}
        self._reading = threading.Lock()

    def begin(self, asking: Asking) -> None:
        """Has it load what is asked."""
        if asking in self._numbers:
            return
        suite, name = asking.suite, getattr(asking.tokenizer, "name_or_path", "")
        number = self._numbers[asking] = len(self._numbers)
        known = suite.made_of is not None and Path(name).is_dir()
        if known and self._say(("load", number, suite.made_of, suite.chosen, name, suite.chat)):
            self._loads.append(asking)
        else:
            self._serves[asking] = False

    def score(
        self, asking: Asking, arm: Arm, digest: str, answers: Answers, seed: int, let_ask: Callable[[], None]
    ) -> Scored | None:
        """None where it cannot, or is gone. Calls `let_ask` once, as soon as another thread may ask: it goes on to
        another arm while this one's records are read."""
        with ExitStack() as asking_it:
            asking_it.callback(let_ask)
            self.begin(asking)
            if not self._learn(asking) or not self._ask(asking, arm, digest, answers, seed):
                return None
            with self._reading:
                results, left = self._hear() or (None, 0)
                asking_it.close()
                records: list[Record] = []
                while left:
                    if not (some := self._hear()):
                        return None
                    records += some
                    left -= len(some)
        return None if results is None else (results, records)

    def _learn(self, asking: Asking) -> bool:
        """Whether it asks the same there."""
        if self._loads:
            with self._reading:
                while self._loads:
                    loaded = self._loads.popleft()
                    self._serves[loaded] = self._hear() == _identity(loaded.suite, loaded.requests)
        return self._serves[asking]

    def _ask(self, asking: Asking, arm: Arm, digest: str, answers: Answers, seed: int) -> bool:
        return self._say(("score", self._numbers[asking], arm, digest, dict(answers), seed))

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """When no thread has it any more."""
        self.end()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                if pipe:
                    pipe.close()

    def _say(self, what: object) -> bool:
        assert self._process.stdin
        try:
            _write(self._process.stdin, pickle.dumps(what))
        except (OSError, ValueError, pickle.PicklingError, TypeError, AttributeError):
            return False
        return True

    def _hear(self) -> Any:
        assert self._process.stdout
        try:
            with _keeping_garbage():
                return _read(self._process.stdout)
        except Exception:  # it is gone, or says what cannot be read
            self.end()
            return None


def _identity(suite: Suite, requests: Mapping[str, Sequence[Any]]) -> str:
    """Of all that is asked, and of what decides its scores."""
    digest = hashlib.blake2b(repr((suite.versions, suite.primary, suite.walls)).encode())
    for task, asked in requests.items():
        digest.update(repr((task, len(asked))).encode())
        for request in asked:
            digest.update(repr(request).encode())
    return digest.hexdigest()


def serve() -> None:
    """The process: scores what it reads, until nothing comes or who started it is gone."""
    import ctypes

    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it ends it
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)  # whatever a task prints

        served: dict[int, tuple[Suite, Any, dict[str, Any]]] = {}
        while True:
            try:
                kind, number, *asked = _read(sys.stdin.buffer)
            except EOFError:
                return
            try:
                gc.enable()
                gc.collect()  # between arms alone: within one it looks in vain at all that is kept
                if kind == "load":
                    served[number] = suite, _, requests = _load(*asked)
                    gc.freeze()
                    _write(out, pickle.dumps(_identity(suite, requests)))
                    continue
                gc.disable()
                arm, digest, answers, seed = asked
                suite, tokenizer, requests = served[number]
                results, records = suite.score(arm, digest, tokenizer, requests, answers, seed)
                parts = [pickle.dumps(records[k : k + _TOGETHER]) for k in range(0, len(records), _TOGETHER)]
                parts.insert(0, pickle.dumps((results, len(records))))
            except Exception:  # whoever asked scores it himself, and meets it there
                parts = [pickle.dumps(None)]
            for part in parts:
                _write(out, part)


def _write(pipe: IO[bytes], said: bytes) -> None:
    """Says something, its length first."""
    pipe.write(len(said).to_bytes(8, "little"))
    pipe.write(said)
    pipe.flush()


def _read(pipe: IO[bytes]) -> Any:
    """What is said next, read whole before any of it is made an object. Raises EOFError at the end."""
    return pickle.loads(pipe.read(int.from_bytes(pipe.read(8), "little")))


def _load(
    made_of: Mapping[str, Any], chosen: Mapping[str, list[int]] | None, tokenizer: str, chat: bool
) -> tuple[Suite, Any, dict[str, Any]]:
    from rvdist.evaluate.tokenizer import load_tokenizer

    suite = Suite.load(**made_of)
    if chosen is not None:
        suite = suite.restrict(chosen)
    opened = load_tokenizer(Path(tokenizer), chat)
    return suite, opened, suite.requests(opened)
