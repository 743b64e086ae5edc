"""A user's whole story on a CPU: pretrain, retrofit, evaluate, load, sweep, compare."""

import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kalmagrove.cli import main
from kalmagrove.engine import disconnect
from kalmagrove.parallel import Groups
from tests.e2e.conftest import run
from tests.evaluation import sentence, write_bbh

pytestmark = pytest.mark.e2e
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
}
SMALL = [
    "data=jsonl",
    "data.format=messages",
    "data.source.paths=[chat.jsonl]",
    "data.source.key=messages",
    "data.seq_len=64",
    "data.val_fraction=0.1",
    "data.cache=cache",
    "batch={tokens: 512, micro: 4}",
    "engine.threads=1",
    "eval={every: 1000, micro: 8, max_tokens: 2048}",
    "schedule.warmup=5",
    "optim.lr=3e-3",
    "track={every: 10, wandb: disabled}",
    "price=cpu",
]
TASKS = [
    "evaluation.tasks=[bbh/navigate,bbh_generate/snarks]",
    "evaluation.files=benchmarks",
    "evaluation.limit=2",
    "evaluation.shots=1",
]
RETROFIT = [*SMALL, *TASKS, "base=runs/base/model", "last=2", "ffn.hidden=24", "name=kan"]
RETROFIT += ["warm_start.tokens=2048"]
SAME = """
import sys
import kalmagrove
assert not {"torch", "transformers"} & set(sys.modules)
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from kalmagrove.retrofit import load
tokens = torch.tensor([AutoTokenizer.from_pretrained(sys.argv[1]).encode("The red cat")])
with torch.no_grad():
    one, two = (f(sys.argv[1])(tokens).logits for f in (AutoModelForCausalLM.from_pretrained, load))
print(float((one - two).abs().max()), tokens.shape[1])
"""


def dialogue(rng: random.Random) -> list[dict[str, str]]:
    animal, place = rng.choice(["cat", "dog", "fox"]), rng.choice(["house", "river", "tree"])
    question = f"{sentence(rng, rng.randint(2, 6))}. Where is the {animal}?"
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": f"The {animal} is under the {place}."},
    ] * rng.randint(1, 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with dialogues, two tasks, and a model pretrained on the dialogues."""
    place = tmp_path_factory.mktemp("retrofit")
    rng = random.Random(0)
    rows = [{"messages": dialogue(rng)} for _ in range(400)]
    (place / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_bbh(place / "benchmarks")
    for path in (place / "benchmarks" / "bbh").rglob("*.*"):
        if path.stem not in ("navigate", "snarks"):
            path.unlink()
    words = ["scratch=llama_tiny", "arm=pretrain", "data.tokenizer.kind=bpe", "steps=50"]
    words += ["data.tokenizer.vocab_size=384", "name=base", *SMALL]
    done = run("retrofit", *words, cwd=place, **OFFLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"trains ([\d,]+) of \1 parameters", done.stdout)
    return place


@pytest.fixture(scope="module")
def retrofitted(place: Path) -> Path:
    """The run of RETROFIT, on two processes."""
    done = run("retrofit", *RETROFIT, "steps=50", "launch.nproc=2", cwd=place, **OFFLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    (place / "stdout").write_text(done.stdout)
    assert "FutureWarning" not in done.stderr
    return place / "runs" / "kan"


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "ledger.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["event"] == "step"]


def test_what_a_retrofit_leaves(place: Path, retrofitted: Path) -> None:
    base = losses(place / "runs" / "base")
    assert base[-1] < base[0] - 0.5, "a model learns"
    own = losses(retrofitted)
    assert own[-1] < own[0], "and a retrofitted one learns again"
    out = (place / "stdout").read_text()
    for word in ("kan: replace=kan in blocks 2, 3 of 4", "trains ", "navigate", "snarks", "$"):
        assert word in out
    assert len(re.findall(r"warm start, block [23]: R\^2 -?\d\.\d+ -> 0\.\d+", out)) == 2
    assert (place / "runs" / "latest").resolve() == retrofitted
    names = {path.name for path in retrofitted.iterdir()}
    assert names >= {"arm.json", "retrofit.json", "config.yaml", "model", "tokenizer", "evaluation"}
    report = json.loads((retrofitted / "retrofit.json").read_text())
    assert report["blocks"] == [2, 3]
    assert report["path"] == "model.layers.*.mlp"
    arm = json.loads((retrofitted / "arm.json").read_text())
    assert (arm["arm"], arm["seed"], arm["steps"], arm["tokens"]) == ("kan", 0, 50, 50 * 512)
    assert arm["trainable_parameters"] == report["trainable"]["trainable"]
    assert arm["usd"] > 0
    assert arm["val_nats"] < json.loads((place / "runs/base/arm.json").read_text())["val_nats"] + 1
    results = json.loads((retrofitted / "evaluation" / "tasks" / "results.json").read_text())
    assert set(results["tasks"]) == {"bbh_navigate", "bbh_generate_snarks"}
    assert results["device"]["ranks"] == 2
    files = {path.name for path in (retrofitted / "model").iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json"}


def test_the_model_is_loaded_after_import_kalmagrove(retrofitted: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SAME, str(retrofitted / "model")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    apart, count = done.stdout.split()
    assert float(apart) < 1e-5
    assert int(count) > 2


def test_the_same_command_again_is_finished(
    retrofitted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(retrofitted.parent.parent)
    before = (retrofitted / "ledger.jsonl").read_bytes()
    assert main(["retrofit", *RETROFIT, "steps=50"]) == 0
    assert f"{retrofitted} is finished" in capsys.readouterr().out
    assert main(["retrofit", *RETROFIT, "steps=50", "ffn.degree=3"]) == 2
    assert "trained with other settings (ffn.degree was 2, is 3)" in capsys.readouterr().err
    assert (retrofitted / "ledger.jsonl").read_bytes() == before


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For commands that run in this process: leaves it as it was before they connected."""
    threads = torch.get_num_threads()
    monkeypatch.setattr("kalmagrove.engine.disconnect", lambda: None)  # done here, in order
    yield
    torch.set_num_threads(threads)
    if torch.distributed.is_initialized():
        Groups.reset()
        disconnect()


def test_an_interrupted_one_is_only_evaluated_again(
    retrofitted: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    connected: None,
) -> None:
    """By one process: how a run is done plays no part."""
    ledger, model = retrofitted / "ledger.jsonl", retrofitted / "model" / "model.safetensors"
    before, arm = (ledger.read_bytes(), model.stat().st_mtime), retrofitted / "arm.json"
    said = json.loads(arm.read_text())
    arm.unlink()
    monkeypatch.chdir(retrofitted.parent.parent)
    assert main(["retrofit", *RETROFIT, "steps=50"]) == 0
    assert "has already done its 50 steps" in capsys.readouterr().out
    results = json.loads((retrofitted / "evaluation" / "tasks" / "results.json").read_text())
    assert results["requests_from_disk"] == results["requests"] > 0
    assert (ledger.read_bytes(), model.stat().st_mtime) == before
    assert json.loads(arm.read_text()) == said


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["evaluation.files=nowhere"], 1, "files=nowhere lacks bbh/"),
        (["evaluation.suites=[bhh]"], 2, "bhh"),
        (["evaluation.tasks=[bbh/navigat]"], 2, "navigat"),
        (["base=runs/base/models"], 1, "runs/base/models"),
        (["last=9"], 2, "last=9 must be from 1 to the 4 blocks there are"),
    ],
)
def test_what_is_missing_is_missed_before_training(
    place: Path,
    words: list[str],
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    connected: None,
) -> None:
    monkeypatch.chdir(place)
    assert main(["retrofit", *RETROFIT, *words, "name=wrong"]) == code
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("kalmagrove: ")
    assert message in said
    assert not (place / "runs" / "wrong" / "ledger.jsonl").exists()


def test_a_sweep_ends_with_a_comparison(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["-m", "experiment=kallm", "arm=untouched,restart,kan", "seed=0,1", "steps=10"]
    words += ["base=runs/base/model", "last=1", *SMALL, *TASKS, "evaluation.suites=[]"]
    words += ["evaluation.limit=3"]
    done = run("retrofit", *words, cwd=place, **OFFLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    study = place / "runs" / "kallm"
    assert {path.name for path in study.iterdir() if not path.is_symlink()} >= {
        *("untouched", "restart-seed0", "restart-seed1", "kan-seed0", "kan-seed1"),
        *("comparison.md", "comparison.json"),
    }
    assert "untouched is finished" in done.stdout, "its seeds are one run"
    text = (study / "comparison.md").read_text()
    for arm in ("untouched", "restart", "kan"):
        assert arm in text
        assert arm in done.stdout.rpartition("written to")[0]
    assert json.loads((study / "comparison.json").read_text())
    arms = [json.loads(path.read_text()) for path in study.glob("*/arm.json")]
    assert len({arm["device"] for arm in arms}) == 1

    monkeypatch.chdir(place)
    words = ["compare", "runs/kallm", "--pair", "kan:untouched", "--resamples", "100"]
    (study / "kan-seed1" / "arm.json").unlink()
    assert main(words) == 1
    assert "arm=kan lacks seed 1, which arm=restart has" in capsys.readouterr().err
    (study / "restart-seed1" / "arm.json").unlink()
    assert main(words) == 0
    assert "kan-seed1 is not finished and left out" in capsys.readouterr().out
    assert main([*words, "--reference", "nothing"]) == 2
    said = capsys.readouterr().err
    assert "nothing" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nowhere"], 1, "nowhere is no folder"),
        (["empty"], 1, "empty holds no finished run"),
        (["empty", "--pair", "kan"], 2, "--pair=kan must be two arms, ARM:ARM"),
        (["empty", "--colour", "red"], 2, "--colour red; see kalmagrove compare --help"),
        (["empty", "--resamples", "few"], 2, "invalid int value: 'few'"),
    ],
)
def test_what_compare_refuses(
    place: Path,
    words: list[str],
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (place / "empty").mkdir(exist_ok=True)
    monkeypatch.chdir(place)
    assert main(["compare", *words]) == code
    said = capsys.readouterr().err
    assert said.startswith("kalmagrove: ")
    assert said.count("\n") == 1
    assert message in said


def test_compare_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare"]) == 2
    assert main(["compare", "--help"]) == 0
    assert capsys.readouterr().out.count("usage: kalmagrove compare FOLDER") == 2
