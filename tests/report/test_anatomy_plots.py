"""Pictures, tables and CSV of real findings, of tiny checkpoints."""

import csv
import io

import numpy as np
import pytest
import torch
from checkpoints import POCKET, near, write_checkpoint
from PIL import Image
from threadpoolctl import threadpool_limits

from rvdist.core import config
from rvdist.core.point import Vector
from rvdist.report.anatomy import anatomy_csv, anatomy_sentences, anatomy_tables
from rvdist.report.pictures.anatomy import anatomy_plots
from rvdist.report.pictures.connectivity import connectivity_plot
from rvdist.weights.anatomy.analyze import analyze
from rvdist.weights.checkpoint.source import open_source

pytestmark = pytest.mark.heavy

BLUE = (0, 114, 178)  # the first line
ALL = {"layers", "modules", "spectra", "cosines"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with threadpool_limits(1):
        yield


def shapes(layers, size=12, moe=False):
    found = {"model.embed_tokens.weight": (30, size), "model.norm.weight": (size,), "lm_head.weight": (30, size)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        found |= {f"{at}self_attn.{q}_proj.weight": (size, size) for q in "qkvo"}
        experts = ("experts.0.", "experts.1.", "shared_experts.") if moe else ("",)
        found |= {f"{at}mlp.{e}{m}_proj.weight": (2 * size, size) for e in experts for m in ("gate", "up", "down")}
        found[f"{at}input_layernorm.weight"] = (size,)
    return found


def findings(tmp_path, names, layers=2, lacking=(), **options):
    """Anatomy of a vector for each name, over a model of so many layers; `lacking` leaves out tensors of the first."""
    draw = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=draw) for name, shape in shapes(layers, **options).items()}
    paths = {"target": write_checkpoint(tmp_path / "target", base)}
    for k, _ in enumerate(names):
        plus = {name: t for name, t in near(base, k + 1).items() if k or not any(part in name for part in lacking)}
        paths[str(k)] = write_checkpoint(tmp_path / str(k), plus)
    vectors = {name: Vector(str(k), "target") for k, name in enumerate(names)}
    return analyze(vectors, "target", {source: open_source(str(path)) for source, path in paths.items()})


@pytest.fixture(scope="module")
def pocket():
    sources = {name: open_source(str(POCKET / name)) for name in ("target", "sft", "grpo")}
    return analyze({"v": Vector("grpo", "sft"), "chat": Vector("target", "sft")}, "target", sources)


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def look(plots, expected):
    assert plots.keys() == expected
    for name, png in plots.items():
        found = pixels(png)
        edges = (found[0], found[-1], found[:, 0], found[:, -1])
        assert all((edge == 255).all() for edge in edges), f"{name} runs off the paper"
        assert (found != 255).any(axis=-1).mean() > 0.005
    for name in {"layers", "spectra"} & expected:
        assert (pixels(plots[name]) == BLUE).all(axis=-1).any(), name


def test_pictures_of_the_pocket_family(pocket):
    look(anatomy_plots(pocket), ALL)


def test_a_model_without_layers(tmp_path):
    look(anatomy_plots(findings(tmp_path, ["v", "w"], 0)), {"spectra", "cosines"})


def test_what_a_vector_lacks_is_blank(tmp_path):
    anatomy = findings(tmp_path, ["norms", "all"], lacking=("proj", "embed", "head"))
    look(anatomy_plots(anatomy), ALL)
    assert anatomy_sentences(anatomy)[1] == "It covers 0.99 % of the target's elements."
    rows = {table.title: [row[0] for row in table.rows] for table in anatomy_tables(anatomy)}
    assert rows["norms, by module"] == ["all", "norm"] and len(rows["all, by module"]) == 11


def test_many_layers_and_kinds_and_one_that_is_far_larger(tmp_path):
    """On a logarithmic scale."""
    draw = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=draw) for name, shape in shapes(33, moe=True).items()}
    plus = near(base, 1)
    plus["model.layers.1.self_attn.v_proj.weight"] *= 100
    sources = {
        name: open_source(str(write_checkpoint(tmp_path / name, weights)))
        for name, weights in {"target": base, "plus": plus}.items()
    }
    look(anatomy_plots(analyze({"v": Vector("plus", "target")}, "target", sources)), ALL - {"cosines"})


def test_a_vector_that_is_zero(tmp_path):
    base = {name: torch.ones(shape) for name, shape in shapes(2).items()}
    sources = {name: open_source(str(write_checkpoint(tmp_path / name, base))) for name in ("target", "plus")}
    anatomy = analyze({"v": Vector("plus", "target"), "w": Vector("target", "plus")}, "target", sources)
    assert anatomy_plots(anatomy).keys() == ALL - {"spectra"}
    assert (
        anatomy_sentences(anatomy)[0]
        == "“v” has 0 % of the norm of target; 100 % of its elements are 0, as where donors are equal."
    )


def test_names_are_neither_mathtext_nor_markup_nor_more_than_a_cell(tmp_path):
    names = ["$\\frac{", "_hidden", '<script>,"a\nb"']
    anatomy = findings(tmp_path, names, layers=1)
    look(anatomy_plots(anatomy), ALL)
    lines = list(csv.DictReader(io.StringIO(anatomy_csv(anatomy))))
    assert {line["vector"] for line in lines} == {name.replace("\n", " ") for name in names}
    assert all("\n" not in sentence for sentence in anatomy_sentences(anatomy))
    assert anatomy_tables(anatomy)[4].title == f"{names[2]}, by module"  # a page escapes it


def test_the_csv_holds_every_number(pocket):
    lines = list(csv.DictReader(io.StringIO(anatomy_csv(pocket))))
    parts = [pocket.whole, *pocket.layers, *pocket.kinds, *pocket.cells, *pocket.tensors]
    assert len(lines) == 2 * len(parts)
    for line, (part, vector) in zip(lines, ((part, v) for part in parts for v in pocket.vectors), strict=True):
        m = part.vectors[vector]
        assert (line["name"], line["vector"], int(line["covered"])) == (part.name, vector, m.elements)
        assert (float(line["theta_norm"]), float(line["norm"]), float(line["zeros"])) == (part.norm, m.norm, m.zeros)
        assert (
            float(line["below_0.01"]) == m.below[1]
            and float(line["cosine_v"]) == part.cosines[pocket.vectors.index(vector)][0]
        )
        assert (line["stable_rank"] != "") == (m.spectrum is not None)
        if m.spectrum:
            assert float(line["effective_rank_low"]) == m.spectrum.effective_rank[0]


def test_tables_and_sentences_of_the_pocket_family(pocket):
    table = anatomy_tables(pocket)[0]
    assert table.title == "v, by module" and all(len(row) == len(table.head) for row in table.rows)
    cells = {row[0]: dict(zip(table.head, row, strict=True)) for row in table.rows}
    assert list(cells) == [
        "all", "embedding", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "norm"
    ]  # fmt: skip
    assert cells["all"]["‖v‖ / ‖θ‖"] == "1.71 %" and cells["all"]["cos(v, θ − minus)"] == "−0.006"
    assert cells["embedding"]["effective rank"] == "87 of 128" and cells["all"]["effective rank"].endswith("% of full")
    assert cells["norm"]["effective rank"] == "" and cells["norm"]["≤ 1 % of θ"] == "100 %"
    sentences = anatomy_sentences(pocket)
    assert (
        sentences[0] == "“v” has 1.71 % of the norm of target; 13.1 % of its elements are 0, as where donors are equal."
    )
    assert sentences[1] == "Beside θ it is largest in up_proj (2.67 %) and smallest in norm (0.263 %)."
    assert sentences[-2:] == [
        "The cosine between “v” and “chat” is −0.006.",
        "Of what either of them changes, both change 84.5 %; of this, 50 % in the same direction.",
    ]


@pytest.mark.parametrize("count", [1, 2])
def test_every_line_that_a_text_is_read_along_is_drawn(count):
    vectors = [config.WeightedVectorConfig("plus", "minus") for _ in range(count)]
    found = config.lines(config.Config(target="t", vectors=vectors, analyze=config.AnalyzeConfig(text="f", points=3)))
    assert set(found) == ({"donors", "target"} if count == 1 else {"vectors"})
    assert connectivity_plot([(name, (0.0, 0.5, 1.0), (1.0, 2.0, 1.0)) for name in found]).startswith(b"\x89PNG")
