"""What docker/ says is done here without Docker: the images' steps of installation, and the
commands of the two containers as two nodes on this machine."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

from kalmagrove.engine.connect import free_port
from tests.e2e.conftest import run
from tests.kernels.stand_in import install as install_nvcc

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parents[2]
STEPS = ("packages", "project", "kernels")  # system needs root and apt


def copies() -> list[str]:
    """What the Dockerfile copies of the repository."""
    lines = (ROOT / "docker" / "Dockerfile").read_text().splitlines()
    found = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert "kalmagrove" in found
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with the copied files alone: what the image's build sees."""
    folder = tmp_path / "source"
    for name in copies():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", "bench/results")
            shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
        else:
            shutil.copy2(ROOT / name, folder / name)
    return folder


def install(source: Path, venv: Path, **env: str) -> None:
    """Run the steps of docker/install.sh; PYTHON is that of the tests."""
    for step in STEPS:
        done = subprocess.run(
            [source / "docker" / "install.sh", step],
            env=os.environ | {"VENV": str(venv), "PYTHON": sys.executable} | env,
            cwd=source.parent,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{step}: {done.stdout}{done.stderr}"


def check_installed(venv: Path, folder: Path) -> None:
    """The venv's own kalmagrove works, away from the sources."""
    where = [venv / "bin" / "python", "-c", "import kalmagrove; print(kalmagrove.__file__)"]
    done = subprocess.run(where, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(venv))
    plan = [venv / "bin" / "kalmagrove", "train", "experiment=quickstart", "--dry-run"]
    done = subprocess.run(plan, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_images_steps_install(source: Path, tmp_path: Path) -> None:
    """With the packages of the tests' environment, so that nothing is downloaded."""
    venv, cache = tmp_path / "venv", tmp_path / "kernels"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install_nvcc(tmp_path)
    env = {"PIP_NO_INDEX": "1", "CUDA_HOME": str(tmp_path), "KALMAGROVE_KERNEL_CACHE": str(cache)}
    install(source, venv, **env)
    check_installed(venv, tmp_path)
    assert len(list(cache.glob("*.so"))) == len((tmp_path / "log").read_text().splitlines()) > 5


@pytest.mark.skipif(
    "KALMAGROVE_DOCKER" not in os.environ,
    reason="downloads and installs every package: make test-docker",
)
def test_the_images_steps_install_from_nothing(source: Path, tmp_path: Path) -> None:
    venv, cache = tmp_path / "venv", tmp_path / "kernels"
    nvcc = shutil.which("nvcc")
    env = {"ARCHS": "90" if nvcc else "", "KALMAGROVE_KERNEL_CACHE": str(cache)}
    install(source, venv, **env)
    check_installed(venv, tmp_path)
    assert (len(list(cache.glob("*.so"))) > 5) == bool(nvcc)


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "ledger.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["event"] == "step"]


def test_the_two_containers_train_as_two_processes_do(settings: list[str], tmp_path: Path) -> None:
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    words = [*settings, "optim=adamw", "steps=3", "sample.prompts=[]", "schedule.warmup=0"]
    port, nodes = str(free_port()), []
    for service in services.values():
        command = shlex.split(service["command"])
        assert command[0] == "torchrun"
        here = {"node0": "127.0.0.1", "29500": port}
        command = [here.get(word, word) for word in command[1:]]
        env = os.environ | service["environment"] | {"GLOO_SOCKET_IFNAME": "lo"}
        launcher = [sys.executable, "-m", "torch.distributed.run"]
        nodes.append(
            subprocess.Popen(
                [*launcher, *command, *words],
                cwd=tmp_path,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(said)
    words += ["experiment=quickstart", "name=two-processes", "launch.nproc=2"]
    done = run("train", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = losses(tmp_path / "runs" / "two-containers")
    assert len(found) == 3
    assert found == pytest.approx(losses(tmp_path / "runs" / "two-processes"), rel=1e-6)
