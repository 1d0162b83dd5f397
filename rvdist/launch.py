"""python -m rvdist.launch: configuration → run directory → stages. No logic of its own.

Exit status: 0 everything asked for was done; 1 failed or partly done; 2 bad input (one sentence on
standard error, nothing written); 130 interrupted.
"""

from __future__ import annotations

import difflib
import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from rvdist.config import Config
from rvdist.errors import BadInput

_HERE = Path(__file__).resolve().parent
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"


def main() -> None:
    """The command. Ends the process with the exit status above."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them and exiting with 1
    ConfigStore.instance().store(name="schema", node=Config)
    try:
        hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(run)()
    except BadInput as error:
        _stop(2, str(error))
    except MissingMandatoryValue as error:
        _stop(2, f"{error.full_key} is not set; give {error.full_key}=VALUE")
    except (HydraException, OmegaConfBaseException) as error:
        _stop(2, _sentence(error))
    except KeyboardInterrupt:
        _stop(130, "interrupted")
    except Exception as error:
        if os.environ.get("RVDIST_TRACEBACK"):
            raise
        _stop(1, f"failed: {type(error).__name__}: {error} (RVDIST_TRACEBACK=1 shows where)")


def run(composed: DictConfig) -> float | None:
    """One job: checks the configuration, runs its stages, returns the mean primary score (None without one)."""
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    from rvdist.stages import run_stages

    directory = Path(HydraConfig.get().runtime.output_dir)
    try:
        return run_stages(config, directory, sys.argv[1:])
    except BadInput:
        _remove_empty(directory)
        raise


def _remove_empty(directory: Path) -> None:
    """Hydra made the run directory before anything was checked: bad input leaves nothing behind."""
    for path in (directory, *directory.parents):
        if path == Path.cwd() or any(path.iterdir()):
            return
        path.rmdir()


def _sentence(error: Exception) -> str:
    """Hydra's and OmegaConf's reports of several lines, as one sentence that names the key."""
    cause = error.__cause__ or error
    first = str(error).strip().splitlines()[0].rstrip(".")
    reason = str(cause).strip().splitlines()[0].rstrip(".")
    if "Could not override" in first or "not in struct" in reason or "not in '" in reason:
        key = first.split("'")[1] if "'" in first else first
        close = difflib.get_close_matches(key, _keys(), n=1)
        return f"{key}: no such key; " + (f"did you mean {close[0]}?" if close else "--help lists them")
    return first if first == reason else f"{first}: {reason}"


def _keys() -> list[str]:
    def walk(node: Any, prefix: str) -> list[str]:
        found = []
        for key in node:
            found.append(prefix + str(key))
            if not OmegaConf.is_missing(node, key) and OmegaConf.is_dict(node[key]):
                found += walk(node[key], f"{prefix}{key}.")
        return found

    return walk(OmegaConf.structured(Config), "")


def _stop(status: int, sentence: str) -> None:
    print(f"rvdist: {sentence}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
