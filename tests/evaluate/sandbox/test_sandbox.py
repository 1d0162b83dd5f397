"""Attempts to get out of the sandbox, for real, behind each kind of walls that this machine gives.

An attempt's `f` returns 'escaped' where it got what it wanted, and the test it must pass asks for just that.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from functools import cache
from pathlib import Path

import pytest

import rvdist
from rvdist.evaluate.sandbox import box, jail, sandbox
from rvdist.evaluate.sandbox.sandbox import Limits, Program, run

REPOSITORY = Path(rvdist.__file__).resolve().parents[1]
WHOLE = REPOSITORY.parent / "shared" / "benchmarks" / "humaneval.jsonl"
FIVE = Path(__file__).parents[1] / "tasks" / "humaneval_5.jsonl"
# the wall limit's odd digits tell this run's processes from others'
LIMITS = Limits(
    cpu_seconds=1,
    wall_seconds=15 + os.getpid() / 1e9,
    memory_bytes=512 << 20,
    file_bytes=1 << 20,
    scratch_bytes=2 << 20,
    answer_bytes=1 << 20,
)
SHORT = Limits(cpu_seconds=1, wall_seconds=1 + os.getpid() / 1e9)


def available(mode):
    return pytest.param(mode, marks=pytest.mark.skipif(bool(why := sandbox._refusal(mode)), reason=str(why)))


@pytest.fixture(params=[available("namespaces"), available("landlock")])
def mode(request):
    return request.param


def boxes(mark):
    """Processes of a sandbox whose options hold `mark`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if b"from rvdist.evaluate.sandbox import box" in line and str(mark).encode() in line:
            found.append(int(entry.name))
    return found


def gone(mark):
    """Whether those processes are gone, at the latest after a moment."""
    deadline = time.monotonic() + 60
    while boxes(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not boxes(mark)


def mounted():
    """Everything that is mounted, but for what other tests mount meanwhile, which is under pytest's own directory."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return {line for line in lines if "/pytest-of-" not in line}


@pytest.fixture(autouse=True)
def nothing_is_left():
    mounts = mounted()
    yield
    assert gone(LIMITS.wall_seconds) and gone(SHORT.wall_seconds)
    assert not mounted() - mounts


def attempt(mode, code, test="assert f() == 'escaped'", limits=LIMITS):
    began = time.monotonic()
    (verdict,) = run([Program("", textwrap.dedent(code), test, "f")], limits, mode=mode)
    assert verdict.mode == mode and time.monotonic() - began < limits.wall_seconds + 60
    return verdict


def body(text):
    return "def f():\n" + textwrap.indent(textwrap.dedent(text), "    ")


def swallowing(*lines):
    """Each of them is tried; those that are refused are passed over."""
    return body("".join(f"try:\n    {line}\nexcept Exception: pass\n" for line in lines) + "return 'nothing worked'\n")


ATTEMPTS = {
    "fork bomb": body("import os\nwhile True: os.fork()"),
    "fork": body("import os\nif os.fork() == 0:\n    while True: pass\nreturn 'escaped'"),
    "daemon": body("import os\nos.setsid()\nreturn 'escaped'"),
    "thread bomb": body("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()"),
    "another program": body("import subprocess\nsubprocess.run(['/bin/sh', '-c', 'true'])\nreturn 'escaped'"),
    "exec": body("import os, sys\nos.execv(sys.executable, ['python', '-c', ''])"),
    "memory bomb": body("held = []\nwhile True: held.append(bytearray(1 << 26))"),
    "memory at once": body("return len(bytearray(1 << 40)) and 'escaped'"),
    "endless list": body("import itertools\nreturn itertools.count()"),
    "deep recursion": body("import sys\nsys.setrecursionlimit(1 << 30)\ng = lambda: g()\ng()"),
    "null pointer": body("import ctypes\nctypes.string_at(0)"),
    "abort": body("import os\nos.abort()"),
    "deaf loop": body("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"),
    "loop on import": "while True: pass",
    "exit on import": "import os\nos._exit(0)",
    "sys.exit on import": "import sys\nsys.exit(0)",
    "exit": body("import os\nos._exit(0)"),
    "sys.exit": body("raise SystemExit(0)"),
    "exit later": "import atexit, os\natexit.register(os._exit, 0)\n" + body("import sys\nsys.exit()"),
    "own checker": "def check(candidate): pass\n" + body("return None"),
    "own assertion": "import builtins\nbuiltins.AssertionError = type('Fine', (BaseException,), {})\n"
    + body("raise AssertionError"),
    "equal to everything": "class Same(str):\n    __eq__ = lambda *_: True\n    __hash__ = None\n"
    + body("return Same('no')"),
    "always equal": "class Same:\n    __eq__ = lambda *_: True\n" + body("return Same()"),
    "the tests in a frame": body("""
        import sys
        frame, mark = sys._getframe(1), ''.join(['T3', 'ST'])
        while frame:
            if mark in repr(frame.f_locals) + repr(frame.f_globals): return 'escaped'
            frame = frame.f_back
        return 'not found'
    """),
    "the tests in the heap": body("""
        import gc
        mark = ''.join(['T3', 'ST'])
        for held in gc.get_objects():
            if isinstance(held, (dict, list, tuple)):
                for value in held.values() if isinstance(held, dict) else held:
                    if isinstance(value, (str, bytes)) and mark in str(value): return 'escaped'
        return 'not found'
    """),
    "forged verdict": body("""
        import json, os
        for pipe in range(32):
            for said in ({"outcome": "passed", "reason": ""}, {"refused": "x"}):
                try: os.write(pipe, json.dumps(said).encode() + b"\\n")
                except OSError: pass
        os._exit(0)
    """),
    "rubbish for an answer": "import os\nfor pipe in range(3, 32):\n    try: os.write(pipe, b'[' * 200000 + b'\\n')\n"
    "    except OSError: pass\n",
    "an endless answer": body("return 'x' * (1 << 27)"),
    "flooded pipe": "import os\nwhile True:\n    for pipe in range(3, 32):\n"
    "        try: os.write(pipe, b'x' * 60000)\n        except OSError: pass\n",
    "setuid": swallowing("os = __import__('os'); os.setuid(0); return 'escaped'"),
    "raised limit": swallowing("import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1)); return 'escaped'"),
    "namespace": swallowing(
        "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0; return 'escaped'",
        "import ctypes; assert ctypes.CDLL(None).mount(b'x', b'/', b'tmpfs', 0, None) == 0; return 'escaped'",
        "import ctypes; assert ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0; return 'escaped'",
    ),
    "shared memory": swallowing(
        "import ctypes; assert ctypes.CDLL(None).shmget(0, 4096, 0o1777) >= 0; return 'escaped'",
        "import os; os.memfd_create('x'); return 'escaped'",
    ),
    "too large a file": body("open('/scratch/x', 'wb').write(bytes(3 << 20))\nreturn 'escaped'"),
    "too many files": body("""
        for n in range(9): open(f'/scratch/{n}', 'wb').write(bytes(900 << 10))
        return 'escaped'
    """),
}  # fmt: skip


SAYS = [
    ("def f(): return 1", "assert f() == 1", "passed", ""),
    ("def f(): return 1", "assert f() == 2", "failed", "AssertionError: assert f() == 2"),
    ("def f(): return 1 / 0", "f()", "failed", "ZeroDivisionError: division by zero"),
    ("def f(): raise ValueError('\\ud800\\n')", "f()", "failed", "ValueError: ?"),
    ("def g(): return 1", "f()", "failed", "KeyError: 'f'"),
    ("def f(: return 1", "f()", "failed", "SyntaxError: invalid syntax (<completion>, line 1)"),
    ("import os\nos._exit(0)", "", "failed", "the program ended itself with status 0"),
    ("import sys\nsys.exit(0)", "", "failed", "SystemExit: 0"),
    ("def f(): return [0] * (1 << 40)", "f()", "failed", "MemoryError:"),
    ("while True: pass", "", "timed out", "more than 1 s of processor"),
    ("f = 0", "while True: pass", "timed out", "the tests took more than 1 s of processor"),
    ("import ctypes\nctypes.string_at(0)", "", "killed", "by SIGSEGV"),
    ("def f(): return 'x' * (1 << 21)", "f()", "killed", "an answer of more than 1048576 bytes"),
]


@cache
def verdicts(mode):
    """All of the above at once: most of them wait for a limit."""
    programs = [Program("", code, "assert f() == 'escaped'  # T3ST", "f") for code in ATTEMPTS.values()]
    programs += [Program("", code, test, "f") for code, test, _, _ in SAYS]
    return dict(zip([*ATTEMPTS, *range(len(SAYS))], run(programs, LIMITS, 4, mode), strict=True))


@pytest.mark.heavy
@pytest.mark.parametrize("name", ATTEMPTS)
def test_attempts_do_not_pass(mode, name):
    verdict = verdicts(mode)[name]
    assert verdict.mode == mode and not verdict.passed and verdict.reason, verdict


@pytest.mark.heavy
@pytest.mark.parametrize("number", range(len(SAYS)))
def test_a_verdict_says_what_happened(mode, number):
    _, _, outcome, reason = SAYS[number]
    verdict = verdicts(mode)[number]
    assert verdict.outcome == outcome and verdict.reason.startswith(reason), verdict
    assert bool(verdict.reason) == bool(reason)


@pytest.mark.parametrize(
    "code", ["import time\ntime.sleep(99)", "import os, time\nos.closerange(3, 32)\ntime.sleep(99)"]
)
def test_waiting_and_silence_end_with_the_wall_clock(mode, code):
    verdict = attempt(mode, code, limits=SHORT)
    assert verdict.outcome == "timed out" and verdict.reason.startswith("more than 1")


def test_printing_without_end_costs_the_caller_nothing(mode):
    code = "import sys\nwhile True: sys.stdout.write('x' * 65536); sys.stderr.write('y' * 65536)"
    verdict = attempt(mode, code)
    assert verdict.outcome == "timed out" and len(verdict.reason) < 100


def test_files_outside_are_neither_read_nor_written(mode, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    secret.chmod(0o666)
    for above in (tmp_path, *tmp_path.parents[:2]):  # file modes shall not be what protects it
        above.chmod(0o777)
    homes = ["/etc/passwd", "/proc/1/environ", "/proc/self/environ", str(Path(box.__file__)), str(secret)]
    reading = [f"open({path!r}).read(1); return 'escaped'" for path in homes]
    assert attempt(mode, swallowing(*reading)).reason.startswith("AssertionError")
    places = [secret, tmp_path / "new", "/tmp/rvdist-new", "/rvdist-new", "/dev/shm/rvdist-new", Path(os.__file__)]
    writing = [f"open({str(place)!r}, 'a').write('x'); return 'escaped'" for place in places]
    changing = [
        f"import os; os.{call}; return 'escaped'"
        for call in (
            f"truncate({str(secret)!r}, 0)",
            f"chmod({str(secret)!r}, 0)",
            f"unlink({str(secret)!r})",
            f"rename({str(secret)!r}, {str(secret)!r} + '2')",
            f"mkdir({str(tmp_path / 'new')!r})",
            f"symlink('x', {str(tmp_path / 'new')!r})",
            f"utime({str(secret)!r})",
            f"mkfifo({str(tmp_path / 'new')!r})",
        )
    ]
    assert attempt(mode, swallowing(*writing, *changing)).reason.startswith("AssertionError")
    assert secret.read_text() == "hunter2" and secret.stat().st_mode & 0o777 == 0o666
    assert list(tmp_path.iterdir()) == [secret]
    assert not [place for place in places[1:5] if Path(place).exists()]


def test_the_callers_environment_and_memory_are_out_of_reach(mode, monkeypatch):
    monkeypatch.setenv("RVDIST_SECRET", "hunter2")
    caller = os.getpid()
    tries = [
        "import os; assert any('hunter2' in v for v in os.environ.values()); return 'escaped'",
        "import ctypes; g = ctypes.CDLL(None).getenv; g.restype = ctypes.c_char_p; g(b'RVDIST_SECRET')[0]; "
        "return 'escaped'",
        *(f"open('/proc/{pid}/{name}', 'rb').read(1); return 'escaped'"
          for pid in (caller, 1, "self") for name in ("environ", "mem", "maps", "cmdline")),
        f"import ctypes; assert ctypes.CDLL(None).ptrace(16, {caller}, 0, 0) == 0; return 'escaped'",
        "import ctypes; assert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0; return 'escaped'",
    ]  # fmt: skip
    assert attempt(mode, swallowing(*tries)).reason.startswith("AssertionError")


def test_there_is_no_network(mode, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(str(tmp_path / "s"))
        local.listen()
        port = server.getsockname()[1]
        tries = [
            f"import socket; socket.create_connection(('127.0.0.1', {port}), 1); return 'escaped'",
            f"import socket; socket.socket(socket.AF_UNIX).connect({str(tmp_path / 's')!r}); return 'escaped'",
            "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM); return 'escaped'",
            "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW); return 'escaped'",
            "import socket; socket.socketpair(); return 'escaped'",
        ]
        assert attempt(mode, swallowing(*tries)).reason.startswith("AssertionError")


def test_other_processes_cannot_be_hurt(mode):
    victim = subprocess.Popen(["sleep", "60"])
    try:
        pids = (victim.pid, os.getpid(), os.getppid(), -1, 0, 1)
        tries = [f"import os, signal; os.kill({pid}, signal.SIGKILL); return 'escaped'" for pid in pids]
        tries += [
            "import os; os.kill(os.getppid(), 9); return 'escaped'",
            "import os; os.killpg(0, 9); return 'escaped'",
            f"import signal, os; signal.pidfd_send_signal(os.pidfd_open({victim.pid}), 9); return 'escaped'",
            f"import resource as r; r.prlimit({victim.pid}, r.RLIMIT_CPU, (0, 0)); return 'escaped'",
            f"import fcntl; fcntl.fcntl(0, fcntl.F_SETOWN, {victim.pid}); return 'escaped'",
            "import fcntl; fcntl.fcntl(0, 10, 9); return 'escaped'",
            f"import os; os.setpriority(os.PRIO_PROCESS, {victim.pid}, 19); return 'escaped'",
            f"import os; os.sched_setaffinity({victim.pid}, [0]); return 'escaped'",
        ]
        assert attempt(mode, swallowing(*tries)).reason.startswith("AssertionError")
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_every_system_call_on_the_list_is_refused(mode):
    _, _, calls = jail._SYSTEM_CALLS[os.uname().machine]
    code = f"""
        import ctypes
        call = ctypes.CDLL(None, use_errno=True).syscall
        def f():
            return [name for name, number in {calls!r}.items()
                    if call(number, 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != 1]
    """
    verdict = attempt(mode, code, "left = f()\nassert left == [], left")
    assert verdict.passed, verdict


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x32 is a second numbering of x86_64's calls")
def test_a_second_numbering_of_the_calls_is_no_way_out(mode):
    verdict = attempt(mode, body("import ctypes\nctypes.CDLL(None).syscall(0x40000000 + 57)\nreturn 'escaped'"))
    assert verdict.outcome == "killed" and verdict.reason == "by SIGSYS"


def test_scratch_is_private_and_forgotten():
    if sandbox._refusal("namespaces"):
        pytest.skip("without namespaces there is no scratch directory")
    writes = Program(
        "", "def f():\n    open('x', 'x').write('1')\n    return open('x').read()", "assert f() == '1'", "f"
    )
    assert [verdict.passed for verdict in run([writes] * 4, LIMITS, workers=2)] == [True] * 4
    assert not Path("/scratch").exists()


def test_tests_draw_the_same_cases_and_sets_keep_their_order(mode):
    drawn = "import random\nassert False, (random.random(), f())"
    programs = [Program("", "def f(): return list({'a', 'b', 'c', 'd'})", drawn, "f")] * 2
    one, other = run(programs, LIMITS, mode=mode)
    assert one.reason == other.reason and one.reason.startswith("AssertionError: (0.")


def test_a_killed_caller_leaves_nothing(mode):
    wall = 30 + os.getpid() / 1e9
    code = (
        "from rvdist.evaluate.sandbox.sandbox import *\n"
        f"run([Program('', 'import time; time.sleep(60)', '', 'f')], Limits(wall_seconds={wall}), mode={mode!r})"
    )
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY)
    try:
        deadline = time.monotonic() + 60
        while len(boxes(wall)) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(boxes(wall)) == 3
    finally:
        caller.kill()
        caller.wait()
    assert gone(wall)


def test_the_wall_clock_is_the_callers(mode, monkeypatch):
    """Should the checker not keep it, the caller ends the box all the same."""
    monkeypatch.setattr(sandbox, "_GRACE_SECONDS", -SHORT.wall_seconds)
    (verdict,) = run([Program("", "import time; time.sleep(60)", "", "f")], SHORT, mode=mode)
    assert verdict.outcome == "timed out"


@pytest.mark.parametrize("mode", ["namespaces", "landlock"])
def test_a_user_without_rights_has_the_same_walls(mode):
    python = Path("/usr/bin/python3")
    if os.geteuid() != 0 or not python.exists() or not os.access(python, os.X_OK):
        pytest.skip("needs root, to become someone else, and a Python that everyone may run")
    code = f"""
import os, sys
os.setgroups([]); os.setresgid(12345, 12345, 12345); os.setresuid(12345, 12345, 12345)
os.execve("{python}", ["{python}", "-c", {_AS_USER!r}, {mode!r}], {{"PYTHONPATH": {str(REPOSITORY)!r}}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd="/")
    if "ModuleNotFoundError" in done.stderr or "refuses the sandbox" in done.stderr or "SyntaxError" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    right, *tries = json.loads(done.stdout)
    assert right == f"passed ({mode})"
    assert len(tries) == 4 and not [verdict for verdict in tries if verdict.startswith("passed")], tries


_AS_USER = """
import json, os, sys
from rvdist.evaluate.sandbox.sandbox import Limits, Program, run
codes = ["def f(): return 'escaped'",
         "import os\\nwhile True: os.fork()",
         "def f(): open('/tmp/rvdist-new', 'w'); return 'escaped'",
         f"def f(): open('/proc/{os.getpid()}/environ').read(); return 'escaped'",
         f"import os\\ndef f(): os.kill({os.getpid()}, 9); return 'escaped'"]
programs = [Program("", code, "assert f() == 'escaped'", "f") for code in codes]
print(json.dumps([str(verdict) for verdict in run(programs, Limits(cpu_seconds=1), mode=sys.argv[1])]))
"""


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -(2**63), 2**200, 1.5, float("inf"), 1j, "é\ud800", b"\0\xff", [1, (2,), [[]]], {1, "a"},
        frozenset({(1, 2)}), {(1, 2): [None], "k": {}}, range(3, 9, 2),
    ],
)  # fmt: skip
def test_plain_data_comes_back_as_it_was(value):
    back = box.decode(json.loads(json.dumps(box.encode(value))))
    assert back == value and type(back) is type(value)


def test_other_values_come_back_plain_or_not_at_all():
    numpy = pytest.importorskip("numpy")
    back = box.decode(json.loads(json.dumps(box.encode([iter("ab"), numpy.int64(3), numpy.True_, object(), len]))))
    assert list(back[0]) == ["a", "b"] and back[1:3] == [3, True] and back[3] != back[4]
    assert repr(back[4]) == "<a value of type builtin_function_or_method>"
    for rubbish in (["list"], ["int", 5], ["nonsense", []], [[]], ["dict", [[["list", []], 1]]]):
        with pytest.raises((ValueError, TypeError)):
            box.decode(rubbish)


def test_numpy_is_there(mode):
    pytest.importorskip("numpy")
    code = "import numpy as np\ndef f(x): return np.array(x).sum()"
    assert attempt(mode, code, "import numpy\nassert f([1, 2]) == 3\nassert numpy.allclose(f([0.5]), 0.5)").passed


def humaneval(path, solved):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        Program(
            row["prompt"],
            row["canonical_solution"] if solved else "",
            f"{row['test']}\ncheck({row['entry_point']})",
            row["entry_point"],
        )
        for row in rows
    ]


@pytest.mark.parametrize("solved", [True, False])
def test_five_problems_of_humaneval(mode, solved):
    assert [verdict.passed for verdict in run(humaneval(FIVE, solved), mode=mode)] == [solved] * 5


@pytest.mark.skipif(not WHOLE.exists(), reason="HumanEval's 164 problems are not on this machine")
@pytest.mark.parametrize("solved", [True, False])
def test_all_164_problems_of_humaneval(solved):
    verdicts = run(humaneval(WHOLE, solved), mode=sandbox.available_mode(degraded=True))
    assert len(verdicts) == 164 and [v for v in verdicts if v.passed != solved] == []


def test_walls_that_cannot_be_had_are_named(monkeypatch):
    monkeypatch.setattr(sandbox, "_refusal", {"namespaces": "no unshare", "landlock": None}.get)
    with pytest.raises(sandbox.BadInput, match="benchmarks.sandbox=strict: no unshare; benchmarks.sandbox=degraded"):
        sandbox.available_mode(degraded=False)
    assert sandbox.available_mode(degraded=True) == "landlock"
    monkeypatch.setattr(sandbox, "_refusal", lambda mode: "nothing works")
    with pytest.raises(sandbox.BadInput, match="benchmarks.sandbox=degraded: nothing works; run code tasks on another"):
        sandbox.available_mode(degraded=True)


def test_a_kernel_that_refuses_is_said_once_and_clearly(mode, monkeypatch):
    sandbox._refusal.cache_clear()
    monkeypatch.setattr(sandbox, "_visible", lambda: (["/no/such/directory"], []))
    assert "refuses the sandbox" in str(sandbox._refusal(mode)) and "No such file" in str(sandbox._refusal(mode))
    sandbox._refusal.cache_clear()
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_a_prompt_may_end_with_the_header_of_its_function(mode):
    """As that of the original benchmark's own example does."""
    prompt, test = "two = 2\ndef one():\n", "assert one() == 1 and two == 2"
    answers = ("    return 1", "\treturn 1", "  return 2", "return 1")
    verdicts = run([Program(prompt, answer, test, "one") for answer in answers], LIMITS, mode=mode)
    assert [verdict.outcome for verdict in verdicts] == ["passed", "passed", "failed", "failed"]
