"""Scoring points whose base engines do not start on, as with the tokens of several models: in place as when written."""

import fcntl
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from checkpoints import POCKET, launch, load_checkpoint
from fp8 import BLOCK, quantize
from moved import move
from safetensors.torch import save_file

from rvdist.core.config import BenchmarksConfig, CacheConfig, Config, SweepConfig, VectorConfig
from rvdist.core.errors import BadInput
from rvdist.core.point import Term, Vector, WeightPoint
from rvdist.core.timing import Timing
from rvdist.core.vocabulary import Vocabulary
from rvdist.stages.bases import Bases, require_as_written
from rvdist.stages.job import Job
from rvdist.stages.prepare import Known, prepare
from rvdist.weights.checkpoint.journal import Manifest
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.checkpoint.vocabulary import remap

ENGINES = ("engine.count=1", "engine.kv_cache_gib=0.125", "cluster.nodes=1")
SCORING = ("benchmarks.tasks=[pocket_sums,pocket_choice]", "benchmarks.limit=8", "sweep.alphas=null", *ENGINES)


def samples(run, arm):
    lines = (run / "samples" / f"{arm}.jsonl").read_text().splitlines()
    return [json.loads(line) | {"arm": None, "alpha": None, "point": None} for line in lines]


@pytest.mark.slow
def test_scores_in_place_are_those_of_what_is_written(tmp_path):
    donors = {name: move(POCKET / name, tmp_path / name, f"<{name}>") for name in ("grpo", "sft")}
    given = (f"target={POCKET / 'target'}", f"vector.plus={donors['grpo']}", f"vector.minus={donors['sft']}")
    union = (*given, "tokenizer=union", "alpha=[0,0.5]", "output=out-{alpha}", "cache.dir=cache")
    done = launch(*union, *SCORING, "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    arms = "arms=[{name: baseline, weights: out-0}, {name: half, weights: out-0.5}]"
    done = launch("target=out-0", arms, *SCORING, "cache.dir=other", "hydra.run.dir=fresh", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for arm, written in (("baseline", "baseline"), ("alpha=0.5", "half")):
        assert samples(tmp_path / "run", arm) == samples(tmp_path / "fresh", written)
    (start,) = (tmp_path / "cache" / "bases").iterdir()
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (start / file).read_bytes() == (tmp_path / "out-0" / file).read_bytes()
    done = launch(*union, *SCORING, "hydra.run.dir=again", cwd=tmp_path)
    assert "no engine is needed" in done.stdout, done.stderr
    (start / "tokenizer.json").write_bytes((POCKET / "target" / "tokenizer.json").read_bytes())
    done = launch(*union, *SCORING, "hydra.run.dir=changed", cwd=tmp_path)
    assert done.returncode == 2 and f"{start}: is not as it was written; delete it" in done.stderr


def write_fp8(place):
    """The pocket target with its layers' matrices in fp8, and what has its points scored."""
    weights = load_checkpoint(POCKET / "target")
    for name in [name for name, tensor in weights.items() if tensor.ndim == 2 and ".layers." in name]:
        weights[name], weights[f"{name}_scale_inv"] = quantize(weights[name], BLOCK)
    config = json.loads((POCKET / "target" / "config.json").read_text())
    said = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}
    shutil.copytree(POCKET / "target", place)
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    (place / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    return ("dtype=bfloat16",)


def write_pickled(place):
    shutil.copytree(POCKET / "target", place, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_checkpoint(POCKET / "target"), place / "pytorch_model.bin")
    return ()


def write_stack(place):
    """A recipe whose layers are the target's own."""
    layers = json.loads((POCKET / "target" / "config.json").read_text())["num_hidden_layers"]
    source = f"sources: [{{model: {POCKET / 'target'}, layer_range: [%d, %d]}}]"
    slices = f"slices: [{{{source % (0, 1)}}}, {{{source % (1, layers)}}}]"
    place.write_text(f"{slices}\nmerge_method: passthrough\ndtype: bfloat16\n")
    return ()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "write", "union"),
    [
        ("fp8", write_fp8, False),
        ("fp8", write_fp8, True),
        ("pickled", write_pickled, False),
        ("stack.yml", write_stack, False),
    ],
)
def test_points_of_a_base_that_engines_do_not_start_on_are_scored_as_they_are_written(name, write, union, tmp_path):
    donors = {kind: POCKET / kind for kind in ("grpo", "sft")}
    if union:
        donors = {kind: move(place, tmp_path / kind, f"<{kind}>") for kind, place in donors.items()}
    given = (f"target={name}", f"vector.plus={donors['grpo']}", f"vector.minus={donors['sft']}", "cache.dir=cache")
    given += (*write(tmp_path / name), *["tokenizer=union"] * union)
    done = launch(*given, "sweep.alphas=[0,0.5]", *SCORING[:2], *ENGINES, "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = launch(*given, "alpha=[0,0.5]", "output=out-{alpha}", "stages=[merge]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    arms = "arms=[{name: baseline, weights: out-0}, {name: half, weights: out-0.5}]"
    done = launch("target=out-0", arms, *SCORING, "cache.dir=other", "hydra.run.dir=fresh", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert samples(tmp_path / "run", "baseline") == samples(tmp_path / "fresh", "baseline") != []
    assert samples(tmp_path / "run", "alpha=0.5") == samples(tmp_path / "fresh", "half") != []


def test_points_of_a_quantised_base_are_scored_where_it_is_said_how_they_are_rounded(tmp_path):
    write_fp8(tmp_path / "fp8")
    given = ("target=fp8", f"vector.plus={POCKET / 'grpo'}", f"vector.minus={POCKET / 'sft'}", "output=out")
    for dtype in ("target", "float16"):
        done = launch(*given, f"dtype={dtype}", *SCORING[:2], *ENGINES, cwd=tmp_path)
        assert done.returncode == 2 and "fp8: is quantised, and engines serve plain weights; set dtype" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"fp8", "outputs"}


@pytest.mark.slow
def test_a_text_is_scored_along_alpha_with_the_tokens_of_several_models(tmp_path):
    """What `analyze.text` advises: from the target, and from a donor that has a token of its own."""
    donors = {name: move(POCKET / name, tmp_path / name, f"<{name}>") for name in ("grpo", "sft")}
    (tmp_path / "text").write_text("12 + 30 = 42\n" * 40)
    scoring = ("benchmarks.tasks=[text:text]", "benchmarks.apply_chat_template=false", *ENGINES)
    for target in (POCKET / "target", donors["sft"]):
        given = (
            f"target={target}",
            f"vector.plus={donors['grpo']}",
            f"vector.minus={donors['sft']}",
            "tokenizer=union",
        )
        place = tmp_path / f"of-{target.name}"
        place.mkdir()
        shutil.copy(tmp_path / "text", place)
        done = launch(*given, "sweep.alphas=[0,0.5]", "cache.dir=c", *scoring, "hydra.run.dir=run", cwd=place)
        assert done.returncode == 0, done.stderr
        done = launch(*given, "alpha=0.5", "output=out", "cache.dir=d", "stages=[merge]", cwd=place)
        assert done.returncode == 0, done.stderr
        done = launch("target=out", "cache.dir=d", *scoring, "hydra.run.dir=fresh", cwd=place)
        assert done.returncode == 0, done.stderr
        assert samples(place / "run", "alpha=0.5") == samples(place / "fresh", "baseline") != []
        assert samples(place / "run", "alpha=0.5") != samples(place / "run", "baseline")


def test_what_engines_start_on_is_as_it_was_written_or_refused(tmp_path):
    names = [
        str(POCKET / "target"),
        *(str(move(POCKET / name, tmp_path / name, f"<{name}>")) for name in ("grpo", "sft")),
    ]
    given = (f"target={names[0]}", f"vector.plus={names[1]}", f"vector.minus={names[2]}", "tokenizer=union")
    done = launch(*given, "alpha=0", "output=out", "cache.dir=cache", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    point = WeightPoint(names[0], (Term(0.0, Vector(*names[1:])),), vocabulary=Vocabulary("union", tuple(names)))
    base = remap(point, {name: open_source(name) for name in names}, open_source)[names[0]]
    out = tmp_path / "out"
    plan = Manifest.read(out).plan
    require_as_written(out, plan, base)
    other = {"tokenizer.json": '"5":', "config.json": "rms_norm_eps", "chat_template.jinja": "User"}
    for name, old in other.items():
        whole = (out / name).read_text()
        (out / name).write_text(whole.replace(old, old.swapcase() if name != "tokenizer.json" else '"5 ":'))
        assert (out / name).read_text() != whole
        with pytest.raises(BadInput, match="is not as it was written; delete it"):
            require_as_written(out, plan, base)
        (out / name).write_text(whole)
    (out / "special_tokens_map.json").write_text("{}")
    with pytest.raises(BadInput, match="is not as it was written; delete it"):
        require_as_written(out, plan, base)
    (out / "special_tokens_map.json").unlink()
    require_as_written(out, plan, base)
    (out / "model.safetensors").write_bytes(b"")
    with pytest.raises(BadInput, match="is not as it was written; delete it"):
        require_as_written(out, plan, base)


class OneNode:
    """What is up, where all there is to know is that it is one machine."""

    nodes = ("here",)

    def resources(self):
        return self

    def cool(self):
        pass


def prepared(place, cache):
    """A sweep of a quantised target, all that can be refused being refused."""
    if not (place / "fp8").exists():
        write_fp8(place / "fp8")
    settings = Config(
        target=str(place / "fp8"),
        vector=VectorConfig(str(POCKET / "grpo"), str(POCKET / "sft")),
        dtype="bfloat16",
        sweep=SweepConfig([0.5]),
        benchmarks=BenchmarksConfig(["pocket_sums"], limit=2),
        cache=CacheConfig(str(cache)),
    )
    return prepare(Job(settings, place / "run", "", Timing()), Known())


def base_of(one):
    return Bases(OneNode()).of(one, one.arms[0].point)


def test_a_copy_that_another_run_writes_is_waited_for(tmp_path, capsys):
    """One that died of it is not; nor is one that ended in the meantime."""
    one = prepared(tmp_path, tmp_path / "cache")
    first = base_of(one).path
    said = " ".join(capsys.readouterr().out.split())
    assert f"a copy of {tmp_path / 'fp8'} for engines to start on" in said and "may be deleted when none runs" in said
    whole = (first / "model.safetensors").read_bytes()
    for finishes in (True, False):
        moved = first.rename(tmp_path / "moved")
        (partial := first.with_name(f"{first.name}.partial")).mkdir(0o700)
        lock = os.open(partial / "lock", os.O_RDWR | os.O_CREAT)
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(base_of, prepared(tmp_path, tmp_path / "cache"))
            while "another run is writing it" not in (said := " ".join(capsys.readouterr().out.split())):
                assert not waiting.done(), waiting.result()
                time.sleep(0.01)
            if finishes:
                shutil.copytree(moved, first)
                shutil.rmtree(partial)
            os.close(lock)
            assert waiting.result().path == first
        assert (first / "model.safetensors").read_bytes() == whole and not partial.exists()
        shutil.rmtree(moved)


def test_where_no_copy_can_be_made_it_is_the_cache_that_is_to_be_changed(tmp_path):
    one = prepared(tmp_path, tmp_path / "cache")
    (tmp_path / "cache" / "bases").symlink_to("bases")
    with pytest.raises(BadInput, match="cache/bases/.*: cannot be created .*; set cache.dir to another directory"):
        base_of(one)
