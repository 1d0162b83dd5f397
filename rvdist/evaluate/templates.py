"""Chat templates are programs of strangers: rendered in a process of its own, which is ended when it takes too long.

The process runs transformers' own file that renders them, so that the text is the same to the character, without the
rest of transformers, whose import would take longer than all else. Knows a tokenizer; nothing of tasks.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_SECONDS, _EACH = 3.0, 0.05  # of processor time: for a text at most, and for all of them more by each
_BYTES = 512 << 20  # of memory
_CHARACTERS, _TIMES = 64 << 10, 8  # of a text: so many, and so many times those of its messages
_AT_MOST = 120.0  # seconds for an answer, on a busy machine

_RENDER = """
import json, resource, signal, sys, time, types
seconds, each, nbytes, characters, times, file = json.loads(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (nbytes, nbytes))
signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks ends it
try:
    import logging
    for name in ("transformers", "transformers.utils"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = []
    known = sys.modules["transformers.utils"].import_utils = types.ModuleType("transformers.utils.import_utils")
    known.is_jinja_available = lambda: True
    known.is_torch_available = known.is_vision_available = lambda: False
    told = sys.modules["transformers.utils"].logging = types.ModuleType("transformers.utils.logging")
    told.get_logger = logging.getLogger
    sys.modules |= {known.__name__: known, told.__name__: told}
    module = types.ModuleType("transformers.utils.chat_template_utils")
    module.__package__ = "transformers.utils"
    sys.modules[module.__name__] = module
    exec(compile(open(file).read(), file, "exec"), module.__dict__)
except Exception:  # another version of it knows more of transformers
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        del sys.modules[name]
    import transformers.utils.chat_template_utils as module
began = time.process_time()
for count, line in enumerate(sys.stdin, start=1):
    left = seconds + each * count - (time.process_time() - began)
    signal.setitimer(signal.ITIMER_PROF, min(seconds, max(0.1, left)))
    try:
        asked = json.loads(line)
        (text,), _ = module.render_jinja_template(**asked)
        most = characters + times * len(line)
        said = {"text": text} if len(text) <= most else {"error": f"it makes {len(text):,} characters"}
    except MemoryError:
        said = {"error": f"it takes more than {nbytes >> 20} MiB"}
    except Exception as error:
        said = {"error": (str(error) or type(error).__name__)[:1000]}
    except RecursionError:
        said = {"error": "it calls itself without end"}
    said = json.dumps(said)
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(said, flush=True)
"""


class _Renderer:
    """The process, started when there is something to render. `render` raises ValueError for what a template says, and
    where it is not done within the limits."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def render(self, asked: Mapping[str, Any]) -> str:
        with self.lock:
            said = self._ask(json.dumps(asked))
        if "error" in said:
            raise ValueError(said["error"])
        said["text"].encode()  # raises for half a surrogate, of which no tokenizer makes tokens
        return said["text"]

    def begin(self) -> subprocess.Popen[str]:
        if self._process is None or self._owner != os.getpid():  # a fork's is another's
            self._process, self._owner = _start(), os.getpid()
        return self._process

    def _ask(self, line: str) -> dict[str, str]:
        process = self.begin()
        assert process.stdin is not None and process.stdout is not None
        with suppress(OSError):  # where it has ended
            process.stdin.write(line + "\n")
            process.stdin.flush()
            if select.select([process.stdout], [], [], _AT_MOST)[0] and (answer := process.stdout.readline()):
                said: dict[str, str] = json.loads(answer)
                return said
        self.end()
        if process.returncode in (-signal.SIGPROF, -signal.SIGKILL):
            raise ValueError(f"rendering it takes more than {_SECONDS:g} s of processor time")
        raise ValueError("rendering it crashes")

    def end(self) -> None:
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()
        try:
            process.wait(0.5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


_renderer = _Renderer()
atexit.register(_renderer.end)


def expect() -> None:
    """Starts the process beside what else takes time."""
    with _renderer.lock:
        _renderer.begin()


def _start() -> subprocess.Popen[str]:
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None
    file = str(Path(spec.origin).with_name("utils") / "chat_template_utils.py")
    limits = json.dumps([_SECONDS, _EACH, _BYTES, _CHARACTERS, _TIMES, file])
    return subprocess.Popen(
        [sys.executable, "-I", "-c", _RENDER, limits],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="ascii",
    )  # fmt: skip


def apply_template(tokenizer: Any, messages: Sequence[dict[str, str]], add_generation_prompt: bool) -> str:
    """The prompt of these messages. Raises ValueError, and for a tokenizer with a way of its own what that raises."""
    from transformers import PreTrainedTokenizerBase

    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )
    return _renderer.render(
        {
            "conversations": [list(messages)],
            "chat_template": tokenizer.get_chat_template(),
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
            **tokenizer.special_tokens_map,
        }
    )
