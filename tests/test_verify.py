import json
import shutil
import subprocess
import sys
from collections import defaultdict

import pytest
import torch
from checkpoints import POCKET, load_checkpoint
from safetensors.torch import load_file, save_file

from rvdist.core.point import Term, Vector, WeightPoint
from rvdist.merge.actor import WorkerSettings
from rvdist.merge.driver import merge
from rvdist.merge.plan import build_plan
from rvdist.verify import verify
from rvdist.weights.checkpoint.source import open_source


@pytest.fixture(scope="module")
def merged(ray_local, tmp_path_factory):
    path = tmp_path_factory.mktemp("verify") / "out"
    point = WeightPoint(str(POCKET / "target"), (Term(1.0, Vector(str(POCKET / "grpo"), str(POCKET / "sft"))),))
    sources = {s: open_source(s) for s in point.sources()}
    merge(build_plan({path: point}, sources), sources, defaultdict(str), WorkerSettings(1))
    return path


@pytest.fixture
def copy(merged, tmp_path):
    shutil.copytree(merged, tmp_path / "copy")
    return tmp_path / "copy"


def rewrite(path, change):
    weights = load_file(path / "model.safetensors")
    change(weights)
    (path / "rvdist.json").unlink()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


AT_WORK = """
import signal, sys
import rvdist.{0} as door
door.{0} = lambda *given: signal.raise_signal(signal.SIGINT)
door.main()
"""


@pytest.mark.parametrize("door", ["verify", "inspect"])
def test_an_interrupt_and_a_place_that_cannot_be_are_one_sentence(door, tmp_path):
    (tmp_path / "loop").symlink_to("loop")

    def run(*command):
        ended = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
        return ended.returncode, ended.stderr

    assert run("-c", AT_WORK.format(door), "path") == (130, "rvdist: interrupted\n")
    for path in ("loop", "loop/path", "a" * 300, "b/" * 3000):
        status, errors = run("-m", f"rvdist.{door}", path)
        assert status == 2 and errors.startswith("rvdist: ") and errors.count("\n") == 1, errors


def test_what_a_merge_wrote_is_sound(copy):
    verdict = verify(copy, model=True)
    assert verdict.problems == [] and verdict.unchecked == []
    assert verdict.tensors == len(load_checkpoint(copy))


def test_one_changed_bit_is_found(copy):
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    (problem,) = verify(copy).problems
    assert "model.safetensors: bytes" in problem and "are not what was written" in problem


def test_another_file_under_the_same_name_is_found(copy):
    manifest = (copy / "rvdist.json").read_text()
    rewrite(copy, lambda w: w.update({"extra": torch.zeros(8)}))
    (copy / "rvdist.json").write_text(manifest)
    assert any("does not speak of every byte" in problem for problem in verify(copy).problems)


def test_infinite_values_wrong_shapes_and_missing_tensors_are_found(copy):
    def harm(weights):
        weights["model.norm.weight"] = torch.full((130,), float("inf")).bfloat16()
        weights.pop("model.layers.1.mlp.up_proj.weight")

    rewrite(copy, harm)
    verdict = verify(copy, model=True)
    text = "\n".join(verdict.problems)
    assert "model.norm.weight has 130 values that are infinite" in text
    assert "model.norm.weight has shape [130] where the config says [128]" in text
    assert "model.layers.1.mlp.up_proj.weight is missing" in text
    assert any("digests were not checked" in line for line in verdict.unchecked)


def test_what_layers_and_the_config_say_is_checked_without_transformers(copy):
    def harm(weights):
        weights["model.norm.weight"] = torch.ones(130).bfloat16()
        weights.pop("model.embed_tokens.weight")
        for name in [name for name in weights if name.startswith("model.layers.1.")]:
            weights.pop(name)

    rewrite(copy, harm)
    assert verify(copy).problems == [
        "tensor model.norm.weight has shape [130] where the config says [128]",
        "layer 1 is missing, of the 2 there should be",
    ]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float32, torch.float64])
def test_values_that_are_not_finite_are_found_in_every_dtype(dtype, tmp_path):
    values = torch.tensor([1.0, float("nan"), -2.0, float("inf"), 0.0])
    save_file(
        {"a": torch.ones(3), "b": values.to(dtype), "c": torch.ones(2, dtype=torch.int32)}, tmp_path / "x.safetensors"
    )
    count = 2 if dtype != torch.float8_e4m3fn else int(values.to(dtype).float().isfinite().logical_not().sum())
    assert verify(tmp_path).problems == [
        f"x.safetensors: tensor b has {count} values that are infinite or not a number"
    ]


@pytest.mark.parametrize("tool", ["verify", "inspect"])
def test_neither_imports_what_takes_seconds(tool):
    heavy = "{'torch', 'transformers', 'ray', 'vllm', 'lm_eval', 'hydra'}"
    program = f"import runpy, sys; sys.argv = ['x', {str(POCKET / 'target')!r}]\n"
    program += f"try: runpy.run_module('rvdist.{tool}', run_name='__main__')\n"
    program += f"except SystemExit as end: assert not end.code\nassert not {heavy} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_command_and_its_exit_status(copy, tmp_path):
    def command(*arguments):
        return subprocess.run([sys.executable, "-m", "rvdist.verify", *arguments], capture_output=True, text=True)

    sound = command(str(copy), "--json")
    assert sound.returncode == 0 and json.loads(sound.stdout)["problems"] == []
    (copy / "config.json").write_text('{"model_type": "unheard-of"}')
    unknown = command(str(copy), "--model")
    assert unknown.returncode == 0 and "names were not compared" in unknown.stdout
    (copy / "model.safetensors").write_bytes(b"short")
    broken = command(str(copy))
    assert broken.returncode == 2 and broken.stderr.startswith("rvdist: ") and "Traceback" not in broken.stderr
