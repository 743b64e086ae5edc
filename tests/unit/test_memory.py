"""The memory estimate: exact where ZeRO says so, monotonic where it is an estimate."""

from typing import Any

import pytest
from tiny_run import make_run

from kalmagrove.config.counts import parameter_count
from kalmagrove.track import memory_estimate

pytestmark = pytest.mark.unit


def estimate(dp: int = 1, precision: str = "fp32", **sections: Any) -> dict[str, int]:
    return dict(memory_estimate(make_run(**sections), dp, precision))


N = parameter_count(make_run().model).total


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "states"),
    [(1, 2 * N, 6 * N, 3 * N), (2, 2 * N, 6 * N // 4, 3 * N), (3, N // 2, 6 * N // 4, 3 * N)],
)
def test_zero_shards_by_stage(stage: int, weights: int, gradients: int, states: int) -> None:
    rows = estimate(dp=4, precision="bf16", zero={"stage": stage})
    assert rows["parameters"] == weights
    assert rows["gradients"] == gradients
    assert rows["optimizer states"] == states


def test_fp32_without_zero_needs_16_bytes_a_parameter() -> None:
    rows = estimate(zero={"stage": 0})
    assert rows["parameters"] + rows["gradients"] + rows["optimizer states"] == 16 * N
    plain = estimate(zero={"stage": 0}, optim={"kind": "sgd", "momentum": 0.0})
    assert plain["optimizer states"] == 0


@pytest.mark.parametrize("attention", ["ada", "softmax", "mla"])
@pytest.mark.parametrize("ffn", ["dense", "moe", "kan", "grove"])
def test_activations_grow_with_the_rows_and_shrink_with_checkpointing(
    attention: str, ffn: str
) -> None:
    model = make_run().model.model_dump() | {"layers": 4}
    model["attention"]["pattern"], model["ffn"]["pattern"] = [attention], [ffn]
    one = estimate(model=model)
    two = estimate(model=model, batch={"micro": 2})
    assert two["activations"] == 2 * one["activations"]
    assert two["logits and loss"] == 2 * one["logits and loss"]
    again = estimate(model=model, engine={"activation_checkpointing": True})
    assert again["activations"] < one["activations"] / 2
