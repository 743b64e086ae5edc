"""The doctor's checks, each with something that is wrong."""

import http.server
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kalmagrove.bench import doctor, doctor_io, doctor_links
from kalmagrove.bench.doctor import Finding
from kalmagrove.cli import main
from kalmagrove.parallel import Group
from kalmagrove.track import wandb_sink

pytestmark = pytest.mark.unit


def levels(found: Any) -> list[str]:
    return [one.level for one in found]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_io, "SIZE", 2**20)


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["torch>=2.0", "numpy<1", "not-there-at-all>=3", 'triton; extra == "gpu"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: needed)
    torch_version = torch.__version__.partition("+")[0]
    found = list(doctor.packages({"torch": torch_version, "numpy": "1.0", "absent": "9"}))
    assert [one.level for one in found] == ["problem", "problem", "ok", "warning"]
    assert found[0].text.startswith("numpy ")
    assert "needed: <1" in found[0].text
    assert found[1].text == "not-there-at-all is missing, needed: >=3"
    assert found[2].text == "1 of 3 required packages fit"
    assert "(tested: 1.0)" in found[3].text
    assert "torch" not in found[3].text
    assert "absent" not in found[3].text
    assert "torch" in doctor._lock(), "of this checkout"


# Two GPUs: one as it should be, one with everything wrong.
NVML = SimpleNamespace(
    NVMLError=KeyError,
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED=1,
    NVML_VOLATILE_ECC=0,
    nvmlSystemGetDriverVersion=lambda: b"570.1",
    nvmlDeviceGetCount=lambda: 2,
    nvmlDeviceGetHandleByIndex=lambda number: number,
    nvmlDeviceGetName=lambda gpu: "H100",
    nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(
        total=80 * 2**30, used=(1 + 40 * gpu) * 2**30
    ),
    nvmlDeviceGetTotalEccErrors=lambda gpu, kind, counter: 3 * gpu,
    nvmlDeviceGetCurrentClocksThrottleReasons=lambda gpu: [0x1, 0x1 | 0x40][gpu],  # 0x1: idle
)


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert levels(doctor.gpus(None)) == ["ok"], "none, on this machine"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    (bare,) = doctor.gpus(None)
    assert (bare.level, "nvidia-ml-py" in bare.advice) == ("warning", True)
    found = list(doctor.gpus(NVML))
    assert [(one.topic, one.level) for one in found] == [
        ("GPUs", "ok"), ("GPU 0", "ok"),
        ("GPU 1", "ok"), ("GPU 1", "warning"), ("GPU 1", "problem"), ("GPU 1", "warning"),
    ]  # fmt: skip
    assert found[0].text.endswith("NCCL 2.27.3, driver 570.1")
    assert [one.text for one in found[3:]] == [
        "41.0 GiB are in use already",
        "3 uncorrected memory errors since the driver was loaded",
        "its clock is slowed by heat (hardware)",
    ]


def test_memory_of_a_container(tmp_path: Path) -> None:
    assert "container" not in next(doctor.memory(tmp_path)).text
    (tmp_path / "memory.max").write_text(f"{3 * 2**30}\n")
    (tmp_path / "memory.current").write_text(f"{2 * 2**30}\n")
    (found,) = doctor.memory(tmp_path)
    assert found.level == "warning"
    assert found.text.startswith("3.0 GiB by a container's limit")
    assert "1.0 GiB free" in found.text
    (tmp_path / "memory.max").write_text("max\n")
    assert "container" not in next(doctor.memory(tmp_path)).text


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(total=64 * 2**20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (1024, 4096))
    files, shm = doctor.limits(tmp_path)
    assert (files.level, shm.level) == ("warning", "warning")
    assert "ulimit -n 65536" in files.advice
    assert "--shm-size" in shm.advice


def test_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speed, free = doctor_io.disk(tmp_path)
    assert (speed[0], free[0]) != ("problem", "problem")
    assert "MB/s with fsync" in speed[1]
    assert not list(tmp_path.iterdir()), "it leaves nothing"
    monkeypatch.setattr(doctor_io.fcntl, "flock", lambda *_: None)
    monkeypatch.setattr(doctor_io.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**29))
    _, locks, free = doctor_io.disk(tmp_path)
    assert (locks[0], "no locks" in locks[1]) == ("warning", True)
    assert free[:2] == ("problem", "0.5 GiB free")
    gone, _ = doctor_io.disk(tmp_path / "gone")
    assert (gone[0], gone[1]) == ("problem", "cannot be written (No such file or directory)")
    assert doctor.existing(tmp_path / "a" / "b") == tmp_path


def test_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert abs(doctor_io.clock_offset(tmp_path)) < 2
    now = time.time
    monkeypatch.setattr(doctor_io.time, "time", lambda: now() - 60)
    (found,) = doctor.clock(tmp_path)
    assert found.level == "warning"
    assert found.text.startswith("60.0")
    assert "behind" in found.text


@pytest.fixture
def address() -> Iterator[str]:
    """Of a server that knows no page."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            """Silent."""

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_network(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    places = {"W&B": address, "hub": "http://127.0.0.1:9"}
    assert doctor_io.network(places) == {"W&B": True, "hub": False}
    monkeypatch.setattr(doctor_io, "PATIENCE", 0.2)
    monkeypatch.setattr(doctor_io, "answers", lambda _: time.sleep(1))
    assert doctor_io.network(places) == {"W&B": False, "hub": False}, "nobody is waited for"


def test_a_key_is_looked_for_in_both_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    settings = SimpleNamespace(base_url="https://host", api_key=None)
    monkeypatch.setattr(wandb, "setup", lambda: SimpleNamespace(settings=settings))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_sink.server() == "https://host"
    assert wandb_sink.api_key_missing()
    (tmp_path / "netrc").write_text("machine other login user password x\n")
    assert wandb_sink.api_key_missing()
    (tmp_path / "netrc").write_text("machine host login user password x\n")
    assert not wandb_sink.api_key_missing()
    monkeypatch.delenv("NETRC")
    settings.api_key = "x"
    assert not wandb_sink.api_key_missing()


def test_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    assert next(doctor_io.ports())[0] in ("ok", "warning")
    monkeypatch.setattr(doctor_io.socket, "gethostname", lambda: "no.such.name.invalid")
    (found,) = doctor_io.ports()
    assert found[0] == "warning"
    assert "no.such.name.invalid, this machine's name, does not lead here" in found[1]


def test_wrong_sums_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    group, device = Group.alone(), torch.device("cpu")
    monkeypatch.setattr(doctor_links.dist, "get_backend", lambda: "gloo")
    for name, right in (("_all_reduce", False), ("_all_to_all", True)):
        link = doctor_links.Link(name, 1.0, right)
        monkeypatch.setattr(doctor_links, name, lambda *_, link=link: link)
    reduce, exchange, clocks = doctor_links.links(group, device)
    assert (reduce.level, exchange.level, clocks.level) == ("problem", "ok", "ok")
    slow = torch.device("cuda")
    assert doctor_links.links(group, slow)[1].level == "warning", "1 GB/s between GPUs"


@pytest.mark.parametrize(("level", "code"), [("ok", 0), ("warning", 0), ("problem", 1)])
def test_the_exit_code_is_that_of_the_worst(
    level: Any, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    found = [Finding("a", "ok", "fine"), Finding("b", level, "text", "do [this]")]
    monkeypatch.setattr(doctor, "examine", lambda *_: found)
    assert main(["doctor", "--json", str(tmp_path / "new" / "found.json")]) == code
    out = capsys.readouterr().out
    assert f"{level}" in out
    assert "text; do [this]" in out
    written = json.loads((tmp_path / "new" / "found.json").read_text())
    assert written["findings"][1] == {
        "topic": "b", "level": level, "text": "text", "advice": "do [this]",
    }  # fmt: skip


def test_where_the_findings_go_is_looked_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    looked: list[Any] = []
    look = lambda *_: looked.append(sorted(tmp_path.iterdir())) or []  # noqa: E731
    monkeypatch.setattr(doctor, "examine", look)
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "found.json"):
        assert main(["doctor", "--json", str(place)]) == 1
        error = capsys.readouterr().err
        assert f"--json {place} cannot be written (" in error
        assert error.count("\n") == 1
    assert not looked
    assert main(["doctor", "--json", str(tmp_path / "found.json")]) == 0
    assert looked == [[tmp_path / "file"]], "no file until there is something to say"
    assert main(["doctor", "--json", "/dev/full"]) == 1, "a disk that became full meanwhile"
    assert "--json /dev/full cannot be written (No space" in capsys.readouterr().err


def test_a_check_that_breaks_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Any:
        raise PermissionError("not for you")

    monkeypatch.setattr(doctor, "cores", broken)
    monkeypatch.setattr(doctor, "_network", lambda: iter(()))
    found = {one.topic: one for one in doctor.examine(tmp_path / "runs", tmp_path)}
    assert found["cores"].text == "cannot be looked at (PermissionError: not for you)"
    assert {"python", "packages", "memory", "runs", "cache", "clock", "ports"} <= set(found)
    assert not (tmp_path / "runs").exists(), "it is looked at, not made"


def test_mistakes_of_doctor(capsys: pytest.CaptureFixture) -> None:
    assert main(["doctor", "--nproc", "0"]) == 2
    assert "--nproc=0 must be at least 1" in capsys.readouterr().err
    assert main(["doctor", "dri=x"]) == 2
    assert "dri=x is not a known key" in capsys.readouterr().err
