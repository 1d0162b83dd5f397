"""Merges with adapters against whole tensors in fp64: under masks and methods, of quantised targets, gone on with."""

import hashlib
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from adapters import ALPHA, RANK, differences, factors, write_adapter
from alone import planned, write
from checkpoints import launch, load_checkpoint, near, tensors, write_checkpoint
from fp8 import BLOCK, dequantized, quantized, write_fp8, written_back
from mixtures import as_int4
from whole_tensors import dare, ties

from rvdist.core.errors import Failed
from rvdist.core.method import MethodSpec
from rvdist.core.point import Mask, Term, Vector, WeightPoint
from rvdist.merge import accounts
from rvdist.merge import plan as planning
from rvdist.merge.actor import WorkerSettings
from rvdist.merge.driver import merge
from rvdist.merge.worker import MergeWorker

Q, UP, EMBEDDING = "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj", "model.embed_tokens"
TOKENS = f"base_model.model.{EMBEDDING}.token_adapter.trainable_tokens_delta"
Weights = dict[str, torch.Tensor]


def write_dora(path: Path, base: Weights, seed: int, rows: tuple[int, ...] = ()) -> Weights:
    """An adapter with DoRA of two matrices, and of the embedding by columns or some of its rows; its difference from
    `base`, whole, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    stored = {name: tensor for name, tensor in factors(seed).items() if not rows or "embed" not in name}
    changes: Weights = {}
    for name, delta in differences(stored).items():
        own = base[name].double()
        along = 0 if name.startswith(EMBEDDING) else 1
        length = (own.norm(dim=along) * (1 + 0.1 * torch.randn(own.shape[1 - along], generator=generator))).float()
        moved = own + delta
        stored[f"base_model.model.{name.removesuffix('.weight')}.lora_magnitude_vector"] = length
        changes[name] = moved * (length.double() / moved.norm(dim=along)).unsqueeze(along) - own
    config: dict[str, object] = {"use_dora": True}
    if rows:
        stored[TOKENS] = torch.randn(len(rows), 48, generator=generator) * 0.02
        config["trainable_token_indices"] = list(rows)
        own = base[f"{EMBEDDING}.weight"].double()
        changes[f"{EMBEDDING}.weight"] = torch.zeros_like(own)
        changes[f"{EMBEDDING}.weight"][list(rows)] = stored[TOKENS].double() - own[list(rows)]
    write_adapter(path, stored, **config)
    return changes


def is_rounded(found: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether it is the exact result rounded once, but for one element of a thousand that is the next one."""
    rounded = exact.to(found.dtype)
    ulp = 2.0**-7 if found.dtype == torch.bfloat16 else 2.0**-22
    close = torch.allclose(found.double(), exact, rtol=ulp, atol=1e-9)
    return close and bool((found != rounded).double().mean() < 1e-3)


def test_a_vector_of_what_an_adapter_replaces_is_all_there_is_to_do(tmp_path):
    """More was done than there was: the bytes of stored rows, not of what they come to, counted."""
    base = tensors(0)
    write_checkpoint(tmp_path / "base", base)
    write_dora(tmp_path / "adapter", base, 3, (300, 4, 17))
    done = launch("vector.plus=adapter", "vector.minus=base", "vector.save=stored", cwd=tmp_path)
    said = re.findall(r"vector: (.+) of (.+) in .*", done.stdout + done.stderr)
    assert said and said[-1][0] == said[-1][1], said


MASKS = {
    "all": (Mask(), {Q: 1.0, UP: 1.0, EMBEDDING: 1.0}),
    "depth": (Mask(depth=(0.25, 1.0)), {Q: 0.25, UP: 1.0, EMBEDDING: 1.0}),
    "layers": (Mask(layers=((1, 2),)), {Q: 0.0, UP: 1.0, EMBEDDING: 0.0}),
    "exclude": (Mask(exclude=(".*up_proj.*",)), {Q: 1.0, UP: 0.0, EMBEDDING: 1.0}),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [(), (300, 4, 17)])
def test_masks_and_coefficients_over_dora(tmp_path, dtype, rows):
    """Of the target itself, and of another base that is named."""
    base = tensors(0, dtype)
    other = near(base, 7)
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "other", other)
    changes = write_dora(tmp_path / "adapter", base, 3, rows)
    vectors = (Vector(str(tmp_path / "adapter")), Vector(str(tmp_path / "adapter"), str(tmp_path / "base")))
    for what, (mask, coefficients) in MASKS.items():
        for target, own, vector in (("base", base, vectors[0]), ("other", other, vectors[1])):
            out = tmp_path / f"{what}-{target}"
            write({out: WeightPoint(str(tmp_path / target), (Term(-0.7, vector, mask),))})
            for name, tensor in load_checkpoint(out).items():
                m = coefficients.get(name.removesuffix(".weight"), 0.0)
                change = changes.get(name, torch.zeros(()))
                assert is_rounded(tensor, own[name].double() - 0.7 * m * change), (what, target, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", ["ties", "dare"])
def test_two_adapters_with_dora_by_another_method(tmp_path, dtype, method):
    base = tensors(0, dtype)
    write_checkpoint(tmp_path / "base", base)
    changes = [write_dora(tmp_path / f"a{seed}", base, seed, rows) for seed, rows in ((3, ()), (4, (300, 4, 17)))]
    terms = tuple(Term(alpha, Vector(str(tmp_path / f"a{seed}"))) for alpha, seed in ((0.8, 3), (0.5, 4)))
    write({tmp_path / "out": WeightPoint(str(tmp_path / "base"), terms, MethodSpec(method, density=0.4, seed=11))})
    work = torch.float64 if dtype == torch.float32 else torch.float32
    for name, tensor in load_checkpoint(tmp_path / "out").items():
        if name not in changes[0]:
            assert torch.equal(tensor, base[name])
            continue
        flat = [change[name].to(work).flatten() for change in changes]
        given = [(term.alpha, v, torch.zeros_like(v)) for term, v in zip(terms, flat, strict=True)]
        own = base[name].flatten()
        exact = ties(own, given, 0.4) if method == "ties" else dare(own, given, 0.4, 11, name)
        assert (tensor.flatten() != exact).double().mean() < 1e-3 and not torch.equal(tensor, base[name]), name
        assert torch.allclose(tensor.flatten().double(), exact.double(), rtol=2**-7, atol=1e-6), name


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_fp8_target_takes_an_adapter(tmp_path, kind):
    """DoRA's base is what the codes mean. Blocks are written back as of donors."""
    plain = tensors(0)
    stored = quantized(plain, BLOCK)
    write_fp8(tmp_path / "target", stored, BLOCK, shards=3)
    meant = dequantized(stored, BLOCK)
    if kind == "lora":
        changes = differences(factors())
        write_adapter(tmp_path / "adapter", factors())
    else:
        changes = write_dora(tmp_path / "adapter", meant, 3)
    point = WeightPoint(str(tmp_path / "target"), (Term(0.5, Vector(str(tmp_path / "adapter"))),))
    write({tmp_path / "out": point})
    write({tmp_path / "plain": point}, "BF16")
    found, floats = load_checkpoint(tmp_path / "out"), load_checkpoint(tmp_path / "plain")
    for name, before in meant.items():
        exact = before.double() + 0.5 * changes.get(name, torch.zeros(()))
        assert is_rounded(floats[name], exact), name
        if stored[name].dtype != torch.float8_e4m3fn:
            assert is_rounded(found[name], exact), name
            continue
        codes, scales, kept = written_back(
            stored[name], stored[f"{name}_scale_inv"], exact.float(), before.float(), BLOCK
        )
        assert torch.allclose(found[f"{name}_scale_inv"], scales, rtol=1e-6, atol=0), name
        assert (found[name].view(torch.uint8) != codes.view(torch.uint8)).double().mean() < 2e-3, name
        assert (kept == 0) == (name in changes)


def test_an_int4_target_takes_an_adapter(tmp_path):
    """Of experts one by one, as Kimi-K2 ships them."""
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.0.mlp.experts.{k}.{p}_proj" for k in range(2) for p in ("gate", "down")]
    plain = {f"{name}.weight": (torch.randn(24, 32, generator=generator) * 0.05).bfloat16() for name in names}
    stored, said = as_int4(plain)
    config = {"model_type": "tiny", "quantization_config": said}
    write_checkpoint(tmp_path / "target", stored, config=config)
    pairs, changes = {}, {}
    for name in names[:2]:
        a, b = (torch.randn(shape, generator=generator) * 0.05 for shape in ((RANK, 32), (24, RANK)))
        pairs |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        changes[f"{name}.weight"] = ALPHA / RANK * b.double() @ a.double()
    write_adapter(tmp_path / "adapter", pairs)
    point = WeightPoint(str(tmp_path / "target"), (Term(0.5, Vector(str(tmp_path / "adapter"))),))
    write({tmp_path / "out": point})
    found = load_checkpoint(tmp_path / "out")
    for name in names:
        parts = [f"{name}.weight_{part}" for part in ("packed", "scale")]
        if f"{name}.weight" not in changes:
            assert all(torch.equal(found[part], stored[part]) for part in parts)
            continue
        codes = (stored[parts[0]][..., None].long() >> torch.arange(0, 32, 4) & 15).view(24, 32) - 8
        before = codes.double().view(24, -1, 8) * stored[parts[1]].double()[..., None]
        exact = (before + 0.5 * changes[f"{name}.weight"].view(24, -1, 8)).float()
        scale = (exact.abs().amax(-1) / 7.5).bfloat16()
        new = (exact / scale.float()[..., None]).round().clamp(-8, 7).long().view(24, 32)
        own = (found[parts[0]][..., None].long() >> torch.arange(0, 32, 4) & 15).view(24, 32) - 8
        assert torch.equal(found[parts[1]], scale) and (own != new).double().mean() < 2e-3, name


def test_a_merge_with_adapters_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "UNIT_BYTES", 1000)
    monkeypatch.setattr(accounts, "SYNC_BYTES", 1)  # every unit
    base = tensors(0)
    write_checkpoint(tmp_path / "base", base)
    write_dora(tmp_path / "dora", base, 3, (300, 4, 17))
    write_adapter(tmp_path / "lora", factors(5))
    terms = (Term(0.5, Vector(str(tmp_path / "dora"))), Term(-0.25, Vector(str(tmp_path / "lora"))))
    point = WeightPoint(str(tmp_path / "base"), terms)

    def run(out: str) -> None:
        plan, sources = planned({tmp_path / out: point})
        merge(plan, sources, defaultdict(str), WorkerSettings(2, alone=True), key=b"key")

    real, done = MergeWorker.run, []

    def until_full(self, unit, claims):
        if len(done) == 30:
            raise Failed(f"{unit.file}: cannot be written (No space left on device)")
        done.append(unit)
        return real(self, unit, claims)

    run("right")
    with monkeypatch.context() as patch:
        patch.setattr(MergeWorker, "run", until_full)
        with pytest.raises(Failed, match="No space left"):
            run("out")
    again: list = []
    monkeypatch.setattr(MergeWorker, "run", lambda *given: again.append(real(*given)) or again[-1])
    run("out")
    assert sum(not one.bytes_written for one in again) > 10
    ours, right = (hashlib.sha256((tmp_path / out / "model.safetensors").read_bytes()) for out in ("out", "right"))
    assert ours.hexdigest() == right.hexdigest()
