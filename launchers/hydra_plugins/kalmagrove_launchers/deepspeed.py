"""`hydra/launcher=deepspeed`: every run of a sweep has processes of its own on this machine."""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class DeepSpeedConfig:
    """Keys under `hydra.launcher`."""

    _target_: str = "hydra_plugins.kalmagrove_launchers.deepspeed.DeepSpeedLauncher"
    at_once: int | None = None  # runs at a time; null: as many as there are GPUs for


ConfigStore.instance().store(
    group="hydra/launcher", name="deepspeed", node=DeepSpeedConfig(), provider="kalmagrove"
)


class DeepSpeedLauncher(Launcher):
    """Several runs at once if the devices suffice; one that fails ends only itself."""

    def __init__(self, at_once: int | None) -> None:
        self.at_once = at_once

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.context, self.config = hydra_context, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from kalmagrove.cli import local, multirun

        verb = str(self.config.hydra.job.config_name)
        runs = multirun.parsed(verb, self.context.config_loader, self.config, job_overrides)
        multirun.tell(*local.run_all(runs, verb, self.at_once))
        return []
