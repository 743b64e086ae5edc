"""Bytes sent in a step: against sums by hand (`tests/dist/test_traffic.py` counts real calls)."""

import itertools
from typing import Any

import pytest
from tiny_run import make_run

from kalmagrove.config.counts import held_parameters
from kalmagrove.track import communication_estimate
from kalmagrove.track.communication import ranks_reached

pytestmark = pytest.mark.unit
D, TOKENS = 8, 8  # of `make_run`: a micro-batch is one row


def sent(processes: int, ffn: str = "dense", precision: str = "fp32", **sections: Any) -> dict:
    model = make_run().model.model_dump()
    model["attention"]["softmax"]["qk_norm"] = False
    model["ffn"]["pattern"] = [ffn]
    sections = {"model": model, "batch": {"tokens": 64}, **sections}
    return dict(communication_estimate(make_run(**sections), processes, precision))


def test_one_process_sends_nothing() -> None:
    assert set(sent(1, "moe").values()) == {0}


@pytest.mark.parametrize("sequence", [False, True])
def test_tensor_parallelism_by_hand(sequence: bool) -> None:
    """Embedding and head, attention and feed-forward: each an all-reduce there and one back; three
    numbers a token for the loss. A sequence split in pieces costs the same, but for the norms.
    """
    ring = 1 / 2  # of two ranks
    streams = (1 + 1 + 2 * 2) * 2 * ring * TOKENS * D * 4
    loss = 3 * 2 * ring * TOKENS * 4
    norms = 3 * 2 * ring * D * 4 if sequence else 0
    micro_batches = 8  # 64 tokens, rows of 8, one data-parallel rank
    rows = sent(2, parallel={"tp": 2, "sequence": sequence})
    assert rows["tensor parallel"] == micro_batches * (streams + loss + norms)
    assert rows["context parallel"] == rows["groves and experts"] == rows["gradients"] == 0


def test_context_parallelism_by_hand() -> None:
    """Keys and values of a row are gathered, and their gradients scattered back."""
    rows = sent(4, parallel={"cp": 4})
    assert rows["context parallel"] == 8 * 2 * (3 / 4) * 2 * TOKENS * D * 4
    assert rows["tensor parallel"] == 0
    held = held_parameters(make_run().model, 1, 1).dense - 2 * 4  # without norms of heads
    assert rows["gradients"] == 2 * (3 / 4) * held * 4, "all-reduced over cp x dp ranks"


@pytest.mark.parametrize(("parts", "chosen", "ranks"), [(4, 1, 2), (6, 2, 3), (8, 3, 4), (8, 5, 2)])
def test_ranks_that_a_token_reaches(parts: int, chosen: int, ranks: int) -> None:
    """All ways to choose, from the first rank's side."""
    ways = list(itertools.combinations(range(parts), chosen))
    reached = sum(len({part * ranks // parts for part in way} - {0}) for way in ways)
    assert ranks_reached(parts, chosen, ranks) == pytest.approx(reached / len(ways))


def test_groves_by_hand() -> None:
    """One of two experts: half of the tokens go to the other rank, with one gate and number."""
    rows = sent(2, "moe", parallel={"ep": 2})
    micro_batches, away = 4, TOKENS / 2
    counts = (1 + 1) * 8
    assert rows["groves and experts"] == micro_batches * (
        counts + away * (2 * D * 4 + 4 + 4) + away * (2 * D * 4 + 4)
    )


def test_checkpointing_repeats_the_forward_pass_but_for_its_end() -> None:
    """Of the two all-reduces of a layer's forward pass, the one that ends it is not repeated."""
    plain = sent(2, parallel={"tp": 2})
    again = sent(2, parallel={"tp": 2}, engine={"activation_checkpointing": True})
    assert again["tensor parallel"] - plain["tensor parallel"] == 8 * TOKENS * D * 4


@pytest.mark.parametrize(
    ("stage", "gradients", "parameters"), [(0, 2, 0), (1, 2, 1), (2, 8, 1), (3, 4, 8)]
)
def test_zero_by_stage(stage: int, gradients: int, parameters: int) -> None:
    """Of 4 micro-batches in a step, over two ranks; experts are whole on the one of each kind."""
    rows = sent(2, "moe", "bf16" if stage else "fp32", parallel={"ep": 2}, zero={"stage": stage})
    model = make_run(model={**make_run().model.model_dump()}).model
    size = 2 if stage else 4
    dense = model.vocab_size * D + 3 * D + 4 * D * D + model.ffn.moe.experts * D
    assert rows["gradients"] == gradients * dense * size / 2
    assert rows["parameters (ZeRO)"] == parameters * dense * size / 2
