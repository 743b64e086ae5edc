"""Runs over two machines, here two nodes on the loopback, that other launchers start: `deepspeed
--hostfile` with ssh and without, and the containers of docker/compose.yaml.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kalmagrove.engine.connect import free_port
from tests.e2e.conftest import run

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parents[2]
HOSTS = ("127.0.0.1", "127.0.0.2")
# In the place of pdsh, which runs a command on each machine (-w) through ssh, its number for %n.
# The shell there has none of the caller's variables.
PDSH = """#!/bin/sh
while getopts Sf:w: option; do [ $option != w ] || hosts=$OPTARG; done
shift $((OPTIND - 1))
number=0 code=0 started=
for host in $(echo $hosts | tr , ' '); do
  env -i PATH=/usr/bin:/bin HOME=/ sh -c "$(echo "$*" | sed "s/%n/$number/g")" &
  number=$((number + 1)) started="$started $!"
done
for one in $started; do wait $one || code=$?; done
exit $code
"""
SSH = """#!/bin/sh
case "$*" in *"hostname -I") echo 127.0.0.1 ;; *hostname) ;; *) exit 255 ;; esac
"""


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """What `deepspeed` is called in, with stand-ins for pdsh and ssh."""
    here = tmp_path / "bin"
    here.mkdir()
    for name, text in (("pdsh", PDSH), ("ssh", SSH)):
        (here / name).write_text(text)
        (here / name).chmod(0o755)
    found = {k: v for k, v in os.environ.items() if not k.startswith("KALMAGROVE_")}
    (tmp_path / "hosts").write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    return found | {"PATH": f"{here}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def deepspeed(*words: str) -> list[str]:
    """docs/clusters.md, without the launcher."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", "hosts"]
    return [*launcher, "--master_port", str(free_port()), *words]


def losses(folder: Path) -> dict[int, float]:
    lines = map(json.loads, (folder / "ledger.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["event"] == "step"}


def test_both_forms_of_deepspeed_train(
    env: dict[str, str], settings: list[str], tmp_path: Path
) -> None:
    train = ["--no_local_rank", "--module", "kalmagrove", "train", *settings, "steps=3"]
    train += ["sample.max_new_tokens=0"]
    done = subprocess.run(
        deepspeed(*train, "name=ssh"), cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    plain, nodes = deepspeed("--no_ssh", "--master_addr", HOSTS[0]), []
    for number in range(2):
        words = [*plain, "--node_rank", str(number), *train, "name=plain"]
        pipe = subprocess.PIPE
        nodes.append(
            subprocess.Popen(words, cwd=tmp_path, env=env, stdout=pipe, stderr=pipe, text=True)
        )
    said = ["".join(node.communicate(timeout=240)) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(said)
    for name in ("ssh", "plain"):
        summary = json.loads((tmp_path / "runs" / name / "summary.json").read_text())
        assert (summary["status"], summary["world_size"]) == ("done", 2)
    found = losses(tmp_path / "runs" / "ssh")
    assert set(found) == {1, 2, 3}
    assert found == losses(tmp_path / "runs" / "plain")


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
    assert set(found) == {1, 2, 3}
    assert found == pytest.approx(losses(tmp_path / "runs" / "two-processes"), rel=1e-6)
