"""Which runs of `hydra/launcher=deepspeed` go at once, and on which GPUs."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from kalmagrove.cli import local, multirun
from kalmagrove.cli.compose import compose_tree
from kalmagrove.config import ConfigError, Run, load

pytestmark = pytest.mark.unit


def runs(count: int, nproc: int, place: Path) -> list[Run]:
    words = ["model=kan_tiny", "ffn=kan", f"launch.nproc={nproc}", f"dir={place}"]
    return [load(compose_tree("train", [*words, f"name=run-{i}"])) for i in range(count)]


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str], float]]:
    """Short programs instead of the runs; what began: name, GPUs, when. `run-1` fails."""
    began: list[tuple[str, list[str], float]] = []

    def start(folder: Path, run: Run, verb: str, gpus: list[str]) -> subprocess.Popen[bytes]:
        began.append((folder.name, gpus, time.monotonic()))
        folder.mkdir(parents=True)
        (folder / "launch.log").write_text("kalmagrove: no luck\n")
        ends = "exit 3" if folder.name == "run-1" else "exit 0"
        return subprocess.Popen(["sh", "-c", f"sleep 0.3; {ends}"])

    monkeypatch.setattr(local, "_start", start)
    return began


@pytest.mark.parametrize(
    ("nproc", "at_once", "together"), [(1, None, 3), (1, 2, 2), (2, None, 1), (2, 3, 1)]
)
def test_gpus_are_shared_out(
    nproc: int,
    at_once: int | None,
    together: int,
    programs: list[tuple[str, list[str], float]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    failed, ran, finished = local.run_all(runs(3, nproc, tmp_path), "train", at_once)
    assert [name for name, _, _ in programs] == ["run-0", "run-1", "run-2"]
    assert all(len(gpus) == nproc for _, gpus, _ in programs)
    first = programs[0][2]
    with_it = [gpus for _, gpus, when in programs if when - first < 0.25]
    assert len(with_it) == together
    assert len({gpu for gpus in with_it for gpu in gpus}) == together * nproc, "none is shared"
    assert list(failed) == [tmp_path / "run-1"]
    assert failed[tmp_path / "run-1"].startswith("exit code 3: kalmagrove: no luck (")
    assert (len(ran), finished) == (3, [])
    with pytest.raises(SystemExit) as end:
        multirun.tell(failed, ran, finished)
    assert end.value.code == 1


def test_without_gpus_one_at_a_time_and_a_signal_begins_no_other(
    programs: list[tuple[str, list[str], float]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    handler = signal.getsignal(signal.SIGTERM)
    four, polled = runs(4, 1, tmp_path), time.sleep

    def sleep(seconds: float) -> None:
        if len(programs) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        polled(seconds)

    monkeypatch.setattr(time, "sleep", sleep)
    failed, _, _ = local.run_all(four, "train", None)
    assert [name for name, _, _ in programs] == ["run-0", "run-1"]
    assert "exit code 143" in failed[tmp_path / "run-1"]
    assert [failed[tmp_path / name] for name in ("run-2", "run-3")] == ["was not begun"] * 2
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_cluster_is_not_for_this_machine(tmp_path: Path) -> None:
    run = load(compose_tree("train", ["cluster=h100x8", "launch.nproc=auto"]))
    with pytest.raises(ConfigError, match="cluster=h100x8 is for hydra/launcher=slurm"):
        local.run_all([run], "train", None)


def test_two_runs_of_one_name_are_refused(tmp_path: Path) -> None:
    class Loader:
        def load_sweep_config(self, config: None, words: list[str]) -> object:
            from omegaconf import OmegaConf

            return OmegaConf.create(compose_tree("train", words))

    points = [["name=same", "seed=1"], ["name=same", "seed=2"]]
    with pytest.raises(ConfigError, match="name=same is the folder of 2 runs of the sweep"):
        multirun.parsed("train", Loader(), None, points)
