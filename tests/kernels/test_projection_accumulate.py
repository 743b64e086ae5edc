"""Sums in shared memory: which blocks there can be, how many tokens they take, where they run.

The kernel itself: test_cuda_emulated.py on the CPU, tests/gpu on a GPU.
"""

from typing import Any

import pytest
import torch

from kalmagrove_kernels.projection import accumulate
from kalmagrove_kernels.projection.accumulate import Block, block_for, candidates, refusal

pytestmark = pytest.mark.unit
BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stages": 2}, "Block.stages=2"),
        ({"tokens": 800}, "Block.tokens=800 must be 1 to 715"),
        ({"stages": 29}, "Block.tokens=None must be 1 to -"),
    ],
)
def test_blocks_that_cannot_be_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Block(**fields)


@pytest.mark.parametrize("tokens", [1, 132, 5000, 16384, 100_000])
@pytest.mark.parametrize("block", [Block(), Block(4), Block(12)])
def test_blocks_come_in_whole_turns_of_the_multiprocessors(block: Block, tokens: int) -> None:
    each = block.tokens_for(tokens, 2048, 132)
    assert 1 <= each <= block.most_tokens
    across, down = 32, -(-tokens // each)
    turns = -(-across * down // 132)
    # One turn less would need more tokens a block than their sums have room for.
    assert 132 * (turns - 1) // across * block.most_tokens < tokens


def test_a_given_number_of_tokens_is_kept() -> None:
    assert Block(tokens=512).tokens_for(16384, 2048, 132) == 512
    assert Block().tokens_for(0, 2048, 132) == 1


def test_candidates_are_different_and_fit() -> None:
    found = list(candidates())
    assert len(found) == len(set(found)) > 3
    for block in found:
        assert refusal(BF16, 104, 64, 2048, block) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "float32"),
        ({"rank": 20}, "rank=20 must be 64"),
        ({"width": 60}, "width=60 must be a multiple of 8"),
        ({"channels": 5000}, "less than 16 pairs"),
        ({"channels": 40000}, "40000 channels do not fit"),
        ({"rank": 256}, "expanded rows are faster"),
    ],
)
def test_where_it_does_not_run_it_says_why(
    changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accumulate, "BLOCKS", {"r64": Block(), "r128": None, "r256": None})
    shape: dict[str, Any] = {
        "dtype": BF16,
        "tokens": 16384,
        "kept": 8,
        "channels": 104,
        "rank": 64,
        "width": 2048,
        "processors": 132,
    }
    assert block_for(**shape)[0] == Block()
    block, why = block_for(**shape | changes)
    assert block is None
    assert reason in why
