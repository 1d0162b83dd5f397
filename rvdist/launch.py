"""python -m rvdist.launch: configuration → run directory → stages. No logic of its own.

`up` and `down` alone begin and end a Ray that stays between commands.

Exit status: 0 everything asked for was done; 1 failed or partly done; 2 bad input (one sentence on
standard error, nothing written); 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rvdist.core.early import as_usual, end_quietly

if __name__ == "__main__" or Path(sys.argv[0]).name == "rvdist":  # as it is installed
    end_quietly()

import atexit
import difflib
import functools
import gc
import os
import shlex
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from rvdist.core import cluster, private_ray, session, text
from rvdist.core.config import Config
from rvdist.core.ends import KEPT, Watch, leave
from rvdist.core.errors import BadInput, Failed, as_ours
from rvdist.core.log import Log
from rvdist.stages import multirun, private_hydra
from rvdist.stages.job import remove_empty

_HERE = Path(__file__).resolve().parent
_BAD_INPUT = (BadInput, HydraException, OmegaConfBaseException)
_UNSCORED = "the jobs are done, but the sweeper asks for their scores; set benchmarks.tasks, or leave hydra/sweeper out"
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"


def main() -> None:
    """The command. Ends the process with the exit status above."""
    if sys.argv[1:] in (["up"], ["down"]):
        _up_or_down(sys.argv[1])
    gc.set_threshold(100_000)  # modules and records are many, cycles are few: a fifth of the imports
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them and exiting with 1
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval draws a bar for each task and arm
    log = multirun.RayLauncher.log = Log(as_json="log=json" in sys.argv)  # until the configuration says so
    session.last_word = "" if log.as_json else f"rvdist: killed, or ended from inside Ray; {KEPT}"
    private_ray.hear = lambda words: log.record("ray", words, "warning")
    watch = Watch(log.fail)
    failures: list[tuple[str, Exception]] = []
    try:
        watch.begin()
        failures = _take(log)
        watch.end()
    except KeyboardInterrupt:  # Ray's core has one of its own for ours
        watch.end()
        leave(130)
    if failures:
        refused = all(isinstance(failure, _BAD_INPUT) for _, failure in failures)
        status = 2 if refused and not multirun.RayLauncher.scores else 1
        for name, failure in failures:
            log.fail(f"{name}{_sentence(failure)}", status)
        if private_ray.is_guest():
            cluster.disconnect()
        sys.exit(status)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    private_ray.say_farewell()
    os._exit(0)  # the interpreter would take a second and a half to take apart what it holds


def _take(log: Log) -> list[tuple[str, Exception]]:
    """Does what the command line says. What failed, with the name of its job where there are several."""
    ConfigStore.instance().store(name="schema", node=Config)
    unfinished = os.environ.get("COMP_LINE")  # a shell asks how a command line could go on
    if unfinished:
        os.environ["COMP_LINE"] = " ".join(_quote(argument) for argument in unfinished.split(" "))
    failures: list[tuple[str, Exception]] = []

    def job(composed: DictConfig) -> float | None:
        """Hydra reports an exception in lines of its own and ends a sweep with it: keep it from Hydra."""
        try:
            score = run(composed, log)
        except Exception as error:
            if os.environ.get("RVDIST_TRACEBACK"):
                raise
            failures.append((_job_of_several(), as_ours(error)))
            return None
        multirun.RayLauncher.scores.append(score)
        return score

    try:
        multirun.register()
        private_hydra.compose_once()
        if not unfinished:
            sys.argv[1:] = [_quote_for_hydra(_quote(argument)) for argument in sys.argv[1:]]
        hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(job)()
    except Exception as error:
        if os.environ.get("RVDIST_TRACEBACK"):
            raise
        if not unfinished and not failures and not multirun.RayLauncher.failures:  # else it follows from them
            scores = multirun.RayLauncher.scores
            unscored = isinstance(error, ValueError) and scores and set(scores) == {None}
            failures.append(("", Failed(_UNSCORED) if unscored else as_ours(error)))
    finally:
        multirun.RayLauncher.close()
    return failures + multirun.RayLauncher.failures


def _up_or_down(what: str) -> NoReturn:
    """A Ray that stays up between commands, or its end."""
    from rvdist.core import upkeep

    as_usual()
    try:
        print(upkeep.up("rvdist.merge.ready") if what == "up" else upkeep.down())
    except (BadInput, Failed) as error:
        print(f"rvdist: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, BadInput) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def run(composed: DictConfig, log: Log) -> float | None:
    """One job: checks the configuration, runs its stages, returns the mean primary score (None without one)."""
    directory = Path(HydraConfig.get().runtime.output_dir)
    try:
        config = OmegaConf.to_object(composed)
        assert isinstance(config, Config)
        from rvdist.stages.jobs import run_stages

        several = HydraConfig.get().mode == RunMode.MULTIRUN  # by Hydra's own launcher, one after the other
        return run_stages(config, directory, sys.argv[1:], log, outlived=several)
    finally:
        remove_empty(directory)


def _job_of_several() -> str:
    """The name of the job that Hydra's own launcher runs; empty where there is but one."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode != RunMode.MULTIRUN:
        return ""
    (own,) = private_hydra.swept(sys.argv[1:], hydra_config.overrides.task)
    return multirun.name_of(hydra_config.job.num, " ".join(own))


def _quote(argument: str) -> str:
    """`output=out/{alpha}` and `engine.args={seed: 1}` as Hydra wants them. In its grammar the braces of a placeholder
    would open a dictionary."""
    key, _, value = argument.partition("=")
    if any(key == mapping or key.startswith(f"{mapping}.") for mapping in _keys(mappings=True)):
        return f"++{argument}"  # what has any keys; Hydra would change only those that are there
    return f"{key}='{value}'" if key in ("output", "publish") and "{" in value and value[0] not in "'\"" else argument


def _quote_for_hydra(argument: str) -> str:
    """A key with a value in quotes where Hydra's grammar, which knows no `=` and few letters in a word, cannot read it
    without. Raises BadInput where it cannot read it at all."""
    key, equals, value = argument.partition("=")
    if argument.startswith("-") or not equals:
        return argument
    quote = '"' if "'" in value else "'"
    quoted = f"{key}={quote}{value}{quote}"
    try:
        override = private_hydra.parse_override(argument)
        if private_hydra.is_glob(override) and key in _keys() and not (CONF / key).is_dir():
            raise BadInput(
                f"{key}: glob() chooses from a group, such as method, and {key} is none; name its values: "
                f"{key}=ONE,OTHER with -m" + (f", or a pattern without -m: \"{key}='models/*'\"" * (key == "target"))
            )
        return argument
    except HydraException as error:
        if value[:1] not in "[{('\"" and not {",", quote} & {*value}:
            with suppress(HydraException):
                private_hydra.parse_override(quoted)
                return quoted
        reason = str(error).strip().splitlines()[0]
    raise BadInput(
        f"{key}: Hydra cannot read {value} ({reason}); a value with spaces, commas, '=', braces, '#' or quotes in it "
        f"is put in quotes for Hydra, within those of the shell: {_as_typed(key, value)}"
    )


def _as_typed(key: str, value: str) -> str:
    """How a value is given so that neither the shell nor Hydra takes it apart."""
    value = value.strip("'\"")
    return shlex.quote(f"{key}='{value}'") if '"' in value or "$" in value else f"\"{key}='{value}'\""


def _sentence(error: Exception) -> str:
    """An error as one sentence; Hydra's and OmegaConf's reports of several lines name the key."""
    if isinstance(error, BadInput | Failed):
        return str(error)
    if isinstance(error, OSError) and error.errno:
        where = text.reason(error.filename or "a file of the run directory", 500)
        return f"{where}: cannot be read or written ({error.strerror}); mend that, and run the same command again"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is not set; give {error.full_key}=VALUE"
    if not isinstance(error, _BAD_INPUT):
        return f"failed: {type(error).__name__}: {text.reason(error, 500)} (RVDIST_TRACEBACK=1 shows where)"
    first = str(error).strip().splitlines()[0].rstrip(".")
    reason = str(error.__cause__ or error).strip().splitlines()[0].rstrip(".")
    if first.startswith("Ambiguous value"):
        key, _, value = first.split("'")[1].partition("=")
        return (
            f"{key}: {value} is several values; put it in quotes for one of this name: {_as_typed(key, value)}, "
            f"into brackets for a list: {key}=[{value}], or add -m to run each"
        )
    if first.startswith("Error parsing override") and "=" not in first:
        stray = first.split("'")[1]
        return f"{stray}: is no KEY=VALUE; a value with spaces is put in quotes: \"KEY='VALUE'\""
    if "Could not override" in first:
        key = first.split("'")[1]
        if key in _keys():
            return f"{key}: {reason}"
        close = difflib.get_close_matches(key, _keys(), n=1)
        return f"{key}: no such key; " + (f"did you mean {close[0]}?" if close else "--help lists them")
    return first if first == reason else f"{first}: {reason}"


@functools.cache
def _keys(mappings: bool = False) -> list[str]:
    """All keys there are, or those alone that are mappings of names which the user chooses."""

    def walk(node: Any, prefix: str) -> Iterator[str]:
        for key in node:
            free = OmegaConf.get_type(node, key) is dict
            if free or not mappings:
                yield prefix + str(key)
            if not free and not OmegaConf.is_missing(node, key) and OmegaConf.is_dict(node[key]):
                yield from walk(node[key], f"{prefix}{key}.")

    return list(walk(OmegaConf.structured(Config), ""))


if __name__ == "__main__":
    main()
