"""The swap: gives a live vLLM engine the weights of another point, in place and to the bit.

Runs inside every vLLM rank, as vLLM's `worker_extension_cls`. Each rank streams the point into vLLM's own
reload path, so that fused and tensor-parallel layouts stay vLLM's business; only the point's JSON travels.
vLLM merely warns about weights it did not get, and its CPU build keeps packed copies that a reload misses:
here the first is an error and the second is repaired. Facts and proofs: docs/vllm.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from rvdist.core.point import WeightPoint
from rvdist.evaluate.fleet.deferred import deferred
from rvdist.weights.reader import open_point

LACKS = "the weight point lacks tensors that the engine needs"
LEFT = "vLLM did not load these parameters of the weight point"

Tensors = Iterator[tuple[str, torch.Tensor]]


def hide_llvmlite() -> None:
    """Call before vLLM starts. It looks for its kernels in the `__dict__` of whatever any module holds, and llvmlite's
    library handle (numba's, which the reader uses) takes that name, as any other, for a function of the library."""
    ffi = sys.modules.get("llvmlite.binding.ffi")
    if ffi is not None and not isinstance(ffi.lib.__dict__, dict):
        handle = type(ffi.lib)
        ffi.lib.__class__ = type(handle.__name__, (handle,), {"__slots__": (), "__dict__": property(lambda self: {})})


hide_llvmlite()  # in the ranks, which import nothing else of ours before they start


class SwapExtension:
    """Mixed into vLLM's worker class; names are prefixed because vLLM refuses an attribute it already has."""

    model_config: Any  # these three are the worker's
    model_runner: Any
    reload_weights: Any
    _rvdist_tensors: list[str]
    _rvdist_rows: torch.Tensor  # of logits since they were asked for: all of them, and those that give no distribution

    _rvdist_bytes = 0  # that swaps read

    def rvdist_bytes(self) -> int:
        """How many bytes the swaps of this rank read."""
        return self._rvdist_bytes

    def rvdist_ready(self, tensors: list[str]) -> None:
        """Call once after start on a checkpoint of these tensors. vLLM's CPU kernels use AMX tiles, but in eager mode
        nothing asks the kernel for them, and a first batch of one token dies of an illegal instruction."""
        if torch.cpu._is_amx_tile_supported():
            torch.cpu._init_amx()
        self._rvdist_tensors = tensors
        self._rvdist_watch_logits()

    def rvdist_rows(self) -> list[int]:
        """How many rows of logits there were since the last call, and how many of them have no finite maximum: a NaN,
        +inf, or nothing but -inf. No token can be drawn from such a row, and vLLM draws one all the same."""
        rows = self._rvdist_rows.tolist()
        self._rvdist_rows.zero_()
        return list(map(int, rows))

    def _rvdist_watch_logits(self) -> None:
        model = self.model_runner.get_model()
        compute, rows = model.compute_logits, torch.zeros(2, dtype=torch.int64, device=self.model_runner.device)

        def watching(*args: Any, **kwargs: Any) -> Any:
            logits = compute(*args, **kwargs)
            if logits is not None and logits.numel():
                rows[0] += logits.shape[0]
                rows[1] += logits.amax(-1).isfinite().logical_not().sum()  # nothing waits for a card
            return logits

        self._rvdist_rows = rows
        model.compute_logits = watching

    def rvdist_swap(self, point: str, exchanged: list[int]) -> dict[str, str]:
        """Loads the weights of `point` (the JSON of a WeightPoint), or the mirror image of them (see `mirror`)
        when there are tokens to be exchanged. Returns the tensors in which this rank read infinities or NaNs, and where
        those of the first come from.

        Raises RuntimeError naming the tensors when one that the engine was started with does not come, or
        does not arrive in vLLM. After any error the weights of this rank are undefined.
        """
        came: set[str] = set()
        with closing(open_point(WeightPoint.from_json(json.loads(point)))) as reader:
            tensors = deferred(reader)
            if exchanged:
                tensors = mirror(tensors, self.model_config.hf_text_config.hidden_size, exchanged)
            loaded = self._rvdist_reload(_noting(came, tensors))
            spoiled = {name: "" if number else reader.blame(name) for number, name in enumerate(reader.spoiled)}
            self._rvdist_bytes += reader.bytes_read
        if missing := self._rvdist_expected() - came:
            raise RuntimeError(f"{LACKS}: {_some(missing)}")
        if stale := {name for name, _ in self.model_runner.get_model().named_parameters()} - loaded:
            raise RuntimeError(f"{LEFT}: {_some(stale)}")
        _repair_packed_copies(self.model_runner.get_model())
        _clear_caches(self.model_runner.kv_caches)
        return spoiled

    def _rvdist_expected(self) -> set[str]:
        """The tensors that the engine was started with, but for those that vLLM reads over."""
        names = set(self._rvdist_tensors)
        if self.model_config.hf_text_config.tie_word_embeddings:
            names.discard("lm_head.weight")
        return {name for name in names if not name.endswith("rotary_emb.inv_freq")}

    def _rvdist_reload(self, tensors: Tensors) -> set[str]:
        """Hands the tensors to vLLM; returns the parameters it says it loaded, of which it keeps no record."""
        model = self.model_runner.get_model()
        loaded: set[str] = set()
        load_weights = model.load_weights

        def recording(weights: Tensors) -> set[str]:
            loaded.update(load_weights(weights))
            return loaded

        model.load_weights = recording
        try:
            self.reload_weights(weights_iterator=tensors)
        finally:
            del model.load_weights
        return loaded


def _clear_caches(caches: Iterable[Any]) -> None:
    """Zeroes all that requests left behind. Attention reads whole blocks, multiplies what no token wrote by 0, and
    0 · NaN is NaN: blocks in which one point left NaNs would spoil whatever is asked at the next."""
    tensors, _ = tree_flatten(list(caches))
    for storage in {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}.values():
        torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).zero_()


def _noting(names: set[str], tensors: Tensors) -> Tensors:
    for name, tensor in tensors:
        names.add(name)
        yield name, tensor


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


def _repair_packed_copies(model: Any) -> None:
    """Brings up to date what vLLM's CPU build packed at start and its reload leaves as it was: a tied lm_head, which
    owns a packed copy of the embedding but no weight of its own and now takes the one that the reload made for the
    embedding, and the experts of a mixture, which are packed anew."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    embeddings = [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding)]
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead):
            for other in embeddings:
                if other is not layer and other.weight is layer.weight:
                    layer.cpu_linear = other.cpu_linear
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        experts = getattr(kernel, "fused_experts", None)
        if isinstance(experts, CPUUnquantizedExperts):
            experts.process_weights_after_loading(layer)


# Modules by what they do with the residual stream: a column, or a row, of their weight for each of its channels.
_READ_RESIDUAL = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "gate", "shared_expert_gate"}
_WRITE_RESIDUAL = {"o_proj", "down_proj"}
_VOCABULARY = {"embed_tokens", "lm_head"}


def mirror(tensors: Tensors, hidden: int, exchanged: list[int]) -> Tensors:
    """Other weights for the same function, for the engine's probe.

    A fixed random half of the `hidden` channels of the residual stream changes its sign wherever a weight
    reads or writes it, queries, keys and values change theirs, and the two tokens `exchanged` change places.
    Signs and places are exact in floating point: every matrix is another one, and the logits are the same to
    the bit, for a prompt with those tokens exchanged.
    """
    signs = torch.randint(0, 2, (hidden,), generator=torch.Generator().manual_seed(0)) * 2 - 1
    for name, tensor in tensors:
        module, kind = name.split(".")[-2:]
        sign = signs.to(tensor.dtype)
        if module in _WRITE_RESIDUAL:
            tensor = tensor * (sign[:, None] if kind == "weight" else sign)
        elif module in _READ_RESIDUAL | _VOCABULARY and kind == "weight":
            tensor = tensor * sign
        if module in ("q_proj", "k_proj", "v_proj") or name.endswith("o_proj.weight"):
            tensor = -tensor
        if module in _VOCABULARY:
            tensor[exchanged] = tensor[exchanged[::-1]]
        yield name, tensor


def mirror_obstacle(names: Iterable[str], config: Mapping[str, Any]) -> str | None:
    """Why a model of these tensors has no known mirror image; None when it has one."""
    if "rms_norm_eps" not in config:
        return "its norm is not a root mean square"
    for name in names:
        module, kind = ("", *name.split("."))[-2:]
        known = (
            (module in _READ_RESIDUAL | _WRITE_RESIDUAL and kind in ("weight", "bias"))
            or (module in _VOCABULARY and kind == "weight")
            or (module.endswith("norm") and kind == "weight")
        )
        if not known:
            return f"nothing is known of tensor {name}"
    return None
