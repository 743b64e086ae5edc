"""A wheel built from the tree works away from the repository."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.e2e.conftest import run

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed in it."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    subprocess.run(["git", "clone", "-q", ROOT, source], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", place, source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = place.glob("kalmagrove-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    homes = {"conf": "kalmagrove/conf", "kernels/csrc": "kalmagrove_kernels/csrc"}
    homes |= {"launchers/templates": "kalmagrove/templates"}
    homes |= {"launchers/hydra_plugins": "hydra_plugins"}
    for folder, inside in homes.items():
        files = [p for p in (source / folder).rglob("*") if p.is_file()]
        assert files
        for path in files:
            assert f"{inside}/{path.relative_to(source / folder)}" in names
    install = [*pip, "install", "-q", "--no-deps", "--target", place / "site", wheel]
    subprocess.run(install, check=True, capture_output=True)
    return place / "site"


def test_the_wheel_trains(site: Path, settings: list[str], tmp_path: Path) -> None:
    where = subprocess.run(
        [sys.executable, "-c", "import kalmagrove; print(kalmagrove.__file__)"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(str(site))
    words = [*settings, "steps=2", "launch.nproc=2", "name=away"]
    done = run("train", *words, cwd=tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs" / "away" / "summary.json").exists()
