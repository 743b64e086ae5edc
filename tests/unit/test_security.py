"""What must not be: code run out of data, names that lead out of a folder, secrets and loose
permissions in what a run writes."""

import ast
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kalmagrove.cli import main, run_folder
from kalmagrove.cli.compose import compose_tree, read_yaml
from kalmagrove.config import CheckpointError, ConfigError, DataError, load
from kalmagrove.config.secrets import refuse_secrets
from kalmagrove.data.tokenizer import _from_pretrained
from kalmagrove.engine.checkpoint_files import FORMAT, checksum, faults, read_index, read_state
from kalmagrove.engine.tensor_files import TensorReader
from kalmagrove.retrofit.files import check_folder
from kalmagrove.retrofit.files import load as load_pretrained

pytestmark = pytest.mark.unit
ROOT = Path(__file__).resolve().parents[2]
CODE = [ROOT / "kalmagrove", ROOT / "kernels" / "kalmagrove_kernels", ROOT / "launchers"]
# Modules whose loading of data runs what the data says, and calls that do or allow that.
MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "compile", "system", "popen", "unsafe_load", "full_load", "instantiate"}
CALLS |= {"chmod", "umask", "mktemp"}
# (file, what is found there) -> why it may stay
ALLOWED: dict[tuple[str, str], str] = {}


def dangers(text: str) -> Iterator[str]:
    """What a source text has of the above."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            for name in [module] if module else [alias.name for alias in node.names]:
                if name.split(".")[0] in MODULES:
                    yield f"import {name}"
        if isinstance(node, ast.Call):
            yield from _dangers_of(node)


def _dangers_of(call: ast.Call) -> Iterator[str]:
    place = ast.unparse(call.func)
    owner, _, name = place.rpartition(".")
    given = {word.arg: ast.unparse(word.value) for word in call.keywords}
    if name in CALLS and not (name in ("eval", "compile") and owner):  # model.eval(), re.compile()
        yield name
    if place == "torch.load" and given.get("weights_only") != "True":
        yield "torch.load"
    if place in ("yaml.load", "yaml.load_all"):
        yield place
    remote = name == "from_pretrained" and "Auto" in owner
    if remote and given.get("trust_remote_code") != "False":
        yield "from_pretrained without trust_remote_code=False"
    for word in ("trust_remote_code", "allow_pickle", "shell"):
        if given.get(word, "False") != "False":
            yield f"{word}={given[word]}"


@pytest.mark.parametrize(
    "text",
    [
        *("import pickle", "from dill import loads", "import joblib", "eval(x)", "exec(x)"),
        *("torch.load(p)", "torch.load(p, weights_only=False)", "yaml.load(x)", "os.system(x)"),
        *("np.load(p, allow_pickle=True)", "run(x, shell=True)", "path.chmod(0o777)"),
        *("hydra.utils.instantiate(x)", "load(trust_remote_code=yes)", "yaml.full_load(x)"),
        *("AutoModel.from_pretrained(x)", "AutoConfig.from_pretrained(x, trust_remote_code=True)"),
    ],
)
def test_the_search_finds(text: str) -> None:
    assert list(dangers(text))


def test_the_search_leaves_in_peace() -> None:
    fine = "model.eval(); re.compile(x); torch.load(p, weights_only=True); run(x, shell=False)"
    assert list(dangers(fine)) == []


def test_no_data_is_run_as_code() -> None:
    files = [path for folder in CODE for path in folder.rglob("*.py")]
    assert len(files) > 150
    found = {
        (str(path.relative_to(ROOT)), danger)
        for path in files
        for danger in dangers(path.read_text())
    }
    assert found == set(ALLOWED), "not allowed, or no longer there"


ESCAPES = ["../secret.safetensors", "/etc/passwd", "sub/file.safetensors", "..", ""]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of one tensor, with a file beside its folder."""
    folder = tmp_path / "step-000001"
    folder.mkdir()
    for path in (folder / "shard-00000.safetensors", tmp_path / "secret.safetensors"):
        save_file({"w/weight": torch.ones(3)}, path)
    describe(folder, "shard-00000.safetensors")
    return folder


def describe(folder: Path, file: str) -> None:
    """Have state and index name `file`, with the size and checksum it really has."""
    facts = checksum(folder / file) if (folder / file).is_file() else (1, 1)
    entry = {"shape": [3], "kinds": ["weight"], "scalars": {}, "parts": [[file, None, 0, 3]]}
    (folder / "index.json").write_text(json.dumps({"w": entry}))
    (folder / "state.json").write_text(json.dumps({"format": FORMAT, "files": {file: facts}}))


@pytest.mark.parametrize("name", ESCAPES)
def test_an_index_that_leads_out_of_the_checkpoint_is_refused(checkpoint: Path, name: str) -> None:
    assert faults(checkpoint) == []
    assert read_index(checkpoint)["w"].parts[0].file == "shard-00000.safetensors"
    describe(checkpoint, name)
    with pytest.raises(CheckpointError, match="no file of its folder"):
        read_index(checkpoint)
    assert "leads out of the checkpoint" in faults(checkpoint)[0]
    with pytest.raises(CheckpointError, match="leads out of the checkpoint"):
        TensorReader(checkpoint).whole(name, "w/weight")


def test_links_in_a_checkpoint_are_refused(checkpoint: Path) -> None:
    (checkpoint / "link.safetensors").symlink_to(checkpoint.parent / "secret.safetensors")
    describe(checkpoint, "link.safetensors")
    assert "is a link" in faults(checkpoint)[0]
    with pytest.raises(CheckpointError, match="is a link"):
        TensorReader(checkpoint).whole("link.safetensors", "w/weight")
    (checkpoint / "state.json").rename(checkpoint.parent / "state.json")
    (checkpoint / "state.json").symlink_to(checkpoint.parent / "state.json")
    with pytest.raises(CheckpointError, match=r"state\.json is a link"):
        read_state(checkpoint)


@pytest.mark.parametrize("name", ESCAPES)
def test_weights_of_others_outside_their_folder_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"a": "model.safetensors", "b": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="no file of its folder"):
        check_folder(tmp_path)


def test_code_of_a_model_folder_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for name in ("configuration_evil", "modeling_evil", "tokenization_evil"):
        (tmp_path / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')")
    auto = {
        "AutoConfig": "configuration_evil.Config",
        "AutoModelForCausalLM": "modeling_evil.Model",
        "AutoTokenizer": ["tokenization_evil.Tokenizer", None],
    }
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_pretrained(tmp_path)
    with pytest.raises(DataError, match="cannot be loaded"):
        _from_pretrained(str(tmp_path))
    assert not marker.exists()


def test_names_of_runs_stay_in_dir() -> None:
    tree = compose_tree("train", ["price=cpu"])
    assert load(tree).name is None
    for name in ("../up", "/tmp/x", "a/b", "..", ".", "", "latest", "a\\b"):
        for section in (tree, tree["model"], tree["data"]):
            before, section["name"] = section["name"], name
            with pytest.raises(ConfigError, match="cannot name a folder of runs"):
                load(tree)
            section["name"] = before


TOKEN = "hf_" + "abcdefghij" * 3


@pytest.mark.parametrize(
    ("value", "environment"),
    [
        (TOKEN, {}),
        (f"before {TOKEN}", {}),
        ("https://somebody:password@host/data", {}),
        ("0123456789abcdef0123", {"WANDB_API_KEY": "0123456789abcdef0123"}),
    ],
)
def test_secrets_are_refused_and_not_repeated(value: str, environment: dict[str, str]) -> None:
    tree = {"track": {"tags": ["fine", value]}}
    with pytest.raises(ConfigError, match=r"track\.tags=\(hidden\) looks like a secret") as caught:
        refuse_secrets(tree, environment)
    assert value not in str(caught.value)


def test_a_variable_of_jobs_that_would_hold_a_secret_is_refused() -> None:
    """It would stand in every batch script."""
    cluster = {"slurm": {"env": {"NCCL_DEBUG": "INFO", "WANDB_API_KEY": "whatever"}}}
    with pytest.raises(ConfigError, match=r"env\.WANDB_API_KEY=\(hidden\) looks like") as caught:
        refuse_secrets({"cluster": cluster}, {})
    assert "whatever" not in str(caught.value)
    cluster["slurm"]["env"]["WANDB_API_KEY"] = ""
    refuse_secrets({"cluster": cluster}, {})


def test_an_error_does_not_repeat_a_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its line goes to the logs of jobs, too."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def fail(words: object) -> int:
        raise DataError(f"https://host/?token={TOKEN} cannot be read")

    monkeypatch.setattr("kalmagrove.cli.prepare.main", fail)
    assert main(["prepare"]) == 1
    assert capsys.readouterr().err == "kalmagrove: https://host/?token=(hidden) cannot be read\n"


def test_what_is_no_secret_passes() -> None:
    environment = {
        "SOME_TOKEN": "short",
        "KEY_FOLDER": "/home/somebody/keys",
        "SHELL": "kalmagrove-kalmagrove",
    }
    tree = {
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "path": "/home/somebody/keys/corpus",
        "name": "short",
        "project": "kalmagrove-kalmagrove",
        "url": "https://host:8080/a@b",
    }
    refuse_secrets(tree, environment)


def test_a_secret_reaches_no_config_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither from the environment, through an interpolation, nor through a saved file."""
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    words = ["price=cpu", "track.tags=['${oc.env:WANDB_API_KEY}']"]
    with pytest.raises(ConfigError, match=r"track\.tags=\(hidden\)"):
        load(compose_tree("train", words))
    run = load(compose_tree("train", ["price=cpu"]))
    run_folder.write_config(tmp_path / "config.yaml", run)
    assert "0123456789" not in (tmp_path / "config.yaml").read_text()
    tree = read_yaml(str(tmp_path / "config.yaml"))
    with pytest.raises(ConfigError, match=r"track\.entity=\(hidden\)"):
        load({**tree, "track": {**tree["track"], "entity": TOKEN}})


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_umask_holds_for_what_a_run_writes(tmp_path: Path, mask: int) -> None:
    run = load(compose_tree("train", ["price=cpu", "name=some", f"dir={tmp_path}/runs"]))
    tokenizer: Any = type("Tokenizer", (), {"save": lambda self, folder: folder.mkdir()})()
    before = os.umask(mask)
    try:
        folder = run_folder.choose(run)
        run_folder.claim(folder)
        run_folder.settle(folder, run, tokenizer)
    finally:
        os.umask(before)
    made = [path for path in (tmp_path / "runs").rglob("*") if not path.is_symlink()]
    assert {"config.yaml", ".lock", "checkpoints"} <= {path.name for path in made}
    for path in made:
        assert stat.S_IMODE(path.stat().st_mode) & (mask | 0o022) == 0, path
