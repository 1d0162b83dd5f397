"""A vector in any layout of experts applies to a target in any other: the same bytes as in the target's own layout."""

from __future__ import annotations

from contextlib import closing
from itertools import product
from pathlib import Path

import pytest
import torch
from adapters import RANK, write_adapter
from checkpoints import launch, load_checkpoint, near, write_checkpoint
from mixtures import BIASED, CALLED, PLAIN, E, Weights, canonical, stored

from rvdist.core.config import Config, Saved
from rvdist.core.config.points import Storage
from rvdist.core.errors import BadInput
from rvdist.core.point import Mask, Term, Vector, WeightPoint
from rvdist.core.timing import Timing
from rvdist.stages.job import Job
from rvdist.stages.prepare import Known, _Index
from rvdist.weights import compat
from rvdist.weights.checkpoint.layouts import Relaid, lay_out
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.operand import open_operand
from rvdist.weights.reader import open_point


def computed(point: WeightPoint, size: int) -> Weights:
    reader, out = open_point(point), {}
    for name, spec in reader.base.tensors.items():
        out[name] = torch.empty(spec.numel, dtype=torch.bfloat16)
        for begin in range(0, spec.numel, size):
            reader.fill(name, begin, out[name][begin : begin + size])
    return out


def opened_and_checked(point: WeightPoint) -> compat.Compatibility:
    base = open_source(point.base)
    return compat.check(point, {name: lay_out(open_source(name), base) for name in point.sources()})


@pytest.mark.parametrize(
    ("donors", "target", "biased"),
    [(*pair, False) for pair in product(PLAIN, repeat=2)] + [(*pair, True) for pair in product(BIASED, repeat=2)],
)
def test_all_pairs_are_the_merge_in_one_layout(tmp_path: Path, donors: str, target: str, biased: bool) -> None:
    base = canonical(0, biased)
    plus, minus = near(base, 1), near(base, 2)
    named = {"model_type": "gpt_oss" if biased else "mixtral"}
    own = write_checkpoint(tmp_path / "target", stored(base, target), config=named)
    points = {}
    for layout in {donors, target}:
        paths = [
            str(write_checkpoint(tmp_path / f"{role}-{layout}", stored(weights, layout), shards=2, config=named))
            for role, weights in (("plus", plus), ("minus", minus))
        ]
        points[layout] = WeightPoint(str(own), (Term(0.5, Vector(*paths)),))
    base_source = open_source(str(own))
    sources = {source: lay_out(open_source(source), base_source) for source in points[donors].sources()}
    compat.check(points[donors], sources)
    assert isinstance(sources[points[donors].terms[0].vector.plus], Relaid) == (donors != target)
    with closing(open_operand(plus_source := sources[points[donors].terms[0].vector.plus])) as operand:
        for name, spec in plus_source.tensors.items():
            operand.read(name, 0, spec.numel, torch.empty(8 * spec.numel, dtype=torch.uint8))
    if isinstance(plus_source, Relaid):
        promised = sum(nbytes for name in plus_source.tensors for _, nbytes in plus_source.reads(name))
        assert operand.bytes_read == promised or (donors == "interleaved" and operand.bytes_read < promised)  # at once
    wanted = computed(points[target], 1 << 20)
    assert any(not torch.equal(wanted[name], tensor.view(-1)) for name, tensor in stored(base, target).items())
    for size in (1 << 20, 13):
        got = computed(points[donors], size)
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(("masked", "sizes"), [("down_proj", (14, 7)), ("gate_up_proj", (7, 7))])
def test_matrices_that_another_tensor_shows_to_be_transposed_are_refused(
    tmp_path: Path, masked: str, sizes: tuple[int, int]
) -> None:
    """As Qwen3-VL's are to Qwen3's: of some sizes one of the two tensors has the same shape either way."""
    base = canonical(0, False, *sizes)
    across = {
        name: tensor.transpose(1, 2).contiguous() if tensor.dim() == 3 else tensor
        for name, tensor in stored(base, "fused").items()
    }
    own = str(write_checkpoint(tmp_path / "target", across))
    paths = [str(write_checkpoint(tmp_path / name, stored(near(base, k), "fused"))) for k, name in enumerate("pm")]
    for mask in (Mask(), Mask(exclude=(f".*{masked}",))):
        with pytest.raises(BadInput, match=f"p: has the matrices of .*{masked} transposed to those of .*target"):
            opened_and_checked(WeightPoint(own, (Term(0.5, Vector(*paths), mask),)))


def test_a_vector_of_donors_in_two_layouts_is_stored_in_that_of_the_first(tmp_path: Path) -> None:
    base = canonical(0, False)
    minus = near(base, 2)
    for name, weights, layout in (("plus", near(base, 1), "fused"), ("minus", minus, "w1"), ("same", minus, "fused")):
        write_checkpoint(tmp_path / name, stored(weights, layout))
    for name, save in (("minus", "one"), ("same", "other")):
        told = ["vector.plus=plus", f"vector.minus={name}", f"vector.save={save}"]
        done = launch(*told, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    one, other = (load_checkpoint(tmp_path / save) for save in ("one", "other"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_gate_and_up_that_may_lie_either_way_are_not_guessed(tmp_path: Path) -> None:
    """Transposed and with biases as gpt-oss's, of a model that does not say it is one: halves look alike."""
    weights = canonical(0, True)
    base = open_source(str(write_checkpoint(tmp_path / "one", stored(weights, "gate_proj"))))
    for model_type, mapped in (("gpt_oss", True), ("another", False)):
        path = write_checkpoint(
            tmp_path / model_type, stored(weights, "interleaved"), config={"model_type": model_type}
        )
        assert isinstance(lay_out(open_source(str(path)), base), Relaid) == mapped


@pytest.mark.heavy
def test_targets_of_two_layouts_share_donors(tmp_path: Path) -> None:
    """Two jobs, which are one plan where nothing keeps them apart: each target gets its vector, in its layout."""
    base = canonical(0, False)
    plus, minus = near(base, 1), near(base, 2)
    for name, weights in (("plus", plus), ("minus", minus)):
        write_checkpoint(tmp_path / name, stored(weights, "gate_proj"))
    for layout in PLAIN:
        write_checkpoint(tmp_path / "targets" / layout, stored(base, layout))
    done = launch(
        "target=targets/*", "vector.plus=plus", "vector.minus=minus", "alpha=0.5", "output=out/{target}", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    merged = {
        name: (tensor.float() + 0.5 * (plus[name].float() - minus[name].float())).bfloat16()
        for name, tensor in base.items()
    }
    for layout in PLAIN:
        found, wanted = load_checkpoint(tmp_path / "out" / layout), stored(merged, layout)
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted), layout


def test_a_donor_that_two_targets_want_laid_out_otherwise_is_refused(tmp_path: Path) -> None:
    base = canonical(0, False)
    paths = {layout: str(write_checkpoint(tmp_path / layout, stored(base, layout))) for layout in PLAIN}
    donors = [str(write_checkpoint(tmp_path / name, stored(near(base, 1), "gate_proj"))) for name in ("plus", "minus")]
    points = [WeightPoint(paths[layout], (Term(0.5, Vector(*donors)),)) for layout in PLAIN]
    own = WeightPoint(paths["fused"], (Term(0.5, Vector(donors[0], paths["gate_proj"])),))
    for asked in (points, points[::-1], [points[0], own], [own, points[0]]):
        job = Job(Config(target=asked[0].base, stages=["merge"], output="out"), None, "", Timing())
        with pytest.raises(BadInput, match="another layout"):
            _Index(job, job.settings, Known()).add(asked)


def test_an_adapter_of_square_experts_that_two_targets_want_otherwise_is_refused(tmp_path: Path) -> None:
    """What the first target decides of it is not what the second is compared with."""
    count, size, name = 3, 16, "model.layers.0.mlp.experts.down_proj"
    for kind in ("mixtral", "gpt_oss"):
        own = {name: torch.ones(count, size, size), "model.norm.weight": torch.ones(size)}
        write_checkpoint(tmp_path / kind, own, config={"model_type": kind})
    at = "base_model.model.model.layers.0.mlp.experts.lora_{}.weight"
    pair = {at.format("A"): torch.ones(count * RANK, size), at.format("B"): torch.ones(size, count * RANK)}
    adapter = str(write_adapter(tmp_path / "adapter", pair, target_parameters=["experts.down_proj"]))
    points = [WeightPoint(str(tmp_path / kind), (Term(0.5, Vector(adapter)),)) for kind in ("mixtral", "gpt_oss")]
    for asked in (points, points[::-1]):
        job = Job(Config(target=asked[0].base, stages=["merge"], output="out"), None, "", Timing())
        with pytest.raises(BadInput, match="in another layout"):
            _Index(job, job.settings, Known()).add(asked)


def test_a_vector_is_not_stored_in_the_layout_of_a_target_beside(tmp_path: Path) -> None:
    base = canonical(0, False)
    target = str(write_checkpoint(tmp_path / "target", stored(base, "fused")))
    donors = [str(write_checkpoint(tmp_path / name, stored(near(base, 1), "gate_proj"))) for name in ("plus", "minus")]
    job = Job(Config(target=target, stages=["merge"], output="out"), None, "", Timing())
    index = _Index(job, job.settings, Known())
    index.add_vector(Saved(Vector(*donors), tmp_path / "v", Storage()), [])
    with pytest.raises(BadInput, match="another layout"):
        index.add([WeightPoint(target, (Term(0.5, Vector(*donors)),))])


@pytest.mark.parametrize(
    ("donors", "target", "said"),
    [
        ("gate_proj", "fused", Mask(exclude=(r".*experts\.1\..*",))),
        ("gate_proj", "fused", Mask(include=(r".*gate_proj.*", r".*down_proj"))),
        ("fused", "gate_proj", Mask(exclude=(r".*\.down_proj",))),
        ("gate_proj", "w1", Mask(exclude=(r".*\.mlp\.experts\..*",))),
        ("w1", "fused", Mask(exclude=(r"model\.layers\.0\.block_sparse_moe\.gate\.weight",))),
    ],
)
def test_a_mask_by_the_donors_names_is_refused(tmp_path: Path, donors: str, target: str, said: Mask) -> None:
    """It would mask nothing out, or all, and nobody would know."""
    base = canonical(0, False)
    paths = [str(write_checkpoint(tmp_path / name, stored(near(base, k), donors))) for k, name in enumerate("pm")]
    own = str(write_checkpoint(tmp_path / "target", stored(base, target)))
    with pytest.raises(BadInput, match=r"mask\.(in|ex)clude: .* matches .* of .*/p, and not .* of .*/target"):
        opened_and_checked(WeightPoint(own, (Term(0.5, Vector(*paths), said),)))
    beside = str(write_checkpoint(tmp_path / "beside", stored(base, donors)))
    opened_and_checked(WeightPoint(beside, (Term(0.5, Vector(*paths), said),)))


@pytest.mark.parametrize(
    "mask",
    [
        Mask(exclude=(r".*experts\.1\..*",)),
        Mask(include=(r".*\.w2\..*",)),
        Mask(layers=((0, 0),)),
        Mask(exclude=(r".*gate\.weight",), depth=(0.5,)),
    ],
)
def test_a_mask_by_the_targets_names_is_that_in_one_layout(tmp_path: Path, mask: Mask) -> None:
    base = canonical(0, False)
    own = str(write_checkpoint(tmp_path / "target", stored(base, "w1")))
    merged = []
    for layout in ("w1", "fused", "gate_proj"):
        paths = [
            str(write_checkpoint(tmp_path / f"{name}-{layout}", stored(near(base, k), layout)))
            for k, name in enumerate("pm")
        ]
        point = WeightPoint(own, (Term(0.5, Vector(*paths), mask),))
        assert not any("mask." in note for note in opened_and_checked(point).exceptions)
        merged.append(computed(point, 1 << 20))
    for other in merged[1:]:
        assert all(torch.equal(merged[0][name], tensor) for name, tensor in other.items())
    changed = [name for name, tensor in stored(base, "w1").items() if not torch.equal(merged[0][name], tensor.view(-1))]
    assert changed and (mask.layers or len(changed) < len(base) * 3)


def test_a_mask_that_matches_nothing_is_told_of(tmp_path: Path) -> None:
    base = canonical(0, False)
    paths = [str(write_checkpoint(tmp_path / name, stored(near(base, k), "w1"))) for k, name in enumerate("pmt")]
    point = WeightPoint(paths[2], (Term(0.5, Vector(*paths[:2]), Mask(exclude=(r".*experts\.9\..*", ".*w2.*"))),))
    notes = opened_and_checked(point).exceptions
    assert [note for note in notes if "mask" in note] == [r"mask.exclude: '.*experts\\.9\\..*' matches no tensor of t"]


@pytest.mark.parametrize(
    ("called", "elsewhere"),
    [
        ({"mlp.gate.weight": "mlp.router.weight"}, "PhiMoE in memory, gpt-oss"),
        ({"mlp.gate.weight": "mlp.router.layer.weight"}, "Granite-MoE as it is published"),
        ({"mlp.gate.e_score_correction_bias": "mlp.e_score_correction_bias"}, "MiniMax-M2 as it is published"),
    ],
)
@pytest.mark.parametrize(("donors", "target"), [("fused", "gate_proj"), ("fused", "w1"), ("w1", "fused")])
def test_a_router_is_found_under_its_other_names(
    tmp_path: Path, called: dict[str, str], elsewhere: str, donors: str, target: str
) -> None:
    """No tensor is left out where the experts map."""

    def put(name: str, weights: Weights, layout: str, own: dict[str, str]) -> str:
        found = stored(weights, layout)
        block = next(name for name in found if name.endswith(".gate.weight")).removesuffix("gate.weight")
        found[f"{block}gate.e_score_correction_bias"] = weights["router"][:, 0].float().contiguous()
        names = {block + ours[4:]: block + theirs[4:] for ours, theirs in own.items()}
        return str(write_checkpoint(tmp_path / name, {names.get(n, n): tensor for n, tensor in found.items()}))

    base = canonical(0, False)
    own = put("target", base, target, {})
    merged = []
    for layout, names in ((target, {}), (donors, called)):
        paths = [put(f"{name}-{layout}", near(base, k), layout, names) for k, name in enumerate("pm")]
        point = WeightPoint(own, (Term(0.5, Vector(*paths)),))
        assert not any("skipped" in note or "stay as" in note for note in opened_and_checked(point).exceptions)
        merged.append(computed(point, 1 << 20))
    assert all(torch.equal(merged[0][name], tensor) for name, tensor in merged[1].items())
    assert merged[0].keys() == merged[1].keys()


def others(experts: str) -> Weights:
    """The experts of a layer as others store them, under names and in shapes of their own."""
    weights = canonical(0, False)
    gate, up, down = weights["gate"], weights["up"], weights["down"]
    both, at = torch.cat([gate, up], 1), "model.layers.0"
    single = {f"experts.{k}.{part}_proj.weight": weights[part][k] for part in CALLED["w1"] for k in range(E)}
    stacks = {f"experts.mlp.{n}": t.reshape(-1, 10) for n, t in (("w1", gate), ("v1", up), ("w2", down.mT))}
    singles = {
        f"experts.mlp.{k}.{n}.weight": t[k] for k in range(E) for n, t in (("w1", gate), ("v1", up), ("w2", down))
    }
    block, of = {
        "Llama 4": ("feed_forward", {"experts.gate_up_proj": both.mT, "experts.down_proj": down.mT}),
        "Llama 4, one by one": ("feed_forward", single),
        "DBRX": ("ffn", stacks),
        "DBRX, one by one": ("ffn", singles),
        "a tensor a projection": ("mlp", {f"experts.{part}_proj": weights[part] for part in CALLED["w1"]}),
        "fused": ("mlp", {"experts.gate_up_proj": both, "experts.down_proj": down}),
        "fused modules": ("mlp", {"experts.gate_up_proj.weight": both, "experts.down_proj.weight": down}),
        "one by one": ("mlp", single),
        "Nemotron-H": ("mlp", {name: tensor for name, tensor in single.items() if "gate" not in name}),
        "Nemotron-H, fused": ("mlp", {f"experts.{part}_proj": weights[part] for part in ("up", "down")}),
        "w13": ("mlp", {"experts.w13_weight": both, "experts.w2_weight": down}),
        "Aria": ("mlp", {"experts.fc1.weight": both.mT, "experts.fc2.weight": down.mT}),
    }[experts]  # fmt: skip
    return {f"{at}.{block}.{name}": tensor.contiguous() for name, tensor in of.items()} | {
        f"{at}.{block}.gate.weight": weights["router"],
        "model.embed_tokens.weight": canonical(1, False, 100, 70)["gate"].view(-1, 100),  # nearly all of the vector
    }


@pytest.mark.parametrize(
    ("donors", "target"),
    [
        ("Llama 4", "Llama 4, one by one"), ("Llama 4, one by one", "Llama 4"),
        ("DBRX", "DBRX, one by one"), ("DBRX, one by one", "DBRX"),
        ("a tensor a projection", "fused"), ("fused", "a tensor a projection"), ("a tensor a projection", "one by one"),
        ("fused modules", "fused"), ("fused", "fused modules"), ("Nemotron-H, fused", "Nemotron-H"),
        ("Nemotron-H", "Nemotron-H, fused"), ("w13", "fused"), ("one by one", "w13"), ("Aria", "fused"),
    ],
)  # fmt: skip
def test_a_layout_that_does_not_map_is_refused_by_a_tensor_of_each(tmp_path: Path, donors: str, target: str) -> None:
    """However little of the vector the experts are."""
    paths = [
        str(write_checkpoint(tmp_path / name, near(others(experts), k)))
        for k, (name, experts) in enumerate((("plus", donors), ("minus", donors), ("target", target)))
    ]
    with pytest.raises(
        BadInput, match=r"stores its experts .*\(model\..*\) where .* stores them .*\(model\..*\); conv"
    ):
        opened_and_checked(WeightPoint(paths[2], (Term(0.5, Vector(*paths[:2])),)))
    same = str(write_checkpoint(tmp_path / "same", near(others(donors), 3)))
    opened_and_checked(WeightPoint(same, (Term(0.5, Vector(*paths[:2])),)))


@pytest.mark.heavy
def test_analyze_finds_the_same_in_every_layout(tmp_path: Path) -> None:
    """Norms, spectra, cosines and whether donors and target are near, of two vectors: those in the target's layout."""
    base = canonical(0, False)
    write_checkpoint(tmp_path / "target", stored(base, "gate_proj"))
    for layout, (k, name) in product(PLAIN, enumerate(("plus", "minus", "other"), 1)):
        write_checkpoint(tmp_path / layout / name, stored(near(base, k), layout))
    found = []
    for plus, minus in (("gate_proj", "gate_proj"), ("fused", "w1"), ("w1", "fused"), ("w1", "w1")):
        vectors = f"[{{plus: {plus}/plus, minus: {minus}/minus}}, {{plus: {minus}/other, minus: {plus}/minus}}]"
        run = tmp_path / f"{plus}-{minus}"
        done = launch(
            "target=target", f"vectors={vectors}", "stages=[analyze]", f"hydra.run.dir={run}", cwd=tmp_path
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append(((run / "anatomy.csv").read_text(), (run / "anatomy.json").read_text()))
    assert "experts" in found[0][1] and all(other == found[0] for other in found[1:])
