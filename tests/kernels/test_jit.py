"""The just-in-time builder: its cache, its errors, ranks that build at once. No nvcc is needed:
`stand_in` is one."""

import ctypes
import fcntl
import shutil
import threading
from pathlib import Path

import pytest
import torch

from kalmagrove_kernels import jit
from tests.kernels.stand_in import install

pytestmark = pytest.mark.unit


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CUDA_HOME with a stand-in for nvcc, and sources and cache of our own."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("KALMAGROVE_KERNEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(jit, "source_folder", lambda: tmp_path / "csrc")
    (tmp_path / "csrc" / "op").mkdir(parents=True)
    (tmp_path / "csrc" / "common.cuh").write_text("// shared\n")
    (tmp_path / "csrc" / "op" / "op.cu").write_text("// op\n")
    install(tmp_path)
    return tmp_path


def calls(home: Path) -> list[str]:
    log = home / "log"
    return log.read_text().splitlines() if log.exists() else []


def test_a_library_is_built_once(home: Path) -> None:
    place = jit.build("op", ("-DX=1",))
    assert place.read_text() == "// op\n"
    assert place.parent == home / "cache"
    assert jit.build("op", ("-DX=1",)) == place
    (call,) = calls(home)
    assert {*jit.FLAGS, "-DX=1", "-I.", "op/op.cu"} <= set(call.split())


def test_everything_that_matters_is_in_the_key(home: Path) -> None:
    places = [jit.build("op", ()), jit.build("op", ("-DX=1",))]
    (home / "csrc" / "common.cuh").write_text("// changed\n")
    places.append(jit.build("op", ()))
    (home / "csrc" / "op" / "op.cu").write_text("// changed\n")
    places.append(jit.build("op", ()))
    install(home, version="13.1")
    places.append(jit.build("op", ()))
    assert len(set(places)) == len(places) == len(calls(home))


def test_ranks_that_build_at_once_compile_once(home: Path) -> None:
    install(home, seconds=0.2)
    places: list[Path] = []
    ranks = [threading.Thread(target=lambda: places.append(jit.build("op", ()))) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(places) == 4
    assert len(set(places)) == len(calls(home)) == 1


def test_a_build_waits_for_the_lock_and_leaves_nothing_half_done(home: Path) -> None:
    place = jit.build("op", ())
    place.unlink()
    with open(place.with_suffix(".lock"), "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        rank = threading.Thread(target=jit.build, args=("op", ()))
        rank.start()
        rank.join(0.2)
        assert rank.is_alive()
        assert not place.exists()
    rank.join()
    assert {path.suffix for path in (home / "cache").iterdir()} == {".so", ".lock"}


def test_errors_of_the_compiler_are_shown(home: Path) -> None:
    install(home, failure="echo 'warning: fine'; echo 'op.cu(3): error: no such thing' >&2; exit 1")
    with pytest.raises(RuntimeError, match=r"(?s)nvcc.*CUDA_HOME.*op.cu.3.: error") as caught:
        jit.build("op", ())
    assert "fine" not in str(caught.value)
    assert [path.suffix for path in (home / "cache").iterdir()] == [".lock"]
    install(home)
    assert jit.build("op", ()).exists()


def test_without_nvcc_the_remedy_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(home / "bin")
    monkeypatch.setattr(jit.shutil, "which", lambda name: None)
    monkeypatch.setattr(jit.os, "access", lambda path, mode: False)
    with pytest.raises(RuntimeError, match=r"nvcc.*CUDA_HOME is /.*backend='triton'"):
        jit.build("op", ())
    monkeypatch.delenv("CUDA_HOME")
    with pytest.raises(RuntimeError, match="CUDA_HOME is not set"):
        jit.find_nvcc()


def test_a_broken_nvcc_is_named(home: Path) -> None:
    (home / "bin" / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(RuntimeError, match="nvcc --version failed; set CUDA_HOME"):
        jit.build("op", ())


def test_missing_sources_are_named(home: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no CUDA sources of other under .*csrc"):
        jit.build("other", ())


def test_a_cache_that_is_no_folder_is_named(home: Path) -> None:
    (home / "cache").write_text("")
    with pytest.raises(RuntimeError, match="set KALMAGROVE_KERNEL_CACHE"):
        jit.build("op", ())


def test_the_cache_is_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KALMAGROVE_KERNEL_CACHE", raising=False)
    assert jit.cache_folder() == Path.home() / ".cache" / "kalmagrove" / "kernels"


def test_the_sources_of_the_package_are_found() -> None:
    assert {"common.cuh", "edge/edge_topk.cu", "edge/spline.cuh"} <= set(jit.read_sources("edge"))


def test_hopper_needs_its_own_target() -> None:
    assert jit.gencode(9, 0) == "-gencode=arch=compute_90a,code=sm_90a"
    assert jit.gencode(8, 6) == "-gencode=arch=compute_86,code=sm_86"


def test_a_tensor_that_is_on_no_gpu_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"cuda backend of edge needs .* GPU and got cpu"):
        jit.library("edge", torch.device("cpu"), DEGREE=3)


def test_a_failed_launch_raises_what_cuda_says(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Loaded:
        def __init__(self, path: str) -> None:
            self.good = self.launcher(None)
            self.bad = self.launcher(b"invalid argument")

        @staticmethod
        def launcher(result: bytes | None) -> object:
            def call(*arguments: object) -> bytes | None:
                seen.append([getattr(a, "value", None) for a in arguments])
                return result

            return call

    monkeypatch.setattr(ctypes, "CDLL", Loaded)
    library, tensor = jit.Library("op", Path("op.so")), torch.ones(2)
    library.launch("good", tensor, None, 7, 0.5)
    assert seen == [[tensor.data_ptr(), None, 7, 0.5, None]]
    with pytest.raises(RuntimeError, match=r"CUDA kernel op.bad: invalid argument"):
        library.launch("bad", tensor)
