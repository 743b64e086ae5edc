"""The processes of a run on this machine: started, asked to stop, and started again if they die.

`kalmagrove train` and `retrofit` call `supervise` where no launcher started them. What a try leaves
is in the run's folder, so the next one goes on as the same command would.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from kalmagrove.cli import launch, run_folder
from kalmagrove.cli.run_folder import newest_step
from kalmagrove.config import (
    BudgetReached,
    ConfigError,
    Hung,
    Interrupted,
    NonFiniteError,
    Training,
)
from kalmagrove.config.attempts import CLEAN, Heartbeat

STOPPING = "finishing the step and saving; Ctrl-C again kills"
WILLED = (Interrupted, BudgetReached, ConfigError, NonFiniteError)  # another try ends the same way
IDLE = 3  # tries in a row that save nothing new
PAUSE = 60  # seconds before another try, at most


def supervise(run: Training, nproc: int, heartbeat: Heartbeat, verb: str = "train") -> int:
    """Do `verb` with `nproc` local processes; returns the exit code.

    If they die (a rank is killed, fails or hangs), they are started again from the last checkpoint,
    `launch.max_restarts` times at most, and not after three tries in a row that saved nothing new.

    Args:
        run: with the name and dir of the folder that was chosen for it.
        heartbeat: entered; of the first try, which began when the command did. Another one begins
            where the one before has ended: the pause between them is paid for.
    """
    folder, again, idle = Path(run.dir) / run.run_name, 0, 0
    with tempfile.TemporaryDirectory(prefix="kalmagrove-") as place:
        processes = Processes(Path(place))
        with processes.signals():
            while True:
                before = newest_step(folder)
                returned = processes.run(run, nproc, verb, heartbeat.attempt.environment)
                code = launch.exit_code(returned)
                heartbeat.died = code not in (0, *(error.exit_code for error in CLEAN))
                if code in (0, *(error.exit_code for error in WILLED)) or processes.stopping:
                    return code
                saved = newest_step(folder)
                idle = idle + 1 if saved == before else 0
                if again == run.launch.max_restarts or idle == IDLE:
                    _say_end(_what(returned), folder, again, idle)
                    return code
                heartbeat.again()
                again += 1
                pause = min(PAUSE, 2 ** (again - 1))
                _say(
                    f"{_what(returned)} after step {_reached(folder)}; starts again from step "
                    f"{saved} in {pause} s (restart {again} of {run.launch.max_restarts})"
                )
                if not processes.wait(pause):
                    heartbeat.died = True
                    _say(f"stopped; the same command continues from step {saved}")
                    return Interrupted.exit_code
                if run.checkpoint.resume == "never":  # the folder was new
                    resume = run.checkpoint.model_copy(update={"resume": "auto"})
                    run = run.model_copy(update={"checkpoint": resume})


class Processes:
    """The launcher of a run and its ranks, in a session of their own: a Ctrl-C reaches this process
    alone, which asks the ranks to stop through a file, so that they finish their step and save. A
    second one ends them.
    """

    def __init__(self, place: Path) -> None:
        """place: a folder for files that the ranks read."""
        self._config, self._stop_file = place / "config.yaml", place / "stop"
        self._launcher: subprocess.Popen[bytes] | None = None

    @property
    def stopping(self) -> bool:
        return self._stop_file.exists()

    def run(self, run: Training, nproc: int, verb: str, environment: Mapping[str, str]) -> int:
        """Until all have ended; returns what the launcher did: negative if a signal killed it."""
        run_folder.write_config(self._config, run)
        self._launcher = subprocess.Popen(
            [*launch.command(run, nproc), "kalmagrove", verb, "--config", str(self._config)],
            env={
                **launch.environment(),
                **environment,
                "KALMAGROVE_STOP_FILE": str(self._stop_file),
            },
            start_new_session=True,
        )
        returned = self._launcher.wait()
        if returned:  # ranks whose launcher was killed got SIGTERM from the system, and save
            _end(self._launcher.pid, run.launch.reserve if returned < 0 else 0)
        return returned

    @contextmanager
    def signals(self) -> Iterator[None]:
        """SIGINT, SIGTERM and SIGHUP ask the ranks to stop."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup leaves it
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def wait(self, seconds: float) -> bool:
        """Whether nobody asked to stop in this time."""
        _until(lambda: self.stopping, seconds)
        return not self.stopping

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.stopping:
            _say(STOPPING)
        elif number == signal.SIGINT and self._launcher and self._launcher.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._launcher.pid, signal.SIGKILL)
        self._stop_file.touch()


def _end(group: int, seconds: float) -> None:
    """Kill what is left of a process group, if it does not end by itself in so many seconds."""
    import psutil

    def left() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                own = os.getpgid(process.pid) == group
                if own and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (OSError, psutil.Error):  # it has ended
                continue
        return found

    _until(lambda: not left(), seconds)
    for process in left():
        with suppress(psutil.Error):
            process.kill()
    _until(lambda: not left(), PAUSE)  # one that the kernel keeps would keep the run's folder


def _until(true: Callable[[], bool], seconds: float) -> None:
    """Wait for something, no longer than so many seconds."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.1)


def _what(returned: int) -> str:
    """What became of a launcher and its ranks, of which it passes on the first bad code."""
    code = launch.exit_code(returned)
    if code == Hung.exit_code:
        return "the ranks hung"
    if code <= 128:
        return f"a rank failed with exit code {code}"
    try:
        name = signal.Signals(code - 128).name
    except ValueError:
        name = f"signal {code - 128}"
    return f"{'the launcher' if returned < 0 else 'a rank'} was killed by {name}"


def _say_end(what: str, folder: Path, again: int, idle: int) -> None:
    """Why there is no other try. What failed by itself has said why."""
    continues = f"the same command continues from step {newest_step(folder)}"
    if idle == IDLE:
        _say(f"{what}; gives up: {IDLE} tries in a row saved nothing new")
    elif again:
        _say(f"{what}; gives up after {again} restarts (launch.max_restarts); {continues}")
    elif not what.startswith("a rank failed"):
        _say(f"{what} after step {_reached(folder)}; {continues}")


def _reached(folder: Path) -> int:
    """The last step that the ledger tells of."""
    from kalmagrove.track import read_history

    ledger = folder / "ledger.jsonl"
    return read_history(ledger).reached[0] if ledger.is_file() else 0


def _say(text: str) -> None:
    print(f"kalmagrove: {text}", file=sys.stderr, flush=True)
