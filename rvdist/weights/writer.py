"""Writes the tensors of a stored vector into a staging: a part is durable and journalled before it counts as done."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch
import xxhash

from rvdist.core.errors import BadInput, Failed
from rvdist.weights.arithmetic.method import count_nonfinite
from rvdist.weights.checkpoint.header import TensorSpec
from rvdist.weights.checkpoint.journal import Written
from rvdist.weights.checkpoint.staging import Staging
from rvdist.weights.checkpoint.stream import write_exactly
from rvdist.weights.operand import Operand, tell_nonfinite

_SYNC_BYTES = 1 << 30  # written before they are made durable and journalled


class Writer:
    """Parts of tensors into the files of a staging, digested on their way."""

    def __init__(self, staging: Staging, donors: Sequence[Operand]) -> None:
        self._staging, self._donors = staging, donors
        self._open: dict[str, int] = {}
        self._pending: list[Written] = []

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
            why = " and ".join(filter(None, suspects)) or "the donors are finite, and their difference overflows"
            raise BadInput(
                f"{self._staging.output}: tensor {name} of the vector would be infinite or not a number: {why}; get a "
                "sound copy, or store it in a wider vector.dtype"
            )

    def write(self, part: TensorSpec, chunks: Iterator[torch.Tensor]) -> None:
        """Writes the elements of a part, which come in its dtype, 1-d and in order. Raises BadInput, Failed."""
        digest, offset = xxhash.xxh3_128(), part.offset
        for chunk in chunks:
            self.require_finite(part.name, chunk)
            try:
                written = write_exactly(self._descriptor(part.file), offset, chunk)
            except OSError as error:
                raise Failed(f"{part.file}: cannot be written ({error.strerror})") from None
            digest.update(written)
            offset += written.nbytes
        if part.nbytes:
            self._pending.append(Written(part.file, part.offset, part.nbytes, digest.hexdigest()))
        if sum(written.nbytes for written in self._pending) > _SYNC_BYTES:
            self.sync()

    def sync(self) -> None:
        """Makes durable what was written, and journals it. Raises Failed."""
        try:
            for descriptor in self._open.values():
                os.fdatasync(descriptor)
        except OSError as error:
            raise Failed(f"what was written cannot be made durable ({error.strerror})") from None
        self._staging.journal(self._pending)
        self._pending = []

    def _descriptor(self, file: str) -> int:
        if file not in self._open:
            self._open[file] = self._staging.open(file, os.O_WRONLY)
        return self._open[file]

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()
