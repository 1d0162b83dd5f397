"""Tensors of a weight point, read when vLLM copies them.

They are read into vLLM's own parameters, with no tensor in between, or by bounce buffers where these are a card's. Of a
tensor-parallel shard that is a range of rows, or of a matrix's columns, only these are read.

Knows nothing of vLLM: whatever is done to such a tensor other than taking rows or columns and copying them to memory in
one piece gets an ordinary tensor, which is read then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from rvdist.evaluate.fleet.bounce import BounceBuffers
from rvdist.evaluate.fleet.readers import Readers
from rvdist.weights.reader import PointReader

_aten = torch.ops.aten
Steps = tuple[tuple[Any, tuple[Any, ...]], ...]  # each an operator, and what it is given but for the tensor


class Deferred(torch.Tensor):
    """A tensor, contiguous and on the CPU, that `fill` writes from its element `start` on into a 1-d tensor; of whole
    rows, `columns` writes some columns. `taken` are the steps by which it was taken of the tensor `origin`. `bounce`:
    the buffers by which it is copied, which a card needs."""

    origin: str
    taken: Steps
    _start: int
    _fill: Callable[[int, torch.Tensor], None]
    _columns: Callable[[range, range, torch.Tensor], None] | None
    _bounce: BounceBuffers | None
    _whole: torch.Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        shape: torch.Size,
        dtype: torch.dtype,
        fill: Callable[[int, torch.Tensor], None],
        start: int = 0,
        columns: Callable[[range, range, torch.Tensor], None] | None = None,
        origin: str = "",
        bounce: BounceBuffers | None = None,
    ) -> Deferred:
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=torch.device("cpu"))
        made._start, made._fill, made._columns, made._bounce, made._whole = start, fill, columns, bounce, None
        made.origin, made.taken = origin, ()
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is _aten.copy_.default and isinstance(args[1], Deferred) and args[1]._copy_to(args[0]):
            return args[0]
        if func in _VIEWS and args[0]._whole is None and (parts := _VIEWS[func](*args)) is not None:
            several = isinstance(parts, list)
            for k, part in enumerate(parts if several else [parts]):
                step = (_aten.select.int, (0, k)) if several else (func, args[1:])
                part.origin, part.taken = args[0].origin, (*args[0].taken, step)
            return parts
        args, kwargs = tree_map_only(Deferred, Deferred.read, (args, kwargs or {}))
        return func(*args, **kwargs)

    def read(self) -> torch.Tensor:
        """All of it as an ordinary tensor, the same at every call."""
        if self._whole is None:
            self._whole = torch.empty(self.shape, dtype=self.dtype, device="cpu")  # whatever the default is
            self._fill(self._start, self._whole.view(-1))
        return self._whole

    def _copy_to(self, target: torch.Tensor) -> bool:
        """Whether it was read into `target`. Nothing is to be read into one without memory, by which vLLM only counts
        the elements that come."""
        if self._whole is not None or target.shape != self.shape or target.dtype != self.dtype:
            return False
        if target.is_meta or not target.is_contiguous():
            return target.is_meta
        out = target.view(-1).as_subclass(torch.Tensor)
        if self._bounce:
            row = max(1, self.shape[-1]) if self.dim() > 1 else 1
            self._bounce.copy(lambda start, part: self._fill(self._start + start, part), out, row)
        elif target.device.type == "cpu":
            self._fill(self._start, out)
        else:
            return False
        return True

    def _slice(self, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Deferred | None:
        first, last, _ = slice(start, end).indices(self.shape[dim])
        rows = dim % self.dim() == 0
        last_dim = dim % self.dim() == self.dim() - 1
        if step == 1 and self._columns and last_dim and not rows and 0 < last - first < self.shape[dim]:
            return self._narrow(self._columns, range(first, last))
        if step != 1 or not (rows or last - first == self.shape[dim]):
            return None
        return self._part([max(0, last - first), *self.shape[1:]] if rows else self.shape, first * rows)

    def _narrow(self, fill: Callable[[range, range, torch.Tensor], None], columns: range) -> Deferred:
        """Some columns; what is taken of them are whole rows."""
        above, count = self._start // self.shape[-1], len(columns)

        def fill_rows(start: int, out: torch.Tensor) -> None:
            assert not (start % count or out.numel() % count), "part of a row"
            row = above + start // count
            fill(range(row, row + out.numel() // count), columns, out)

        return Deferred(torch.Size([*self.shape[:-1], count]), self.dtype, fill_rows, bounce=self._bounce)

    def _unbind(self, dim: int = 0) -> list[Deferred] | None:
        return None if dim % self.dim() else [self._part(self.shape[1:], row) for row in range(self.shape[0])]

    def _select(self, dim: int, index: int) -> Deferred | None:
        return None if dim % self.dim() else self._part(self.shape[1:], range(self.shape[0])[index])

    def _unsqueeze(self, dim: int) -> Deferred:
        shape = list(self.shape)
        shape.insert(dim % (self.dim() + 1), 1)
        return self._part(shape, 0)

    def _part(self, shape: Sequence[int], row: int) -> Deferred:
        start = self._start + (row * self.numel() // self.shape[0] if row else 0)
        columns = self._columns if len(shape) > 1 and shape[-1] == self.shape[-1] else None
        return Deferred(torch.Size(shape), self.dtype, self._fill, start, columns, bounce=self._bounce)


# What need not be read to be taken: a range of rows, all, or each row, of whatever shape.
_VIEWS: dict[Any, Callable[..., Deferred | list[Deferred] | None]] = {
    _aten.slice.Tensor: Deferred._slice,
    _aten.unbind.int: Deferred._unbind,
    _aten.select.int: Deferred._select,
    _aten.unsqueeze.default: Deferred._unsqueeze,
}


def defer_tensors(
    reader: PointReader | Readers, bounce: BounceBuffers | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every (name, tensor) of the reader's only point; `bounce` takes them to a card. They can be read until the reader
    is closed."""
    for name, spec in reader.base.tensors.items():
        shape, dtype = torch.Size(spec.shape), reader.output_dtype(spec)
        columns = partial(reader.fill_columns, name) if len(shape) > 1 else None
        yield name, Deferred(shape, dtype, partial(reader.fill, name), 0, columns, name, bounce)


def take(tensor: torch.Tensor, steps: Steps) -> torch.Tensor:
    """What the steps take of a tensor, deferred or not."""
    for operator, given in steps:
        tensor = operator(tensor, *given)
    return tensor
