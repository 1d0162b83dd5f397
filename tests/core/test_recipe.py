"""mergekit's recipes: our results against what tests/core/mergekit/record.py recorded of its own; and refusals."""

import json
import os
import subprocess
from collections import defaultdict
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import POCKET, SCORING, launch, load_checkpoint, write_checkpoint
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from points import read_point
from safetensors.torch import load_file

from rvdist.core.config import Config, OutputFormat
from rvdist.core.errors import BadInput
from rvdist.core.method import MethodSpec
from rvdist.core.point import WeightPoint
from rvdist.core.recipe import read_recipe
from rvdist.core.timing import Timing
from rvdist.launch import CONF
from rvdist.merge.actor import WorkerSettings
from rvdist.merge.driver import merge
from rvdist.merge.plan import build_plan
from rvdist.report.card import card
from rvdist.report.wording import formula
from rvdist.stages import multirun
from rvdist.stages.job import Job
from rvdist.stages.jobs import run_jobs
from rvdist.stages.warm import Warm
from rvdist.weights import compat
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.lanes import HostLane
from rvdist.weights.reader import PointReader

HERE = Path(__file__).parent / "mergekit"
CONFIG = {"model_type": "llama", "hidden_size": 4, "num_hidden_layers": 3}
VOCABULARY = {"<unk>": 0} | {f"word{k}": k for k in range(1, 8)}
# How far apart two roundings of the same formula may be, in units in the last place of the largest number at an
# element. mergekit's arithmetic is the inputs' dtype, and in bf16 the weights and differences are rounded to it too.
# Angles and lengths of whole tensors it finds in fp32. Of della_whole, what is divided by weights is multiplied again.
UNITS = {torch.float32: 2.0, torch.float16: 1.0, torch.bfloat16: 2.0}
ANGLES = {"slerp": 2, "karcher": 2, "nuslerp": 2, "model_stock": 4, "multislerp": 4, "della_whole": 2}  # × these units
RANDOM = {"dare_linear", "della", "della_linear"}
STACKED = "passthrough"
EXACT = sorted(path.stem for path in HERE.glob("*.yml") if path.stem not in RANDOM | {STACKED})


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost tensors this small more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def expected():
    return by_prefix(load_file(HERE / "expected.safetensors"))


def by_prefix(tensors):
    found = defaultdict(dict)
    for name, tensor in tensors.items():
        prefix, _, key = name.rpartition("/")
        found[prefix][key] = tensor
    return found


@pytest.fixture(scope="module")
def models(expected, tmp_path_factory):
    """A directory with the models, where the recipes' relative paths are right."""
    where = tmp_path_factory.mktemp("models")
    for prefix, tensors in expected.items():
        if prefix.startswith("inputs/"):
            path = write_checkpoint(where / prefix.removeprefix("inputs/"), tensors, config=CONFIG)
            (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": VOCABULARY}, "added_tokens": []}))
    return where


@pytest.fixture
def here(models, monkeypatch):
    monkeypatch.chdir(models)
    return models


def names(source):
    return open_source(source).tensors


def merged(path, seed=0):
    recipe = read_recipe(path, names, seed)
    dtype = getattr(torch, recipe.dtype) if recipe.dtype else None
    reader = PointReader([recipe.point], {source: open_source(source) for source in recipe.point.sources()}, dtype)
    try:
        return {
            name: torch.cat([chunk.clone() for _, (chunk,) in reader.chunks(name, 0, spec.numel)]).view(spec.shape)
            for name, spec in reader.base.tensors.items()
        }
    finally:
        reader.close()


def units_apart(found, wanted, inputs):
    """The largest distance of two sets of tensors, in units in the last place of the largest number there."""
    worst = 0.0
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        size = torch.stack([t[name].double().abs() for t in (*inputs, found, wanted)]).amax(0)
        unit = torch.finfo(tensor.dtype).eps * 2 ** size.log2().floor()
        worst = max(worst, float(((found[name].double() - tensor.double()).abs() / unit).max()))
    return worst


@pytest.mark.parametrize("recipe", EXACT)
def test_equals_mergekit_to_rounding(recipe, expected, here):
    require_equal(recipe, merged(HERE / f"{recipe}.yml"), expected)


def require_equal(recipe, found, expected):
    """To the roundings of docs/recipes.md, and by far nearer to mergekit's than the base is."""
    wanted = expected[recipe]
    assert found.keys() == wanted.keys()
    point = read_recipe(HERE / f"{recipe}.yml", names).point
    inputs = [expected[f"inputs/{source}"] for source in point.sources()]
    dtype = next(iter(wanted.values())).dtype
    assert units_apart(found, wanted, inputs) <= UNITS[dtype] * next(
        (n for name, n in ANGLES.items() if recipe.startswith(name)), 1
    )
    base = expected[f"inputs/{point.base}"]
    moved = sum(float((wanted[name].double() - base[name].double()).norm()) for name in wanted)
    apart = sum(float((wanted[name].double() - found[name].double()).norm()) for name in wanted)
    assert apart < 0.05 * moved, "agrees with mergekit no better than the base does"


def test_layers_are_stacked_as_mergekit_does(expected, here):
    require_stacked(merged(HERE / f"{STACKED}.yml"), expected)


def require_stacked(found, expected):
    assert found.keys() == expected[STACKED].keys() and "model.layers.3.mlp.up_proj.weight" in found
    assert all(torch.equal(found[name], tensor) for name, tensor in expected[STACKED].items())


EXAMPLES = {  # mergekit's own, and what of the same shape is recorded here
    "arcee_fusion.yml": "arcee_fusion", "bio-merge.yml": "ties_bio", "gradient-slerp.yml": "slerp",
    "linear.yml": "linear", "orcamini-platy-44layer.yml": STACKED, "ties.yml": "ties_densities",
}  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES)
def test_recipes_of_the_shape_of_mergekits_examples_run(example, expected, here, tmp_path):
    """All but one of them in fp16; the docs have a row for each."""
    recipe = EXAMPLES[example]
    found = merged(written(tmp_path, f"{recipe}.yml", "float32", "float16"))
    assert found.keys() == expected[recipe].keys()
    assert all(tensor.dtype == torch.float16 for tensor in found.values())
    said = (Path(__file__).parents[2] / "docs/recipes.md").read_text()
    row = next(line for line in said.splitlines() if line.startswith(f"| `{example}` | runs"))
    assert row.endswith(f"| `{recipe}.yml` |")


def test_each_model_is_dropped_from_by_its_own_density(here, tmp_path):
    """DARE's choice is random: each vector keeps its share, and what stays is divided by that share."""
    text = "{merge_method: dare_linear, base_model: base, parameters: {normalize: false}, dtype: float32, models: ["
    text += (
        "{model: a, parameters: {weight: 1, density: 0.25}}, {model: b, parameters: {weight: 1, density: [0.5, 1]}}]}"
    )
    (tmp_path / "own.yml").write_text(text)
    point = read_recipe(tmp_path / "own.yml", names, 3).point
    assert WeightPoint.from_json(json.loads(json.dumps(point.to_json()))) == point
    (a, *_), tensor = point.terms, "model.layers.2.mlp.up_proj.weight"
    assert a.density == (0.25,) and point.densities(tensor, 3, lambda _: True) == (0.25, 1.0)
    assert point.densities("model.layers.1.mlp.up_proj.weight", 3, lambda _: True) == (0.25, 0.75)
    base, one, other = (load_checkpoint(Path(name))[tensor].double() for name in ("base", "a", "b"))
    only_a = (dict(read_point(point))[tensor].double() - other) / (one - base)  # b has density 1 in the last layer
    assert set(only_a.round().unique().tolist()) == {0.0, 4.0}
    assert formula(point).endswith("density 0.25 … 1, seed 3)")
    same = read_recipe(HERE / "ties.yml", names).point
    assert not any(term.density for term in same.terms) and "density" not in same.to_json()["terms"][0]


def test_random_dropping_differs_only_in_the_scale(expected, here):
    """What stays is random. mergekit scales it so that the sum of magnitudes is again that of the whole tensor,
    we divide by the density, which gives that sum in expectation."""
    base, donor = expected["inputs/base"], expected["inputs/a"]
    for found, by_norm in ((expected["dare_linear"], True), (merged(HERE / "dare_linear.yml", 3), False)):
        kept = total = 0
        for name, tensor in found.items():
            difference = donor[name].double() - base[name].double()
            change = tensor.double() - base[name].double()
            stays = change.abs() > 1e-7
            scale = difference.abs().sum() / difference[stays].abs().sum() if by_norm else 1 / 0.6
            torch.testing.assert_close(change[stays], 0.5 * scale * difference[stays], rtol=1e-4, atol=1e-7)
            kept, total = kept + int(stays.sum()), total + tensor.numel()
        assert kept / total == pytest.approx(0.6, abs=4 * (0.6 * 0.4 / total) ** 0.5)


@pytest.mark.parametrize("recipe", ["della_linear", "della"])
def test_small_magnitudes_of_a_row_are_dropped_more_often(recipe, expected, here):
    """What stays is random, by the same probabilities as mergekit's, and scaled as mergekit scales it."""
    base, donor = expected["inputs/base"], expected["inputs/a"]
    for found in (expected[recipe], merged(HERE / f"{recipe}.yml", 3)):
        ends = {0: [], 1: []}
        for name, tensor in found.items():
            difference = donor[name].double() - base[name].double()
            change = tensor.double() - base[name].double()
            stays = change.abs() > 1e-7
            scale = difference.abs().sum() / difference[stays].abs().sum()
            torch.testing.assert_close(change[stays], 0.5 * scale * difference[stays], rtol=1e-4, atol=1e-7)
            rows, kept = (t.view(-1, t.shape[-1]) for t in (difference.abs(), stays))
            for end, places in enumerate((rows.argmin(1), rows.argmax(1))):
                ends[end] += kept.gather(1, places[:, None]).flatten().tolist()
        for end, probability in ((0, 0.15), (1, 0.85)):
            share, spread = sum(ends[end]) / len(ends[end]), (0.15 * 0.85 / len(ends[end])) ** 0.5
            assert share == pytest.approx(probability, abs=4 * spread)


def test_dropped_by_density_without_rescale(here, tmp_path):
    recipe = read_recipe(written(tmp_path, "dare_linear.yml", "density: 0.6", "density: 0.5, rescale: false"), names, 7)
    assert recipe.point.method == MethodSpec("dare", 0.5, 7)
    assert [term.alpha for term in recipe.point.terms] == [0.25]  # the method divides by 0.5 again


def written(where, recipe, old="", new=""):
    """A recipe with one thing changed."""
    text = (HERE / recipe).read_text()
    assert old in text
    path = where / "recipe.yml"
    path.write_text(text.replace(old, new, 1))
    return path


REFUSED = [
    ("linear.yml", "merge_method: linear", "merge_method: none", "merge_method 'none'"),
    ("linear.yml", "dtype: float32", "dtype: float64", "dtype 'float64'"),
    ("linear.yml", "dtype: float32", "chat_template: auto", "chat_template is not supported"),
    ("linear.yml", "dtype: float32", "tokenizer_source: union", "tokenizer_source is set and base_model is not"),
    (
        "slerp.yml",
        "dtype: float32",
        "tokenizer_source: a+b",
        r"tokenizer_source 'a\+b' is not union, base, or the name",
    ),
    ("slerp.yml", "dtype: float32", "tokenizer: {source: 3}", "tokenizer.source 3 is not union"),
    ("slerp.yml", "dtype: float32", "tokenizer: {sauce: base}", "tokenizer.sauce is not supported, only source"),
    ("slerp.yml", "dtype: float32", "tokenizer: {pad_to_multiple_of: 1.5}", "tokenizer.pad_to_multiple_of 1.5 is not"),
    ("slerp.yml", "dtype: float32", "tokenizer: {tokens: [x]}", r"tokenizer.tokens \['x'\] is not a mapping"),
    (
        "slerp.yml",
        "dtype: float32",
        "tokenizer: {tokens: {x: {force: true}}}",
        "tokenizer.tokens.x has to be a mapping",
    ),
    ("slerp.yml", "dtype: float32", "tokenizer: {tokens: {5: {source: base}}}", "tokenizer.tokens.5 5 is not a token"),
    (
        "slerp.yml",
        "dtype: float32",
        "tokenizer: {tokens: {x: {source: z}}}",
        "tokenizer.tokens.x.source 'z' is not one of",
    ),
    (
        "slerp.yml",
        "dtype: float32",
        "tokenizer: {tokens: {x: {source: {kind: one}}}}",
        "tokenizer.tokens.x.source {'kind': 'one'} is no model",
    ),
    (
        "slerp.yml",
        "dtype: float32",
        "tokenizer: {tokens: {x: {source: {kind: model_token, model: base}}}}",
        "tokenizer.tokens.x.source wants token or token_id, one of them",
    ),
    (
        "slerp.yml",
        "dtype: float32",
        "tokenizer: {tokens: {x: {source: {kind: model_token, model: base, token_id: -1}}}}",
        "tokenizer.tokens.x.source.token_id -1 is not an id",
    ),
    (
        "slerp.yml",
        "dtype: float32",
        "tokenizer: {source: base}\ntokenizer_source: base",
        "tokenizer and tokenizer_source",
    ),
    (
        "passthrough.yml",
        "dtype: float32",
        "tokenizer_source: union",
        "tokenizer_source 'union' is not supported for layers",
    ),
    ("linear.yml", "dtype: float32", "parameters: {normalize: false}", "parameters.normalize is false and the weights"),
    ("linear.yml", "dtype: float32", "parameters: {normalize: 1}", "parameters.normalize 1 is not true or false"),
    ("linear.yml", "weight: 0.3", "gamma: 0.3", r"models\[1\].parameters.gamma is not a parameter we have"),
    ("linear.yml", "weight: 0.3", "density: 0.3", r"models\[1\].parameters.weight is not set for tensor"),
    ("linear.yml", "weight: 0.3", "weight: x", r"models\[1\].parameters.weight 'x' is not a finite number"),
    ("linear.yml", "weight: 0.3", "weight: []", r"models\[1\].parameters.weight is an empty list"),
    ("linear.yml", "weight: 0.3", "weight: -1.5", "weight adds up to 0"),
    ("linear.yml", "model: a", "model: a+adapter", r"models\[1\].model 'a\+adapter': an adapter"),
    ("linear.yml", "model: a", "model: b", r"models\[2\].model b is listed before"),
    ("linear.yml", "model: a,", "model: a, layer_range: [0, 2],", r"models\[1\].layer_range is not supported here"),
    ("linear.yml", "models:", "slices:", "slices has to be a list of one slice"),
    ("ties.yml", "base_model: base\n", "", "base_model is not set; ties needs one"),
    ("ties.yml", "density: 0.3", "density: [0.3, 1.5]", "density 1.5 is not above 0"),
    ("ties.yml", "density: 0.3", "density: 0", "density 0 is not above 0"),
    ("ties.yml", "density: 0.3", "density: 0.3, lambda: 0.5", "parameters.lambda 0.5 is not supported for ties"),
    ("ties.yml", "density: 0.3", "density: 0.3, rescale: true", "parameters.rescale true is not supported"),
    ("slerp.yml", "[0, 3]", "[0, 2]", r"slices\[0\].sources\[0\].layer_range \[0, 2\] is not \[0, 3\]"),
    (
        "slerp_bf16.yml",
        "model: far-bf16",
        "model: far-bf16}\n  - {model: a-bf16",
        "models name 2 models beside the base",
    ),
    ("breadcrumbs.yml", "gamma: 0.1", "gamma: 1", "parameters.gamma 1 is not at least 0 and below 1"),
    ("breadcrumbs.yml", "gamma: 0.1", "gamma: [0.1, 0.2]", r"gamma differs between models or tensors \(0.1, 0.2\)"),
    ("breadcrumbs.yml", "gamma: 0.1", "rescale: true", "parameters.rescale true is not supported for breadcrumbs"),
    ("sce.yml", "value: 0.8", "value: 0", "select_topk 0 is not above 0"),
    ("sce.yml", "base_model: base", "", "base_model is not set; sce needs one"),
    ("model_stock.yml", "{model: far}, {model: c}", "", "models name 1 models beside the base; model_stock needs two"),
    (
        "nuslerp.yml",
        "base_model: base",
        "base_model: a",
        "models name 1 models beside the base; nuslerp goes between two",
    ),
    (
        "nuslerp.yml",
        "dtype:",
        "parameters: {nuslerp_flatten: false}\ndtype:",
        "parameters.nuslerp_flatten false is not",
    ),
    (
        "multislerp_models.yml",
        "dtype:",
        "parameters: {normalize_weights: false}\ndtype:",
        "parameters.normalize_weights",
    ),
    ("slerp_bf16.yml", "t: 0.3", "weight: 0.3", "parameters.t is not set for tensor"),
    ("della.yml", "epsilon: 0.35", "epsilon: 0.5", "epsilon 0.5 and density 0.5 "),
    ("arcee_fusion.yml", "model: base}", "model: a}", "models name 2 models beside the base; arcee_fusion goes"),
    ("passthrough.yml", "[1, 3]", "[3, 3]", r"slices\[1\].sources\[0\].layer_range \[3, 3\] is not a range"),
    ("passthrough.yml", "[1, 3]", "[1, true]", r"slices\[1\].sources\[0\].layer_range \[1, True\] is not a range"),
    ("passthrough.yml", "[1, 3]}", "[1, 3]}, {model: c}", r"slices\[1\].sources has to be a list of one model"),
    ("passthrough.yml", "[1, 3]", "[1, 3], parameters: {scale: 2}", r"slices\[1\].sources\[0\].parameters.scale"),
    ("passthrough.yml", "slices:", "parameters: {scale: 2}\nslices:", r"parameters.scale is not supported: layers are"),
    ("passthrough.yml", "slices:", "slices: 1\nmodels:", "slices has to be a list of slices"),
    ("ram.yml", "epsilon: 0.012", "r: 0.1", "parameters.r is not a parameter we have"),
]


@pytest.mark.parametrize(("recipe", "old", "new", "sentence"), REFUSED, ids=[new or old for _, old, new, _ in REFUSED])
def test_refuses_what_we_lack_by_name(recipe, old, new, sentence, here, tmp_path):
    with pytest.raises(BadInput, match=f"recipe.yml: {sentence}") as refused:
        read_recipe(written(tmp_path, recipe, old, new), names)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["- a", "a: [", ""])
def test_refuses_what_is_no_recipe(text, tmp_path):
    (tmp_path / "recipe.yml").write_text(text)
    with pytest.raises(BadInput, match="recipe.yml: is not"):
        read_recipe(tmp_path / "recipe.yml", names)
    with pytest.raises(BadInput, match="nothing.yml: cannot be read"):
        read_recipe(tmp_path / "nothing.yml", names)


@pytest.mark.parametrize(
    "recipe",
    [
        "ties_sum",
        "dare_ties_whole",
        "slerp",
        "breadcrumbs",
        "sce",
        "karcher",
        *sorted(RANDOM),
        "arcee_fusion",
        "ram",
        "ramplus_tl",
    ],
)
def test_bytes_do_not_depend_on_chunks(recipe, here):
    asked = read_recipe(HERE / f"{recipe}.yml", names, 5).point
    if recipe.startswith("dare"):
        asked = replace(asked, method=replace(asked.method, density=0.4))
    whole = dict(read_point(asked))
    reader = PointReader([asked], {s: open_source(s) for s in asked.sources()}, lanes=[HostLane(20)])
    for name, spec in reader.base.tensors.items():
        parts = torch.cat([tensor.clone() for _, (tensor,) in reader.chunks(name, 0, spec.numel)])
        assert torch.equal(parts.view(spec.shape), whole[name]), name
    reader.close()


@pytest.mark.usefixtures("ray_local")
def test_a_real_merge_of_a_recipe(here, tmp_path, expected):
    recipes = {tmp_path / name: read_recipe(HERE / f"{name}.yml", names).point for name in ("slerp", "ties")}
    points = {  # workers have directories of their own
        where: point.relocate({source: str(here / source) for source in point.sources()})
        for where, point in recipes.items()
    }
    sources = {source: open_source(source) for point in points.values() for source in point.sources()}
    for point in points.values():
        assert not compat.check(point, sources).refusals
        assert card._method(point)
    merge(
        build_plan(points, sources, OutputFormat("F32")),
        sources,
        {point: formula(point) for point in points.values()},
        WorkerSettings(1),
    )
    for where, point in points.items():
        found = load_file(where / "model.safetensors")
        inputs = [expected[f"inputs/{Path(source).name}"] for source in point.sources()]
        assert units_apart(found, expected[where.name], inputs) <= 4


@pytest.mark.heavy
def test_the_command_writes_what_mergekit_does(here, expected, tmp_path):
    """All recorded recipes as one plan; dtype and base are the recipe's."""
    files = ",".join(f"'{HERE / name}.yml'" for name in [*EXACT, STACKED])
    places = (f"output={tmp_path}/{{recipe}}", f"hydra.sweep.dir={tmp_path}/run")
    done = launch("-m", f"recipe={files}", *places, cwd=here)
    assert done.returncode == 0, done.stderr
    assert len(EXACT) >= 8
    for recipe in EXACT:
        require_equal(recipe, load_checkpoint(tmp_path / recipe), expected)
    require_stacked(load_checkpoint(tmp_path / STACKED), expected)
    assert json.loads((tmp_path / STACKED / "config.json").read_text())["num_hidden_layers"] == 4
    assert "recipe: " in (tmp_path / "run/0/config.yaml").read_text()

    planned = launch(f"recipe={HERE}/ties.yml", "output=o/{target}-{recipe}", "stages=[plan]", cwd=here)
    assert planned.returncode == 0 and f"{here}/o/base-ties: base +0.7·(a − base)" in planned.stdout, planned.stderr
    in_bf16 = launch(f"recipe={HERE}/ties.yml", f"output={tmp_path}/bf16", "dtype=bfloat16", "stages=[plan]", cwd=here)
    assert in_bf16.returncode == 0, in_bf16.stderr


@pytest.mark.parametrize("method", ["iso_c", "tsv_m"])
def test_recipes_of_methods_that_mergekit_lacks(method, tmp_path):
    models = [f"{{model: {name}, parameters: {{weight: {by}}}}}" for name, by in (("a", 0.5), ("b", 0.25))]
    text = f"merge_method: {method}\nbase_model: t\nparameters: {{lambda: 2}}\nmodels: [{', '.join(models)}]\n"
    (tmp_path / "recipe.yml").write_text(text)
    point = read_recipe(tmp_path / "recipe.yml", lambda name: ["w"]).point
    assert point.method == MethodSpec(method)
    assert [(term.alpha, term.vector.sources()) for term in point.terms] == [(1.0, ("a", "t")), (0.5, ("b", "t"))]


@pytest.mark.slow
def test_the_command_scores_a_recipe_beside_its_base(tmp_path):
    weighted = [f"{{model: {POCKET / name}, parameters: {{weight: {by}}}}}" for name, by in (("grpo", 1), ("sft", -1))]
    text = f"merge_method: task_arithmetic\nbase_model: {POCKET / 'target'}\nmodels: [{', '.join(weighted)}]\n"
    (tmp_path / "recipe.yml").write_text(text)
    scored = launch("recipe=recipe.yml", *SCORING, "hydra.run.dir=run", cwd=tmp_path)
    assert scored.returncode == 0, scored.stderr
    rows = json.loads((tmp_path / "run/summary.json").read_text())
    assert {(row["arm"], row["alpha"], row["delta"] is None) for row in rows} == {
        ("baseline", 0.0, True),
        ("recipe", None, False),
    }
    sums = {row["arm"]: row["value"] for row in rows if row["task"] == "pocket_sums" and row["primary"]}
    assert sums["recipe"] > sums["baseline"], "it is the vector of the demo, at 1"


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("target=base", "recipe and target are both set, and a recipe says what is merged; leave target out"),
        ("vector.plus=a", "recipe and vector are both set"),
        ("vectors=[{plus:a,minus:b}]", "recipe and vectors are both set"),
        ("batch=[{target:a}]", "recipe and batch are both set"),
        ("alpha=0.5", "recipe and alpha are both set"),
        ("sweep.alphas=[1]", "recipe and sweep.alphas are both set"),
        ("search=racing", "recipe and search.method are both set"),
        ("method=ties", "recipe and merge.method are both set"),
        ("arms=[{name:x,weights:a}]", "recipe and arms are both set"),
        ("stages=[analyze]", "analyze needs a vector"),
        ("recipe=none.yml", "none.yml: cannot be read"),
        ("output=null", "nothing to do; set output=DIRECTORY to merge"),
    ],
)
def test_a_recipe_says_what_is_merged_and_nothing_else_does(argument, sentence, here):
    settings = composed("recipe=ties.yml", "output=out", argument)
    settings.recipe = settings.recipe if settings.recipe == "none.yml" else str(HERE / settings.recipe)
    job = Job(settings, here / "run", "", Timing())
    with closing(Warm()) as warm:
        (ended,) = run_jobs([job], warm)
    assert isinstance(ended.error, BadInput) and sentence in str(ended.error)


def composed(*overrides):
    multirun.register()
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = OmegaConf.to_object(compose("config", list(overrides)))
    assert isinstance(settings, Config)
    return settings


@pytest.mark.skipif(
    "RVDIST_MERGEKIT" not in os.environ, reason="RVDIST_MERGEKIT names no Python that has mergekit 0.1.5"
)
def test_mergekit_still_gives_what_was_recorded(expected, tmp_path):
    command = [os.environ["RVDIST_MERGEKIT"], str(HERE / "record.py"), "--out", str(tmp_path / "now.safetensors")]
    subprocess.run(command, check=True, timeout=300)
    now = by_prefix(load_file(tmp_path / "now.safetensors"))
    assert now.keys() == expected.keys()
    for prefix, tensors in expected.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(now[prefix][name], tensor, msg=f"{prefix}/{name}")
