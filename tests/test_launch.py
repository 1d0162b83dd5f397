"""The command as users type it: exit status, one sentence, nothing written."""

import json
import re
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from checkpoints import POCKET, launch, load_checkpoint, near, tensors, write_checkpoint
from safetensors.torch import load_file, save_file

from rvdist.launch import _quote_for_hydra as readable
from rvdist.weights.checkpoint.journal import Manifest

pytestmark = pytest.mark.heavy

SEEDED = ["method=dare", "merge.seed=3"]
VECTOR = ("vector.plus=family/grpo", "vector.minus=family/sft")


def contents(place):
    return sorted(str(path.relative_to(place)) for path in place.rglob("*"))


def refused(place, *arguments, **environment):
    """Runs the command, which must end with status 2, one sentence and nothing written; returns the sentence."""
    before = contents(place)
    done = launch(*arguments, cwd=place, **environment)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (sentence,) = done.stderr.strip().splitlines()
    assert sentence.startswith("rvdist: ")
    assert contents(place) == before
    return sentence


def merge(*more):
    return ("target=family/target", *VECTOR, "output=out", *more)


def edit_weights(path, change):
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def test_donors_that_do_not_exist(place):
    assert "nowhere" in refused(place, "target=family/target", "vector.plus=./nowhere", VECTOR[1], "output=out")
    assert "family/gone" in refused(place, "target=family/target", "vector.plus=family/gone", VECTOR[1], "output=out")


def test_a_donor_with_another_shape(place):
    edit_weights(place / "family/grpo", lambda w: w.update({"model.norm.weight": torch.zeros(129).bfloat16()}))
    assert re.search(r"tensor model.norm.weight has shape \[128\] where .*grpo has \[129\]", refused(place, *merge()))


def test_a_tensor_missing_from_one_donor(place):
    edit_weights(place / "family/sft", lambda w: w.pop("model.norm.weight"))
    assert re.search("sft: lacks tensor model.norm.weight", refused(place, *merge()))


def test_a_truncated_shard(place):
    file = place / "family/grpo/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "grpo/model.safetensors: truncated" in refused(place, *merge())


def test_an_index_that_leaves_its_directory(place):
    index = place / "family/grpo/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../sft/model.safetensors"}}))
    assert "is not a safetensors file of its directory" in refused(place, *merge())


def test_a_different_tokenizer(place):
    file = place / "family/grpo/tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[10:12]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(tokenizer))
    assert "tokenizer differs from the target's" in refused(place, *merge())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (merge("alpha=nan"), "alpha: nan is not a finite number"),
        (merge("alpha=inf"), "alpha: inf is not a finite number"),
        (merge("alpha=one"), "alpha: 'one' is not a finite number"),
        (merge("alhpa=1"), "alhpa: no such key; did you mean alpha?"),
        (merge("merge.wrokers=1"), "merge.wrokers: no such key; did you mean merge.workers?"),
        (merge("merge.workers=many"), "merge.workers"),
        (merge("overwrite=perhaps"), "overwrite"),
        (merge("benchmarks=papers"), "benchmarks"),
        (merge("stages=[merg]"), "stages: 'merg' is not one of"),
        (merge("method=tie"), "method/tie"),
        (merge("merge.method=tie"), "merge.method: 'tie' is not one of linear, ties, dare"),
        (merge("method=ties", "merge.density=1.5"), "merge.density: 1.5 is not a share of each vector"),
        (merge("method=dare", "merge.density=0"), "merge.density: 0 is not a share of each vector"),
        (merge("dtype=int4"), "dtype: 'int4' is not one of"),
        (merge("max_shard_size=lots"), "max_shard_size: 'lots' is not a size"),
        (merge("merge.method=core_space"), "not as two factors, and core_space merges"),
        (merge("merge.method=iso_c", "merge.memory=1KiB"), "MiB, and merge.memory is 0.0 MiB; raise it"),
        (merge("vector.mask.include=[nothing]"), "leaves no tensor"),
        (merge("vector.minus=null"), "vector.minus is not set"),
        (merge("merge.workers=0"), "merge.workers: 0"),
        (merge("merge.threads=0"), "merge.threads: 0"),
        (merge("stages=[plan]", "cluster.nodes=-1"), "cluster.nodes: -1"),
        (merge("engine.count=0"), "engine.count: 0 is not a number of them; give at least 1"),
        (merge("engine.cpu_threads=0"), "engine.cpu_threads: 0"),
        (merge("engine.tensor_parallel_size=0"), "engine.tensor_parallel_size: 0"),
        (merge("engine.max_model_len=0"), "engine.max_model_len: 0"),
        (merge("engine.max_num_seqs=-1"), "engine.max_num_seqs: -1"),
        (merge("engine.kv_cache_gib=0"), "engine.kv_cache_gib: 0 is not a size"),
        (merge("engine.gpu_memory_utilization=2"), "engine.gpu_memory_utilization: 2 is not a share"),
        (merge("cluster.timeout=-1"), "cluster.timeout: -1 is not a time"),
        (merge("benchmarks.tasks=[pocket_sums]", "benchmarks.limit=0"), "benchmarks.limit: 0"),
        (merge("benchmarks.num_fewshot=-1"), "benchmarks.num_fewshot: -1 is not a number of them; give at least 0"),
        ((*VECTOR, "output=out"), "target is not set; give target=DIRECTORY"),
        (("target=family/target",), "nothing to do"),
        (merge("output=family/target"), "family/target: already exists"),
        (merge("output=family/target", "overwrite=true"), "holds the source family/target, which would be lost"),
        (merge("output=family", "overwrite=true"), "holds the source family/target, which would be lost"),
        (merge("cluster.address=127.0.0.1:1", "output=out2"), "no Ray cluster"),
        (merge("output="), "output: is empty; give a value, or leave it out"),
        (merge("vector.plus="), "vector.plus: is empty"),
        (merge("cache.dir="), "cache.dir: is empty"),
        (merge("engine=replay"), "engine.replay: is not set; give a run directory of ours"),
        (
            ("target=family/target", "vectors=[{plus: '', minus: family/sft}]", "output=out"),
            "vectors[0].plus: is empty",
        ),
        (merge(f"output={'a' * 248}"), "a: cannot be created (File name too long); choose another output"),
        (merge(f"output={'a' * 300}/out"), "File name too long"),
        (merge(f"target={'a' * 300}"), "a: cannot be read or written (File name too long); name another place"),
        (merge(f"vector.plus={'a' * 300}"), "a: cannot be read or written (File name too long)"),
        (merge("hydra.run.dir=family/sft/config.json/run"), "run: cannot be read or written (Not a directory); name"),
    ],
)
def test_bad_values(place, arguments, reason):
    assert reason in refused(place, *arguments)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("output=loop", "loop: already exists"),
        ("output=loop/out", "out: cannot be created (Too many levels of symbolic links)"),
        ("target=loop", "loop: no such checkpoint directory"),
        ("hydra.run.dir=loop", "loop: cannot be read or written"),
    ],
)
def test_a_link_that_leads_to_itself(place, key, reason):
    (place / "loop").symlink_to("loop")
    assert reason in refused(place, *merge(key))


def test_an_address_from_the_environment_at_which_nobody_answers(place):
    sentence = refused(place, *merge("cluster=existing"), RAY_ADDRESS="127.0.0.1:1")
    assert sentence.startswith("rvdist: RAY_ADDRESS=127.0.0.1:1: no Ray cluster can be reached there")


@pytest.mark.slow
def test_an_unknown_task(place):
    sentence = refused(place, "target=family/target", *VECTOR, "output=out", "benchmarks.tasks=[pocket_sum]")
    assert "there is no task 'pocket_sum'; did you mean pocket_sums?" in sentence


@pytest.mark.slow
def test_scoring_needs_a_tokenizer_and_its_template(place):
    arguments = ("target=family/target", *VECTOR, "output=out", "benchmarks=pocket")
    (place / "family/target/chat_template.jinja").unlink()
    assert "target: has no chat template; set benchmarks.apply_chat_template=false" in refused(place, *arguments)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (place / "family/target" / file).unlink()
    assert "target: has no tokenizer, and scoring needs one" in refused(place, *arguments)


@pytest.mark.slow
def test_what_an_engine_refuses_as_it_starts_is_one_sentence(place):
    arguments = ["target=family/target", *VECTOR, "benchmarks=pocket", "benchmarks.limit=1"]
    done = launch(*arguments, "engine.args={kv_cache_dtype: nonsense}", cwd=place)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "error for CacheConfig" in done.stderr
    for member in ("target", "grpo", "sft"):
        file = place / "family" / member / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    done = launch(*arguments, cwd=place)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "target: is quantized" in done.stderr and "dtype=bfloat16" in done.stderr


def test_a_merge_from_the_command_and_again(place):
    arguments = merge("alpha=0.5", "hydra.run.dir=run", "merge.workers=1")
    done = launch(*arguments, cwd=place)
    assert done.returncode == 0, done.stderr
    target, plus, minus, out = (
        load_checkpoint(place / p) for p in ("family/target", "family/grpo", "family/sft", "out")
    )
    for name, tensor in out.items():
        exact = target[name].double() + 0.5 * (plus[name].double() - minus[name].double())
        assert torch.equal(tensor, exact.bfloat16()), name
    assert {"README.md", "chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json"} <= {
        path.name for path in (place / "out").iterdir()
    }
    assert "0.5" in (place / "out/README.md").read_text() and str(place) not in (place / "out/README.md").read_text()
    timing = json.loads((place / "run/timing.json").read_text())
    assert {"imports", "ray_init", "index", "plan", "merge"} <= timing["phases"].keys()
    assert timing["bytes_read"] == 3 * timing["bytes_written"] > 0
    again = launch(*arguments, cwd=place)
    assert again.returncode == 0 and "out: already complete" in again.stdout
    assert "out: already exists" in refused(place, *merge("alpha=0.25"))

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(place / "out")
    prompt = AutoTokenizer.from_pretrained(place / "out")("User: add 1 and 2.", return_tensors="pt")
    assert model(input_ids=prompt.input_ids).logits.isfinite().all()


def test_the_dtype_of_the_target_may_be_asked_for_by_its_name(place):
    """The same output: the plan that a merge goes on with after a crash, the digest, the card."""
    said = merge("alpha=0.5", "output=said", "dtype=target", "max_shard_size=1MB")
    left_out = merge("alpha=0.5", "output=left_out", "max_shard_size=1MB")
    for given in (said, left_out):
        done = launch(*given, cwd=place)
        assert done.returncode == 0, done.stderr
    assert Manifest.read(place / "said").plan == Manifest.read(place / "left_out").plan
    for file in (place / "said").iterdir():
        assert file.read_bytes() == (place / "left_out" / file.name).read_bytes()
    done = launch(*said, "output=left_out", cwd=place)
    assert done.returncode == 0 and "left_out: already complete" in done.stdout, done.stderr
    recipe = "merge_method: passthrough\ndtype: float32\nmodels: [{model: family/target}]\n"
    (place / "recipe.yml").write_text(recipe)
    done = launch("recipe=recipe.yml", "output=of_recipe", "dtype=target", cwd=place)
    assert done.returncode == 0, done.stderr
    assert {tensor.dtype for tensor in load_checkpoint(place / "of_recipe").values()} == {torch.bfloat16}


@pytest.mark.slow
def test_several_masked_vectors_from_the_command(place):
    first = "{plus: family/grpo, minus: family/sft, alpha: 0.5, mask: {layers: [[1, 1]]}}"
    second = "{plus: family/sft, minus: family/grpo, alpha: 0.25, mask: {exclude: ['.*embed.*']}}"
    done = launch("target=family/target", f"vectors=[{first},{second}]", "output=out", "merge.workers=1", cwd=place)
    assert done.returncode == 0, done.stderr
    places = ("family/target", "family/grpo", "family/sft", "out")
    target, grpo, sft, out = (load_checkpoint(place / p) for p in places)
    for name, tensor in out.items():
        difference = grpo[name].double() - sft[name].double()
        factor = 0.5 * (".layers.1." in name) - 0.25 * ("embed" not in name)
        assert torch.equal(tensor, (target[name].double() + factor * difference).bfloat16()), name


@pytest.mark.slow
def test_methods_from_the_command(place):
    """The card says what was done; other densities, and the seed of a random choice, are other weights."""
    weights = []
    for k, chosen in enumerate((["method=ties"], ["method=ties", "merge.density=0.3"], ["method=dare"], SEEDED)):
        done = launch(*merge("merge.workers=1", f"output=out{k}", *chosen), cwd=place)
        assert done.returncode == 0, done.stderr
        weights.append(load_checkpoint(place / f"out{k}")["model.embed_tokens.weight"])
    assert not any(torch.equal(one, other) for one, other in combinations(weights, 2))
    for k, said in enumerate(("; density 0.2)", "; density 0.3)", "density 0.1, seed 0)", "density 0.1, seed 3)")):
        card = (place / f"out{k}/README.md").read_text()
        name = "DARE" if "seed" in said else "TIES"
        assert f"θ = {name}(target + 1 · (grpo − sft); " in card and said in card
        assert f"combined by {name}" in card


@pytest.mark.slow
def test_no_tokenizer_at_all_is_legal_and_noted(place):
    for member in ("target", "sft", "grpo"):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (place / "family" / member / file).unlink()
    done = launch(*merge("merge.workers=1"), cwd=place)
    assert done.returncode == 0, done.stderr
    assert "token ids were not compared" in done.stdout


def test_a_plan_touches_nothing(place):
    before = contents(place)
    done = launch(*merge("stages=[plan]", "alpha=[0.5,1]", "output=o-{alpha}"), cwd=place)
    assert done.returncode == 0, done.stderr
    assert "o-0.5" in done.stdout and "reads 2,5" in done.stdout
    assert contents(place) == before


def test_a_plan_foretells_what_falls_to_each_node(place):
    done = launch(*merge("stages=[plan]", "cluster.nodes=3", "merge.workers=5", "max_shard_size=300KB"), cwd=place)
    assert done.returncode == 0, done.stderr
    rows = [
        line.split() for line in done.stdout.splitlines() if line.split()[:1] == ["node"] and line.split()[1].isdigit()
    ]
    assert [(row[1], row[2]) for row in rows] == [("1", "2"), ("2", "2"), ("3", "1")]
    assert sum(int(row[3]) for row in rows) == int(re.search(r"(\d+) files", done.stdout)[1]) > 2


def test_a_plan_foretells_what_matrices_take_beside_memory(tmp_path):
    """Of TSV-M, and where: what `TMPDIR` says, whatever is there."""
    base = tensors(0) | {"model.wide": torch.randn(1100, 1200).bfloat16()}
    for seed, name in enumerate(("target", "sft", "one", "other")):
        write_checkpoint(tmp_path / name, near(base, seed))
    vectors = "vectors=[{plus: one, minus: sft}, {plus: other, minus: sft}]"
    asked = ("target=target", vectors, "method=tsv_m", "output=out", "stages=[plan]", "cache.dir=cache")
    done = launch(*asked, cwd=tmp_path, TMPDIR=str(tmp_path / "none"))
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"a worker takes [\d.]+ MiB for a matrix of tensor model.wide \(1100 × 1200\)\n"
        rf"  and up to 18.5 MiB of its temporary directory \({tmp_path}/none here\)\n",
        done.stdout,
    )


def test_a_plan_has_a_worker_even_where_there_are_fewer_cores_than_its_threads(place):
    done = launch(*merge("stages=[plan]", "merge.threads=4096"), cwd=place)
    assert done.returncode == 0, done.stderr
    assert "node 1" in done.stdout


@pytest.mark.slow
def test_a_batch_from_the_command(place):
    """`experiment=batch`, whose paths start where the repository does."""
    (place / "rvdist").mkdir()
    (place / "rvdist" / "pocket").symlink_to(POCKET)
    code = "import sys; sys.path.remove(''); from rvdist.launch import main; main()"
    command = [sys.executable, "-c", code, "experiment=batch", "hydra.run.dir=run"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    written = sorted(path.name for path in (place / "outputs/batch").iterdir())
    assert written == ["layers-by-depth", "sft--0.5", "target-0.5", "target-1"]
    timing = json.loads((place / "run/timing.json").read_text())
    size = sum(tensor.nbytes for tensor in load_checkpoint(POCKET / "target").values())
    assert timing["bytes_read"] == 3 * size and timing["bytes_written"] == 4 * size
    base, plus, minus = (load_checkpoint(POCKET / name) for name in ("sft", "grpo", "sft"))
    for name, tensor in load_checkpoint(place / "outputs/batch/sft--0.5").items():
        exact = base[name].double() - 0.5 * (plus[name].double() - minus[name].double())
        assert torch.equal(tensor, exact.to(tensor.dtype))


@pytest.mark.slow
def test_a_multirun_over_alpha(place):
    done = launch("-m", *merge("alpha=0.5,1", "output=out/{target}-{alpha}", "merge.workers=1"), cwd=place)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (place / "out").iterdir()) == ["target-0.5", "target-1"]


@pytest.mark.parametrize("launcher", ["rvdist_ray", "basic"])
def test_a_multirun_of_which_a_part_is_bad_input(place, launcher):
    more = ("output=parts/{alpha}", f"hydra/launcher={launcher}", "hydra.sweep.dir=parts/runs")
    done = launch("-m", "target=family/target", *VECTOR, "alpha=0.5,oops", *more, cwd=place)
    assert done.returncode == 1 and (place / "parts/0.5/rvdist.json").exists()
    assert done.stderr == "rvdist: job 1 (alpha=oops): alpha: 'oops' is not a finite number\n"
    shutil.rmtree(place / "parts")
    done = launch("-m", "target=family/target", *VECTOR, "alpha=never", *more, cwd=place)
    assert done.returncode == 2 and done.stderr == "rvdist: job 0: alpha: 'never' is not a finite number\n"
    if launcher != "basic":
        assert not (place / "parts").exists()


@pytest.mark.parametrize("launcher", ["rvdist_ray", "basic"])
def test_a_multirun_over_nothing(place, launcher):
    sentence = refused(place, "-m", "target=glob(family/*)", *VECTOR, f"hydra/launcher={launcher}", "output=out")
    assert "target: glob() chooses from a group, such as method, and target is none" in sentence
    if launcher != "basic":
        done = launch("-m", *merge("method=glob(x*)", "hydra.sweep.dir=no_job"), cwd=place)
        assert done.returncode == 2 and done.stderr.startswith("rvdist: -m: what is swept has no value"), done.stderr


def test_a_sweeper_that_asks_for_scores_where_there_are_none(place):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    sweep = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1", "hydra.sweep.dir=optuna")
    given = ("target=family/target", *VECTOR, "alpha=interval(-1,2)", "method=choice(linear)", "output=/dev/null")
    done = launch("-m", *given, *sweep, cwd=place)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(
        "rvdist: the jobs are done, but the sweeper"
    )
    assert len(re.findall(r"^[01] +(?:alpha=\S+ method=linear|method=linear alpha=\S+) ", done.stdout, re.M)) == 2
    shutil.rmtree(place / "optuna")


def test_help_and_the_composed_configuration(place):
    shown = launch("--help", cwd=place)
    assert shown.returncode == 0 and "benchmarks: none, pa" in shown.stdout and "search: none, racing" in shown.stdout
    assert "method: core_space, core_space_iso, dare, iso_c, linear, ties, tsv_m" in shown.stdout
    assert "density: 1.0" in shown.stdout
    composed = launch("experiment=demo", "--cfg", "job", cwd=place)
    assert composed.returncode == 0 and "pocket_sums" in composed.stdout


def test_the_import_is_cheap():
    heavy = ("torch", "ray", "vllm", "lm_eval", "transformers")
    code = f"import rvdist.launch, rvdist.stages.jobs, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path.home())
    assert done.stdout.strip() == "[]", done.stderr


def test_paths_that_hydra_has_no_words_for(place):
    """They are quoted for whoever did not."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parse = OverridesParser.create().parse_override
    for name in ("epoch=3-step=100", "Модель-模型", "a{b}c", "x#y", "run[v1]", "it's", 'q"t', "my model", "50%"):
        assert parse(readable(f"target={name}")).value() == name
        assert parse(readable(f"vector.plus=../{name}/x")).value() == f"../{name}/x"
    (place / "epoch=3 Модель").symlink_to(place / "family" / "target")
    done = launch("target=epoch=3 Модель", *VECTOR, "output=out", "stages=[plan]", "cache.dir=cache", cwd=place)
    assert done.returncode == 0 and "epoch=3 Модель +1" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("target=a,b",), '''put it in quotes for one of this name: "target='a,b'"'''),
        (("target=[a",), '''within those of the shell: "target='[a'"'''),
        (("target=my", "model"), """model: is no KEY=VALUE; a value with spaces is put in quotes"""),
    ],
)
def test_how_to_quote_is_said(place, arguments, sentence):
    assert sentence in refused(place, *arguments, *VECTOR, "output=out")
