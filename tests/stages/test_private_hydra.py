"""Jobs of a sweep that are made of one another are what Hydra makes of each."""

from __future__ import annotations

import pytest
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from rvdist.core.config import Config
from rvdist.launch import CONF
from rvdist.stages import multirun, private_hydra

pytestmark = pytest.mark.heavy

SWEEPS = {
    "one value": (["target=a", "alpha=0.5"], ["target=a", "alpha=-1"], ["target=a", "alpha='x y'"]),
    "several": (["target=a", "alpha=1"], ["target=b", "alpha=1"], ["target=b", "alpha=[1,2]"]),
    "a group": (["method=linear", "alpha=1"], ["method=ties", "alpha=1"], ["method=dare", "alpha=2"]),
    "one in another": (
        ["vector.mask.depth=[0,1,1]", "vector={plus: a, minus: b}"],
        ["vector.mask.depth=[0,1,0.5]", "vector={plus: a, minus: b}"],
    ),
    "a mapping": (["vector={plus: a}"], ["vector={minus: b}"]),
    "what is added": (["++engine.args={seed: 1}", "alpha=1"], ["++engine.args={max_model_len: 9}", "alpha=1"]),
    "interpolated": (["output=out/${alpha}", "alpha=1"], ["output=out/${target}", "alpha=2"]),
    "hydra's own": (["hydra.job.name=a", "alpha=1"], ["hydra.job.name=b", "alpha=2"]),
    "other keys": (["alpha=1"], ["target=a"], ["alpha=2"]),
    "null and back": (["output=null"], ["output=a"], ["output=null"]),
}


@pytest.fixture
def hydra():
    GlobalHydra.instance().clear()
    ConfigStore.instance().store(name="schema", node=Config)
    multirun.register()
    yield Hydra.create_main_hydra2("rvdist", create_config_search_path(str(CONF)))
    HydraConfig.instance().cfg = None
    GlobalHydra.instance().clear()


@pytest.mark.parametrize(
    "line",
    [[], ["target=a", "alpha=0.5"], ["method=ties", "hydra.job.name=x", "++engine.args={seed: 1}"], ["hydra.mode=RUN"]],
)
def test_a_run_is_composed_once(hydra, monkeypatch, line):
    loader, asked = type(hydra.config_loader), [*dict.fromkeys([*line, "hydra.mode=RUN"])]
    right = hydra.compose_config("config", asked, RunMode.RUN)
    read = []
    load = loader._load_configuration_impl
    monkeypatch.setattr(
        loader, "_load_configuration_impl", lambda *args, **more: read.append(args) or load(*args, **more)
    )
    monkeypatch.setattr(loader, "load_configuration", loader.load_configuration)
    private_hydra.compose_once()
    says = "hydra.mode=RUN" in line
    assert hydra.get_mode("config", list(line)) == (RunMode.RUN if says else None)
    made = hydra.compose_config("config", asked, RunMode.RUN)
    assert len(read) == 1 + says
    assert OmegaConf.to_container(made) == OmegaConf.to_container(right)  # what time it is, either asks for itself
    assert OmegaConf.to_yaml(made) == OmegaConf.to_yaml(right)
    assert OmegaConf.get_type(made, "vector") is OmegaConf.get_type(right, "vector")
    assert OmegaConf.is_struct(made) == OmegaConf.is_struct(right)


def test_a_sweep_and_what_is_refused_are_composed_as_hydra_does(hydra, monkeypatch):
    loader = type(hydra.config_loader)
    monkeypatch.setattr(loader, "load_configuration", loader.load_configuration)
    private_hydra.compose_once()
    assert hydra.get_mode("config", ["alpha=1,2", "hydra.mode=MULTIRUN"]) == RunMode.MULTIRUN
    assert hydra.get_mode("config", ["alpha=1,2"]) is None
    assert hydra.get_mode("config", ["merge.workers=many"]) is None
    with pytest.raises(HydraException, match="Error merging override merge.workers=many"):
        hydra.compose_config("config", ["merge.workers=many", "hydra.mode=RUN"], RunMode.RUN)
    swept = hydra.compose_config("config", ["alpha=1,2", "hydra.mode=MULTIRUN"], RunMode.MULTIRUN)
    assert swept.hydra.mode == RunMode.MULTIRUN


@pytest.mark.parametrize("jobs", SWEEPS.values(), ids=SWEEPS)
def test_a_job_is_what_hydra_composes(hydra, jobs):
    loader = hydra.config_loader
    master = hydra.compose_config("config", [], RunMode.MULTIRUN, with_log_configuration=False)
    right = [loader.load_sweep_config(master, list(overrides)) for overrides in jobs]
    take = private_hydra.compose_alike(loader)
    for _ in range(2):
        for overrides, one in zip(jobs, right, strict=True):
            made = take(master, overrides)
            assert made == one and OmegaConf.to_yaml(made) == OmegaConf.to_yaml(one)
            assert OmegaConf.get_type(made, "vector") is OmegaConf.get_type(one, "vector")
            assert OmegaConf.is_struct(made) == OmegaConf.is_struct(one)


def test_files_are_read_for_the_first_alone(hydra, monkeypatch):
    loader = hydra.config_loader
    master = hydra.compose_config("config", [], RunMode.MULTIRUN, with_log_configuration=False)
    composed = []
    compose = loader.load_sweep_config
    monkeypatch.setattr(loader, "load_sweep_config", lambda *given: composed.append(given) or compose(*given))
    take = private_hydra.compose_alike(loader)
    for k in range(50):
        assert take(master, [f"alpha={k}", "target=a"]).alpha == k
    assert len(composed) == 1


def test_what_hydra_refuses_is_refused_as_it_does(hydra):
    master = hydra.compose_config("config", [], RunMode.MULTIRUN, with_log_configuration=False)
    take = private_hydra.compose_alike(hydra.config_loader)
    take(master, ["merge.workers=1"])
    with pytest.raises(HydraException, match="Error merging override merge.workers=many"):
        take(master, ["merge.workers=many"])
