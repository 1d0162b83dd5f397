import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import rvdist
from rvdist.core import config
from rvdist.core.config import (
    ArmConfig,
    BenchmarksConfig,
    CacheConfig,
    ClusterConfig,
    Config,
    DonorsConfig,
    EngineConfig,
    MaskConfig,
    MergeConfig,
    OutputFormat,
    SearchConfig,
    SweepConfig,
    VectorConfig,
    WeightedVectorConfig,
)
from rvdist.core.errors import BadInput
from rvdist.core.method import METHODS, MethodSpec
from rvdist.core.point import Vector
from rvdist.weights.arithmetic import registry

MASK = MaskConfig(layers=[[0, 3]])


def settings(**changes):
    return Config(**({"target": "org/t", "vector": VectorConfig("p", "m")} | changes))


def test_default_stages_follow_what_is_asked_for():
    assert config.stages(settings(output="o")) == ["merge"]
    assert config.stages(settings(benchmarks=BenchmarksConfig(["x"]))) == ["evaluate", "report"]
    assert config.stages(settings(stages=["report", "evaluate"], benchmarks=BenchmarksConfig(["x"]))) == [
        "evaluate",
        "report",
    ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "nothing to do"),
        ({"stages": ["merge"]}, "output is not set"),
        ({"stages": ["evaluate"]}, "benchmarks.tasks is empty"),
        ({"stages": ["report"]}, "report needs evaluate"),
    ],
)
def test_stages_that_cannot_run(changes, reason):
    with pytest.raises(BadInput, match=reason):
        config.stages(settings(**changes))


RACING = {"method": "racing", "alphas": [0.0, 1.0]}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"search": SearchConfig("racing", [1.0])}, "search.alphas: a search needs at least two values"),
        ({"search": SearchConfig(**RACING, confidence=1.0)}, "search.confidence: 1 is not a share"),
        ({"search": SearchConfig(**RACING, holdout=0.0)}, "search.holdout: 0 is not a share"),
        ({"search": SearchConfig(**RACING, tolerance=1.5)}, "search.tolerance: 1.5 is not a difference of scores"),
        ({"search": SearchConfig(**RACING, round=0)}, "search.round: 0 is not a number of documents"),
        ({"search": SearchConfig(**RACING), "vector": VectorConfig()}, "search.method is set, and no vector"),
        ({"search": SearchConfig(**RACING), "arms": [ArmConfig("a", alpha=1.0)]}, "arms and search.method are both"),
        ({"search": SearchConfig(**RACING, groups=[MaskConfig()] * 12)}, "are 4,096 candidates; at most 1,000"),
        (
            {"search": SearchConfig(**RACING, groups=[MaskConfig()]), "vector": VectorConfig("p", "m", mask=MASK)},
            "search.groups: are masks of one vector; set vector alone",
        ),
        ({"search": SearchConfig(**RACING, groups=[MaskConfig(layers=[[1]])])}, r"search.groups\[0\].layers: \[1\]"),
        ({"arms": [ArmConfig("a/b", alpha=1.0)]}, r"arms\[0\].name: 'a/b' cannot be the name of a file"),
        ({"arms": [ArmConfig("..", alpha=1.0)]}, "cannot be the name of a file"),
        ({"arms": [ArmConfig("a")]}, r"arms\[0\]: give weights=CHECKPOINT or alpha=NUMBER, one of them"),
        ({"arms": [ArmConfig("a", weights="w", alpha=1.0)]}, "one of them"),
        ({"arms": [ArmConfig("a", alpha=1.0), ArmConfig("a", alpha=2.0)]}, "'a' is the name of two of them"),
        ({"arms": [ArmConfig("a", "think", alpha=1.0)]}, "prompts: there is no style 'think'; there are plain"),
        ({"arms": [ArmConfig("a", alpha=1.0)], "vector": VectorConfig()}, r"arms\[0\].alpha is set, and no vector"),
    ],
)
def test_arms_that_cannot_be(changes, reason):
    with pytest.raises(BadInput, match=reason):
        config.arms(settings(**changes))


def test_candidates_of_a_race_are_every_alpha_or_every_choice_for_groups():
    race = SearchConfig("racing", [1.0, 0.0, -0.5])
    assert [arm.name for arm in config.candidates(settings(search=race))] == ["baseline", "alpha=-0.5", "alpha=1"]
    race.groups = [MaskConfig(layers=[[0, 3]]), MaskConfig(layers=[[4, 7]])]
    found = {arm.name: arm for arm in config.candidates(settings(search=race))}
    assert len(found) == 9 and found["alpha=0,1"].alpha is None
    terms = found["alpha=-0.5,1"].point.terms
    assert [(term.alpha, term.mask.layers) for term in terms] == [(-0.5, ((0, 3),)), (1.0, ((4, 7),))]
    assert next(arm.name for arm in config.arms(settings(search=race))) == "baseline"


def test_arms_of_ones_own():
    listed = [
        ArmConfig("Baseline", alpha=0.0),
        ArmConfig("G+T", "think", weights="p"),
        ArmConfig("cross", alpha=0.5, vector=DonorsConfig("q", "m")),
    ]
    prompts = {"plain": "", "think": "Think. "}
    arms = config.arms(settings(arms=listed, prompts=prompts, sweep=SweepConfig([2.0])))
    assert [(arm.name, arm.prompt, arm.alpha) for arm in arms] == [
        ("Baseline", "plain", 0.0),
        ("G+T", "think", None),
        ("cross", "plain", None),
        ("alpha=2", "plain", 2.0),
    ]
    assert arms[1].point.base == "p" and arms[2].point.terms[0].vector.plus == "q"


def test_outputs_have_a_directory_each():
    found = config.outputs(settings(alpha=[0.5, 1, -1.0], output="o/{target}-{alpha}"))
    assert [path.name for path in found] == ["t-0.5", "t-1", "t--1"]
    assert [point.terms[0].alpha for point in found.values()] == [0.5, 1, -1]
    with pytest.raises(BadInput, match=r"put \{alpha\}, \{target\}, \{vector\} or \{recipe\} into it"):
        config.outputs(settings(alpha=[0.5, 1], output="o"))
    with pytest.raises(BadInput, match="a merge needs a vector"):
        config.outputs(settings(vector=VectorConfig(), output="o"))


@pytest.mark.parametrize("value", ["one", float("nan"), float("inf"), None, True, [1, "x"], []])
def test_alpha_is_a_finite_number_or_several(value):
    with pytest.raises(BadInput, match="alpha"):
        config.alphas(value)


def test_vectors_are_weighted_and_scaled():
    several = settings(
        vector=VectorConfig(),
        vectors=[WeightedVectorConfig("p", "m", alpha=2.0), WeightedVectorConfig("q", "m", alpha=-0.5)],
    )
    assert [term.alpha for term in config.point(several, 0.5).terms] == [1.0, -0.25]
    with pytest.raises(BadInput, match="vector and vectors are both set"):
        config.point(settings(vectors=several.vectors), 1.0)
    with pytest.raises(BadInput, match=r"vectors\[0\].minus is not set"):
        config.point(settings(vector=VectorConfig(), vectors=[WeightedVectorConfig("p")]), 1.0)


def test_a_text_is_read_along_several_vectors_together():
    both = settings(
        vector=VectorConfig(), vectors=[WeightedVectorConfig("p", "m"), WeightedVectorConfig("q", "m", alpha=-1)]
    )
    both.analyze.points = 3
    (line,) = config.lines(both).values()
    assert [[term.alpha for term in arm.point.terms] for arm in line] == [[], [0.5, -0.5], [1, -1]]
    assert [arm.name for arm in line] == ["vectors 0.000", "vectors 0.500", "vectors 1.000"]
    assert set(config.lines(settings())) == {"donors", "target"}
    with pytest.raises(BadInput, match="analyze.text needs a vector"):
        config.lines(settings(vector=VectorConfig()))


def test_masks_are_checked():
    masked = settings(vector=VectorConfig("p", "m", None, MaskConfig([".*"], [], [[0, 1], [3, 3]])))
    assert config.point(masked, 1.0).terms[0].mask.layers == ((0, 1), (3, 3))
    for bad in (MaskConfig(["("]), MaskConfig(layers=[[1]]), MaskConfig(layers=[[2, 1]])):
        with pytest.raises(BadInput, match="vector"):
            config.point(settings(vector=VectorConfig("p", "m", None, bad)), 1.0)


def test_the_methods_flow_into_the_point():
    def method(name, density, seed):
        return config.point(settings(merge=MergeConfig(method=name, density=density, seed=seed)), 1.0).method

    assert method("ties", 0.3, 7) == MethodSpec("ties", 0.3)
    assert method("dare", 0.3, 7) == MethodSpec("dare", 0.3, 7)
    assert method("linear", 0.3, 7) == MethodSpec(), "what a method does not use does not tell points apart"


@pytest.mark.parametrize("density", [0, -0.1, 1.01, float("nan"), float("inf")])
def test_methods_that_are_refused(density):
    for name in METHODS:
        with pytest.raises(BadInput, match=r"merge.density: .* above 0 and at most 1"):
            config.point(settings(merge=MergeConfig(method=name, density=density)), 1.0)
    for name in ("ties", "dare"):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            registry.build(MethodSpec(name, density))
    with pytest.raises(ValueError, match="'tie' is not one of"):
        registry.build(MethodSpec("tie"))


def test_arms_are_the_baseline_and_every_other_alpha():
    arms = config.arms(settings(sweep=SweepConfig([1, -1, 0, 1, 0.5])))
    assert [(arm.name, arm.alpha) for arm in arms] == [
        ("baseline", 0.0),
        ("alpha=-1", -1.0),
        ("alpha=0.5", 0.5),
        ("alpha=1", 1.0),
    ]
    assert [arm.name for arm in config.arms(settings(vector=VectorConfig()))] == ["baseline"]
    assert arms[0].point.terms == ()


def test_sizes():
    assert config.size("5GB", "k") == 5 * 10**9
    assert config.size("1.5 MiB", "k") == 3 << 19
    assert config.size(1000, "k") == 1000 and config.size(None, "k") is None
    for bad in ("many", "5TBs", "-1", 0):
        with pytest.raises(BadInput, match="is not a size"):
            config.size(bad, "k")


def test_the_configuration_files_and_the_schema_are_one_tree():
    """Every group's options compose; a key in conf/ that the schema lacks would be refused."""
    from hydra import compose, initialize_config_dir

    from rvdist.stages import multirun

    multirun.register()
    from hydra.core.config_store import ConfigStore

    root = Path(rvdist.__file__).parent.parent / "conf"
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(root), version_base="1.3"):
        for group in ("experiment", "method", "benchmarks", "engine", "cluster"):
            for option in sorted((root / group).glob("*.yaml")):
                composed = compose("config", [f"{group}={option.stem}", "target=t"])
                assert isinstance(OmegaConf.to_object(composed), Config)


def test_a_device_is_chosen_by_what_the_cluster_has():
    assert [config.device(settings(device=name), 2) for name in ("cpu", "cuda")] == ["cpu", "cuda"]
    assert config.device(settings(), 0) == "cpu"
    with pytest.raises(BadInput, match="device=cuda: the cluster has no GPU; set device=cpu"):
        config.device(settings(device="cuda"), 0)


def test_devices_that_cannot_be():
    config.require_resources(settings(device="cuda", merge=MergeConfig(gpus_per_worker=0.25)))
    for share in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(BadInput, match="merge.gpus_per_worker"):
            config.require_resources(settings(merge=MergeConfig(gpus_per_worker=share)))


@pytest.mark.parametrize("key", config.CHOICES)
def test_a_configuration_with_a_value_that_is_none_of_its_choices_cannot_be_made(key):
    """Neither from the command's configuration nor from Python; what is among them is taken."""

    def composed(value):
        given = OmegaConf.structured(Config)
        OmegaConf.update(given, key, [value] if key == "stages" else value)
        return OmegaConf.to_object(given)

    for value in config.CHOICES[key]:
        assert composed(value)
    with pytest.raises(BadInput, match=f"^{key}: 'neither' is not one of {', '.join(config.CHOICES[key])}$"):
        composed("neither")


def test_a_configuration_without_a_size_that_can_be_cannot_be_made():
    assert settings().output_format == OutputFormat()
    assert settings(dtype="float16", max_shard_size="1.5MiB").output_format == OutputFormat("F16", 3 << 19)
    assert settings(dtype="target").output_format == OutputFormat()
    with pytest.raises(BadInput, match="max_shard_size: 'much' is not a size"):
        settings(max_shard_size="much")


def test_donors_may_be_renamed():
    vector = VectorConfig("p", "m", rename=[["^model", "text"], ["a", "b"]])
    assert config.point(settings(vector=vector), 1.0).terms[0].vector == Vector(
        "p", "m", (("^model", "text"), ("a", "b"))
    )
    for rename, reason in (
        ([["a"]], r"vector.rename: \['a'\] is not a pair"),
        ([["(", "b"]], r"vector.rename \['\(', 'b'\] is no substitution"),
        ([["a", r"\1"]], "is no substitution: invalid group reference"),
    ):
        with pytest.raises(BadInput, match=reason):
            config.point(settings(vector=VectorConfig("p", "m", rename=rename)), 1.0)


@pytest.mark.parametrize("url", ["s3://bucket/out", "gs://b/{alpha}", "file:///tmp/x", "https://host/x"])
@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("output", lambda url: {"output": url}),
        ("vector.save", lambda url: {"vector": VectorConfig("p", "m", save=url)}),
        ("cache.dir", lambda url: {"cache": CacheConfig(dir=url)}),
    ],
)
def test_a_url_is_no_path(url, key, given):
    with pytest.raises(BadInput, match=f"^{key}={re.escape(url)}: is a URL, and this is a path; mount it, or copy"):
        settings(**given(url))


def test_a_home_that_the_shell_left_as_it_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home/one")
    asked = settings(target="base", output="~/out", vector=VectorConfig("p", "m", save="~/v"))
    assert list(config.outputs(asked)) == [Path("/home/one/out")]
    assert config.vector_to_save(asked).directory == Path("/home/one/v")


@pytest.mark.parametrize(
    ("nodes", "gib", "keys", "given"),
    [
        ([(2, 0)], 3, {}, [2]),
        ([(8, 0)], 2.5, {}, [3]),
        ([(8, 0)], 0.001, {}, [1]),
        ([(192, 0)] * 4, 800, {}, [16] * 4),
        ([(192, 0)] * 4, 10, {}, [3, 3, 2, 2]),
        ([(4, 0), (1, 0)], 100, {"threads": 2}, [2, 0]),
        ([(1, 0)], 100, {"threads": 2}, [1]),
        ([(64, 8), (64, 0)], 100, {"device": "cuda"}, [8, 0]),
        ([(64, 8)], 100, {"device": "cuda", "gpus_per_worker": 0.25}, [16]),
        ([(192, 0)] * 3, 1, {"workers": 100}, [34, 33, 33]),
        ([(64, 0), (64, 8)], 100, {"device": "cuda"}, [0, 8]),
        ([(64, 0), (64, 8), (64, 1)], 1, {"device": "cuda", "workers": 3}, [0, 2, 1]),
    ],
)
def test_how_many_workers_each_node_gets(nodes, gib, keys, given):
    device = keys.pop("device", "cpu")
    asked = settings(device=device, merge=MergeConfig(**keys))
    assert config.workers(asked, nodes, int(gib * 2**30)) == given


def test_how_many_engines_and_what_each_takes():
    def engines(cpus, there, address="local", nodes=1, **engine):
        asked = settings(engine=EngineConfig(**engine), cluster=ClusterConfig(address))
        return config.engines(asked, [(cpus, there)] * nodes)

    assert engines(8, 0) == (8, (1.0, 0.0))
    assert engines(8, 0, cpu_threads=4) == (2, (4.0, 0.0))
    assert engines(2, 0, count=4) == (4, (0.5, 0.0)), "cores are shared where there will never be more"
    assert engines(2, 0, "auto", count=4) == (4, (1.0, 0.0)), "a cluster may grow"
    assert engines(8, 4) == (4, (0.0, 1.0))
    assert engines(8, 4, gpus=0.25) == (16, (0.0, 0.25)), "several engines a GPU"
    assert engines(8, 4, tensor_parallel_size=2) == (2, (0.0, 2.0)), "several GPUs an engine"
    assert engines(8, 4, "auto", count=9, tensor_parallel_size=2) == (9, (0.0, 2.0))
    with pytest.raises(BadInput, match="engine.count=3 times 2 GPUs each are more than this machine's 4"):
        engines(8, 4, count=3, tensor_parallel_size=2)
    assert engines(8, 4, "auto", tensor_parallel_size=3, nodes=3) == (3, (0.0, 3.0)), "of GPUs of one node"
    assert engines(8, 2, gpus=0.4) == (4, (0.0, 0.4)), "of one GPU"
    assert engines(8, 8, tensor_parallel_size=2, args={"pipeline_parallel_size": 2}) == (2, (0.0, 4.0))
    assert engines(8, 0, cpu_threads=2, tensor_parallel_size=2) == (2, (4.0, 0.0))


def test_an_engine_that_is_larger_than_a_node():
    def engines(**args):
        asked = settings(engine=EngineConfig(tensor_parallel_size=8, args=args), cluster=ClusterConfig("auto"))
        config.require_resources(asked)
        return config.engines(asked, [(64, 8), (64, 8), (64, 0)])

    assert engines() == (2, (0.0, 8.0))
    with pytest.raises(BadInput, match="an engine of 16 GPUs .* more than the 8 of any node; lower it, or set .*=ray"):
        engines(pipeline_parallel_size=2)
    assert engines(pipeline_parallel_size=2, distributed_executor_backend="ray") == (1, (0.0, 16.0))
    with pytest.raises(BadInput, match="pipeline_parallel_size='2' is not a number of them"):
        engines(pipeline_parallel_size="2")


@pytest.mark.parametrize(
    ("asked", "gpus", "build", "device"),
    [
        ("auto", 0, "cpu", "cpu"),
        ("auto", 8, "cuda", "cuda"),
        ("auto", 8, None, "cuda"),
        ("cpu", 8, "cpu", "cpu"),
        ("cuda", 8, "cuda", "cuda"),
        ("cuda", 0, "cuda", "engine.device=cuda: the cluster has no GPU, or none yet; set cluster.address .*nodes"),
        ("auto", 0, "cuda", "the cluster has no GPU, and the vLLM .* is built for GPUs alone; install rvdist.cpu."),
        ("cpu", 8, "cuda", "engine.device=cpu, and the vLLM that is installed is built for GPUs alone; install"),
        (
            "auto",
            8,
            "cpu",
            "the cluster has GPUs, and the vLLM .* is built for CPUs alone; install rvdist.gpu., or set",
        ),
    ],
)
def test_on_what_engines_compute(asked, gpus, build, device):
    asked = settings(engine=EngineConfig(device=asked))
    if device in ("cpu", "cuda"):
        assert config.engine_device(asked, gpus, build) == device
    else:
        with pytest.raises(BadInput, match=device):
            config.engine_device(asked, gpus, build)


@pytest.mark.parametrize(
    ("key", "value", "way"),
    [("arithmetic", "cuda", "set engine.arithmetic=cpu"), ("accelerator_type", "H100", "leave it")],
)
def test_engines_on_cpus_have_nothing_of_a_card(key, value, way):
    with pytest.raises(BadInput, match=f"engine.{key}={value}: engines compute on CPUs here; {way}"):
        config.engine_device(settings(engine=EngineConfig(device="cpu", **{key: value})), 8, "cpu")
    assert config.engine_device(settings(engine=EngineConfig(**{key: value})), 8, "cuda") == "cuda"


def test_engines_on_cpus_take_no_gpu_that_is_there():
    asked = settings(engine=EngineConfig(device="cpu"), cluster=ClusterConfig("auto"))
    assert config.engines(asked, [(8, 4)]) == (8, (1.0, 0.0))


def test_slices_are_larger_on_a_card_unless_given():
    assert config.slice_size(settings(), "cpu") == 256 < config.slice_size(settings(), "cuda")
    assert config.slice_size(settings(engine=EngineConfig(slice_size=7)), "cuda") == 7
    with pytest.raises(BadInput, match="engine.slice_size: 0 is not a number of them"):
        config.require_resources(settings(engine=EngineConfig(slice_size=0)))


@pytest.mark.parametrize("key", ["timeout", "start_timeout"])
@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_a_timeout_is_a_time(key, seconds):
    with pytest.raises(BadInput, match=rf"engine\.{key}: .* is not a time"):
        config.require_resources(settings(engine=EngineConfig(**{key: seconds})))


def test_a_start_may_take_as_long_as_its_bytes_do():
    assert config.engine_timeouts(settings(), 0) == (None, 1800.0)
    assert config.engine_timeouts(settings(), 810 * 10**9)[1] == pytest.approx(1800 + 8100)
    assert config.engine_timeouts(settings(engine=EngineConfig(timeout=5.0, start_timeout=7.0)), 10**12) == (5.0, 7.0)


def test_shares_of_a_gpu_that_cannot_be():
    for share in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(BadInput, match="engine.gpus: .* is not a share of one GPU"):
            config.require_resources(settings(engine=EngineConfig(gpus=share)))
    with pytest.raises(BadInput, match="engine.gpus=0.5: an engine of 2 ranks takes whole GPUs"):
        config.require_resources(settings(engine=EngineConfig(gpus=0.5, tensor_parallel_size=2)))


@pytest.mark.parametrize("written", [".", "", "../{}", "../{}/", "./", "../{}/../{}"])
def test_a_target_is_called_by_its_directory_however_it_is_written(written, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    target = written.format("model", "model") or str(tmp_path / "model")
    settings = Config(target=target, vector=VectorConfig(target, "minus/"), output="out/{target}-{vector}")
    assert [path.name for path in config.outputs(settings)] == ["model-model"]
