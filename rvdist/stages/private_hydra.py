"""What we take from Hydra beyond its public interface, in the process of the command."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rvdist.core.private import Library

HYDRA = Library("hydra-core", "1.3.8")
_DIRNAME = "hydra._internal.config_loader_impl:get_overrides_dirname"
_LOADER = "hydra._internal.config_loader_impl:ConfigLoaderImpl"
_AS_A_RUN = "hydra.mode=RUN"  # what Hydra adds to the command line of a run
NEEDED = (
    "hydra._internal.core_plugins:__path__",
    "hydra.core.plugins:Plugins.register",
    "hydra.core.utils:JobReturn._return_value",
    "hydra.core.override_parser.overrides_parser:OverridesParser.parse_override",
    _DIRNAME,
    f"{_LOADER}.load_configuration(validate_sweep_overrides)",
    "hydra._internal.hydra:Hydra.get_mode",
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


def compose_once() -> None:
    """A patch, for good: Hydra composes what a command line says to see whether it is a sweep, and where it is none
    anew, with its mode set. That is set in the first then. Raises Failed where Hydra has not what we know of it."""
    HYDRA.require(*NEEDED)
    loader = HYDRA.get(_LOADER)
    load = loader.load_configuration
    seen: dict[tuple[str | None, tuple[str, ...]], DictConfig] = {}

    def take(
        self: ConfigLoader,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        if not validate_sweep_overrides:  # it looks for the mode
            with suppress(Exception):  # of a sweep, as a rule
                config: DictConfig = load(self, config_name, overrides, RunMode.RUN, from_shell)
                seen[config_name, (*overrides, _AS_A_RUN)] = config
                return config
        elif run_mode == RunMode.RUN and (found := seen.pop((config_name, tuple(overrides)), None)) is not None:
            found.hydra.mode = RunMode.RUN
            found.hydra.overrides.hydra.append(_AS_A_RUN)
            return found
        return load(self, config_name, overrides, run_mode, from_shell, validate_sweep_overrides)  # type: ignore[no-any-return]

    loader.load_configuration = take


def result_of(job: JobReturn) -> Any:
    """What a job returned, or raised: its public property prints what was raised."""
    return job._return_value


def compose_alike(loader: ConfigLoader) -> Callable[[DictConfig, Sequence[str]], DictConfig]:
    """A patch of a sweep's loader, and what composes a job of it: Hydra composes every job from its files, twice. One
    whose values alone differ from those of a job before is made of that one's configuration."""
    compose = loader.load_sweep_config
    parse = cache(OverridesParser.create().parse_override)
    is_group = cache(lambda key: bool(loader.get_group_options(key)))
    composed: dict[tuple[str, ...], tuple[list[str], bytes]] = {}

    def take(master_config: DictConfig, sweep_overrides: Sequence[str]) -> DictConfig:
        overrides = list(sweep_overrides)
        keys = tuple(override.partition("=")[0] for override in overrides)
        if keys not in composed:
            composed[keys] = overrides, pickle.dumps(compose(master_config, overrides))
        before, of_it = composed[keys]
        changed = [(parse(a), parse(b)) for a, b in zip(before, overrides, strict=True) if a != b]
        for pair in changed:
            if not (_is_plain(pair, keys) and not is_group(pair[0].key_or_group)):
                return compose(master_config, overrides)
        config: DictConfig = pickle.loads(of_it)  # a copy takes five times as long
        try:
            for _, override in changed:
                OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        except OmegaConfBaseException:
            return compose(master_config, overrides)  # raises as Hydra does
        own = [parse(line) for line in overrides if not parse(line).is_hydra_override()]
        config.hydra.overrides.task = [override.input_line for override in own]
        config.hydra.job.override_dirname = HYDRA.get(_DIRNAME)(
            overrides=own, **config.hydra.job.config.override_dirname
        )
        OmegaConf.copy_cache(from_config=master_config, to_config=config)
        return config

    setattr(loader, "load_sweep_config", take)  # noqa: B010
    return take


def _is_plain(pair: tuple[Override, Override], keys: Sequence[str]) -> bool:
    """Whether nothing but one value differs, which stands in no other and in which no other stands."""
    key = pair[0].key_or_group
    others = [bare for other in keys if (bare := other.lstrip("+~")) != key]
    apart = not any(f"{other}.".startswith(f"{key}.") or f"{key}.".startswith(f"{other}.") for other in others)
    return (
        keys.count(key) == 1
        and apart
        and not pair[0].is_hydra_override()
        and all(_is_simple(override.value()) for override in pair)
    )


def _is_simple(value: Any) -> bool:
    one = str | int | float | bool | None
    return isinstance(value, one) or (isinstance(value, list) and all(isinstance(part, one) for part in value))


def parse_override(argument: str) -> Override:
    """Raises HydraException for what is no KEY=VALUE of Hydra's grammar."""
    return OverridesParser.create().parse_override(argument)


def is_glob(override: Override) -> bool:
    """Whether it stands for the options of a group that match."""
    return override.value_type is ValueType.GLOB_CHOICE_SWEEP


def swept(typed: Sequence[str], *jobs: Sequence[str]) -> list[list[str]]:
    """Of the overrides of each job those whose keys the command line, as it was typed, does not give one value for all
    jobs."""
    fixed = set()
    for argument in typed:
        with suppress(HydraException):  # of flags
            override = parse_override(argument)
            if not override.is_sweep_override():
                fixed.add(override.get_key_element())
    return [[override for override in own if override.partition("=")[0] not in fixed] for own in jobs]
