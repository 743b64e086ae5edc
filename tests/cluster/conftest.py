"""A real Slurm of two nodes on loopback, started by slurm.sh; and what tests ask of it."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("slurm.sh")
SMALL = [
    "model=kan_tiny",
    "ffn=kan",
    "data=text",
    "data.seq_len=32",
    "data.val_fraction=0.2",
    "data.tokenizer.vocab_size=512",
    f"data.source.paths=[{Path(os.__file__).parent}/json/*.py]",
    "batch={tokens: 512, micro: 4}",
    "eval={every: 100000, micro: 4, max_tokens: 1024}",
    "checkpoint.every=100000",
    "track.every=1",
    "track.wandb=disabled",
    "price=cpu",
    "sample.max_new_tokens=0",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why = _missing()
    for item in items:
        if why and "cluster" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=why))


def _missing() -> str | None:
    """Why no Slurm can be started here; None: it can."""
    if not os.environ.get("KALMAGROVE_SLURM"):
        return "a real Slurm on this machine is started by `make test-slurm` alone"
    if os.geteuid() != 0:
        return "needs root, to start slurmd"
    if shutil.which("slurmctld") is None and shutil.which("apt-get") is None:
        return "needs Slurm, or Debian to install it"
    return None


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which `sbatch` and `srun` find the Slurm; ended with the session."""
    place = os.environ.get("KALMAGROVE_SLURM_DIR") or "/var/tmp/kalmagrove-slurm"
    done = subprocess.run([SCRIPT, "start", place], timeout=300)
    if done.returncode == 3:
        pytest.skip("needs a Slurm, which this machine cannot have; slurm.sh says why")
    done.check_returncode()
    env = os.environ | {
        "SLURM_CONF": f"{place}/slurm.conf",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    env.pop("KALMAGROVE_STOP_FILE", None)
    yield env
    if not os.environ.get("KALMAGROVE_SLURM_KEEP"):
        subprocess.run([SCRIPT, "stop", place], check=True, timeout=120)


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a tiny run; the token cache is shared by all tests."""
    return [*SMALL, f"data.cache={tmp_path_factory.mktemp('cache')}"]


def kalmagrove(*words: str) -> list[str]:
    return [sys.executable, "-m", "kalmagrove", *words]


def run(
    *words: str, cwd: Path, env: dict[str, str], timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; the output is kept."""
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


def lines(folder: Path) -> list[dict]:
    """Of a run's ledger; none as long as there is no file."""
    try:
        text = (folder / "ledger.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses(folder: Path) -> dict[int, float]:
    """Training loss by step; of a step done twice, the later line counts."""
    return {line["step"]: line["loss"] for line in lines(folder) if line["event"] == "step"}


def until(true: Callable[[], object], what: str, seconds: float = 120) -> None:
    """Wait; fails with `what` after `seconds`."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.2)


def sweep(*words: str, settings: list[str]) -> list[str]:
    """The command that submits a job for each run."""
    conf = Path(__file__).with_name("conf")
    launcher = ["-m", "hydra/launcher=slurm", "hydra.launcher.poll=1", "cluster=loopback"]
    launcher.append(f"hydra.searchpath=[file://{conf}]")
    return kalmagrove("train", *launcher, *settings, *words)


def submit(
    *words: str, settings: list[str], cwd: Path, env: dict[str, str], timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """A sweep of jobs, here or (see `env`) anywhere, until it ends."""
    return run(*sweep(*words, settings=settings), cwd=cwd, env=env, timeout=timeout)
