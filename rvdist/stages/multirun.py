"""The launcher `rvdist_ray`: runs the jobs of a Hydra sweep together, on one Ray cluster and one warm fleet.

Hydra's jobs share global state, so none is run in a thread or process of its own: each is only composed, as Hydra
composes it, and then all of them are run as one. Between the batches of a sweeper such as Optuna's, Ray and the
engines stay up; `close` ends them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from rvdist.core.config import Config
from rvdist.core.errors import BadInput
from rvdist.core.log import Log, LoggedTiming
from rvdist.core.table import Cells, print_table
from rvdist.core.timing import Timing, seconds_since_process_start
from rvdist.stages import private_hydra
from rvdist.stages.job import Ended, Job, remove_empty

if TYPE_CHECKING:
    from rvdist.report.page.models import Model
    from rvdist.stages.warm import Warm

NAME = "rvdist_ray"


@dataclass
class LauncherConfig:
    """What Hydra makes the launcher from."""

    _target_: str = f"{private_hydra.PLUGINS}.{NAME}.RayLauncher"


def register() -> None:
    """Makes the launcher known to Hydra."""
    private_hydra.register(NAME, __name__, RayLauncher, LauncherConfig)


def name_of(number: int, own: str) -> str:
    """What stands before the sentence of a job that failed; `own` is what sets it apart."""
    return f"job {number} ({own}): " if own else f"job {number}: "


class RayLauncher(Launcher):
    """Of all jobs so far `failures` are those of some, by name, which Hydra is not told: it would end the sweep; so are
    `scores`, also of jobs that Hydra's own launcher runs. What happens is told in `log`, the command's."""

    log: ClassVar[Log]
    failures: ClassVar[list[tuple[str, Exception]]] = []
    scores: ClassVar[list[float | None]] = []  # of those that are done
    _sweep: ClassVar[Path | None] = None  # its directory
    _warm: ClassVar[Warm | None] = None
    _models: ClassVar[dict[str, Model]] = {}  # what all jobs so far scored, by what they differ in besides α

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `launch`."""
        self._context, self._config = hydra_context, config
        self._take = private_hydra.compose_alike(hydra_context.config_loader)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Returns the mean primary score of each job, None of one that failed or scored nothing."""
        from rvdist.stages.jobs import run_jobs
        from rvdist.stages.warm import Warm

        if not job_overrides:
            raise BadInput("-m: what is swept has no value, so there is no job; say which there are: KEY=ONE,OTHER")
        setup_globals()
        RayLauncher._sweep = Path(self._config.hydra.sweep.dir).absolute()
        timing = LoggedTiming(RayLauncher.log)
        if RayLauncher._warm is None:
            RayLauncher._warm = Warm(outlived=False)
            timing.add("imports", seconds_since_process_start())
        composed = [
            self._compose(number, overrides, timing) for number, overrides in enumerate(job_overrides, initial_job_idx)
        ]
        runs = [job for _, job in composed if isinstance(job, Job)]
        self._gather_logs(runs)
        directories = [str(job.directory) if isinstance(job, Job) else "" for _, job in composed]
        try:
            ended = dict(zip(runs, run_jobs(runs, RayLauncher._warm), strict=True))
        finally:
            RayLauncher.log.release()
            for run in runs:
                remove_empty(run.directory)
        swept = private_hydra.swept(self._config.hydra.overrides.task, *job_overrides)
        rows: list[Cells] = []
        jobs = zip(swept, composed, directories, strict=True)
        for number, (overrides, (returned, job), directory) in enumerate(jobs, initial_job_idx):
            returned.status = JobStatus.COMPLETED
            own = " ".join(overrides)
            match job if isinstance(job, Exception) else ended[job].error or ended[job].objective:
                case Exception() as failure:
                    RayLauncher.failures.append((name_of(number, own), failure))
                    rows.append([str(number), own, "failed"])
                case score:
                    RayLauncher.scores.append(score)
                    returned.return_value = score
                    shown = "" if score is None else f"{score:.4f}"
                    rows.append([str(number), own, shown, str(directory)])
                    if isinstance(job, Job):
                        self._keep(job, own, ended[job])
        self._show_models()
        print_table(("job", "", "mean score", "directory"), rows, RayLauncher.log.console)
        return [returned for returned, _ in composed]

    def _keep(self, job: Job, own: str, ended: Ended) -> None:
        """For the page of all jobs; those that differ in α alone are one model."""
        from rvdist.report.page.models import Model

        sweep, place = Path(self._config.hydra.sweep.dir).absolute(), job.directory.absolute()
        if ended.findings and ended.findings.rows and sweep in place.parents:
            differing = [override for override in own.split(" ") if not override.startswith("alpha=")]
            name = " ".join(differing).strip() or job.settings.target
            where = (str(place.relative_to(sweep) / "report.html"),)
            found = Model(name, ended.findings.benchmarks, where)
            RayLauncher._models[name] = RayLauncher._models[name].join(found) if name in RayLauncher._models else found

    def _show_models(self) -> None:
        """All jobs that have scores as one page, in the sweep's directory."""
        if RayLauncher._models:
            from rvdist.report.page.models import write_models

            path = Path(self._config.hydra.sweep.dir).absolute() / "report.html"
            models = list(RayLauncher._models.values())
            write_models(path, "One model" if len(models) == 1 else f"{len(models)} models", models)
            RayLauncher.log.say("message", f"report: {path}")

    def _gather_logs(self, runs: Sequence[Job]) -> None:
        """In the sweep's directory, where all are below it: each job's would else have the lines of all others."""
        sweep = Path(self._config.hydra.sweep.dir).absolute()
        if len(runs) > 1 and all(sweep in job.directory.parents for job in runs):
            RayLauncher.log.gather(sweep)

    def _compose(self, number: int, overrides: Sequence[str], timing: Timing) -> tuple[JobReturn, Job | Exception]:
        """A job as Hydra makes it ready, and what there is to run or why there is nothing."""
        jobs: list[Job] = []

        def collect(composed: DictConfig) -> None:
            settings = OmegaConf.to_object(composed)
            assert isinstance(settings, Config)
            RayLauncher.log.as_json = settings.log == "json"
            command = " ".join(["python -m rvdist.launch", *overrides])
            directory = Path(HydraConfig.get().runtime.output_dir)
            jobs.append(Job(settings, directory, command, timing, RayLauncher.log))

        config = self._take(self._config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        returned = run_job(
            hydra_context=self._context,
            task_function=collect,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        returned.cfg = returned.hydra_cfg = None  # nobody asks, and of ten thousand jobs they are gigabytes
        return returned, jobs[0] if jobs else private_hydra.result_of(returned)

    @classmethod
    def close(cls) -> None:
        """Ends what stayed up. A sweep that left nothing of its own leaves nothing of Hydra's."""
        if cls._warm is not None:
            cls._warm.close()
            cls._warm = None
        with suppress(OSError):
            if cls._sweep and [file.name for file in cls._sweep.iterdir()] == ["multirun.yaml"]:
                (cls._sweep / "multirun.yaml").unlink()
                remove_empty(cls._sweep)
