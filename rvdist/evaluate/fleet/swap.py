"""The swap: gives a live vLLM engine the weights of another point, in place and to the bit.

Runs inside every vLLM rank, as vLLM's `worker_extension_cls`. Each rank streams the point into vLLM's own
reload path, so that fused and tensor-parallel layouts stay vLLM's business; only the point's JSON travels.
What vLLM has to find out for that is recorded once.
vLLM merely warns about weights it did not get, and its CPU build keeps packed copies that a reload misses:
here the first is an error and the second is repaired. Facts and proofs: docs/vllm.md.
"""

from __future__ import annotations

import json
from contextlib import closing
from typing import Any

import torch

from rvdist.core.point import WeightPoint
from rvdist.evaluate.fleet.bounce import BounceBuffers, Straight
from rvdist.evaluate.fleet.deferred import defer_tensors
from rvdist.evaluate.fleet.mirror import Tensors, mirror
from rvdist.evaluate.fleet.private_vllm import (
    ask_for_amx,
    clear_caches,
    end_without_names,
    hide_llvmlite,
    is_on_cpu,
    own_choices,
    repair_packed_copies,
    require_in_rank,
    unname_memory,
    watch_logits,
)
from rvdist.evaluate.fleet.readers import Readers
from rvdist.evaluate.fleet.recorded import Recorded
from rvdist.weights.arithmetic.method import warm_up
from rvdist.weights.checkpoint.kept import KeptSources

LACKS = "the weight point lacks tensors that the engine needs"
LEFT = "vLLM did not load these parameters of the weight point"

warm_up()  # an engine goes to many points
hide_llvmlite()  # in the ranks, which import nothing else of ours before they start
end_without_names()


class SwapExtension:
    """Mixed into vLLM's worker class; names are prefixed because vLLM refuses an attribute it already has."""

    model_config: Any  # these three are the worker's
    model_runner: Any
    reload_weights: Any
    _rvdist_tensors: list[str]
    _rvdist_recorded: Recorded
    _rvdist_sources: KeptSources
    _rvdist_readers: int
    _rvdist_arithmetic: str
    _rvdist_bounce: BounceBuffers | None
    _rvdist_rows: torch.Tensor  # of logits since they were asked for: all of them, and those that give no distribution

    _rvdist_bytes = 0  # that swaps read

    def rvdist_bytes(self) -> int:
        """How many bytes the swaps of this rank read."""
        return self._rvdist_bytes

    def rvdist_resolved(self) -> dict[str, str]:
        """What vLLM has chosen in this rank."""
        return own_choices(self)

    def rvdist_ready(self, tensors: list[str], readers: int, arithmetic: str) -> None:
        """Call once after start on a checkpoint of these tensors; so many threads read points, whose arithmetic is done
        on the `cpu` or on the card, `cuda`. Raises Failed where vLLM is not as we know it."""
        require_in_rank()
        unname_memory()
        ask_for_amx()
        self._rvdist_tensors, self._rvdist_recorded = tensors, Recorded(self)
        self._rvdist_sources, self._rvdist_readers, self._rvdist_arithmetic = KeptSources(), readers, arithmetic
        self._rvdist_bounce = None if is_on_cpu() else BounceBuffers() if arithmetic == "cpu" else Straight()
        self._rvdist_rows = watch_logits(self.model_runner)

    def rvdist_rows(self) -> list[int]:
        """How many rows of logits there were since the last call, and how many of them have no finite maximum: a NaN,
        +inf, or nothing but -inf. No token can be drawn from such a row, and vLLM draws one all the same."""
        rows: list[int] = self._rvdist_rows.tolist()
        self._rvdist_rows.zero_()
        return rows

    def rvdist_forget(self) -> bool:
        """Has vLLM search anew at every swap from now on. Whether it did not before."""
        return self._rvdist_recorded.forget()

    def rvdist_swap(self, point: str, exchanged: list[int]) -> dict[str, str]:
        """Loads the weights of `point` (the JSON of a WeightPoint), or the mirror image of them (see `mirror`)
        when there are tokens to be exchanged. Returns the tensors in which this rank read infinities or NaNs, and where
        those of the first come from.

        Raises RuntimeError naming the tensors when one that the engine was started with does not come, or
        does not arrive in vLLM. After any error the weights of this rank are undefined.
        """
        came: set[str] = set()
        wanted = WeightPoint.from_json(json.loads(point))
        kept = self._rvdist_sources
        opened = Readers(wanted, self._rvdist_readers, kept.open, self._rvdist_arithmetic, kept.remap)
        with closing(opened) as reader:
            tensors = defer_tensors(reader, self._rvdist_bounce)
            shapes = {name: spec.shape for name, spec in reader.base.tensors.items()}
            if exchanged:
                text = self.model_config.hf_text_config
                tensors = mirror(tensors, shapes, text.to_dict() | {"hidden_size": text.hidden_size}, exchanged)
            stale = self._rvdist_recorded.load(_note_names(came, tensors), shapes, self._rvdist_expected())
            if self._rvdist_bounce:
                self._rvdist_bounce.wait()
            spoiled = {name: "" if number else reader.blame(name) for number, name in enumerate(reader.spoiled)}
            self._rvdist_bytes += reader.bytes_read
        if missing := self._rvdist_expected() - came:
            raise RuntimeError(f"{LACKS}: {_some(missing)}")
        if stale:
            raise RuntimeError(f"{LEFT}: {_some(stale)}")
        repair_packed_copies(self.model_runner.get_model())
        clear_caches(self.model_runner.kv_caches)
        return spoiled

    def _rvdist_expected(self) -> set[str]:
        """The tensors that the engine was started with, but for those that vLLM reads over."""
        names = set(self._rvdist_tensors)
        if self.model_config.hf_text_config.tie_word_embeddings:
            names.discard("lm_head.weight")
        return {name for name in names if not name.endswith("rotary_emb.inv_freq")}


def _note_names(names: set[str], tensors: Tensors) -> Tensors:
    for name, tensor in tensors:
        names.add(name)
        yield name, tensor


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
