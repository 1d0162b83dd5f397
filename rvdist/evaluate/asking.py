"""What arms of one prompt style are asked: a suite's requests, through one tokenizer and template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rvdist.core.errors import BadInput
from rvdist.core.text import reason
from rvdist.evaluate import templates
from rvdist.evaluate.request import Generate, Request
from rvdist.evaluate.suite import Document, Suite

Requests = Mapping[str, Sequence[Request]]  # by task

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True, eq=False)
class Asking:
    """What is asked of engines that serve alike.

    `serving` is a digest of what engines read of a checkpoint besides its weights; `tensors` are those it has; `whole`
    is what is asked of all documents, where these are some of them."""

    serving: str
    tensors: str
    suite: Suite
    tokenizer: Any
    requests: Requests
    whole: Asking | None = None

    @cached_property
    def documents(self) -> dict[str, list[Document]]:
        """The requests by document."""
        return self.suite.asked(self.tokenizer)

    def restricted(self, documents: Mapping[str, Sequence[int]]) -> Asking:
        """The same, of these documents alone."""
        suite = self.suite.restricted(documents)
        return replace(self, suite=suite, requests=suite.requests(self.tokenizer), whole=self)

    @cached_property
    def places(self) -> dict[str, dict[tuple[Request, int], int]]:
        """Where each request of a task is, the first of equal ones; repeats of one are told apart."""
        found: dict[str, dict[tuple[Request, int], int]] = {task: {} for task in self.requests}
        for task, requests in self.requests.items():
            for place, request in enumerate(requests):
                found[task].setdefault(with_repeat(request), place)
        return found


def with_repeat(request: Request) -> tuple[Request, int]:
    """A request, and which of its repeats it is."""
    return request, request.repeat if isinstance(request, Generate) else 0


def load_tokenizer(path: Path, chat: bool) -> Any:
    """The checkpoint's tokenizer. Raises BadInput where it has none, or no chat template and one is asked for."""
    if chat:
        templates.expect()
    from transformers import AutoTokenizer

    if not any((path / name).exists() for name in _TOKENIZERS):  # transformers would make up an empty one
        raise BadInput(f"{path}: has no tokenizer, and scoring needs one; copy the tokenizer's files there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except BaseException as error:  # transformers raises what it likes for files it cannot use, its Rust a panic
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BadInput(f"{path}: has a tokenizer that cannot be loaded ({reason(error)})") from None
    if chat and not tokenizer.chat_template:
        raise BadInput(f"{path}: has no chat template; set benchmarks.apply_chat_template=false")
    return tokenizer
