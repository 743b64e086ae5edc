"""`kalmagrove checkpoint`: inspect, verify, convert, and their mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kalmagrove.cli import main
from kalmagrove.config import CheckpointError
from kalmagrove.engine.checkpoint_files import FORMAT, checksum, read_index, read_state, write_json
from kalmagrove.engine.checkpoint_tools import convert, newest, verify
from kalmagrove.engine.tensor_files import FileWriter, Stored
from kalmagrove.engine.tensor_index import Entry, Part, to_json

pytestmark = pytest.mark.unit
W = torch.arange(24, dtype=torch.float32).view(4, 6)
WEIGHTS = {"w": W.bfloat16(), "bias": torch.ones(3), "load": torch.zeros(2)}


def make(folder: Path, step: int = 3, parts: Any = None) -> Path:
    """Two ranks, each with a half of the columns of `w`."""
    path = folder / "checkpoints" / f"step-{step:06d}"
    path.mkdir(parents=True)
    files = FileWriter(path)
    halves = [Part(f"shard-0000{r}.safetensors", (1, 3 * r, 3), 0, 12) for r in (0, 1)]
    for rank, part in enumerate(halves):
        flat = W[:, 3 * rank : 3 * rank + 3].reshape(-1)
        tensors = {
            "w/weight": flat,
            "w/exp_avg": flat + 100,
            "rank/torch": torch.tensor([rank, 7], dtype=torch.uint8),
            "rank/load": torch.tensor([1.0, rank]),
        }
        if rank == 0:
            tensors["bias/buffer"] = torch.ones(3)
        metadata = {"python": f"p{rank}", "numpy": f"n{rank}"}
        files.tensors(part.file, {k: Stored.of(t) for k, t in tensors.items()}, metadata)
    files.tensors("model.safetensors", {k: Stored.of(t) for k, t in WEIGHTS.items()})
    index = {
        "w": Entry((4, 6), ("weight", "exp_avg"), {"step": 3.0}, tuple(parts or halves)),
        "bias": Entry((3,), ("buffer",), {}, (Part(halves[0].file, None, 0, 3),)),
    }
    files.json("index.json", to_json(index))
    assert files.error is None
    layout = {"world": 2, "tp": 2, "ep": 1, "cp": 1, "dp": 1, "zero.stage": 2, "precision": "x"}
    tree = {"format": FORMAT, "step": step, "tokens": 960, "layout": layout, "files": files.written}
    run = {"steps": 10, "model": {"name": "toy"}, "optim": {"kind": "adamw"}}
    write_json(path / "state.json", {**tree, "run": run, "kept": [1, 2]})
    return path


def renew(path: Path, file: str) -> None:
    """Make the checksum of a changed file right."""
    state = read_state(path)
    state["files"][file] = checksum(path / file)
    write_json(path / "state.json", state)


def test_verify_is_silent_about_a_whole_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make(tmp_path, 3)
    path = make(tmp_path, 20)
    assert newest(tmp_path) == path
    assert verify(path) == []
    assert main(["checkpoint", "verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{path} is whole\n"


def test_verify_names_every_fault(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = make(tmp_path)
    (path / "model.safetensors").unlink()
    shard = path / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert main(["checkpoint", "verify", str(path)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: model.safetensors is missing",
        f"{path}: shard-00001.safetensors has a wrong checksum",
    ]


def test_verify_looks_behind_right_checksums(tmp_path: Path) -> None:
    half = Part("shard-00000.safetensors", (1, 0, 3), 0, 12)
    assert verify(make(tmp_path / "a", parts=[half])) == [
        "w [4, 6]: dimension 1: [3, 6) of 6 is missing"
    ]
    path = make(tmp_path / "b")
    tree = json.loads((path / "index.json").read_text())
    tree["w"]["kinds"].append("exp_avg_sq")
    (path / "index.json").write_text(json.dumps(tree))
    renew(path, "index.json")
    found = verify(path)
    assert len(found) == 2
    assert all("w/exp_avg_sq" in fault for fault in found)
    (path / "index.json").write_text("{")
    renew(path, "index.json")
    assert "index.json cannot be read" in verify(path)[0]


def test_convert_makes_one_file_of_whole_tensors(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source, target = make(tmp_path / "run"), tmp_path / "new" / "merged"
    assert main(["checkpoint", "convert", str(tmp_path / "run"), str(target)]) == 0
    assert str(target) in capsys.readouterr().out
    assert verify(target) == []
    assert sorted(p.name for p in target.iterdir()) == [
        "index.json",
        "model.safetensors",
        "shard-00000.safetensors",
        "state.json",
    ]
    tensors = load_file(target / "shard-00000.safetensors")
    assert torch.equal(tensors["w/weight"], W.flatten())
    assert torch.equal(tensors["w/exp_avg"], W.flatten() + 100)
    assert torch.equal(tensors["bias/buffer"], torch.ones(3))
    assert torch.equal(tensors["rank/load"], torch.tensor([2.0, 1.0])), "counts are summed"
    assert tensors["rank/torch"].tolist() == [0, 7]
    for name, tensor in load_file(target / "model.safetensors").items():
        assert torch.equal(tensor, WEIGHTS[name])
    old, new = read_state(source), read_state(target)
    assert {**old, "layout": 0, "files": 0} == {**new, "layout": 0, "files": 0}
    assert new["layout"]["world"] == new["layout"]["tp"] == 1
    assert read_index(target)["w"].scalars == {"step": 3.0}


def test_convert_can_leave_the_optimizer_out(tmp_path: Path) -> None:
    source, target = make(tmp_path / "run"), tmp_path / "merged"
    convert(source, target, weights_only=True)
    assert verify(target) == []
    entry = read_index(target)["w"]
    assert (entry.kinds, entry.scalars) == (("weight",), {})
    assert "w/exp_avg" not in load_file(target / "shard-00000.safetensors")


def test_convert_refuses_what_is_there_and_what_is_damaged(tmp_path: Path) -> None:
    source = make(tmp_path / "run")
    with pytest.raises(CheckpointError, match="exists already"):
        convert(source, source)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="could not be written"):
        convert(source, tmp_path / "file" / "merged")
    (source / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"is damaged: model\.safetensors is missing"):
        convert(source, tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "run"]


def test_inspect_shows_what_is_in_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make(tmp_path)
    assert main(["checkpoint", "inspect", str(tmp_path)]) == 0
    words = capsys.readouterr().out.split()
    for expected in ("3", "960", "adamw", "tp=2,", "zero.stage=2,", "exp_avg", "24", "index.json"):
        assert expected in words


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, ""),
        (["look"], 2, "invalid choice: 'look'"),
        (["verify"], 2, "the following arguments are required: path"),
        (["verify", "a", "b"], 2, "unrecognized arguments: b"),
        (["convert", "a"], 2, "the following arguments are required: target"),
        (["inspect", "/none"], 1, "/none holds no checkpoint"),
        (["verify", "/none"], 1, "/none holds no checkpoint"),
        (["convert", "/none", "b"], 1, "/none holds no checkpoint"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["checkpoint", *words]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == (1 if message else 0)


def test_another_format_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = make(tmp_path)
    write_json(path / "state.json", {"format": 1, "files": {}})
    for words in (["verify"], ["inspect"], ["convert", str(tmp_path / "b")]):
        assert main(["checkpoint", words[0], str(path), *words[1:]]) == 1
        error = capsys.readouterr().err
        assert "has format 1; this version of kalmagrove reads format 2" in error
        assert error.count("\n") == 1


def test_help(capsys: pytest.CaptureFixture) -> None:
    assert main(["checkpoint", "--help"]) == 0
    assert "kalmagrove checkpoint convert SRC DST" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert "checkpoint" in capsys.readouterr().out
