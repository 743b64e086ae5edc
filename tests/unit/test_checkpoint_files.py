"""Finding, verifying, rotating and comparing checkpoints; files with checksums."""

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kalmagrove.config import CheckpointError
from kalmagrove.engine.checkpoint import load_weights
from kalmagrove.engine.checkpoint_files import (
    FORMAT,
    checksum,
    differences,
    faults,
    find_checkpoints,
    read_state,
    remove_unfinished,
    rotate,
    set_aside,
    step_folder,
    write_json,
    write_state,
)
from kalmagrove.engine.engine import frozen_digest
from kalmagrove.engine.tensor_files import FileWriter, Stored, TensorReader, write_tensors

pytestmark = pytest.mark.unit
RUN = {
    "model": {"d_model": 256, "name": "a", "backend": "auto", "ffn": {"pattern": ["kan"]}},
    "optim": {"kind": "adamw", "decay_splines": False, "lr": 1e-3},
    "data": {"tokenizer": {"kind": "bpe", "vocab_size": 512}, "seq_len": 8},
    "steps": 10,
}
HERE = {
    "run": RUN,
    "layout": {"world": 2, "zero.stage": 1},
    "parameters": "abc",
    "batches": {"samples": 80, "data": "f00"},
}


def checkpoint(folder: Path, step: int) -> Path:
    path = step_folder(folder, step)
    path.mkdir(parents=True)
    torch.save({"w": torch.ones(3)}, path / "shard-00000.safetensors")
    files = {"shard-00000.safetensors": checksum(path / "shard-00000.safetensors")}
    write_json(path / "state.json", {"format": FORMAT, "step": step, "files": files})
    return path


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_checkpoints_are_found_newest_first_from_any_folder(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    made = [checkpoint(folder, step) for step in (5, 1000000, 20)]
    (folder / "step-000099.tmp").mkdir()
    newest_first = [made[1], made[2], made[0]]
    assert find_checkpoints(folder) == newest_first
    assert find_checkpoints(tmp_path) == newest_first
    assert find_checkpoints(made[2]) == [made[2]]
    assert find_checkpoints(tmp_path / "none") == []


def test_whole_checkpoints_have_no_faults(tmp_path: Path) -> None:
    assert faults(checkpoint(tmp_path, 1)) == []


def test_damage_is_named(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 1)
    file = path / "shard-00000.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-10])
    expected = f"shard-00000.safetensors has {len(data) - 10} bytes instead of {len(data)}"
    assert faults(path) == [expected]
    file.write_bytes(data[:-10] + bytes(10))
    assert faults(path) == ["shard-00000.safetensors has a wrong checksum"]
    file.unlink()
    assert faults(path) == ["shard-00000.safetensors is missing"]
    (path / "state.json").write_text('{"format": 1, "files"')
    assert "state.json cannot be read" in faults(path)[0]


def test_every_bit_of_the_state_is_vouched_for(tmp_path: Path) -> None:
    good = {"format": FORMAT, "step": 4, "batches": {"samples": 64}, "files": {}}
    write_state(tmp_path, good)
    path = tmp_path / "state.json"
    whole = path.read_bytes()
    unnoticed = [read_state(tmp_path)]
    for place in range(len(whole)):
        for bit in range(8):
            spoilt = bytearray(whole)
            spoilt[place] ^= 1 << bit
            path.write_bytes(spoilt)
            with contextlib.suppress(CheckpointError):
                unnoticed.append(read_state(tmp_path))
    for tree in unnoticed:  # white space, and the name of the checksum itself
        assert {key: tree[key] for key in good} == good


def test_ranks_share_the_reading(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 1)
    (path / "shard-00000.safetensors").unlink()
    assert [len(faults(path, rank, 3)) for rank in range(3)] == [1, 0, 0]


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 1)
    write_json(path / "state.json", {"format": FORMAT - 1, "files": {}})
    for read in (read_state, faults):
        with pytest.raises(CheckpointError, match=f"has format {FORMAT - 1}; .*reads format"):
            read(path)


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        checkpoint(tmp_path, step)
    rotate(tmp_path, 2)
    assert names(tmp_path) == ["step-000003", "step-000010"]


def test_leftovers_of_a_kill_are_removed_or_put_back(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1)
    (tmp_path / "step-000002.tmp").mkdir()
    checkpoint(tmp_path, 3).rename(tmp_path / "step-000003.old")  # killed while being replaced
    checkpoint(tmp_path, 4)
    (tmp_path / "step-000004.old").mkdir()
    remove_unfinished(tmp_path)
    assert names(tmp_path) == ["step-000001", "step-000003", "step-000004"]


def test_checkpoints_of_an_abandoned_future_are_set_aside(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    set_aside(tmp_path, 1)
    assert names(tmp_path) == ["step-000001", "step-000002.aside", "step-000003.aside"]
    assert find_checkpoints(tmp_path) == [tmp_path / "step-000001"]


def changed(*path_and_value: Any) -> dict[str, Any]:
    *path, key, value = path_and_value
    tree = copy.deepcopy(HERE)
    node = tree
    for part in path:
        node = node[part]
    node[key] = value
    return tree


@pytest.mark.parametrize(
    ("here", "expected"),
    [
        (changed("run", "steps", 99), []),
        (changed("run", "optim", "lr", 1.0), []),
        (changed("run", "model", "name", "b"), []),
        (changed("run", "model", "backend", "triton"), []),
        (changed("batches", "samples", 0), []),
        (changed("run", "model", "new_setting", 1), []),
        (changed("run", "model", "d_model", 128), ["model.d_model: checkpoint 256, run 128"]),
        (changed("run", "optim", "kind", "sgd"), ["optim.kind: checkpoint adamw, run sgd"]),
        (changed("layout", "world", 4), []),
        (changed("layout", "zero.stage", 3), []),
        (changed("batches", "data", "ba4"), ["batches.data: checkpoint f00, run ba4"]),
        (
            changed("run", "data", "tokenizer", "vocab_size", 300),
            ["data.tokenizer.vocab_size: checkpoint 512, run 300"],
        ),
        (
            changed("run", "model", "ffn", "pattern", ("dense",)),
            ["model.ffn.pattern: checkpoint ['kan'], run ['dense']"],
        ),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, list) else "",
)
def test_what_must_agree(here: dict[str, Any], expected: list[str]) -> None:
    assert differences(HERE, here) == expected


def test_other_parameters_under_the_same_settings_are_noticed() -> None:
    assert "names or shapes differ" in differences(HERE, changed("parameters", "xyz"))[0]


def test_tensors_are_written_as_safetensors_with_their_checksum(tmp_path: Path) -> None:
    tensors = {
        "flags": torch.tensor([True, False, True]),
        "w": torch.randn(3, 5).T,
        "low": torch.randn(7).bfloat16(),
        "one": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.empty(0, 4),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }
    path = tmp_path / "a.safetensors"
    stored = {name: Stored.of(tensor) for name, tensor in tensors.items()}
    assert write_tensors(path, stored, {"note": "x"}) == checksum(path)
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    reader = TensorReader(tmp_path)
    assert reader.metadata(path.name) == {"note": "x"}
    assert torch.equal(reader.read(path.name, "low", 2, 5), tensors["low"][2:5])
    with pytest.raises(CheckpointError, match="other"):
        reader.shape(path.name, "other")
    with pytest.raises(CheckpointError, match="cannot be read"):
        reader.keys("missing.safetensors")


def test_a_write_that_fails_is_kept_and_ends_writing(tmp_path: Path) -> None:
    files = FileWriter(tmp_path / "missing")
    files.json("a.json", {})
    assert isinstance(files.error, FileNotFoundError)
    (tmp_path / "missing").mkdir()
    files.json("a.json", {})
    assert names(tmp_path / "missing") == []
    assert files.written == {}


def test_weights_of_nothing_and_of_another_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        load_weights(tmp_path, torch.nn.Linear(2, 2))
    path = step_folder(tmp_path, 1)
    path.mkdir()
    save_file({"weight": torch.ones(3, 2), "bias": torch.ones(3)}, path / "model.safetensors")
    files = {"model.safetensors": checksum(path / "model.safetensors")}
    write_json(path / "state.json", {"format": FORMAT, "files": files})
    with pytest.raises(CheckpointError, match=r"weight: checkpoint \(3, 2\), model \(2, 2\)"):
        load_weights(tmp_path, torch.nn.Linear(2, 2))
    model = torch.nn.Linear(2, 3)
    load_weights(tmp_path, model)
    assert torch.equal(model.weight, torch.ones(3, 2))


RETROFIT = {
    "arm": "kan",
    "base": "a",
    "scratch": None,
    "last": 5,
    "blocks": None,
    "replace": "kan",
    "ffn": {"kind": "family", "degree": 2},
    "embeddings": "tied",
    "warm_start": {"tokens": None},
    **{key: RUN[key] for key in ("optim", "data", "steps")},
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"ffn": {"kind": "family", "degree": 3}}, ["ffn.degree: checkpoint 2, run 3"]),
        ({"last": None, "blocks": [1]}, ["last: checkpoint 5, run null"]),
        ({"embeddings": "frozen", "base": "b"}, ["base: checkpoint a, run b"]),
        ({"arm": "other", "warm_start": {"tokens": 9}, "steps": 20}, []),
    ],
)
def test_a_retrofit_is_compared_by_what_its_model_is(
    change: dict[str, Any], expected: list[str]
) -> None:
    saved = {**HERE, "run": RETROFIT, "frozen": "123"}
    found = differences(saved, {**saved, "run": {**RETROFIT, **change}})
    assert found[: len(expected)] == expected
    assert bool(found) == bool(expected)


def test_weights_that_do_not_train_must_be_the_same() -> None:
    saved = {**HERE, "frozen": "123"}
    assert differences(saved, {**HERE, "frozen": "123"}) == []
    for other in ("124", None):
        [line] = differences(saved, {**HERE, "frozen": other})
        assert line == "the weights that do not train differ (has the base model changed?)"
    assert differences(HERE, {**HERE, "frozen": None}) == [], "of a version that knew none"


def test_the_digest_of_frozen_weights_is_of_names_and_values() -> None:
    def digest(names: str = "ab", value: float = 1.0, dtype: torch.dtype = torch.float32) -> Any:
        model = torch.nn.ParameterDict({name: torch.ones(3, dtype=dtype) for name in names})
        for parameter in model.values():
            parameter.requires_grad_(False)
        torch.nn.init.constant_(model[names[0]], value)
        model["trains"] = torch.nn.Parameter(torch.randn(2))
        return frozen_digest(model)

    assert digest() == digest() == digest(dtype=torch.bfloat16)
    assert len({digest(), digest("ac"), digest(value=2.0), digest("a")}) == 4
    assert frozen_digest(torch.nn.Linear(2, 2)) is None
