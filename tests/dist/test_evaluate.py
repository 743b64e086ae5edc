"""Two processes share an evaluation and give the scores of one."""

import json
from pathlib import Path

import pytest

from kalmagrove.parallel import Group
from tests.dist.evaluate_workers import scores
from tests.dist.harness import run_ranks
from tests.evaluation import save_llama, write_bbh

pytestmark = pytest.mark.dist


def test_two_processes_give_the_scores_of_one(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    texts = ["The cat sees the red dog. " * n for n in (1, 40, 3, 3)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    given = {
        "folder": str(save_llama(tmp_path / "llama")),
        "files": str(write_bbh(tmp_path, items=5)),
        "corpus": str(corpus),
    }
    one = scores(Group.alone(), out=str(tmp_path / "one"), **given)["first"]
    both = run_ranks(
        "scores", 2, module="tests.dist.evaluate_workers", out=str(tmp_path / "two"), **given
    )
    assert both["size"] == 2
    assert len(list((tmp_path / "two" / "answers").iterdir())) == 2, "each wrote its share"
    for two in (both["first"], both["second"]):
        assert two["requests"] == one["requests"]
        assert two["tasks"] == one["tasks"]
        bits = two["bits_per_byte"]
        assert bits.pop("bits_per_byte") == pytest.approx(one["bits_per_byte"]["bits_per_byte"])
        for name, items in one["items"].items():
            for mine, theirs in zip(two["items"][name], items, strict=True):
                numbers = theirs.get("log_likelihoods")
                assert mine.get("log_likelihoods") == pytest.approx(numbers, abs=1e-4)
                assert mine["choice"] == theirs["choice"]
    assert both["first"]["requests_from_disk"] == 0
    assert both["second"]["requests_from_disk"] == one["requests"]
    written = json.loads((tmp_path / "two" / "results.json").read_text())
    assert written["tasks"] == one["tasks"]
