"""Whole `kalmagrove train` commands of two ranks into which faults are injected: see `inject`."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from kalmagrove.track.audit import faults as ledger_faults
from tests.e2e.conftest import SMALL

INJECT = Path(__file__).with_name("inject")
EVERY = 4  # steps between checkpoints
HANG = "launch.hang_timeout=8"
WORDS = [
    *SMALL,
    f"data.source.paths=[{Path(os.__file__).parent}/json/*.py]",
    "data.val_fraction=0.1",
    "ffn=grove",
    "parallel.ep=2",
    "launch.nproc=2",
    "batch.tokens=256",
    "steps=8",
    f"checkpoint.every={EVERY}",
    "sample.max_new_tokens=0",
]


@dataclass(frozen=True)
class Fault:
    """What rank `rank` does in a phase of a step, once: see `inject`."""

    do: str
    phase: str
    step: int
    rank: int = 1


def injected(folder: Path, name: str, *faults: Fault) -> dict[str, str]:
    """The environment in which a run's ranks have these faults, once; `folder` remembers that."""
    told = [
        {**vars(fault), "done": str(folder / f"{name}-{number}")}
        for number, fault in enumerate(faults)
    ]
    return {"PYTHONPATH": str(INJECT), "KALMAGROVE_FAULTS": json.dumps(told)}


class Place:
    """A folder in which runs are broken, beside one that never was."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        whole = self.train("whole")
        assert whole.returncode == 0, whole.stderr

    def train(
        self, name: str, *faults: Fault, words: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run the command to its end. A fault that has happened does not happen again."""
        command = [sys.executable, "-m", "kalmagrove", "train", *WORDS, f"name={name}", *words]
        command.append(f"data.cache={self.folder / 'cache'}")
        # Files, as a pipe would be open as long as an orphan lives.
        out, err = self.folder / f"{name}.out", self.folder / f"{name}.err"
        with out.open("w") as stdout, err.open("w") as stderr:
            done = subprocess.run(
                command,
                cwd=self.folder,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | injected(self.folder, name, *faults),
                stdout=stdout,
                stderr=stderr,
                timeout=400,
            )
        return subprocess.CompletedProcess(
            command, done.returncode, out.read_text(), err.read_text()
        )

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def lines(self, name: str) -> list[dict]:
        """Of the ledger."""
        text = (self.run(name) / "ledger.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def lost(self, name: str) -> list[int]:
        """Steps that every session but the first found to be lost."""
        first = [line for line in self.lines(name) if line["event"] in ("start", "resume")]
        return [line["lost_steps"] for line in first[1:]]

    def losses(self, name: str) -> dict[int, tuple[float, float]]:
        """Loss and gradient norm by step; of a step done twice, the later line counts."""
        found = [line for line in self.lines(name) if line["event"] == "step"]
        return {line["step"]: (line["loss"], line["grad_norm"]) for line in found}

    def as_if_nothing_happened(self, name: str) -> None:
        """The run is done and has the figures of the one that was never broken."""
        assert self.losses(name) == self.losses("whole")
        assert json.loads((self.run(name) / "summary.json").read_text())["status"] == "done"
        assert ledger_faults(self.run(name) / "ledger.jsonl") == []
        kept = sorted(path.name for path in (self.run(name) / "checkpoints").iterdir())
        assert kept == ["step-000004", "step-000008"]
        assert self.processes() == []

    def processes(self) -> list[psutil.Process]:
        """Those that still live, of all commands in this folder."""
        found = []
        for process in psutil.process_iter():
            try:
                if str(self.folder) in process.environ().get("KALMAGROVE_FAULTS", ""):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def until_all_ended(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.processes():
            assert time.monotonic() < end, [process.cmdline() for process in self.processes()]
            time.sleep(0.2)
