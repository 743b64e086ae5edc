"""Train, look at what is left, kill, resume, stop, generate."""

import json
import os
import signal
import subprocess
import time
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from kalmagrove.config.attempts import BEAT, beats
from kalmagrove.engine.connect import free_port
from kalmagrove.track import read_history
from kalmagrove.track.accounts import sessions
from kalmagrove.track.audit import faults
from tests.e2e.conftest import command, run

pytestmark = pytest.mark.e2e
TWO = "launch.nproc=2"
SUMMARY = {
    "status", "steps", "tokens", "val_loss_nats", "val_bits_per_byte", "unigram_nats",
    "bigram_nats", "tokens_per_s", "device_seconds", "usd", "params_total", "params_active",
    "world_size", "commit",
}  # fmt: skip


def losses(folder: Path) -> dict[int, float]:
    """Training loss by step; of a step done twice, the later line counts."""
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["event"] == "step"}


@pytest.fixture(scope="module")
def finished(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 24 steps on two processes, never interrupted."""
    place = tmp_path_factory.mktemp("finished")
    words = [*settings, TWO, "zero=stage2", "steps=24", "name=whole", "checkpoint.every=8"]
    words += ["profile=steps", "profile.steps=[2,3]", "track.tensorboard=true"]
    began = time.time()
    done = run("train", *words, cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    (place / "stdout").write_text(done.stdout)
    (place / "began").write_text(str(began))
    return place


def test_what_a_run_leaves(finished: Path) -> None:
    folder = finished / "runs" / "whole"
    assert (finished / "runs" / "latest").resolve() == folder.resolve()
    for name in ("config.yaml", "ledger.jsonl", "console.log", "checkpoints", "samples"):
        assert (folder / name).exists(), name
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == [
        "step-000016",
        "step-000024",
    ]
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) >= SUMMARY
    assert summary["status"] == "done"
    assert (summary["steps"], summary["tokens"]) == (24, 24 * 512)
    assert summary["world_size"] == 2
    assert summary["usd"] > 0
    exact = summary["device_seconds"] * 0.04 / 3600
    assert summary["usd"] == pytest.approx(exact, rel=1e-3, abs=1e-6), "kept to a millionth"
    assert 0 < summary["bigram_nats"] < summary["unigram_nats"]
    assert summary["params_active"] < summary["params_total"]
    by_step = losses(folder)
    assert set(by_step) == set(range(1, 25))
    assert by_step[24] < by_step[1] - 0.5, "a model learns"
    out = (finished / "stdout").read_text()
    assert "bigram" in out
    assert (folder / "samples" / "step-000024.txt").read_text().strip() in out


def test_its_phases_add_up_to_the_time_since_the_command(finished: Path) -> None:
    """Preparing data, and starting the ranks, which other processes do, included."""
    folder = finished / "runs" / "whole"
    stop = json.loads((folder / "ledger.jsonl").read_text().splitlines()[-1])
    ended = datetime.fromisoformat(stop["time"]).timestamp()
    wall = ended - float((finished / "began").read_text())
    assert sum(stop["phases"].values()) == pytest.approx(wall, rel=0.01)
    assert stop["wall_seconds"] == pytest.approx(wall, rel=0.01)
    assert faults(folder / "ledger.jsonl") == []
    assert beats(folder) == []


def test_what_was_looked_at_while_it_trained(finished: Path) -> None:
    folder = finished / "runs" / "whole"
    traces = [path.name for path in (folder / "profile").iterdir()]
    assert traces == ["trace-steps-2-3-rank-0.json.gz"]
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    for line in lines:
        if line["event"] == "step":
            least, mean, most = (line[f"rank_seconds_{which}"] for which in ("min", "mean", "max"))
            assert 0 < least <= mean <= most < line["step_seconds"], "of two ranks, own time alone"
            assert mean == pytest.approx((least + most) / 2, abs=2e-6)
            assert line["slowest_rank"] in (0, 1)


def test_a_run_is_sent_to_wandb_out_of_its_ledger(finished: Path) -> None:
    folder = finished / "runs" / "whole"
    assert not (folder / "wandb").exists(), "track.wandb=disabled"
    done = run("track", "sync", "runs/whole", cwd=finished, HF_TOKEN="a-token-of-the-hub")
    assert done.returncode == 0, done.stdout + done.stderr
    (sent,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    assert f"wandb sync {sent.parent}" in done.stdout
    content = sent.read_bytes()
    assert b"loss/train" in content
    assert b"a-token-of-the-hub" not in content


def test_one_process_gives_the_same_losses(finished: Path, settings: list[str]) -> None:
    words = [*settings, "zero=stage0", "steps=24", "name=alone", "batch.micro=8"]
    words += ["checkpoint.every=100"]
    done = run("train", *words, cwd=finished)
    assert done.returncode == 0, done.stderr
    alone = losses(finished / "runs" / "alone")
    whole = losses(finished / "runs" / "whole")
    for step in range(1, 13):  # rounding grows with the steps
        assert alone[step] == pytest.approx(whole[step], rel=2e-4), step


def test_any_layout_gives_the_same_losses_and_continues_any_other(
    settings: list[str], tmp_path: Path
) -> None:
    """With SGD, as AdamW divides by the size of gradients: rounding grows within a few steps."""
    words = [*settings, "ffn=grove", "model.attention.softmax.kv_heads=2", "batch.micro=2"]
    words += ["optim=sgd", "optim.lr=0.05", "schedule=constant", "sample.max_new_tokens=0"]
    split = ["parallel.tp=2", "parallel.ep=2", "launch.nproc=4", "zero=stage2", "name=split"]
    for more in (["steps=12", "name=alone", "zero=stage0"], ["steps=10", *split]):
        done = run("train", *words, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    whole = losses(tmp_path / "runs" / "alone")
    found = losses(tmp_path / "runs" / "split")
    assert found == pytest.approx({step: whole[step] for step in range(1, 11)}, rel=2e-5)
    last = json.loads((tmp_path / "runs/split/ledger.jsonl").read_text().splitlines()[-4])
    assert last["comm"]["alltoall_bytes"] > 0

    more = ["launch.nproc=1", "zero=stage0", "steps=12", "name=split"]
    done = run("train", *words, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "runs" / "split") == pytest.approx(whole, rel=5e-5)
    assert run("checkpoint", "verify", "runs/split", cwd=tmp_path).returncode == 0


def test_a_finished_run_is_not_trained_again(finished: Path, settings: list[str]) -> None:
    config = finished / "runs" / "whole" / "config.yaml"
    before = (config.parent / "ledger.jsonl").read_bytes()
    done = run("train", "--config", str(config), cwd=finished)
    assert done.returncode == 0, done.stderr
    assert "has already done its 24 steps" in done.stdout
    assert (config.parent / "ledger.jsonl").read_bytes() == before
    # The same under a launcher, where the ranks themselves find out.
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    launcher = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **port}
    words = [*settings, "zero=stage2", "steps=24", "name=whole"]
    done = run("train", *words, cwd=finished, **launcher)
    assert done.returncode == 0, done.stderr
    assert "has already done its 24 steps" in done.stdout
    other = run("train", *words, "optim.lr=1e-3", cwd=finished)
    assert other.returncode == 2
    assert "trained with other settings (optim.lr was 0.003, is 0.001)" in other.stderr
    assert (config.parent / "ledger.jsonl").read_bytes() == before


def start(words: list[str], cwd: Path) -> subprocess.Popen[bytes]:
    with (cwd / "log").open("ab") as log:
        return subprocess.Popen(
            command("train", *words),
            cwd=cwd,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def wait_for(process: subprocess.Popen[bytes], folder: Path, step: int) -> None:
    """Until the run's ledger has the line of `step`."""
    ledger, until = folder / "ledger.jsonl", time.monotonic() + 180
    while time.monotonic() < until:
        log = (folder.parent.parent / "log").read_text()
        assert process.poll() is None, log
        if ledger.exists() and f'"step": {step},' in ledger.read_text().replace('":', '": '):
            return
        if ledger.exists() and max(losses(folder), default=0) >= step:
            return
        time.sleep(0.05)
    pytest.fail(f"step {step} was not reached in time")


def test_killed_and_resumed_is_bit_exact(
    finished: Path, settings: list[str], tmp_path: Path
) -> None:
    words = [*settings, TWO, "zero=stage2", "steps=24", "name=whole", "checkpoint.every=8"]
    began = time.monotonic()
    process = start(words, tmp_path)
    folder = tmp_path / "runs" / "whole"
    wait_for(process, folder, 11)
    for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
        victim.send_signal(signal.SIGKILL)
    process.wait()
    real = time.monotonic() - began
    reached = max(losses(folder))
    assert 11 <= reached < 24, "the kill came in time"
    done = run("train", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(folder) == losses(finished / "runs" / "whole")
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    (resumed,) = [line for line in lines if line["event"] == "resume"]
    assert resumed["step"] in (8, 16)
    assert resumed["lost_steps"] == reached - resumed["step"]
    booked = sessions(read_history(folder / "ledger.jsonl"))[0].spent.wall_seconds
    assert real - 1.5 * BEAT < booked < real + 0.1, "up to the last beat before the kill"
    assert (faults(folder / "ledger.jsonl"), beats(folder)) == ([], [])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "done"
    assert summary["tokens"] == 24 * 512


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves(
    number: signal.Signals, settings: list[str], tmp_path: Path
) -> None:
    words = [*settings, TWO, "steps=3000", "name=stopped", "checkpoint.every=2000"]
    words += ["checkpoint.resume=never"]
    process = start(words, tmp_path)
    folder = tmp_path / "runs" / "stopped"
    wait_for(process, folder, 3)
    process.send_signal(number)
    assert process.wait(timeout=120) == 75, (tmp_path / "log").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert "resume: auto" in (folder / "config.yaml").read_text()
    assert (folder / "checkpoints" / f"step-{summary['steps']:06d}" / "state.json").exists()
    log = (tmp_path / "log").read_text()
    assert log.count("kalmagrove: stopped by ") == 1, "one rank says it"
    assert "checkpoint.resume=auto continues" in log
    assert log.count("finishing the step and saving; Ctrl-C again kills") == 1


def test_another_model_is_refused(finished: Path, settings: list[str]) -> None:
    folder = finished / "runs" / "whole"
    before = (folder / "config.yaml").read_bytes()
    words = [*settings, TWO, "zero=stage2", "steps=30", "name=whole", "ffn=dense"]
    done = run("train", *words, cwd=finished)
    assert done.returncode == 1
    assert done.stderr.count("model.ffn.pattern") == 1, "one rank says it"
    assert "Traceback" not in done.stderr
    assert (folder / "config.yaml").read_bytes() == before, "a refused start changes nothing"


def test_generate(finished: Path) -> None:
    words = ["generate", "run=runs/whole", "max_new_tokens=12", "prompt=def f(x):", "prompt=import"]
    first, second = (run(*words, cwd=finished) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert first.stdout.startswith("def f(x):")
    assert "\nimport" in first.stdout
    missing = run("generate", "run=runs/none", cwd=finished)
    assert missing.returncode == 1
    assert missing.stderr.startswith("kalmagrove: run=")
    assert missing.stderr.count("\n") == 1
    tokenizer = finished / "runs" / "whole" / "tokenizer" / "tokenizer.json"
    own = tokenizer.read_text()
    try:
        tree = json.loads(own)
        tree["added_tokens"][0]["lstrip"] = not tree["added_tokens"][0]["lstrip"]
        tokenizer.write_text(json.dumps(tree))
        foreign = run(*words, cwd=finished)
    finally:
        tokenizer.write_text(own)
    assert foreign.returncode == 1
    assert "is not the tokenizer that" in foreign.stderr


def test_a_mistake_leaves_nothing_behind(settings: list[str], tmp_path: Path) -> None:
    done = run("train", *settings, "model.ffn.kan.top_k=99", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()
    words = [*settings, TWO, "data.seq_len=4000000", "batch.tokens=32000000"]
    done = run("train", *words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("kalmagrove: data.seq_len=4000000 is longer than the data")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()
