"""The images' steps of installation, done here without Docker."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

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
