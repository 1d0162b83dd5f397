"""Nothing is written before all that can be refused is refused, whatever stage would refuse it."""

from dataclasses import replace

import pytest
from checkpoints import launch, load_checkpoint, write_checkpoint

from rvdist.core.config import (
    AnalyzeConfig,
    BatchConfig,
    BenchmarksConfig,
    CacheConfig,
    Config,
    EngineConfig,
    MergeConfig,
    VectorConfig,
)
from rvdist.core.errors import BadInput, Failed
from rvdist.stages.job import remove_empty
from rvdist.stages.jobs import run_stages

CODE = BenchmarksConfig(["humaneval"])
SUMS = BenchmarksConfig(["pocket_sums"], limit=2)


def contents(place):
    """Every file's bytes, every directory; but for digests, which are remembered of whatever was read."""
    return {
        str(path.relative_to(place)): path.read_bytes() if path.is_file() else None
        for path in place.rglob("*")
        if "cache" not in path.relative_to(place).parts
    }


def asked(place, save="v"):
    """Everything at once: a vector, two outputs and their scores."""
    donors = {name: str(place / "family" / name) for name in ("target", "grpo", "sft")}
    return Config(
        target=donors["target"],
        vector=VectorConfig(donors["grpo"], donors["sft"], save=save and str(place / save)),
        alpha=[0.5, 1],
        output=str(place / "out-{alpha}"),
        benchmarks=SUMS,
        cache=CacheConfig(str(place / "cache")),
    )


def without(place, *names):
    for member in ("target", "grpo", "sft"):
        for name in names:
            (place / "family" / member / name).unlink(missing_ok=True)


TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

REFUSED = {
    "a mistyped task": (
        {"benchmarks": BenchmarksConfig(["pocket_summs"])},
        r"there is no task 'pocket_summs'; did you mean pocket_sums\?",
    ),
    "no tokenizer": ({}, "has no tokenizer"),
    "no chat template": ({}, "has no chat template"),
    "code that may not run": ({"benchmarks": CODE}, "allow_code_execution"),
    "no data": ({"benchmarks": BenchmarksConfig(["gsm8k"], data_dir="/nowhere")}, "/nowhere"),
    "engine arguments": ({"engine": EngineConfig(args={"enable_prefix_caching": True})}, "engine.args"),
    "a recording": ({"engine": EngineConfig(replay="/nowhere")}, "nowhere"),
    "a device": ({"device": "cuda"}, "device=cuda"),
    "workers": ({"merge": MergeConfig(workers=0)}, "merge.workers"),
    "analyze": ({"stages": ["merge", "analyze"], "analyze": AnalyzeConfig("text.txt", 2)}, "analyze.points"),
    "analyze without its text": ({"stages": ["merge", "analyze"], "analyze": AnalyzeConfig("/nowhere.txt")}, "nowhere"),
    "report": ({"stages": ["merge", "report"]}, "report needs"),
    "publish": ({"publish": "no repository"}, "is not the name of a repository"),
    "where the vector goes": ({"vector": "family/target/config.json/v"}, "cannot be created"),
    "a vector in the way": ({"vector": "family/sft"}, "already exists"),
    "where outputs go": ({"output": "family/target/config.json/{alpha}"}, "cannot be created"),
    "an output in the way": ({"output": "family/sft", "alpha": 1.0}, "already exists"),
    "a batch": ({"vector": None, "batch": [BatchConfig()], "benchmarks": CODE}, "allow_code_execution"),
    "a batch that saves": ({"batch": [BatchConfig()]}, "batch is set"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_nothing_is_written(case, place, ray_local):
    changes, reason = REFUSED[case]
    settings = asked(place)
    if "vector" in changes:
        save = changes["vector"] and str(place / changes["vector"])
        changes = {**changes, "vector": replace(settings.vector, save=save)}
    if "output" in changes:
        changes = {**changes, "output": str(place / changes["output"])}
    if case == "no tokenizer":
        without(place, *TOKENIZER, "chat_template.jinja")
    if case == "no chat template":
        without(place, "chat_template.jinja")
    (place / "run").mkdir()
    before = contents(place)
    with pytest.raises(BadInput, match=reason):
        run_stages(replace(settings, **changes), place / "run", [])
    assert contents(place) == before


@pytest.mark.parametrize(
    ("directory", "said"),
    [
        ("family/target", "is the directory of the source .*/family/target"),
        ("link", "is the directory of the source .*/family/grpo"),
        ("out-1", "is in the output .*/out-1, or is it"),
        ("v/run", "is in the output .*/v, or is it"),
    ],
)
def test_a_run_directory_in_a_model_is_refused(place, directory, said):
    """Its config.yaml and timing.json would lie among the model's files, and go into outputs with these."""
    (place / "link").symlink_to("family/grpo")
    before = contents(place)
    with pytest.raises(BadInput, match=f"hydra.run.dir: .*/{directory} {said}"):
        run_stages(asked(place), place / directory, [])
    assert contents(place) == before


@pytest.mark.heavy
def test_nothing_is_written_without_a_cluster(place):
    before = contents(place)
    done = launch(
        "target=family/target", "vector.plus=family/grpo", "vector.minus=family/sft", "vector.save=v", "output=out",
        "cluster.address=127.0.0.1:1", "cache.dir=cache", cwd=place,
    )  # fmt: skip
    assert done.returncode == 2 and "cluster.address=127.0.0.1:1" in done.stderr
    assert contents(place) == before


def test_what_was_written_before_the_refusal_is_said(place, ray_local):
    """Only reading weights shows that a sum overflows: by then the vector is there, and the status is that of half."""
    settings = replace(asked(place), alpha=1e38, benchmarks=BenchmarksConfig(), dtype="float16")
    (place / "run").mkdir()
    with pytest.raises(Failed, match=r"infinite.*; written before, and kept: .*/v$"):
        run_stages(replace(settings, output=str(place / "out")), place / "run", [])
    assert (place / "v" / "vector.json").exists() and not (place / "out").exists()


def test_donors_that_are_the_same_are_said(place, capsys):
    """Also where one is a copy of the other, in other files; a donor that differs in one bit is another."""
    (place / "run").mkdir()
    copy = write_checkpoint(place / "copy", load_checkpoint(place / "family" / "sft"), shards=2)
    for name in ("config.json", "tokenizer.json"):
        (copy / name).write_bytes((place / "family" / "sft" / name).read_bytes())
    sft = str(place / "family" / "sft")
    for plus, said in ((sft, True), (str(copy), True), (str(place / "family" / "grpo"), False)):
        settings = replace(asked(place, None), vector=VectorConfig(plus, sft), stages=["plan"])
        run_stages(settings, place / "run", [])
        assert ("hold the same weights: their vector is zero" in " ".join(capsys.readouterr().out.split())) == said


def test_a_run_directory_that_another_command_removes_first(tmp_path, monkeypatch):
    """As commands of one second do, whose directories Hydra names alike."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "day" / "other").mkdir(parents=True)
    remove_empty(tmp_path / "outputs" / "day" / "own")
    assert (tmp_path / "outputs" / "day" / "other").exists()
    (tmp_path / "outputs" / "day" / "other").rmdir()
    remove_empty(tmp_path / "outputs" / "day" / "own")
    assert not (tmp_path / "outputs").exists()
