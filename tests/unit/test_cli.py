"""The command line: verbs, help, mistakes that are one line and exit code 2, run folders."""

import copy
import functools
import json
import operator
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
import yaml

from kalmagrove import __version__
from kalmagrove.cli import VERBS, launch, main, run_folder, session, train
from kalmagrove.cli.compose import compose_tree, read_yaml
from kalmagrove.config import (
    BudgetReached,
    ConfigError,
    DataError,
    Interrupted,
    KalmaGroveError,
    Run,
    load,
)
from kalmagrove.parallel import Groups

pytestmark = pytest.mark.unit


def test_usage_lists_the_verbs(capsys: pytest.CaptureFixture) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_help_and_cfg_of_every_verb(verb: str, capsys: pytest.CaptureFixture) -> None:
    assert main([verb, "--help"]) == 0
    assert f"kalmagrove {verb}" in capsys.readouterr().out
    assert main([verb, "--cfg", "job"]) == 0
    assert re.search(r"^\w+:", capsys.readouterr().out, re.M)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["steps=abc"], "steps='abc' should be a valid integer"),
        (["stepz=3"], "stepz=3 is not a known key"),
        (["model.ffn.kan.topk=3"], "model.ffn.kan.topk=3 is not a known key"),
        (["+model.ffn.kan.topk=3"], "model.ffn.kan.topk=3 is not a known key; did you mean top_k?"),
        (["model=nope"], "model=nope is not an option; try "),
        (["experiment=nope"], "experiment=nope is not an option; try "),
        (["steps"], "argument='steps' is not of the form key=value"),
        (["steps=[1"], "steps"),
        (["model=kan_tiny", "model.attention.ada.heads=5"], "must divide model.d_model=64"),
        (["parallel.tp=4"], "parallel.tp=4 must divide model.attention.softmax.kv_heads=2; try 2"),
        (["parallel.tp=2"], "must divide the number of processes=1; try parallel.tp=1, or 2 proc"),
        (["--config", "/does/not/exist.yaml"], "--config=/does/not/exist.yaml cannot be read"),
        (["--config=/does/not/exist.yaml"], "--config=/does/not/exist.yaml cannot be read"),
        (["--config", "a.yaml", "steps=3"], "takes one file and no overrides"),
        (["--cfg", "job", "model=nope"], "model=nope is not an option"),
        (["-m", "steps=3,x"], "steps='x' should be a valid integer"),
        (["-m", "steps=3", "model=kan_tiny,nope"], "model=nope is not an option"),
        (["-m", "steps=3,4", "model=kan_tiny", "batch.tokens=16384,5"], "batch.tokens=5 must be"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["train", "--dry-run", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "", "a sweep does not begin"
    err = err.strip()
    assert message in err
    assert err.startswith("kalmagrove: ")
    assert "\n" not in err


def test_unknown_verb(capsys: pytest.CaptureFixture) -> None:
    assert main(["trian"]) == 2
    assert "trian is not a verb" in capsys.readouterr().err


def test_dry_run_shows_the_plan(capsys: pytest.CaptureFixture) -> None:
    words = ["train", "--dry-run", "model=kan_tiny", "steps=7", "launch.nproc=2"]
    assert main(words) == 0
    assert not run_folder.log.disabled, "Hydra must not silence what was imported before it"
    out = capsys.readouterr().out
    assert "steps: 7" in out
    for word in ("embedding", "attention", "ffn", "active", "memory"):
        assert word in out.lower(), word
    assert f"{7 * 16384:,}" in out


def test_dry_run_shows_the_layout(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = ["ffn=grove", "parallel.tp=2", "parallel.ep=4", "parallel.sequence=true"]
    assert main(["train", "--dry-run", *words, "launch.nproc=8", "zero=stage2"]) == 0
    out = capsys.readouterr().out
    assert "8 ranks: tp 2 x cp 1 x dp 4; ep 4 x expert_dp 2; sequence; ZeRO 2" in out
    assert "Memory of a rank, fp32" in out
    sent = out.partition("Sent by a rank in a step, fp32")[2]
    for word in ("tensor parallel", "groves and experts", "gradients", "parameters (ZeRO)"):
        assert word in sent
    assert main(["train", "--dry-run", "model=kan_tiny"]) == 0
    assert "Sent by" not in capsys.readouterr().out, "one process sends nothing"


@functools.cache
def composed() -> dict:
    return compose_tree("train", ["model=kan_tiny"])


def tiny(folder: Path, *words: str) -> Run:
    tree = copy.deepcopy(composed())
    for word in [f"dir={folder}", *words]:
        *home, last = word.partition("=")[0].split(".")
        node = functools.reduce(operator.getitem, home, tree)
        node[last] = yaml.safe_load(word.partition("=")[2])
    return load(tree)


def pretend_done(run: Run) -> Path:
    folder = run_folder.choose(run)
    run_folder.claim(folder)
    run_folder.settle(folder, run, SimpleNamespace(save=lambda place: place.mkdir()))
    (folder / "summary.json").write_text('{"status": "done", "steps": 5}')
    (folder / "ledger.jsonl").touch()
    return folder


def test_finished_is_only_the_same_configuration(tmp_path: Path) -> None:
    folder = pretend_done(tiny(tmp_path, "steps=5", "name=a"))
    assert (tmp_path / "latest").resolve() == folder
    same = tiny(tmp_path, "steps=5", "name=a", "eval.every=3", "data.workers=2", "launch.nproc=2")
    assert run_folder.finished(folder, same) == {"status": "done", "steps": 5}
    assert run_folder.finished(folder, tiny(tmp_path, "steps=6", "name=a")) is None
    other = tiny(tmp_path, "steps=5", "name=a", "optim.lr=0.5", "seed=3")
    with pytest.raises(ConfigError, match=r"seed was 0, is 3; optim.lr was 0.001, is 0.5.*never"):
        run_folder.finished(folder, other)


def test_dollars_cannot_be_capped_of_a_run_that_had_no_price(tmp_path: Path) -> None:
    words = ("name=a", "budget.usd=1.0", "price.usd_per_core_hour=0.05")
    folder = tmp_path / "a"
    assert run_folder.finished(folder, tiny(tmp_path, *words)) is None, "it has not begun"
    folder.mkdir()
    line = {"event": "stop", "device_seconds": 9.0, "wall_seconds": 9.0}
    (folder / "ledger.jsonl").write_text(json.dumps({**line, "usd": 0.5}) + "\n")
    assert run_folder.finished(folder, tiny(tmp_path, *words)) is None
    (folder / "ledger.jsonl").write_text(json.dumps({**line, "usd": None}) + "\n")
    with pytest.raises(ConfigError, match=r"budget.usd=1.0 cannot be kept: a has .*budget.hours"):
        run_folder.finished(folder, tiny(tmp_path, *words))
    hours = tiny(tmp_path, "name=a", "budget.hours=1.0")
    assert run_folder.finished(folder, hours) is None


def test_a_saved_configuration_continues_the_run_begun_anew(tmp_path: Path) -> None:
    first = pretend_done(tiny(tmp_path, "steps=5", "name=a"))
    again = tiny(tmp_path, "steps=5", "name=a", "checkpoint.resume=never")
    assert run_folder.finished(first, again) is None
    second = pretend_done(again)
    assert second == first.with_name("a-2")
    saved = load(read_yaml(str(second / "config.yaml")))
    assert saved.checkpoint.resume == "auto"
    assert run_folder.choose(saved) == second


def test_what_a_folder_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = run_folder.claim(tmp_path / "a")
    assert run_folder.holds(tmp_path / "a", token)
    assert not run_folder.holds(tmp_path / "a", "another")
    assert not run_folder.holds(tmp_path / "elsewhere", token)
    with pytest.raises(ConfigError, match="name=a is being trained by another process"):
        run_folder.claim(tmp_path / "a")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"dir=.*file cannot hold the run b \(Not a directory"):
        run_folder.claim(tmp_path / "file" / "b")

    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_folder.fcntl, "flock", no_locks)
    assert run_folder.holds(tmp_path / "c", run_folder.claim(tmp_path / "c"))


def test_machines_without_a_common_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, run = Groups.single(), tiny(tmp_path, "name=a")
    monkeypatch.setattr(run_folder, "holds", lambda folder, token: False)
    with pytest.raises(ConfigError, match=r"dir=.* must be on a file system that all machines"):
        session.claim(run, groups)
    prepared = SimpleNamespace(fingerprint="here", path=tmp_path)
    session.check_same_data(run, groups, prepared)
    monkeypatch.setattr("kalmagrove.parallel.broadcast_object", lambda value, group: "there")
    with pytest.raises(DataError, match=r"data.cache=.* is here on rank 0 and there on rank 0"):
        session.check_same_data(run, groups, prepared)


SRUN = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}


def test_launchers_are_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    run = tiny(tmp_path, "launch.nproc=2")
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    assert (launch.launched_world_size(), launch.launched_rank()) == (4, 1)
    with pytest.raises(ConfigError, match=r"launch.nproc=2 contradicts the launcher.*4 processes"):
        launch.world_size(run)
    assert launch.world_size(tiny(tmp_path)) == 4
    monkeypatch.setenv("SLURM_PROCID", "0")  # a shell: srun --pty bash
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert launch.launched_world_size() is None
    assert launch.world_size(run) == 2


def test_gpus_may_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1f, GPU-2e")
    run = tiny(tmp_path, "launch.nproc=3", "launch.port=1234")
    with pytest.raises(ConfigError, match=r"launch.nproc=3 must be at most the 2 visible GPUs"):
        launch.world_size(run)
    (info,) = [w for w in launch.command(run, 2) if w.startswith("--world_info=")]
    decoded = launch.base64.urlsafe_b64decode(info.partition("=")[2])
    assert launch.json.loads(decoded) == {"localhost": ["GPU-1f", "GPU-2e"]}


def test_as_many_gpus_as_the_layout_goes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    run = tiny(tmp_path, "launch.nproc=auto", "parallel.cp=2")
    assert launch.world_size(run) == 2
    assert "using 2 of 3 GPUs, over which the layout and batch.tokens=16384" in (
        capsys.readouterr().err
    )
    too_wide = tiny(tmp_path, "launch.nproc=auto", "parallel.cp=4")
    with pytest.raises(ConfigError, match=r"=4 must divide .* processes=3; try .*, or 4 processes"):
        too_wide.check_world(launch.world_size(too_wide))


def test_exit_codes() -> None:
    killed = 128 + signal.SIGKILL
    codes = {0: 0, 3: 3, 75: 75, -signal.SIGKILL: killed, 256 - signal.SIGKILL: killed}
    assert {returned: launch.exit_code(returned) for returned in codes} == codes


def test_a_launcher_that_lost_the_run_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(train, "supervise", lambda run, nproc, heartbeat: 0)
    monkeypatch.setattr("kalmagrove.data.prepare", lambda data: None)
    monkeypatch.setattr("kalmagrove.data.check_seq_len", lambda prepared, seq_len: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = ["train", "model=kan_tiny", "launch.nproc=2", f"dir={tmp_path}"]
    assert main(words) == 1
    assert "does not say that the 1000 steps are done" in capsys.readouterr().err


def test_a_stop_ends_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    begun: list[int] = []

    def start(run: Run, dry_run: bool, in_sweep: bool) -> int:
        begun.append(run.steps)
        return 75 if run.steps == 2 else 0

    monkeypatch.setattr(train, "_start", start)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "-m", "model=kan_tiny", "steps=1,2,3"]) == 75
    assert begun == [1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["runs"], "nothing lies about"


def test_a_run_at_its_cap_ends_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []

    def start(run: Run, dry_run: bool, in_sweep: bool) -> int:
        begun.append(run.steps)
        if run.steps == 1:
            raise BudgetReached("spent")  # in this process
        return 76 if run.steps == 2 else 0  # by processes of its own

    monkeypatch.setattr(train, "_start", start)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "-m", "model=kan_tiny", "steps=1,2,3"]) == 76
    assert begun == [1, 2, 3]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("error", [Interrupted("enough"), DataError("gone")])
def test_connected_ranks_say_once_what_all_know(
    rank: int,
    error: KalmaGroveError,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    for name, value in (SRUN | {"SLURM_PROCID": str(rank)}).items():
        monkeypatch.setenv(name, value)

    def fail(words: object) -> int:
        raise error

    monkeypatch.setattr(train, "main", fail)
    prefix = "kalmagrove: rank 1: " if rank else "kalmagrove: "
    assert main(["train"]) == error.exit_code
    assert capsys.readouterr().err == f"{prefix}{error}\n", "not connected: each for itself"
    store = dist.HashStore()
    if rank:
        store.set("kalmagrove/last_word", "said")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    assert main(["train"]) == error.exit_code
    silent = rank and isinstance(error, Interrupted)
    assert capsys.readouterr().err == ("" if silent else f"{prefix}{error}\n")
    assert store.num_keys() == int(isinstance(error, Interrupted) or rank)
