"""Faults in the ranks of an unchanged `kalmagrove train`: Python imports this at its start, from
PYTHONPATH, and it does what KALMAGROVE_FAULTS says.

That is a list of faults (JSON), each with: rank; step, and phase of it; do, one of DEEDS; done, a
file that is made when it has happened, so that it does not in the next try.
"""

import ctypes
import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

FAULTS = json.loads(os.environ.get("KALMAGROVE_FAULTS", "[]"))
DEEDS: dict[str, Callable[[], Any]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(600),
    "sleep with the lock": lambda: ctypes.PyDLL(None).sleep(600),
    "kill launcher": lambda: os.kill(os.getppid(), signal.SIGKILL),
    "kill supervisor": lambda: os.kill(_parent(os.getppid()), signal.SIGKILL),
}


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


class Injector:
    """The faults of this rank."""

    def __init__(self, faults: list[dict[str, Any]]) -> None:
        self.faults = faults
        self.step = 0

    def at(
        self, phase: str, before: Callable[[], object] = lambda: None, step: int | None = None
    ) -> None:
        """Do what is due in this phase of a step, by default the one that is trained. before: what
        is done first, if so.
        """
        now = (self.step if step is None else step, phase)
        for fault in self.faults:
            done = Path(fault["done"])
            if (fault["step"], fault["phase"]) == now and not done.exists():
                done.touch()
                before()
                DEEDS[fault["do"]]()


def patch_watchdog(module: ModuleType, injector: Injector) -> None:
    """Phases of the loop: where they begin."""
    at = module.Progress.at

    def patched(self: Any, phase: str, step: int | None = None) -> None:
        at(self, phase, step)
        injector.step = self.place.step
        injector.at(phase)

    module.Progress.at = patched


def patch_exchange(module: ModuleType, injector: Injector) -> None:
    """`all-to-all`: this rank does not come to the exchange in which the others wait."""
    exchange = module.dist.all_to_all_single

    def patched(*args: Any, **more: Any) -> Any:
        injector.at("all-to-all")
        return exchange(*args, **more)

    module.dist.all_to_all_single = patched


def patch_files(module: ModuleType, injector: Injector) -> None:
    """`save`: when half of this rank's file is written."""
    tensors = module.FileWriter.tensors

    def patched(self: Any, name: str, *rest: Any) -> None:
        tensors(self, name, *rest)
        path, step = self.folder / name, int(self.folder.name[len("step-") :][:6])
        injector.at("save", lambda: os.truncate(path, path.stat().st_size // 2), step)

    module.FileWriter.tensors = patched


PATCHES = {
    "kalmagrove.engine.watchdog": patch_watchdog,
    "kalmagrove.parallel.differentiable": patch_exchange,
    "kalmagrove.engine.tensor_files": patch_files,
}


class Finder(importlib.abc.MetaPathFinder):
    """Patches modules when they are imported."""

    def __init__(self, injector: Injector) -> None:
        self.injector = injector

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in PATCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None
        loader = spec.loader
        assert loader is not None
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            PATCHES[name](module, self.injector)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


RANK = os.environ.get("RANK", os.environ.get("SLURM_PROCID"))
mine = [fault for fault in FAULTS if str(fault["rank"]) == RANK]
if mine:
    sys.meta_path.insert(0, Finder(Injector(mine)))
