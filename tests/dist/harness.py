"""Start a worker function in several gloo processes and get what rank 0 returns.

A worker is a function of a module that takes plain arguments and returns plain data (JSON). Run as
`python -m module WORKER ARGUMENTS RESULT`, the module calls it and writes rank 0's result.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from kalmagrove.engine.connect import free_port

ROOT = Path(__file__).resolve().parents[2]
# `make test-matrix`: all layouts, not a representative part of them
WHOLE = bool(os.environ.get("KALMAGROVE_MATRIX"))


class Ranks:
    """Running processes of one worker."""

    def __init__(
        self,
        worker: str,
        ranks: int,
        env: dict[str, str] | None = None,
        module: str = "tests.dist.workers",
        **arguments: Any,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kalmagrove-dist-"))
        self.logs = [self.folder / f"rank-{rank}.log" for rank in range(ranks)]
        shared = {
            **os.environ,
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            **(env or {}),
        }
        command = [sys.executable, "-m", module, worker, json.dumps(arguments)]
        command.append(str(self.folder / "result.json"))
        self.processes = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
            )
            for rank, log in enumerate(self.logs)
        ]

    def kill(self) -> None:
        """SIGKILL all processes, as a failing machine would."""
        for process in self.processes:
            process.kill()
            process.wait()

    def signal(self, number: signal.Signals, rank: int) -> None:
        self.processes[rank].send_signal(number)

    def codes(self, timeout: float = 120) -> list[int]:
        """Exit codes. Outliving `timeout` kills all processes and fails the test."""
        try:
            return [process.wait(timeout) for process in self.processes]
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"no end after {timeout} s\n{self.output()}") from None

    def output(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()[-4000:]}" for log in self.logs)

    def result(self, timeout: float = 120) -> Any:
        """What rank 0 returned; all ranks must have ended well."""
        codes = self.codes(timeout)
        assert not any(codes), f"exit codes {codes}\n{self.output()}"
        return json.loads((self.folder / "result.json").read_text())


def run_ranks(
    worker: str,
    ranks: int,
    *,
    timeout: float = 120,
    module: str = "tests.dist.workers",
    env: dict[str, str] | None = None,
    **arguments: Any,
) -> Any:
    return Ranks(worker, ranks, env, module, **arguments).result(timeout)
