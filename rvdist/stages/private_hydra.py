"""What we take from Hydra beyond its public interface, in the process of the command."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from rvdist.core.private import Library

HYDRA = Library("hydra-core", "1.3.8")
NEEDED = (
    "hydra._internal.core_plugins:__path__",
    "hydra.core.plugins:Plugins.register",
    "hydra.core.utils:JobReturn._return_value",
    "hydra.core.override_parser.overrides_parser:OverridesParser.parse_override",
)
PLUGINS = "hydra._internal.core_plugins"  # Hydra takes a plugin from its own packages only


def register(name: str, module: str, launcher: type[Launcher], settings: type) -> None:
    """Makes a launcher known to Hydra, under the name of a module of Hydra's, which is its own `module`. Raises
    Failed where Hydra has not what we know of it."""
    HYDRA.require(*NEEDED)
    launcher.__module__ = f"{PLUGINS}.{name}"
    setattr(import_module(PLUGINS), name, sys.modules[module])
    ConfigStore.instance().store(group="hydra/launcher", name=name, node=settings)
    Plugins.instance().register(launcher)


def returned(job: JobReturn) -> Any:
    """What a job returned, or raised: its public property prints what was raised."""
    return job._return_value


def compose_once(loader: ConfigLoader) -> Callable[[DictConfig, Sequence[str]], DictConfig]:
    """A patch of a sweep's loader: Hydra composes every job to see whether it can be, and throws it away. What is
    returned composes a job, unless that has been done."""
    found: dict[tuple[str, ...], DictConfig] = {}
    compose = loader.load_sweep_config

    def keep(master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        found[tuple(sweep_overrides)] = config = compose(master_config, sweep_overrides)
        return config

    def take(master_config: DictConfig, sweep_overrides: Sequence[str]) -> DictConfig:
        known = found.pop(tuple(sweep_overrides), None)
        return compose(master_config, list(sweep_overrides)) if known is None else known

    setattr(loader, "load_sweep_config", keep)  # noqa: B010
    return take


def parse_override(argument: str) -> None:
    """Raises HydraException for what is no KEY=VALUE of Hydra's grammar."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    OverridesParser.create().parse_override(argument)
