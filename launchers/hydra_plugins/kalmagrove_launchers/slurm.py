"""`hydra/launcher=slurm`: every run of a sweep is a job. Hydra runs where it is submitted only."""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class SlurmConfig:
    """Keys under `hydra.launcher`; what is asked of Slurm stands in `cluster.slurm`."""

    _target_: str = "hydra_plugins.kalmagrove_launchers.slurm.SlurmLauncher"
    at_once: int | None = None  # one job array, of which so many run at a time; null: a job a run
    wait: bool = True  # until all jobs have ended; false: `kalmagrove jobs` tells of them
    poll: float = 5.0  # seconds between questions to Slurm


ConfigStore.instance().store(
    group="hydra/launcher", name="slurm", node=SlurmConfig(), provider="kalmagrove"
)


class SlurmLauncher(Launcher):
    """Submits; then waits for the jobs and tells which runs failed."""

    def __init__(self, at_once: int | None, wait: bool, poll: float) -> None:
        self.at_once, self.wait, self.poll = at_once, wait, poll

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.context, self.config = hydra_context, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from kalmagrove.cli import multirun, slurm

        verb = str(self.config.hydra.job.config_name)
        runs = multirun.parsed(verb, self.context.config_loader, self.config, job_overrides)
        jobs, finished = slurm.submit(runs, verb, self.at_once)
        if self.wait:
            multirun.tell(slurm.wait(jobs, self.poll), [job.folder for job in jobs], finished)
        return []
