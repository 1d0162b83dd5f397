"""Writes the tensors of a stored vector into a staging: a part is durable and journalled before it counts as done."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
import xxhash

from rvdist.core.errors import BadInput, Failed
from rvdist.weights.arithmetic.method import count_nonfinite
from rvdist.weights.checkpoint.direct import File
from rvdist.weights.checkpoint.header import TensorSpec
from rvdist.weights.checkpoint.journal import Written
from rvdist.weights.checkpoint.staging import Staging
from rvdist.weights.nonfinite import tell_nonfinite
from rvdist.weights.stored import Operand

_SYNC_BYTES = 1 << 30  # written before they are made durable and journalled
_OVERFLOWS = "the donors are finite, and their difference overflows"
_SYNC_SECONDS = 30.0  # after which less is, too
_KEPT = "what was durable before is kept, and the same command goes on from there"


class Writer:
    """Parts of tensors into the files of a staging, digested on their way."""

    def __init__(self, staging: Staging, donors: Sequence[Operand]) -> None:
        self._staging, self._donors = staging, donors
        self._open: dict[str, File] = {}
        self._pending: list[Written] = []
        self._synced = time.monotonic()

    def has(self, parts: Sequence[TensorSpec]) -> bool:
        """Whether these parts are there from an earlier run."""
        claims = [self._staging.claims.get((part.file, part.offset, part.nbytes)) for part in parts if part.nbytes]
        return all(
            claim is not None and claim.holds(self._staging.partial, self._staging.handle.opener) for claim in claims
        )

    def require_finite(self, name: str, values: torch.Tensor) -> None:
        """Raises BadInput for values of a tensor that are infinite or not a number, and says where they come from."""
        if count_nonfinite(values):
            parts = ("plus", "minus") if len(self._donors) == 2 else ("the vector",)
            suspects = [
                tell_nonfinite(donor, name, part, 1 << 62)
                for donor, part in zip(self._donors, parts, strict=True)
                if name in donor.checkpoint.tensors  # a factor of one is not
            ]
            found = " and ".join(filter(None, suspects))
            raise BadInput(
                f"{self._staging.output}: tensor {name} of the vector would be infinite or not a number: "
                + (f"{found}; get a sound copy" if found else f"{_OVERFLOWS}; store it in a wider vector.dtype")
            )

    def write(self, parts: Sequence[TensorSpec], chunks: Iterator[Sequence[torch.Tensor]]) -> None:
        """Writes the elements of parts, of which some of each come at a time, in its dtype, 1-d and in order. Raises
        BadInput, Failed."""
        digests, offsets = [xxhash.xxh3_128() for _ in parts], [part.offset for part in parts]
        for pieces in chunks:
            for k, (part, piece) in enumerate(zip(parts, pieces, strict=True)):
                if not piece.numel():
                    continue
                self.require_finite(part.name, piece)
                data = piece.view(torch.uint8).numpy().data
                try:
                    self._file(part.file).write(data, offsets[k])
                except OSError as error:
                    raise Failed(f"{error.filename}: cannot be written ({error.strerror}); {_KEPT}") from None
                digests[k].update(data)
                offsets[k] += data.nbytes
        for part, digest in zip(parts, digests, strict=True):
            if part.nbytes:
                self._pending.append(Written(part.file, part.offset, part.nbytes, digest.hexdigest()))
        late = time.monotonic() - self._synced > _SYNC_SECONDS
        if self._pending and (late or sum(written.nbytes for written in self._pending) > _SYNC_BYTES):
            self.sync()

    def sync(self) -> None:
        """Makes durable what was written, and journals it. Raises Failed."""
        try:
            for file in self._open.values():
                file.sync()
        except OSError as error:
            raise Failed(f"{error.filename}: cannot be made durable ({error.strerror}); {_KEPT}") from None
        self._staging.journal(self._pending)
        self._pending, self._synced = [], time.monotonic()

    def _file(self, name: str) -> File:
        if name not in self._open:
            self._open[name] = File(self._staging.partial / name, direct=False, handle=self._staging.handle)
        return self._open[name]

    def close(self) -> None:
        for file in self._open.values():
            file.close()
