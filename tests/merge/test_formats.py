"""What checkpoints are made of: fp8, other dtypes side by side, padded vocabularies, names that nobody has heard of.

Each merge against whole tensors computed in fp64 and rounded once, and then against itself cut otherwise.
"""

import json
from collections import defaultdict
from dataclasses import replace
from functools import partial

import pytest
import torch
import whole_tensors
from checkpoints import load_checkpoint, near, tensors, write_checkpoint
from fp8 import BLOCK, digests, quantized, weights_of, write_fp8, write_mixed
from points import read_point, shifted

from rvdist.core.config import OutputFormat
from rvdist.core.errors import BadInput
from rvdist.core.method import MethodSpec
from rvdist.core.point import Term, Vector, WeightPoint
from rvdist.merge import plan as planning
from rvdist.merge.actor import WorkerSettings
from rvdist.merge.driver import merge
from rvdist.merge.plan import build_plan
from rvdist.weights import compat
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.lanes import HostLane
from rvdist.weights.reader import PointReader


def opened(point):
    return {source: open_source(source, rename) for source, rename in point.renames()}


def write(points, workers=1, dtype=None, extra_rows=False):
    """The command's merge of a point for each directory, without its notes."""
    sources = {}
    for point in points.values():
        sources |= opened(point)
        compat.check(point, sources, extra_rows=extra_rows)
    plan = build_plan(points, sources, OutputFormat(dtype))
    stats = merge(plan, sources, defaultdict(lambda: "card\n"), WorkerSettings(workers))
    return plan, stats


def exact(paths, name, dtype, alpha=0.7):
    target, plus, minus = (weights_of(paths[k])[name].double() for k in ("target", "plus", "minus"))
    return (target + alpha * (plus - minus)).to(dtype)


@pytest.fixture
def mixed_fp8(tmp_path):
    return partial(write_mixed, tmp_path)


IN_FP8 = [("target", "plus", "minus"), ("target",), ("plus", "minus"), ("minus",)]


@pytest.fixture(scope="module")
def plain(ray_local, tmp_path_factory):
    """Families of which these are in fp8, and below them what one merge makes of each, and another one of its cuts."""
    place = tmp_path_factory.mktemp("plain")
    families = {in_fp8: write_mixed(place / "+".join(in_fp8), *in_fp8) for in_fp8 in IN_FP8}
    points = {in_fp8: shifted(paths, 0.6) for in_fp8, paths in families.items()}
    plan, stats = write({place / "+".join(k) / "out": point for k, point in points.items()}, dtype="BF16")
    assert stats.bytes_read == plan.bytes_read == sum(
        spec.nbytes for point in points.values() for source in opened(point).values() for spec in (
            *source.tensors.values(), *getattr(source, "scales", {}).values()
        )
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "UNIT_BYTES", 1000)
        write({place / "+".join(k) / "cut": point for k, point in points.items()}, workers=2, dtype="BF16")
    return families


@pytest.mark.parametrize("in_fp8", IN_FP8)
def test_fp8_is_merged_into_a_plain_checkpoint(plain, in_fp8):
    paths = plain[in_fp8]
    place = paths["target"].parent
    out, off, total = load_checkpoint(place / "out"), 0, 0
    assert out.keys() == tensors(0).keys()
    for name, tensor in out.items():
        target, plus, minus = (weights_of(path)[name].float() for path in paths.values())
        assert torch.equal(tensor, (target + 0.6 * (plus - minus)).bfloat16()), name
        off += int((tensor != exact(paths, name, torch.bfloat16, 0.6)).sum())
        total += tensor.numel()
    assert off <= total / 1000, "a scaled value has 24 bits, of which fp32 rounds some away"
    assert "quant" not in (place / "out/config.json").read_text()
    assert digests(place / "cut") == digests(place / "out")


@pytest.mark.parametrize("method", [MethodSpec(), MethodSpec("ties", 0.4), MethodSpec("dare", 0.4, 3)])
def test_fp8_is_read_the_same_however_it_is_cut(mixed_fp8, method):
    point = replace(shifted(mixed_fp8("target", "plus"), 0.7, -0.2), method=method)

    def read(chunk):
        reader = PointReader([point], opened(point), torch.float32, lanes=[HostLane(chunk)])
        for name, spec in reader.base.tensors.items():
            yield torch.cat([tensor.clone() for _, (tensor,) in reader.chunks(name, 0, spec.numel)])

    assert all(torch.equal(one, other) for one, other in zip(read(1 << 17), read(313), strict=True))


@pytest.mark.usefixtures("ray_local")
def test_an_fp8_target_in_float32_is_correctly_rounded(mixed_fp8, tmp_path):
    paths = mixed_fp8("target", "plus", "minus")
    write({tmp_path / "out": shifted(paths)}, dtype="F32")
    for name, tensor in load_checkpoint(tmp_path / "out").items():
        assert torch.equal(tensor, exact(paths, name, torch.float32)), name


def test_another_block_size_is_another_plan(mixed_fp8, tmp_path):
    point = shifted(mixed_fp8("plus"))
    before = build_plan({tmp_path / "out": point}, opened(point)).digests
    config = tmp_path / "plus/config.json"
    config.write_text(config.read_text().replace("[32, 20]", "[32, 23]"))  # 3 columns of blocks, as before
    assert build_plan({tmp_path / "out": point}, opened(point)).digests != before


def strange(seed):
    """Every dtype, and tensors with no element or no dimension, under names that nobody has heard of."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape, dtype):
        return torch.randn(shape, generator=generator).mul(0.02).to(dtype)

    return {
        "ζ/0/кристалл": normal((131, 7), torch.bfloat16),
        "router!": normal((64, 40), torch.float32),
        "Norm": normal((40,), torch.float32),
        "half": normal((33, 9), torch.float16),
        "wide": normal((17,), torch.float64),
        "steps": torch.randint(-9, 9, (6, 2), generator=generator),
        "bytes": torch.randint(0, 255, (11,), generator=generator).to(torch.uint8),
        "alive": torch.rand(13, generator=generator) > 0.5,
        "scalar": normal((), torch.bfloat16),
        "empty": torch.empty(0, 5, dtype=torch.bfloat16),
        "nothing": torch.empty(3, 0),
    }


def moved(weights, seed, dtypes=()):
    """A sibling: every number is another one, in other dtypes where these say so."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            tensor = tensor.double() + 0.004 * torch.randn(tensor.shape, generator=generator)
            found[name] = tensor.to(dict(dtypes).get(name, weights[name].dtype))
        else:
            found[name] = ~tensor if tensor.dtype == torch.bool else tensor + 1
    return found


@pytest.mark.usefixtures("ray_local")
def test_dtypes_side_by_side_and_names_that_nobody_has_heard_of(tmp_path, monkeypatch):
    base = strange(0)
    other = {"ζ/0/кристалл": torch.float16, "Norm": torch.bfloat16, "scalar": torch.float32, "wide": torch.float16}
    family = {"target": base, "plus": moved(base, 1, other), "minus": moved(base, 2)}
    config = {"model_type": "chandelier", "arms": 7}
    paths = {name: write_checkpoint(tmp_path / name, weights, 2, config) for name, weights in family.items()}
    write({tmp_path / "out": shifted(paths)})
    monkeypatch.setattr(planning, "UNIT_BYTES", 300)
    write({tmp_path / "cut": shifted(paths)}, workers=2)
    assert digests(tmp_path / "out") == digests(tmp_path / "cut")
    out = load_checkpoint(tmp_path / "out")
    assert out.keys() == base.keys()
    for name, tensor in base.items():
        assert out[name].dtype == tensor.dtype and out[name].shape == tensor.shape
        wanted = exact(paths, name, tensor.dtype) if tensor.is_floating_point() else tensor
        assert torch.equal(out[name], wanted), name
    notes = compat.check(shifted(paths), opened(shifted(paths))).exceptions
    assert {note.split()[1] for note in notes if "not floating-point" in note} == {"steps", "bytes", "alive"}


def test_a_donor_of_integers_where_the_target_has_numbers(tmp_path):
    base = tensors(0)
    paths = {name: write_checkpoint(tmp_path / name, near(base, k)) for k, name in enumerate(("target", "minus"))}
    paths["plus"] = write_checkpoint(tmp_path / "plus", base | {"model.norm.weight": torch.ones(48).int()})
    with pytest.raises(BadInput, match="plus: tensor model.norm.weight is stored as I32, and in the target it is BF16"):
        compat.check(shifted(paths), opened(shifted(paths)))


def rows(weights, count):
    """The same with so many rows in its vocabulary: cut, or padded with what must not matter."""
    table = weights["model.embed_tokens.weight"]
    padding = torch.full((max(0, count - len(table)), table.shape[1]), 3.0, dtype=table.dtype)
    return weights | {"model.embed_tokens.weight": torch.cat([table[:count], padding])}


@pytest.mark.parametrize("method", [MethodSpec(), MethodSpec("ties", 0.4), MethodSpec("dare", 0.4, 3)])
@pytest.mark.parametrize(
    ("target", "plus", "minus"), [(320, 301, 301), (301, 320, 320), (310, 320, 301), (310, 301, 320), (301, 320, 310)]
)
def test_rows_that_all_have_get_the_vector(tmp_path, method, target, plus, minus):
    base = tensors(0)
    paths = {
        "target": write_checkpoint(tmp_path / "target", rows(base, target)),
        "plus": write_checkpoint(tmp_path / "plus", rows(near(base, 1), plus)),
        "minus": write_checkpoint(tmp_path / "minus", rows(near(base, 2), minus)),
    }
    point = replace(shifted(paths), method=method)
    sources = opened(point)
    with pytest.raises(BadInput, match="has shape .* weight arithmetic needs equal shapes; compat.extra_rows=keep"):
        compat.check(point, sources)
    report = compat.check(point, sources, extra_rows=True)
    common = min(target, plus, minus)
    assert report.exceptions == (
        f"tensor model.embed_tokens.weight: its first {common} rows get the vector "
        f"(the target has {target}, plus has {plus}, minus has {minus})",
    )
    assert report.distances[point.terms[0].vector] < 0.5, "sampled at the same rows"

    table, (p, m) = rows(base, target)["model.embed_tokens.weight"], (near(base, k) for k in (1, 2))
    p, m = (
        torch.zeros_like(table).index_copy(0, torch.arange(common), w["model.embed_tokens.weight"][:common])
        for w in (p, m)
    )
    flat = [tensor.view(-1) for tensor in (table, p, m)]
    if method.name == "ties":
        wanted = whole_tensors.ties(flat[0], [(0.7, *flat[1:])], method.density)
    else:
        wanted = whole_tensors.dare(
            flat[0], [(0.7, *flat[1:])], method.density, method.seed, "model.embed_tokens.weight"
        )
    found = dict(read_point(point))["model.embed_tokens.weight"]
    assert torch.equal(found, wanted.view(table.shape))
    assert torch.equal(found[common:], table[common:])
    reader = PointReader([point], sources, lanes=[HostLane(577)])
    cut = [tensor.clone() for _, (tensor,) in reader.chunks("model.embed_tokens.weight", 0, table.numel())]
    assert torch.equal(torch.cat(cut), wanted)
    if method.name != "ties":  # which reads a tensor more than once
        plan = build_plan({tmp_path / "out": point}, sources)
        others = sum(spec.nbytes for spec in sources[point.base].tensors.values()) - table.nbytes
        assert plan.bytes_read == 3 * others + table.nbytes + 2 * common * 48 * 2
        assert reader.bytes_read == table.nbytes + 2 * common * 48 * 2


@pytest.mark.usefixtures("ray_local")
def test_padded_rows_through_a_merge(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "UNIT_BYTES", 1000)
    base = tensors(0)
    paths = {
        name: write_checkpoint(tmp_path / name, rows(weights, count))
        for name, weights, count in (("target", base, 320), ("plus", near(base, 1), 310), ("minus", near(base, 2), 304))
    }
    plan, stats = write({tmp_path / "out": shifted(paths)}, workers=2, extra_rows=True)
    assert stats.bytes_read == plan.bytes_read
    for name, tensor in load_checkpoint(tmp_path / "out").items():
        target, plus, minus = (load_checkpoint(path)[name] for path in paths.values())
        n = min(len(t) if t.shape else 1 for t in (plus, minus))
        wanted = target.clone().view(target.shape or (1,))
        change = (
            (plus.double() - minus.double()) if plus.shape == minus.shape else plus[:n].double() - minus[:n].double()
        )
        wanted[:n] = (wanted[:n].double() + 0.7 * change.view(wanted[:n].shape)).bfloat16()
        assert torch.equal(tensor, wanted.view(tensor.shape)), name


def experts(prefix="model."):
    """A mixture of experts: single matrices, a stack of them, and a router in fp32."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(shape, generator=generator).mul(0.02).bfloat16()

    weights = {f"{prefix}embed_tokens.weight": normal(40, 16), "lm_head.weight": normal(40, 16)}
    for layer in range(2):
        at = f"{prefix}layers.{layer}"
        weights[f"{at}.self_attn.q_norm.weight"] = normal(16)
        weights[f"{at}.mlp.gate.weight"] = normal(4, 16).float()
        weights[f"{at}.mlp.experts.stacked.gate_up_proj"] = normal(4, 16, 24)
        for expert in range(4):
            weights[f"{at}.mlp.experts.{expert}.down_proj.weight"] = normal(16, 12)
    return weights


def test_a_mixture_of_experts(tmp_path):
    base = experts()
    family = {"target": base, "plus": near(base, 1), "minus": near(base, 2)}
    config = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}
    paths = {name: write_checkpoint(tmp_path / name, weights, 3, config) for name, weights in family.items()}
    assert compat.check(shifted(paths), opened(shifted(paths))).exceptions == ()
    for name, tensor in read_point(shifted(paths)):
        assert torch.equal(tensor, exact(paths, name, base[name].dtype)), name
    config = json.loads((paths["plus"] / "config.json").read_text()) | {"num_experts_per_tok": 8}
    (paths["plus"] / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="num_experts_per_tok=8 where the target has 2"):
        compat.check(shifted(paths), opened(shifted(paths)))


RENAME = ((r"^model\.", "model.language_model."), (r"^lm_head\.(.*)", r"model.language_model.head.\1"))


def text_and_image_models(tmp_path, in_fp8=False):
    """Text donors, and a target that has their tower under another prefix beside one for images."""
    text = experts()
    tower = {"model.language_model." + k.removeprefix("model.").replace("lm_", ""): v for k, v in near(text, 3).items()}
    target = tower | {"model.visual.blocks.0.w": torch.randn(9, 3), "model.language_model.only": torch.ones(2)}
    paths = {"target": write_checkpoint(tmp_path / "target", target, 2)}
    for name, seed in (("plus", 1), ("minus", 2)):
        weights = near(text, seed)
        if in_fp8:
            paths[name] = write_fp8(tmp_path / name, quantized(weights, BLOCK), BLOCK)
        else:
            paths[name] = write_checkpoint(tmp_path / name, weights)
    return paths


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("in_fp8", [False, True])
def test_a_vector_of_a_text_model_for_the_tower_of_another(tmp_path, in_fp8):
    paths = text_and_image_models(tmp_path, in_fp8)
    with pytest.raises(BadInput, match="no tensor in common"):
        compat.check(shifted(paths), opened(shifted(paths)))
    vector = Vector(str(paths["plus"]), str(paths["minus"]), RENAME)
    point = WeightPoint(str(paths["target"]), (Term(0.6, vector),))
    report = compat.check(point, opened(point))
    assert "were renamed: ^model\\. → model.language_model., then" in report.exceptions[0]
    assert "lacks 2 of the target's tensors" in report.exceptions[1] and report.distances[vector] < 0.5
    write({tmp_path / "out": point})
    found, base = load_checkpoint(tmp_path / "out"), load_checkpoint(paths["target"])
    plus, minus = (weights_of(paths[name]) for name in ("plus", "minus"))
    assert found.keys() == base.keys()
    for old in plus:
        new = "model.language_model." + old.removeprefix("model.").replace("lm_", "")
        work = torch.float64 if base[new].dtype == torch.float32 else torch.float32
        wanted = base[new].to(work) + 0.6 * (plus[old].to(work) - minus[old].to(work))
        assert torch.equal(found.pop(new), wanted.to(base[new].dtype)), new
    assert all(torch.equal(tensor, base[name]) for name, tensor in found.items()) and len(found) == 2

    again = WeightPoint.from_json(json.loads(json.dumps(point.to_json())))
    assert again == point and again.relocate({s: f"/x{s}" for s in point.sources()}).terms[0].vector.rename == RENAME
    contents = dict.fromkeys(point.sources(), "c")
    assert point.digest(contents) != shifted(paths, 0.6).digest(contents)


def test_two_tensors_of_one_name(tmp_path):
    path = write_checkpoint(tmp_path / "m", experts())
    with pytest.raises(BadInput, match=r"m: vector.rename gives the name model.layers.N.* to both"):
        open_source(str(path), [(r"layers\.\d", "layers.N")])


def test_a_vector_of_a_part_of_thousands_of_tensors(tmp_path):
    """The language tower of a multimodal model; donors that also have what it lacks."""
    generator = torch.Generator().manual_seed(6)
    tower = {
        f"language.blocks.{k}.w{j}": torch.randn(4, 3, generator=generator).bfloat16()
        for k in range(500)
        for j in range(4)
    }
    vision = {f"visual.blocks.{k}.w": torch.randn(3, generator=generator).bfloat16() for k in range(1500)}
    paths = {
        "target": write_checkpoint(tmp_path / "target", tower | vision),
        "plus": write_checkpoint(tmp_path / "plus", near(tower, 1) | {"value_head": torch.ones(2)}, 7),
        "minus": write_checkpoint(tmp_path / "minus", near(tower, 2) | {"value_head": torch.ones(2)}),
    }
    point = shifted(paths)
    lacks, skipped, applied = compat.check(point, opened(point)).exceptions
    assert lacks.startswith(
        "the vector lacks 1500 of the target's tensors, which stay as they are: visual.blocks.0.w, "
    )
    assert skipped == "1 of the vector's tensors are not in the target and were skipped: value_head"
    assert applied.startswith("of the vector ") and "of its size ‖v‖ by a sample" in applied
    found = dict(read_point(point))
    assert all(torch.equal(found[name], tensor) for name, tensor in vision.items())
    target, plus, minus = (load_checkpoint(path) for path in paths.values())
    for name in tower:
        change = 0.7 * (plus[name].double() - minus[name].double())
        assert torch.equal(found[name], (target[name].double() + change).bfloat16()), name
