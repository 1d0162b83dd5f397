"""Merges on a real Ray cluster against whole tensors computed in fp64 and rounded once."""

import hashlib
import os
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from checkpoints import load_checkpoint, near, tensors, write_checkpoint, write_family

from rvdist.core.config import OutputFormat
from rvdist.core.errors import BadInput
from rvdist.core.point import Mask, Term, Vector, WeightPoint
from rvdist.merge import crew, driver
from rvdist.merge import plan as planning
from rvdist.merge.actor import WorkerSettings
from rvdist.merge.driver import merge
from rvdist.merge.plan import build_plan
from rvdist.weights.checkpoint.source import open_source

pytestmark = pytest.mark.usefixtures("ray_local")


def run(points, outputs, workers=1, dtype=None, max_shard_size=None, alone=False, **options):
    sources = {s: open_source(s) for point in points for s in point.sources()}
    plan = build_plan(dict(zip(outputs, points, strict=True)), sources, OutputFormat(dtype, max_shard_size))
    return merge(plan, sources, defaultdict(lambda: "card\n"), WorkerSettings(workers, alone=alone), **options)


def shifted(paths, alpha=1.0, mask=None):
    return WeightPoint(
        str(paths["target"]), (Term(alpha, Vector(str(paths["plus"]), str(paths["minus"])), mask or Mask()),)
    )


def digests(path):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(path.iterdir())}


DTYPES, ALPHAS = [torch.bfloat16, torch.float16, torch.float32], [1.0, -0.7]


@pytest.fixture(scope="module")
def merged(ray_local, tmp_path_factory):
    """A family of each dtype, and below it what one merge makes of it at each α."""
    place = tmp_path_factory.mktemp("merged")
    families = {dtype: write_family(place / str(dtype), dtype, shards=2) for dtype in DTYPES}
    points = {
        place / str(dtype) / str(alpha): shifted(paths, alpha) for dtype, paths in families.items() for alpha in ALPHAS
    }
    run(list(points.values()), list(points))
    return families


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_equals_fp64_rounded_once(merged, dtype, alpha):
    paths = merged[dtype]
    out = paths["target"].parent / str(alpha)
    target, plus, minus, out = (load_checkpoint(p) for p in (*paths.values(), out))
    assert out.keys() == target.keys()
    off = total = 0
    for name, tensor in out.items():
        exact = (target[name].double() + alpha * (plus[name].double() - minus[name].double())).to(dtype)
        assert tensor.dtype == dtype and tensor.shape == exact.shape
        off += int((tensor != exact).sum())
        total += tensor.numel()
    assert off == 0 if dtype == torch.float32 else off < total / 10_000


def test_the_bytes_do_not_depend_on_the_number_of_workers(family, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "UNIT_BYTES", 1000)
    point = shifted(family(shards=3), 0.5)
    run([point], [tmp_path / "one"], workers=1)
    run([point], [tmp_path / "three"], workers=3)
    run([point], [tmp_path / "alone"], workers=2, alone=True)
    assert digests(tmp_path / "one") == digests(tmp_path / "three") == digests(tmp_path / "alone")
    assert "model.safetensors.index.json" in digests(tmp_path / "one")


def test_one_pass_writes_many_points(family, tmp_path):
    paths = family()
    points = [shifted(paths, alpha) for alpha in (-1.0, 0.0, 2.0)]
    stats = run(points, [tmp_path / str(k) for k in range(3)])
    assert stats.bytes_read == sum(open_source(str(p)).nbytes for p in paths.values())
    assert stats.bytes_written == 3 * open_source(str(paths["target"])).nbytes
    for k in (0, 2):
        run([points[k]], [tmp_path / f"alone{k}"])
        assert digests(tmp_path / str(k)) == digests(tmp_path / f"alone{k}")
    target, still = load_checkpoint(paths["target"]), load_checkpoint(tmp_path / "1")
    assert all(torch.equal(still[name], target[name]) for name in target)


def test_several_targets_share_the_bytes_of_their_donors(family, tmp_path):
    paths = family()
    other = write_checkpoint(tmp_path / "other", near(tensors(0), 7))
    again = {**paths, "target": other}
    stats = run([shifted(paths), shifted(again)], [tmp_path / "a", tmp_path / "b"])
    one = open_source(str(other)).nbytes
    assert stats.bytes_read == 4 * one, "two targets and two donors, each once"
    for point, name in ((shifted(paths), "a"), (shifted(again), "b")):
        run([point], [tmp_path / f"{name}-alone"])
        assert digests(tmp_path / name)["model.safetensors"] == digests(tmp_path / f"{name}-alone")["model.safetensors"]


def test_an_output_under_dev_null_is_computed_and_not_kept(family, tmp_path):
    paths = family()
    stats = run([shifted(paths)], [Path("/dev/null/a")])
    assert stats.bytes_read == 3 * stats.bytes_written == 3 * open_source(str(paths["target"])).nbytes
    with pytest.raises(BadInput, match="infinite"):
        run([shifted(paths, 1e9)], [Path("/dev/null")], dtype="F16")


def test_masks_and_several_vectors(family, tmp_path):
    paths = family()
    base = load_checkpoint(paths["target"])
    other = write_checkpoint(tmp_path / "other", near(base, 9))
    mask = Mask(include=(r".*self_attn.*",), layers=((1, 2),))
    vectors = [Vector(str(paths["plus"]), str(paths["minus"])), Vector(str(other), str(paths["minus"]))]
    run(
        [WeightPoint(str(paths["target"]), (Term(0.75, vectors[0], mask), Term(-0.25, vectors[1])))], [tmp_path / "out"]
    )
    plus, minus, second, out = (load_checkpoint(p) for p in (paths["plus"], paths["minus"], other, tmp_path / "out"))
    for name, tensor in out.items():
        exact = base[name].double() - 0.25 * (second[name].double() - minus[name].double())
        exact += 0.75 * mask.coefficient(name, 3) * (plus[name].double() - minus[name].double())
        assert torch.equal(tensor, exact.bfloat16()), name


def test_dtype_and_shard_size_of_the_output(family, tmp_path):
    paths = family()
    run([shifted(paths)], [tmp_path / "out"], dtype="F32", max_shard_size=40_000)
    out, target, plus, minus = (load_checkpoint(p) for p in (tmp_path / "out", *paths.values()))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    for name, tensor in out.items():
        assert torch.equal(tensor, (target[name].double() + plus[name].double() - minus[name].double()).float())
    assert '"dtype": "float32"' in (tmp_path / "out" / "config.json").read_text()


def test_what_stands_beside_the_weights_is_carried_over(merged):
    target = merged[torch.bfloat16]["target"]
    out = target.parent / "1.0"
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (target / name).read_bytes()
    assert (out / "README.md").read_text() == "card\n"


def test_nonfinite_results_are_refused_and_leave_nothing(tmp_path):
    base = {"w": torch.full((8,), 60000.0).half()}
    paths = {"target": base, "plus": {"w": torch.full((8,), 9000.0).half()}, "minus": {"w": torch.zeros(8).half()}}
    paths = {name: write_checkpoint(tmp_path / name, weights) for name, weights in paths.items()}
    with pytest.raises(BadInput, match="tensor w would be .*: all it is made of is finite, and the result overflows"):
        run([shifted(paths)], [tmp_path / "out"])
    assert not list(tmp_path.glob("out*"))
    run([shifted(paths)], [tmp_path / "out"], allow_nonfinite=True)
    assert load_checkpoint(tmp_path / "out")["w"].isinf().all()


@pytest.mark.parametrize(
    "bad",
    [
        ["target"],
        pytest.param(["plus"], marks=pytest.mark.slow),
        pytest.param(["minus"], marks=pytest.mark.slow),
        ["plus", "minus"],
    ],
)
def test_the_source_that_holds_what_is_not_finite_is_named(bad, tmp_path):
    """Also where infinity less infinity is what is not a number."""
    weights = {name: {"v": torch.ones(5).half(), "w": torch.ones(4, 3).half()} for name in ("target", "plus", "minus")}
    for name in bad:
        weights[name]["w"][2, 1] = float("inf")
    paths = {name: write_checkpoint(tmp_path / name, own) for name, own in weights.items()}
    with pytest.raises(BadInput, match="tensor w would be infinite or not a number: ") as caught:
        run([shifted(paths)], [tmp_path / "out"])
    sentence = str(caught.value)
    for name in weights:
        part = f"{tmp_path / name}/model.safetensors ({'the target' if name == 'target' else name}) has 1 value that is"
        assert (part in sentence) == (name in bad)
    assert "the first at [2, 1]" in sentence and "allow_nonfinite=true" in sentence and "overflow" not in sentence


def test_a_source_that_changes_underneath_stops_the_merge(family, tmp_path):
    paths = family()
    point = shifted(paths)
    sources = {s: open_source(s) for s in point.sources()}
    plan = build_plan({tmp_path / "out": point}, sources)
    file = paths["plus"] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(BadInput, match="plus/model.safetensors: it changed or was truncated"):
        merge(plan, sources, defaultdict(str), WorkerSettings(1))
    file.write_bytes(bytes(sources[str(paths["plus"])].stamps["model.safetensors"].size))
    with pytest.raises(BadInput, match="plus/model.safetensors: changed while it was being read"):
        merge(plan, sources, defaultdict(str), WorkerSettings(1))
    assert not list(tmp_path.glob("out*"))


def test_a_killed_worker_costs_its_units_in_flight_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "UNIT_BYTES", 1 << 20)
    base = {f"layers.{k}.w": v for k in range(12) for v in [tensors(k)["model.embed_tokens.weight"].repeat(120, 1)]}
    paths = {
        name: write_checkpoint(tmp_path / name, weights)
        for name, weights in {"target": base, "plus": near(base, 1), "minus": near(base, 2)}.items()
    }
    run([shifted(paths)], [tmp_path / "undisturbed"])
    real, mark = crew.WorkerActor, tmp_path / "killed"

    class Killed(real):
        def run(self, unit, claims):
            if unit.start and not mark.exists():  # it has done others
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return real.run(self, unit, claims)

    monkeypatch.setattr(crew, "WorkerActor", Killed)
    run([shifted(paths)], [tmp_path / "disturbed"], workers=2)
    assert mark.exists()
    assert digests(tmp_path / "disturbed") == digests(tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_killed_run_is_resumed_and_redoes_only_what_the_journal_lacks(tmp_path, monkeypatch):
    """The driver's process group dies by SIGKILL halfway; the same command goes on and the bytes are the same."""
    base = {f"layers.{k}.w": tensors(k)["model.embed_tokens.weight"].repeat(400, 1) for k in range(8)}
    paths = {
        name: write_checkpoint(tmp_path / name, weights)
        for name, weights in {"target": base, "plus": near(base, 1), "minus": near(base, 2)}.items()
    }
    script = tmp_path / "merge.py"
    script.write_text(RESUMABLE)
    command = [sys.executable, str(script), *map(str, paths.values()), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(Path(driver.__file__).parents[2])}
    killed = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, env=environment)
    for line in killed.stdout:
        if line.startswith(b"journalled"):
            break
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "out").exists()
    journalled = len((tmp_path / "out.partial/journal.jsonl").read_text().splitlines()) - 1
    assert journalled > 0
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    written = int(done.stdout.split("written ")[1])
    total = open_source(str(paths["target"])).nbytes
    assert 0 < written < total, "a part was redone, not all"
    run([shifted(paths)], [tmp_path / "undisturbed"])
    resumed, whole = digests(tmp_path / "out"), digests(tmp_path / "undisturbed")
    assert resumed["model.safetensors"] == whole["model.safetensors"]


RESUMABLE = """
import sys
from pathlib import Path
from rvdist.core import cluster
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.checkpoint.staging import Staging
from rvdist.merge import accounts, crew, plan as planning
from rvdist.merge import driver
from rvdist.core.point import Term, Vector, WeightPoint

planning.UNIT_BYTES = 4 << 20
accounts.SYNC_BYTES = 8 << 20
journal = Staging.journal
def telling(self, written):
    journal(self, written)
    print("journalled", flush=True)
Staging.journal = telling

target, plus, minus, out = sys.argv[1:]
cluster.connect("local")
point = WeightPoint(target, (Term(1.0, Vector(plus, minus)),))
sources = {s: open_source(s) for s in point.sources()}
plan = planning.build_plan({Path(out): point}, sources)
print("written", driver.merge(plan, sources, {point: ""}, crew.WorkerSettings(1)).bytes_written)
"""
