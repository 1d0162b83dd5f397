"""What decides bytes of an output, of a stored vector or of an answer is in the name by which it is known again."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapters import ALPHA, RANK, factors, write_adapter
from alone import planned
from checkpoints import launch, load_checkpoint, write_checkpoint, write_family
from safetensors.torch import load_file, save_file

from rvdist.core.config import OutputFormat
from rvdist.core.config.points import Storage
from rvdist.core.method import MethodSpec
from rvdist.core.point import Mask, Term, Vector, WeightPoint
from rvdist.evaluate.cache import serving_digest
from rvdist.merge import plan
from rvdist.merge.plan import AS_THE_BASE
from rvdist.weights import store
from rvdist.weights.checkpoint.bound import settle
from rvdist.weights.checkpoint.digest import checkpoint_digest
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.header import Stamp
from rvdist.weights.checkpoint.source import open_source

SOURCES = ("target", "plus", "minus", "adapter", "vector")
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
ABOUT = {  # keys of config.json that say how tensors lie, or go into an output
    "model_type": "gpt_oss", "tie_word_embeddings": False, "quantization_config": FP8, "num_attention_heads": 3,
    "num_key_value_heads": 1, "vocab_size": 300, "dtype": "float16", "text_config": {"model_type": "gpt_oss"},
}  # fmt: skip
EXACT = Storage()
BESIDE = ("tokenizer.json", "chat_template.jinja", "generation_config.json", "special_tokens_map.json", "modeling.py")


def change_weights(file: Path) -> None:
    found = load_file(file)
    found[min(found)].view(-1)[0] += 1
    save_file(found, file, metadata={"format": "pt"})


def change_json(file: Path, **said: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | said))


IN_FILES = {
    f"{name}'s {key}": (name, "config.json", {key: value}) for name in SOURCES[:3] for key, value in ABOUT.items()
}
IN_FILES |= {f"{name}'s weights": (name, "model.safetensors", None) for name in ("target", "plus", "minus")}
IN_FILES |= {
    "the adapter's scale": ("adapter", "adapter_config.json", {"lora_alpha": 7}),
    "the peft that wrote the adapter": ("adapter", "adapter_config.json", {"peft_version": "0.17.0"}),
    "the adapter's factors": ("adapter", "adapter_model.safetensors", None),
    "how the vector is stored": ("vector", "vector.json", {"more": 1}),
    "the vector's model_type": ("vector", "config.json", {"model_type": "gpt_oss"}),
    "the vector's values": ("vector", "vector.safetensors", None),
}
IN_THE_OUTPUT = {f"the target's {name}": ("target", name, None) for name in BESIDE}


@contextmanager
def changed(file: Path, said: dict[str, object] | None) -> Iterator[None]:
    """The file with something changed, meanwhile."""
    before = file.read_bytes() if file.exists() else None
    if said is not None:
        change_json(file, **said)
    elif file.suffix == ".safetensors":
        change_weights(file)
    else:
        file.write_bytes((before or b"{}") + b" ")
    yield
    file.unlink() if before is None else file.write_bytes(before)


@pytest.fixture
def family(tmp_path: Path) -> Path:
    write_family(tmp_path)
    for name in ("target", "plus", "minus"):
        whole = load_checkpoint(tmp_path / name)
        for file in (tmp_path / name).glob("*.safetensors*"):
            file.unlink()
        save_file(whole, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    write_adapter(tmp_path / "adapter", factors())
    vector = Vector(str(tmp_path / "plus"), str(tmp_path / "minus"))
    sources = {source: open_source(source) for source in vector.sources()}
    store.save(vector, sources, tmp_path / "vector", Storage(), say=lambda text: None)
    return tmp_path


def point_of(place: Path) -> WeightPoint:
    """One of all kinds of sources."""
    plus, minus, adapter, vector = (str(place / name) for name in SOURCES[1:])
    terms = (Term(0.5, Vector(plus, minus)), Term(0.25, Vector(adapter)), Term(0.125, Vector(vector)))
    return WeightPoint(str(place / "target"), terms)


def plan_of(place: Path, form: OutputFormat = AS_THE_BASE, point: WeightPoint | None = None) -> str:
    (digests,) = planned({place / "out": point or point_of(place)}, form)[0].digests
    return digests[0]


def answers_of(place: Path) -> tuple[str, str]:
    """What of a point's files names the answers of an engine: the point's digest, and that of what is served beside."""
    point = point_of(place)
    sources = {source: open_source(source) for source in point.sources()}
    contents = {name: checkpoint_digest(source) for name, source in sources.items()}
    return settle(point, sources).digest(contents), serving_digest(place / "target")


@pytest.fixture
def as_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether such models go together is another question: here some of them would be refused."""
    monkeypatch.setattr("rvdist.weights.compat.check", lambda point, sources: None)


@pytest.mark.usefixtures("as_they_lie")
def test_what_stands_in_files_names_an_output_and_answers(family):
    seen, answers = {plan_of(family)}, answers_of(family)
    assert {plan_of(family)} == seen and answers_of(family) == answers
    unnoticed = []
    for what, (source, file, said) in (IN_FILES | IN_THE_OUTPUT).items():
        with changed(family / source / file, said):
            named = plan_of(family)
            if named in seen or (answers_of(family) == answers and not file.endswith(".py")):  # no engine runs its code
                unnoticed.append(what)
            seen.add(named)
        assert answers_of(family) == answers
    assert unnoticed == []


SETTINGS = {
    "alpha": {"alpha": 0.75},
    "mask.include": {"mask": Mask(include=(r".*q_proj.*",))},
    "mask.exclude": {"mask": Mask(exclude=(r".*q_proj.*",))},
    "mask.layers": {"mask": Mask(layers=((0, 1),))},
    "mask.depth": {"mask": Mask(depth=(0.5, 1.0))},
    "density": {"density": (0.5,)},
}
METHODS = [MethodSpec("ties", density=0.5), MethodSpec("ties", density=0.4), MethodSpec("dare", density=0.5)]
METHODS += [replace(METHODS[-1], seed=7)]


@pytest.mark.usefixtures("as_they_lie")
def test_every_setting_names_an_output(family, monkeypatch):
    point = point_of(family)
    asked = [point, *(replace(point, method=method) for method in METHODS)]
    for fields in SETTINGS.values():
        asked.append(replace(point, terms=(replace(point.terms[0], **fields), *point.terms[1:])))
    asked.append(replace(point, terms=point.terms[::-1]))
    found = [plan_of(family, point=one) for one in asked]
    found += [plan_of(family, form) for form in (OutputFormat("BF16"), OutputFormat("F32"), OutputFormat(None, 20_000))]
    monkeypatch.setattr(plan, "_ARITHMETIC", plan._ARITHMETIC + 1)
    found.append(plan_of(family))
    assert len({*found}) == len(found) == 16


VECTORS = {what: changed for what, changed in IN_FILES.items() if changed[0] in ("plus", "minus")}
VECTORS = {f"plus's {name}": ("plus", name, None) for name in BESIDE} | VECTORS


def test_what_stands_in_files_names_a_stored_vector(family):
    def is_named(storage: Storage = EXACT) -> bool:
        vector = Vector(str(family / "plus"), str(family / "minus"))
        sources = {source: open_source(source) for source in vector.sources()}
        return store.is_saved(vector, sources, family / "vector", storage)

    assert is_named() and not any(map(is_named, (Storage("BF16"), Storage(rank=2), Storage(density=0.5))))
    for what, (source, file, said) in VECTORS.items():
        with changed(family / source / file, said):
            assert not is_named(), what


def test_a_config_that_is_put_right_is_merged_anew(tmp_path):
    """Which way square experts lie, model_type alone tells: what it says is part of what an output is."""
    generator, count, size = torch.Generator().manual_seed(0), 3, 16
    name = "model.layers.0.mlp.experts.down_proj"
    base = {name: torch.randn(count, size, size, generator=generator) * 0.02, "model.norm.weight": torch.ones(size)}
    write_checkpoint(tmp_path / "target", base, config={"model_type": "mixtral"})
    a, b = (torch.randn(shape, generator=generator) * 0.05 for shape in ((count * RANK, size), (size, count * RANK)))
    at = "base_model.model.model.layers.0.mlp.experts.lora_{}.weight"
    adapted = {"target_parameters": ["experts.down_proj"]}
    write_adapter(tmp_path / "adapter", {at.format("A"): a, at.format("B"): b}, **adapted)
    products = [b[:, e::count].double() @ a[e * RANK : (e + 1) * RANK].double() for e in range(count)]
    change = torch.stack(products) * ALPHA / RANK

    def run() -> str:
        done = launch("target=target", "vector.path=adapter", "output=out", cwd=tmp_path)
        assert done.returncode in (0, 2), done.stderr
        return done.stdout + done.stderr

    run()
    written = load_checkpoint(tmp_path / "out")[name]
    assert torch.allclose(written, (base[name] + change).float(), rtol=0, atol=1e-7)
    change_json(tmp_path / "target/config.json", model_type="gpt_oss")
    said = run()
    assert "already exists; choose another output" in said and "complete" not in said


def test_an_output_that_may_be_infinite_is_none_that_must_be_finite(tmp_path):
    """Finished with allow_nonfinite=true it is complete for that alone."""
    for name, value in (("target", 60000.0), ("plus", 9000.0), ("minus", 0.0)):
        write_checkpoint(tmp_path / name, {"w": torch.full((8,), value).half()})
    asked = ("target=target", "vector.plus=plus", "vector.minus=minus", "output=out", "compat.force=true")

    def run(*more: str) -> tuple[int, str]:
        done = launch(*asked, *more, cwd=tmp_path)
        return done.returncode, done.stdout + done.stderr

    assert run("allow_nonfinite=true")[0] == 0 and load_checkpoint(tmp_path / "out")["w"].isinf().all()
    status, said = run("allow_nonfinite=true")
    assert status == 0 and "already complete" in said
    status, said = run()
    assert status == 2 and "already exists; choose another output" in said and "complete" not in said


def test_an_output_or_a_vector_that_lost_a_file_is_not_complete(family):
    asked = ("target=target", "vector.plus=plus", "vector.minus=minus", "stages=[merge]", "output=out", "vector.save=v")

    def run() -> tuple[int, str]:
        done = launch(*asked, cwd=family)
        return done.returncode, done.stdout + done.stderr

    assert run()[0] == 0
    for file in (family / "out/model.safetensors", next((family / "v").glob("*.safetensors"))):
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        status, said = run()
        assert status == 2 and f"{file.parent}: already exists; choose another" in said, said
        file.write_bytes(whole)
    status, said = run()
    assert status == 0 and said.count("already complete") == 2


def test_jobs_that_write_one_output_otherwise_are_refused(family):
    """In another dtype: the second was left out without a word. Also where a link spells it in another way; what would
    be the same is written once."""
    (family / "link").symlink_to(family)
    asked = ("-m", "target=target", "vector.plus=plus", "vector.minus=minus", "stages=[merge]", "hydra.sweep.dir=sweep")
    for number, spelled in enumerate(("output=out0", "output=out1,link/out1")):
        done = launch(*asked, spelled, "dtype=null,float32", cwd=family)
        assert done.returncode == 1 and f"would write {family}/{'link/' * number}out{number};" in done.stderr
    done = launch(*asked, "output=out2,link/out2", cwd=family)
    assert done.returncode == 0 and (family / "out2/model.safetensors").exists(), done.stderr


def test_which_rank_saved_which_file_names_what_they_hold(tmp_path):
    """Its name alone says where in a tensor the rows of a file lie."""
    files = [tmp_path / f"model_world_size_2_rank_{rank}.pt" for rank in (0, 1)]

    def digest() -> str:
        return checkpoint_digest(Checkpoint(tmp_path, {}, {}, {file.name: Stamp.of(file) for file in files}))

    for file, content in zip(files, (b"one", b"two"), strict=True):
        file.write_bytes(content)
    before = digest()
    for file, content in zip(files, (b"two", b"one"), strict=True):
        file.write_bytes(content)
    assert digest() != before
