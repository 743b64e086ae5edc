"""`kalmagrove plan`: what it prints and writes, the command that it recommends, what it refuses."""

import json
import math
import shlex
from pathlib import Path

import pytest

from kalmagrove.cli import main
from kalmagrove.cli.compose import compose_tree
from kalmagrove.cli.dry_run import with_vocabulary
from kalmagrove.cli.plan import command, planned_of
from kalmagrove.config import Plan, Run, load, validate

pytestmark = pytest.mark.unit
QUICK = ["cluster.gpus=2", "cluster.gpus_per_node=2", "batch.tokens=262144", "show=2"]
FIXED = ["search=false", "batch.tokens=262144"]
LONG = ["cluster=h100x8", "data.seq_len=524288", "ffn=kan"]
AGAIN = "engine.activation_checkpointing=true"


def trained(line: str) -> tuple[Run, int]:
    """What the printed command trains, and on how many processes."""
    words = shlex.split(line)
    assert words[:2] == ["kalmagrove", "train"]
    run = load(compose_tree("train", words[2:]))
    assert isinstance(run.launch.nproc, int)
    run.check_world(run.launch.nproc)
    return with_vocabulary(run)[0], run.launch.nproc


def commands(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("kalmagrove train")]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["ffn=dense", "attention=softmax", "search=false", "zero=stage3"],
        ["model=kan_135m", "data=fineweb_edu", "optim=muon", "optim.lr=0.002", *QUICK],
        ["model=kan_135m", "parallel.ep=2", "zero.bucket=1000", "zero.stage=2", *QUICK],
        [*LONG, "parallel.cp=8", "search=false", "zero=stage2", AGAIN],
        [*LONG, "model.vocab_size=32768"],
        ["model.attention.pattern=[ada,softmax]", "engine.precision=auto", *FIXED],
        ["data.tokenizer.vocab_size=8192", "parallel.tp=2", "parallel.sequence=true", *FIXED],
        ["model.vocab_size=50304", "data.tokenizer.vocab_size=50000", *FIXED],
        ["+eval.every=7", "+steps=9", "++optim.clip=0.5", *FIXED],
    ],
)
def test_the_printed_command_is_the_run_that_was_planned(words: list[str]) -> None:
    wanted = validate(Plan, compose_tree("plan", words))
    one = planned_of(wanted, words, 10**9)
    assert one.best is not None
    planned = one.best.run
    run, processes = trained(command(one))
    assert processes == wanted.cluster.gpus
    for section in ("model", "batch", "parallel", "zero", "optim", "engine"):
        assert getattr(run, section) == getattr(planned, section), section
    assert run.data.seq_len == planned.data.seq_len
    assert run.data.source == planned.data.source
    tokenizer = run.data.tokenizer.vocab_size
    assert tokenizer == planned.data.tokenizer.vocab_size or wanted.model.vocab_size == 32768
    steps = 9 if "+steps=9" in words else math.ceil(1e9 / planned.batch.tokens)
    assert run.steps == steps
    assert run.eval.every == (7 if "+eval.every=7" in words else 100)


def test_each_model_beside_another_has_its_command(capsys: pytest.CaptureFixture) -> None:
    words = ["model=kan_135m", "compare=[dense_135m]", "ffn=kan", "cluster=h200x1", *FIXED]
    assert main(["plan", *words]) == 0
    first, other = commands(capsys.readouterr().out)
    assert trained(first)[0].model.name == "kan_135m"
    run = trained(other)[0]
    assert run.model.name == "dense_135m"
    assert {run.model.ffn_kind(i) for i in range(run.model.layers)} == {"kan"}
    assert "compare" not in first + other


def test_points_of_a_sweep_have_their_own_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["model=kan_tiny", "cluster=h200x1,h200x8", "ffn=kan,dense", *FIXED]
    assert main(["plan", "-m", *words]) == 0
    runs = [trained(line) for line in commands(capsys.readouterr().out)]
    kinds = [(processes, run.model.ffn_kind(0)) for run, processes in runs]
    assert kinds == [(1, "kan"), (1, "dense"), (8, "kan"), (8, "dense")]
    assert not any(tmp_path.iterdir())


def test_plan_prints_layouts_and_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "plan.json"
    assert main(["plan", "model=kan_135m", "compare=[dense_135m]", *QUICK, f"out={out}"]) == 0
    printed = capsys.readouterr().out
    text = " ".join(printed.split())
    for words in (
        "kan_135m: 132M parameters, 78.8M active",
        "Side by side",
        "The loss is not predicted",
        "20 a parameter",
        "vocabulary of 49,152",
    ):
        assert words in text
    models = json.loads(out.read_text())["models"]
    assert [m["model"] for m in models] == ["kan_135m", "dense_135m"]
    assert [m["command"] for m in models] == commands(printed)
    assert models[0]["layouts"][0]["tokens"] == models[1]["layouts"][0]["tokens"]
    assert models[0]["layouts"][0]["usd"] > 0


def test_a_model_that_does_not_fit_does_not_hide_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "plan.json"
    words = ["model=dense_340b", "compare=[kan_nano,kan_tiny]", "cluster=h200x1", "tokens=1000000"]
    assert main(["plan", *words, "batch.tokens=262144", "show=2", f"out={out}"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "dense_340b on 1 x NVIDIA H200: none of 2 layouts can be",
        "dense_340b is refused: cluster.gpus=1 cannot hold dense_340b; the nearest layout",
        "kan_nano: 8.01M parameters, 6.76M active",
        "refused -",
        "use more GPUs",
    ):
        assert part in text
    large, small, _ = json.loads(out.read_text())["models"]
    assert large["layouts"] == []
    assert len(large["refused"]) == 2
    assert large["command"] is None
    assert "cannot hold dense_340b" in large["error"]
    assert small["layouts"]
    assert small["error"] is None


def test_a_model_that_cannot_be_is_a_row(capsys: pytest.CaptureFixture) -> None:
    words = ["model=kan_nano", "compare=[kan_135m]", "cluster=h200x8", *FIXED]
    assert main(["plan", *words, "parallel.tp=2", "ffn=kan", "batch.micro=2"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "kan_135m is refused: parallel.tp=2 must divide model.attention" in text


def test_where_nothing_can_be_the_reasons_are_listed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "plan.json"
    words = ["model=dense_340b", "cluster=h100x8", "show=2", f"out={out}"]
    assert main(["plan", *words]) == 2
    shown = capsys.readouterr()
    assert shown.out.count("usable (optimizer") + shown.out.count("usable\n(optimizer") == 2
    assert "show=60 lists 58 more" in shown.out
    assert "cluster.gpus=8 cannot hold dense_340b; the nearest layout" in shown.err
    (model,) = json.loads(out.read_text())["models"]
    assert len(model["refused"]) == 60


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["search=false", "parallel.ep=3"], "parallel.ep=3 must divide model.ffn.grove.groves=8"),
        (["search=false", "batch.micro=64"], "cannot hold kan_1b as given: tp 1, ep 1, ZeRO 1,"),
        (["search=false", "batch.micro=64"], "; try batch.micro=8, or search=true"),
        (
            [*LONG, "search=false", "zero=stage2", AGAIN],
            "; try parallel.tp=4 parallel.cp=2 parallel.sequence=true zero=stage1, or search=true",
        ),
        (
            ["cluster.gpus=6", "cluster=h200x8", "model=kan_nano"],
            "batch.tokens=4194304 must be a multiple of data.seq_len=4096 x batch.micro=1 x "
            "data-parallel ranks=6 = 24576; try 4177920 or 4202496",
        ),
        (["search=false", "batch.tokens=4096"], "batch.tokens=4096 must be a multiple of"),
        (["cluster.gpus=12"], "cluster.gpus=12 must be whole machines"),
        (["engine.precision=fp32"], "engine.precision=fp32 is not planned for"),
        (["compare=[nope]", *QUICK], "model=nope is not an option"),
        (["cluster=nope"], "cluster=nope is not an option"),
        (["cluster=null"], "cluster=null is not an option; try a100x8, h100x1024"),
        (["zero=3"], "zero=3 is not an option; try stage0, stage1, stage2, stage3"),
        (["price=h100"], "price=h100 is not planned with: the price and the peak are those of"),
        (["price=h100"], "use cluster.usd_per_gpu_hour=2.69"),
        (["host=missing.json"], "host=missing.json cannot be read as the output of kalmagrove"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["plan", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_refused_before_planning(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for out, message in (
        (tmp_path / "none" / "x.json", "is in no folder: there is no"),
        (tmp_path, f"is a folder; try out={tmp_path}/plan.json"),
    ):
        assert main(["plan", *QUICK, f"out={out}"]) == 2
        shown = capsys.readouterr()
        assert f"out={out} {message}" in shown.err
        assert shown.out == ""
    assert main(["plan", "model=kan_tiny", "cluster=h200x1", *FIXED, "out=/dev/full"]) == 2
    assert "out=/dev/full cannot be written (No space left on device)" in capsys.readouterr().err


def test_the_sources_models_are_planned_side_by_side(capsys: pytest.CaptureFixture) -> None:
    layout = ["search=false", "zero=stage3", "parallel.tp=8", "parallel.sequence=true"]
    words = ["model=kan_340b", "compare=[moe_340b]", "cluster=h100x1024", "tokens=1000000000000"]
    again = "engine.activation_checkpointing=true"
    assert main(["plan", *words, *layout, "parallel.ep=16", again]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "$230k" in text
    assert "$2.1M" in text
    assert "it does not say how many it trained" in text
