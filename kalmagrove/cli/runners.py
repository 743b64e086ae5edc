"""Where the trials of a sweep run: on this machine, or as jobs of Slurm. How each of them ended."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from kalmagrove.cli import launch, local, run_folder, slurm
from kalmagrove.config import BudgetReached, Interrupted, KalmaGroveError, Training
from kalmagrove.track import read_history

KILLED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes of a run before its first step
AGAIN = ("PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "TIMEOUT")  # states that say nothing of the run
IDLE = 3  # jobs of a run that end so and saved nothing new
SILENT = 100  # questions in a row that Slurm may leave without an answer
Status = Literal["done", "stopped", "budget", "failed", "lost"]


@dataclass(frozen=True)
class End:
    """How a run ended. lost: it was killed and can begin again where it saved. text: why."""

    folder: Path
    status: Status
    text: str = ""


class Runner(Protocol):
    """Begins runs and tells how they ended.

    here: the runs end when this process is asked to stop; else they go on without it.
    every: seconds between looks at them.
    """

    here: bool
    every: float

    def room(self, run: Training) -> bool:
        """Whether another run can begin now."""

    def goes_on(self, folder: Path) -> bool:
        """Whether the run is going, begun by an earlier process."""

    def begin(self, folder: Path, run: Training) -> None:
        """Begin the run, or join it if it goes on."""

    def ended(self) -> Iterator[End]:
        """Those that have ended since the last call."""

    def stop(self, folder: Path) -> None:
        """Have a run save and end."""


class Here:
    """Runs on this machine's GPUs, or on its cores."""

    here, every = True, 1.0

    def __init__(self, at_once: int | None) -> None:
        self._machine = local.Machine("train", at_once)
        self._runs: dict[Path, Training] = {}
        self._stopped: set[Path] = set()
        self._finished: list[Path] = []

    def room(self, run: Training) -> bool:
        return self._machine.room(run)

    def goes_on(self, folder: Path) -> bool:
        return local.found(folder) is not None

    def begin(self, folder: Path, run: Training) -> None:
        self._runs[folder] = run
        self._stopped.discard(folder)
        if not self.goes_on(folder) and run_folder.done(folder, run) is not None:
            self._finished.append(folder)
        else:
            self._machine.begin(folder, run)

    def ended(self) -> Iterator[End]:
        while self._finished:
            yield End(self._finished.pop(), "done")
        for one in self._machine.ended():
            status = self._status(one)
            yield End(one.folder, status, "" if status == "done" else local.failure(one))

    def stop(self, folder: Path) -> None:
        self._stopped.add(folder)
        for one in self._machine.going:
            if one.folder == folder:
                one.signal(signal.SIGTERM)

    def _status(self, one: local.Going) -> Status:
        if run_folder.done(one.folder, self._runs[one.folder]) is not None:
            return "done"
        if one.code is None:  # nobody here has its exit code
            said = written(one.folder)
            return "lost" if said in (None, "done") else said
        if one.code in KILLED and one.folder in self._stopped:
            return "stopped"
        codes: dict[int, Status] = {
            Interrupted.exit_code: "stopped",
            BudgetReached.exit_code: "budget",
        }
        return codes.get(one.code, "failed")


class Jobs:
    """Runs as jobs of Slurm. One that the cluster takes away without queuing it again, or whose
    machine dies, is submitted again.
    """

    here, every = False, 5.0

    def __init__(self, at_once: int | None) -> None:
        """at_once: at most so many; None: as many as the cluster has GPUs for."""
        slurm.check()
        self._at_once = at_once
        self._going: dict[slurm.Job, Training] = {}
        self._finished: list[Path] = []
        self._saved: dict[Path, tuple[int, int]] = {}
        self._silent = 0

    def room(self, run: Training) -> bool:
        assert run.cluster is not None
        most = self._at_once or max(1, run.cluster.gpus // launch.world_size(run))
        return len(self._going) < most

    def goes_on(self, folder: Path) -> bool:
        job = slurm.recorded(folder)
        return job is not None and job.goes_on

    def begin(self, folder: Path, run: Training) -> None:
        jobs, finished = slurm.submit([run], "train")
        self._going |= dict.fromkeys(jobs, run)
        self._finished += finished

    def ended(self) -> Iterator[End]:
        while self._finished:
            yield End(self._finished.pop(), "done")
        for job, run in list(self._going.items()):
            try:
                state = job.state or "forgotten"
                self._silent = 0
            except KalmaGroveError:  # it restarts, perhaps
                self._silent += 1
                if self._silent > SILENT:
                    raise
                return
            if state in (*slurm.ENDED, "forgotten"):
                del self._going[job]
                if self._taken_away(job, state):
                    print(f"job {job.job} {state}: {job.folder} is submitted again", flush=True)
                    self.begin(job.folder, run)
                else:
                    yield self._end(job, state)

    def stop(self, folder: Path) -> None:
        for job in self._going:
            if job.folder == folder:
                try:
                    print(slurm.cancel(job), flush=True)
                except KalmaGroveError as error:  # it has just ended
                    print(error, flush=True)

    def _taken_away(self, job: slurm.Job, state: str) -> bool:
        """Whether another job should take up the run."""
        if state not in AGAIN or (job.folder / "slurm" / "cancel").exists():
            return False
        newest = run_folder.newest_step(job.folder)
        before, idle = self._saved.get(job.folder, (0, 0))
        idle = idle + 1 if newest == before else 0
        self._saved[job.folder] = newest, idle
        return written(job.folder) in (None, "stopped") and idle < IDLE

    def _end(self, job: slurm.Job, state: str) -> End:
        why = slurm.failure(job, state)
        if why is None:
            return End(job.folder, "done")
        said = written(job.folder)
        cancelled = state == "CANCELLED" or (job.folder / "slurm" / "cancel").exists()
        if said == "budget" or (cancelled and said in (None, "stopped")):
            return End(job.folder, said or "stopped", why)
        lost = state == "forgotten" and said in (None, "stopped")
        return End(job.folder, "lost" if lost else "failed", why)


def written(folder: Path) -> Status | None:
    """How the run's last session ended, as its ledger says; None: it does not say, or has not
    begun.
    """
    path = folder / "ledger.jsonl"
    lines = read_history(path).lines if path.is_file() else ()
    return lines[-1]["status"] if lines and lines[-1]["event"] == "stop" else None
