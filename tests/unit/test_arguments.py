"""The tools' own words: help before and after an action, and mistakes in one sentence."""

import pytest

from kalmagrove.cli import main

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "words",
    [
        "track sync --help", "track dashboards -h", "checkpoint inspect --help", "bench ada -h",
        "report --help", "ledger show --help", "jobs list -h", "doctor --help", "compare -h",
        "sweep show --help", "bench layouts --help", "bench lengths -h",
    ],
)  # fmt: skip
def test_help_is_shown_wherever_it_is_asked_for(words: str, capsys: pytest.CaptureFixture) -> None:
    assert main(words.split()) == 0
    assert capsys.readouterr().out.startswith(f"kalmagrove {words.split()[0]}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("track sync", "the following arguments are required: runs; see kalmagrove track --help"),
        ("checkpoint look", "argument action: invalid choice: 'look' (choose from 'inspect', "),
        ("jobs list --nope", "unrecognized arguments: --nope; see kalmagrove jobs --help"),
        ("bench ada --rounds 0", "0 is not positive; see kalmagrove bench ada --help"),
        ("bench lengths --steps x", "invalid int value: 'x'; see kalmagrove bench lengths --help"),
        ("compare x --nope", "unrecognized arguments: --nope; see kalmagrove compare --help"),
    ],
)
def test_a_mistake_is_a_sentence(words: str, said: str, capsys: pytest.CaptureFixture) -> None:
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "understood" not in error
    assert error.count("\n") == 1
