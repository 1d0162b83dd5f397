"""What arms of one prompt style are asked: a suite's requests, through one tokenizer and template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rvdist.evaluate.fleet.served import companions
from rvdist.evaluate.request import Generate, Request
from rvdist.evaluate.suite import Document, Suite
from rvdist.weights.checkpoint.digest import require_same
from rvdist.weights.checkpoint.header import Stamp

Requests = Mapping[str, Sequence[Request]]  # by task


@dataclass(frozen=True, eq=False)
class Asking:
    """What is asked of engines that serve alike.

    `serving` is a digest of what engines read of a checkpoint besides its weights; `tensors` is the JSON of its
    tensors' names, dtypes and shapes; `whole` is what is asked of all documents, where these are some of them. `stamps`
    are what the file system said of what `serving` is of, in the directory `served`."""

    serving: str
    tensors: str
    suite: Suite
    tokenizer: Any
    requests: Requests
    whole: Asking | None = None
    served: Path | None = None
    stamps: Mapping[Path, Stamp] = field(default_factory=dict)

    def require_unchanged(self) -> None:
        """Raises BadInput where engines that start now would read other files beside the weights."""
        if self.served:
            require_same(self.stamps, companions(self.served))

    @cached_property
    def documents(self) -> dict[str, list[Document]]:
        """The requests by document."""
        return self.suite.documents_asked(self.tokenizer)

    def restrict(self, documents: Mapping[str, Sequence[int]]) -> Asking:
        """The same, of these documents alone."""
        suite = self.suite.restrict(documents)
        return replace(self, suite=suite, requests=suite.requests(self.tokenizer), whole=self)

    @cached_property
    def places(self) -> dict[str, dict[tuple[Request, int], int]]:
        """Where each request of a task is, the first of equal ones; repeats of one are told apart."""
        by_task: dict[str, dict[tuple[Request, int], int]] = {task: {} for task in self.requests}
        for task, requests in self.requests.items():
            for place, request in enumerate(requests):
                by_task[task].setdefault(with_repeat(request), place)
        return by_task


def with_repeat(request: Request) -> tuple[Request, int]:
    """A request, and which of its repeats it is."""
    return request, request.repeat if isinstance(request, Generate) else 0
