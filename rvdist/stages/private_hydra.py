"""What we take from Hydra beyond its public interface, in the process of the command."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher

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


def parse_override(argument: str) -> None:
    """Raises HydraException for what is no KEY=VALUE of Hydra's grammar."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    OverridesParser.create().parse_override(argument)
