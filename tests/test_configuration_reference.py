import runpy
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from rvdist.core.config import Config
from rvdist.launch import CONF
from rvdist.stages import multirun

SCRIPT = Path(__file__).resolve().parent.parent / "docs" / "configuration.py"


def test_the_reference_is_up_to_date():
    """Which also means that no key lacks a meaning, nor any meaning a key: the script refuses both."""
    written = runpy.run_path(str(SCRIPT))
    assert written["REFERENCE"].read_text(encoding="utf-8") == written["reference"](), f"run python {SCRIPT}"


def test_what_it_calls_a_default_is_what_a_run_has():
    ConfigStore.instance().store(name="schema", node=Config)
    multirun.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = OmegaConf.to_container(compose("config"))
    default = OmegaConf.to_container(OmegaConf.structured(Config))
    default["prompts"]["think"] = composed["prompts"]["think"]
    assert composed == default
