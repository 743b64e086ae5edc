"""All ranks leave together when the first one's money is used up, and only more of it goes on."""

import json
from pathlib import Path

import pytest

from kalmagrove.track.audit import faults
from tests.dist.harness import run_ranks

pytestmark = pytest.mark.dist


def test_all_ranks_leave_at_the_cap(tmp_path: Path) -> None:
    found = run_ranks("budget", 2, folder=str(tmp_path), stage=2)
    for name in ("first", "same", "more"):
        (began, step, saved, said), (*other, heard) = found[name]
        assert other == [began, step, saved], "the ranks stand at the same step"
        assert saved == step
        assert "with a higher cap continues" in said
        assert heard.startswith("the budget is used up")
    (_, first, *_), (began, same, *_), (again, more, _, said) = (
        found[name][0] for name in ("first", "same", "more")
    )
    assert first > 1
    assert began == same == again == first, "nothing is trained with the same cap"
    assert more > first
    assert said.startswith("budget.usd=12 is reached")
    lines = [json.loads(text) for text in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    one, two, three = (line for line in lines if line["event"] == "stop")
    # Steps and saves may be slower than those before: here by half a second of two cores at most.
    assert one["usd"] < 7
    assert two["usd"] > one["usd"]
    assert three["usd"] < 13
    assert faults(tmp_path / "ledger.jsonl") == []
