"""Libraries made ahead of time: those that the models use, where the run time looks for them."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from kalmagrove.cli.compose import conf_dir
from kalmagrove_kernels import jit, prebuild
from kalmagrove_kernels.ada import cuda_convolve
from kalmagrove_kernels.edge import cuda as edge
from kalmagrove_kernels.projection import accumulate
from tests.kernels.stand_in import install

pytestmark = pytest.mark.unit
HOPPER = (9, 0)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder, empty; nvcc is a stand-in, the sources are the package's."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("KALMAGROVE_KERNEL_CACHE", str(tmp_path / "cache"))
    install(tmp_path)
    return tmp_path / "cache"


def libraries_in(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.so")}


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], set[str]]:
    """What the ops ask for on a GPU of some capability, by name, for every size of prebuild."""
    paths: list[Path] = []
    monkeypatch.setattr(jit, "Library", lambda op, path: paths.append(path))

    def names(capability: tuple[int, int]) -> set[str]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        jit._library.cache_clear()
        paths.clear()
        gpu = torch.device("cuda:0")
        jit.library("permute", gpu)
        if capability == HOPPER:
            accumulate._library(torch.bfloat16, gpu)
        for dtype in prebuild.DTYPES:
            tensor: Any = SimpleNamespace(device=gpu, dtype=dtype)
            cuda_convolve._library(tensor, torch.ones(prebuild.TAPS, 8))
            for edges in prebuild.EDGES:
                edge._library(tensor, edge.Shape(1, edges, 8, prebuild.DEGREE, 8, 1, 1))
        jit._library.cache_clear()
        return {path.name for path in paths}

    return names


def test_the_run_time_finds_what_was_built(
    cache: Path, looked_up: Callable[[tuple[int, int]], set[str]]
) -> None:
    assert prebuild.main(["--arch", "90", "--arch", "80"]) == 0
    made = libraries_in(cache)
    calls = (cache.parent / "log").read_text().splitlines()
    assert len(calls) == len(made) > 10
    assert looked_up(HOPPER) | looked_up((8, 0)) == made
    assert (cache.parent / "log").read_text().splitlines() == calls, "something was compiled anew"


def test_they_are_put_into_another_folder(
    cache: Path, tmp_path: Path, looked_up: Callable[[tuple[int, int]], set[str]]
) -> None:
    assert prebuild.main(["--arch", "8.0", "--out", str(tmp_path / "out")]) == 0
    assert not cache.exists()
    assert libraries_in(tmp_path / "out") == looked_up((8, 0))


def test_errors_name_their_cause(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(cache.parent, failure="echo 'op.cu(3): error: no such thing'; exit 1")
    assert prebuild.main(["--arch", "90"]) == 1
    assert "prebuild: nvcc could not compile" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        prebuild.main(["--arch", "hopper"])
    assert "hopper is no compute capability; try 90" in capsys.readouterr().err


def test_all_that_the_models_use_is_built() -> None:
    built = list(prebuild.libraries(HOPPER))
    models = [yaml.safe_load(p.read_text())["model"] for p in conf_dir().glob("model/*.yaml")]
    models = [model for model in models if "kan" in model.get("ffn", {})]
    assert len(models) >= 5
    for model in models:
        kans = model["ffn"]["kan"], model["ffn"]["grove"]["kan"]
        for dtype in prebuild.DTYPES:
            taps = model["attention"]["ada"]["taps"]
            assert ("ada", cuda_convolve.constants(taps, dtype)) in built, model["name"]
            for kan in kans:
                wanted = edge.constants(kan["edge"]["degree"], kan["edges"], dtype)
                assert ("edge", wanted) in built, model["name"]
