"""A checkpoint's tokenizer. Its files are looked at before transformers and the `tokenizers` library open them, which
take what they find, for as long as it takes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rvdist.core.errors import BadInput
from rvdist.core.foreign import require_light
from rvdist.core.regular import read_regular
from rvdist.core.text import reason
from rvdist.evaluate import templates

_NAMES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_OPENED = re.compile(
    r"(tokenizer|special_tokens|added_tokens|vocab|merges|chat_template|config|processor|preprocessor|tekken).*\.(json|txt)"
    r"|.*\.(model|tiktoken|jinja)"
)
_TEMPLATES = "additional_chat_templates"
_MOST, _MOST_SMALL = 64 << 20, 4 << 20  # bytes of a vocabulary, of another file
_LARGE = re.compile(r"tokenizer\.json|tekken\.json|(vocab|merges)\..*|.*\.(model|tiktoken)")
_REGEX = re.compile(rb'"Regex"\s*:\s*("(?:[^"\\]|\\.)*")')
_HIDDEN = re.compile(rb"\\u00[4-7]")  # a letter written in another way, as a key could be
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_KNOWN = {_WORDS % r"\p{N}{1,3}", _WORDS % r"\p{N}"}  # Llama's and Qwen's, which end
_ATOM = r"(?:[^\\.^$|?*+()\[\]{}]|\\(?:\W|[sSdDwWnrt])|\[\^?(?:[^\\\[\]&]|\\(?:\W|[sSdDwWnrt]))+\]|\.)"
_LINEAR = re.compile(rf"\^?{_ATOM}{{1,99}}(?:[*+]|\{{\d{{1,3}},?\}}|\$)?")  # at most its end is repeated
_SECONDS, _BYTES = 3, 512 << 20  # of processor time, of memory

_TRY = """
import resource, sys
seconds, nbytes = map(int, sys.argv[2:])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
resource.setrlimit(resource.RLIMIT_DATA, (nbytes, nbytes))
from tokenizers import Tokenizer
try:
    tokenizer = Tokenizer.from_file(sys.argv[1])
    for one in ("a", "x", "0", " ", "\\n", "ab ", "a1", "A.", "\\u4e00", "=", "The quick brown fox, 3.14! "):
        ids = tokenizer.encode(one * (1000 // len(one)) + "\\u2205").ids
        tokenizer.decode(ids)
except BaseException as error:
    print(str(error).splitlines()[:1] or [type(error).__name__])
"""


def load_tokenizer(path: Path, chat: bool) -> Any:
    """The checkpoint's tokenizer. Raises BadInput where it has none, or one that cannot be used, or no chat template
    where one is asked for."""
    require_usable(path)
    if chat:
        templates.expect()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except BaseException as error:  # transformers raises what it likes for files it cannot use, its Rust a panic
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BadInput(f"{path}: has a tokenizer that cannot be loaded ({reason(error)})") from None
    if chat and not tokenizer.chat_template:
        raise BadInput(f"{path}: has no chat template; set benchmarks.apply_chat_template=false")
    return tokenizer


def require_usable(path: Path) -> None:
    """Raises BadInput where there is no tokenizer, or its files are not regular, too large, too much of something, or
    have regular expressions that do not end."""
    if not any(os.path.lexists(path / name) for name in _NAMES):  # transformers would make up an empty one
        raise BadInput(f"{path}: has no tokenizer, and scoring needs one; copy the tokenizer's files there")
    folders = [path, path / _TEMPLATES] if (path / _TEMPLATES).is_dir() else [path]
    for file in sorted(file for folder in folders for file in folder.iterdir()):
        if not _OPENED.fullmatch(file.name):
            continue
        try:
            content = read_regular(file, _MOST if _LARGE.fullmatch(file.name) else _MOST_SMALL)
            if file.suffix == ".json":
                require_light(content)
        except OSError as error:
            raise BadInput(
                f"{file}: cannot be read ({reason(error.strerror or error)}); copy the tokenizer again"
            ) from None
        except ValueError as error:
            raise BadInput(f"{file}: cannot be used ({reason(error)}); copy the tokenizer again") from None
        if file.name == "tokenizer.json" and _is_odd(content):
            _require_linear_decoder(file, content)
            _try(file, len(content))


def _is_odd(content: bytes) -> bool:
    """Whether it may have a regular expression of which it is not known that it ends."""
    if _HIDDEN.search(content):
        return True
    try:
        return not {json.loads(found) for found in _REGEX.findall(content)} <= _KNOWN
    except ValueError:
        return True


def _require_linear_decoder(file: Path, content: bytes) -> None:
    """Raises BadInput where its decoder has another regular expression than such as take no longer than a text is long:
    an engine decodes what its model writes, and nothing ends that."""

    def found(value: Any, name: str = "") -> Iterator[str]:
        for key, inner in value if isinstance(value, tuple) else ((name, one) for one in value):
            if isinstance(inner, tuple | list):
                yield from found(inner, key)
            elif key == "Regex":
                yield str(inner)

    whole = json.loads(content, object_pairs_hook=tuple)
    for key, value in whole if isinstance(whole, tuple) else ():
        for pattern in found([value]) if key == "decoder" else ():
            if not _LINEAR.fullmatch(pattern):
                raise BadInput(
                    f"{file}: has a tokenizer that cannot be used (its decoder has a regular expression that may take "
                    f"for ever on what the model writes: {reason(pattern, 80)}); take the model's own"
                )


def _try(file: Path, nbytes: int) -> None:
    """Raises BadInput where it is not read, or some short texts are not cut, in time and in memory. What takes long for
    other texts is found where they are cut (evaluate.fleet.prompts)."""
    limits = [str(_SECONDS + nbytes // (4 << 20)), str(_BYTES + 16 * nbytes)]
    try:
        ended = subprocess.run(
            [sys.executable, "-I", "-c", _TRY, str(file.absolute()), *limits],
            env=os.environ | {"RUST_BACKTRACE": "0", "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=120,
        )  # fmt: skip
        code, said = ended.returncode, ended.stdout.strip()
    except subprocess.TimeoutExpired:
        code, said = -signal.SIGXCPU, ""
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        said = f"reading it and cutting some texts takes more than {limits[0]} s: a regular expression does not end"
    elif code:
        said = "reading it takes too much memory"
    if said:
        raise BadInput(f"{file}: has a tokenizer that cannot be used ({reason(said)}); take the model's own")
