"""The command line: verbs, help, and mistakes that are one line and exit code 2."""

import re

import pytest

from kalmagrove import __version__
from kalmagrove.cli import VERBS, main

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
        (["--config", "/does/not/exist.yaml"], "--config=/does/not/exist.yaml cannot be read"),
        (["--cfg", "job", "model=nope"], "model=nope is not an option"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["train", "--dry-run", *words]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err
    assert err.startswith("kalmagrove: ")
    assert "\n" not in err


def test_unknown_verb(capsys: pytest.CaptureFixture) -> None:
    assert main(["trian"]) == 2
    assert "trian is not a verb" in capsys.readouterr().err


def test_dry_run_shows_the_plan(capsys: pytest.CaptureFixture) -> None:
    words = ["train", "--dry-run", "model=kan_tiny", "steps=7", "launch.nproc=2"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "steps: 7" in out
    for word in ("embedding", "attention", "ffn", "active", "memory"):
        assert word in out.lower(), word
    assert f"{7 * 16384:,}" in out
