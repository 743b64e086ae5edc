"""Disks, files and numbers that fail on purpose: what is said, what is lost, and that it goes on.

Disks are real ones (tmpfs), small enough to be filled: that needs root.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kalmagrove.cli import run_folder
from kalmagrove.config import ConfigError, Data, DataError, validate
from kalmagrove.data import prepare
from tests.dist.harness import Ranks, run_ranks

pytestmark = pytest.mark.dist
MODULE = "tests.dist.fault_workers"


def mount(place: Path, size: str) -> None:
    place.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("this system has no mount")
    if done.returncode:
        pytest.skip(f"a disk of its own needs the right to mount: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with small disks at `disk`, `tokens` and `read-only/checkpoints`."""
    folder = tmp_path_factory.mktemp("faults")
    disks = [folder / "disk", folder / "tokens", folder / "read-only" / "checkpoints"]
    for disk in disks:
        mount(disk, "1m")
    yield folder
    for disk in disks:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def variants() -> dict[str, dict[str, Any]]:
    adam: dict[str, Any] = {"optim": {"kind": "adamw", "lr": 0.01}}
    found = {f"z{stage}": {**adam, "zero": {"stage": stage}} for stage in range(4)}
    return {**found, "z2 bf16": {**found["z2"], "engine": {"precision": "bf16"}}}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What needs no disk of its own."""
    folder = tmp_path_factory.mktemp("faults-files")
    jobs: dict[str, dict[str, Any]] = {
        name: {"folder": str(folder / name)}
        for name in ("damage", "nan", "slow_disk", "background", "sizes")
    }
    jobs["sizes"]["variants"] = variants()
    found: dict[str, Any] = run_ranks("several", 2, module=MODULE, jobs=jobs)
    return found


@pytest.fixture(scope="module")
def disks(place: Path) -> dict[str, Any]:
    jobs = {
        "full": {"disk": str(place / "disk")},
        "read_only": {"folder": str(place / "read-only")},
    }
    found: dict[str, Any] = run_ranks("several", 2, module=MODULE, jobs=jobs)
    return found


def test_damage_of_any_file_is_found_and_the_checkpoint_before_it_is_continued(
    results: dict[str, Any],
) -> None:
    result = results["damage"]
    files = {name.split()[0] for name in result["found"]}
    shards = {f"shard-0000{rank}.safetensors" for rank in range(2)}
    assert files == {"index.json", "model.safetensors", "state.json", *shards}
    for name, (ranks, told) in result["found"].items():
        file = name.split()[0]
        assert [step for step, _ in ranks] == [2, 2], name
        [passed_over, aside], others = ranks[0][1], ranks[1][1]
        assert "step-000004 is damaged and passed over" in passed_over, name
        assert file in passed_over, name
        assert "step-000004.aside" in aside, name
        assert others == [], "one rank says it"
        assert any(file in fault for fault in told), name
    assert result["again"] == {"3": True, "4": True}
    for message in result["none"]:
        assert "there is no whole checkpoint in" in message
        assert "checkpoint.resume=never to begin anew" in message


def test_numbers_of_one_rank_that_are_not_finite(results: dict[str, Any]) -> None:
    result = results["nan"]
    for said in result["said"]:
        assert said.startswith("3: steps 4 to 5 gave no finite update (loss not finite on rank 1, ")
        assert "micro-batch 1, 2, 3, 4 of 4)" in said
        assert "the last good checkpoint is" in said
    # The save of step 4 holds the weights of step 3: nothing was updated.
    assert result["second"]["began"] == 4
    assert result["second"]["said"] == "done"


def test_the_bytes_of_a_checkpoint_are_known_before_the_first_step(
    results: dict[str, Any],
) -> None:
    for name in variants():
        reckoned, written = results["sizes"][name]
        assert reckoned == written, name


def test_a_slow_disk_is_waited_for_and_booked(results: dict[str, Any]) -> None:
    result = results["slow_disk"]
    assert result["said"] == "done"
    assert result["seconds"] > 3 * 10 * 0.02, "three saves of more than ten writes"
    assert result["ledger"] == []
    assert result["whole"] == [[], []]
    assert result["left"] == ["step-000004", "step-000006"]


def test_training_goes_on_while_a_slow_disk_is_written_to(results: dict[str, Any]) -> None:
    result = results["background"]
    assert (result["found"]["said"], result["found"]["ended"]) == ("done", 6)
    assert result["same"], "steps do not see the saves"
    saves = [event for event in result["events"] if event[0] in ("saving", "checkpointed")]
    assert [event for event in saves if event[0] == "saving"] == [["saving", 2], ["saving", 4]]
    (first, two), (second, four), (last, six) = [e[1:] for e in saves if e[0] == "checkpointed"]
    assert [two, four, six] == ["step-000002", "step-000004", "step-000006"]
    assert 2 < first <= 4
    assert 4 < second <= 6
    assert last == 6

    assert result["told"]["said"] == "done"
    assert result["ledger"] == []
    assert [saved for _, saved in result["lines"]] == [2, 4, None]
    assert all(step > saved for step, saved in result["lines"][:2])


def test_a_save_in_the_background_may_fail_or_be_killed(results: dict[str, Any]) -> None:
    result = results["background"]
    assert result["failed"]["said"] == "done"
    [line] = result["failed"]["heard"]
    assert "step-000002 could not be written: on rank 1: [Errno 28] No space left" in line
    assert line.endswith("Training goes on; if the next save fails too, the run ends")
    [unsaved] = [event for event in result["broken"] if event[0] == "unsaved"]
    assert unsaved[1] > 2
    assert result["left broken"] == ["step-000004", "step-000006"]
    assert result["whole"] == [[], []]

    assert (result["killed"]["began"], result["killed"]["said"]) == (4, "done")
    assert result["goes on"] == {"5": True, "6": True}
    assert result["left"] == ["step-000002", "step-000004", "step-000006"]


def test_a_full_disk_costs_a_save_and_no_checkpoint(disks: dict[str, Any]) -> None:
    result = disks["full"]
    once = result["once"]
    assert (once["began"], once["ended"], once["said"]) == (0, 6, "done")
    [line] = once["heard"]
    assert "step-000004 could not be written: it takes " in line
    assert " are free; the last good checkpoint is " in line
    assert "step-000002; free space on that disk" in line
    assert line.endswith("Training goes on; if the next save fails too, the run ends")
    assert result["left"] == ["step-000002", "step-000006"]

    for rank, twice in enumerate(result["twice"]):
        assert (twice["began"], twice["ended"]) == (6, 10)
        assert twice["said"].startswith("CheckpointError 1: checkpoint ")
        assert "step-000010 could not be written: it takes " in twice["said"]
        assert len(twice["heard"]) == (rank == 0)
    assert result["left twice"] == ["step-000002", "step-000006"]

    start = result["start"]
    assert (start["began"], start["ended"]) == (6, 6)
    assert start["said"].startswith("ConfigError 2: dir=runs has no room for a checkpoint: one t")

    unseen = result["unseen"]
    assert (unseen["began"], unseen["ended"], unseen["said"]) == (6, 14, "done")
    assert "step-000013 could not be written: " in unseen["heard"][0]
    assert "[Errno 28] No space left on device" in unseen["heard"][0]
    assert result["left after"] == ["step-000012", "step-000014"]
    assert result["ledger"] == []
    assert result["events"] == [4, 8, 13]


def test_a_disk_that_becomes_read_only_costs_a_save(disks: dict[str, Any]) -> None:
    result = disks["read_only"]
    assert (result["ended"], result["said"]) == (6, "done")
    [line] = result["heard"]
    assert "step-000004 could not be written: [Errno 30] Read-only file system" in line
    assert "check that it can be written" in line
    assert result["left"] == ["step-000002", "step-000006"]


def test_a_ledger_that_cannot_be_written_ends_all_ranks(place: Path) -> None:
    arguments = {"disk": str(place / "disk")}
    subprocess.run(["rm", "-rf", str(place / "disk" / "run")], check=True)
    ranks = Ranks("ledger_full", 2, module=MODULE, room_again=False, **arguments)
    codes = ranks.codes()
    assert codes[0] == 1, ranks.output()
    assert codes[1] != 0, ranks.output()
    said = "the ledger cannot be written (No space left on device); make room and run the same"
    assert said in ranks.output()
    again = run_ranks("ledger_full", 2, module=MODULE, room_again=True, **arguments)
    assert (again["began"], again["ended"], again["said"]) == (2, 6, "done")
    assert again["ledger"] == []


def test_a_read_only_folder_is_named_before_the_first_step(place: Path) -> None:
    disk = place / "read-only" / "checkpoints"
    (disk.parent / run_folder.LOCK).write_text(token := "here")
    assert run_folder.holds(disk.parent, token)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        assert not run_folder.holds(disk.parent, token), "any rank's machine may be the one"
        with pytest.raises(ConfigError) as refused:
            run_folder.claim(disk.parent)
        assert "dir=" in str(refused.value)
        assert "cannot hold the run read-only (Read-only file system: " in str(refused.value)
        assert str(disk) in str(refused.value)
        assert str(refused.value).endswith("check its rights or give another dir")
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert run_folder.claim(disk.parent)


@pytest.mark.parametrize("free", [4_096, 32_768], ids=["tokenizer", "tokens"])
def test_preparing_on_a_full_disk_leaves_nothing_and_is_done_again(place: Path, free: int) -> None:
    corpus, cache = place / "corpus.jsonl", place / "tokens"
    corpus.write_text("".join(f'{{"text": "grove {i} of kalma edges"}}\n' for i in range(2000)))
    tree: dict[str, Any] = {
        "name": f"t{free}",
        "source": {"kind": "jsonl", "paths": [str(corpus)]},
        "tokenizer": {"vocab_size": 300},
        "cache": str(cache),
        "workers": 1,
    }
    data, filler = validate(Data, tree), cache / "filler"
    filler.write_bytes(b"0" * (shutil.disk_usage(cache).free - free))
    with pytest.raises(DataError, match=r"data.cache=.*tokens has no space left; free it or"):
        prepare(data, progress=False)
    filler.unlink()
    assert [path for path in cache.iterdir() if path.is_dir()] == []
    prepared = prepare(data, progress=False)
    assert prepared.train.documents + prepared.val.documents == 2000
    shutil.rmtree(prepared.path)
