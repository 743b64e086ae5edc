"""The memory estimate: exact where ZeRO says so, monotonic where it is an estimate."""

from typing import Any

import pytest
import torch
from tiny_run import make_run

from kalmagrove.config import Run
from kalmagrove.config.counts import (
    attention_count,
    ffn_count,
    held_parameters,
    parameter_count,
)
from kalmagrove.nn import build_model
from kalmagrove.parallel import Group, Groups, is_expert
from kalmagrove.track import memory, memory_estimate
from kalmagrove.track.memory import layer_floats

pytestmark = pytest.mark.unit


def estimate(processes: int = 1, precision: str = "fp32", **sections: Any) -> dict[str, int]:
    return dict(memory_estimate(make_run(**sections), processes, precision))


N = parameter_count(make_run().model).total


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "states"),
    [
        (1, 2 * N, 4 * N, 3 * N),
        (2, 2 * N, 4 * N // 4, 3 * N),
        (3, N // 2 + 2 * N, 4 * N // 4, 3 * N),  # and all weights gathered, kept by autograd
    ],
)
def test_zero_shards_by_stage(stage: int, weights: int, gradients: int, states: int) -> None:
    """Gradients: their fp32 sums; the new ones in bf16 appear as activations go."""
    rows = estimate(
        processes=4, precision="bf16", zero={"stage": stage}, batch={"tokens": 64, "micro": 1}
    )
    assert rows["parameters"] == weights
    assert rows["gradients"] == gradients
    assert rows["optimizer states"] == states


def test_zero_2_sums_gradients_only_over_several_micro_batches() -> None:
    batch = {"tokens": 32, "micro": 1}
    rows = estimate(processes=4, precision="bf16", zero={"stage": 2}, batch=batch)
    assert rows["gradients"] == 0


def test_new_gradients_count_where_they_are_more_than_the_activations() -> None:
    model = make_run().model.model_dump() | {"vocab_size": 8192}
    rows = dict(memory_estimate(make_run(model=model, zero={"stage": 1}), 1, "bf16"))
    parameters = rows["parameters"] // 2
    free = rows["activations"] + rows["logits and loss"]
    assert rows["gradients"] == 4 * parameters + max(0, 2 * parameters - free)
    assert sum(rows.values()) == 18 * parameters + max(2 * parameters, free)


def test_stage_3_gathers_a_layer_at_a_time_with_checkpointing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "LIVE", 0)
    model = make_run().model.model_dump() | {"layers": 4}
    zero, again = {"stage": 3}, {"activation_checkpointing": True}
    run = make_run(model=model, zero=zero, engine=again, batch={"tokens": 64, "micro": 1})
    total = parameter_count(run.model).total
    layer = attention_count(run.model, 0).total + ffn_count(run.model, 0).total
    assert dict(memory_estimate(run, 4, "bf16"))["parameters"] == 2 * total // 4 + 2 * layer


@pytest.mark.parametrize("ffn", ["kan", "grove"])
def test_kernels_keep_less(ffn: str) -> None:
    model = make_run().model.model_dump()
    model["attention"]["pattern"], model["ffn"]["pattern"] = ["ada"], [ffn]
    run = make_run(model=model, data={"seq_len": 512}, batch={"tokens": 512})
    for other in ("cpu", "reference"):
        masked, kept = (dict(memory_estimate(run, 1, "bf16", p)) for p in (other, "kernels"))
        assert kept["activations"] < masked["activations"]
        assert masked | {"activations": 0} == kept | {"activations": 0}


def test_all_to_all_buffers() -> None:
    rows = dict(memory_estimate(wide_run("ada", "grove", parallel={"ep": 2}), 2, "bf16"))
    # Of 4 groves one is chosen: half of the tokens go to the other rank, and as many come.
    assert rows["all-to-all buffers"] == 2 * (64 / 2) * 16 * 2


def test_what_the_modules_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted on a CPU, whose norms keep two copies in fp32 where those of a GPU keep the input."""
    run = wide_run("softmax", "dense")
    block = build_model(run.model, Groups.single()).to(torch.bfloat16).train().blocks[0]
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights and x.numel() >= 64 * 8:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        block(torch.randn(1, 64, 16, dtype=torch.bfloat16, requires_grad=True))
    numbers = sum(x.untyped_storage().nbytes() for x in kept.values()) / 2 / 64
    norms = 3 * (2 * 16 + 2 * 16)  # before blocks, and of q and k
    assert numbers - norms == layer_floats(run, 0)


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


LAYOUTS = [(1, 1, 1), (2, 1, 1), (2, 2, 2), (1, 2, 4), (4, 1, 2)]
KINDS = [
    ("ada", "kan", {}),
    ("ada", "grove", {"kernel": "ode", "output_norm": False, "decay": "fixed"}),
    ("softmax", "moe", {}),
    ("mla", "dense", {}),
    ("mla", "grove", {}),
]


def fake_groups(tp: int, cp: int, ep: int) -> Groups:
    """The first of 8 ranks under a layout, without processes: building does not communicate."""

    def group(size: int) -> Group:
        return Group(None, 0, size, tuple(range(size)))

    dp = 8 // tp // cp
    return Groups(
        world=group(8), tp=group(tp), cp=group(cp), dp=group(dp), dp_cp=group(dp * cp),
        ep=group(ep), expert_dp=group(8 // ep), device=torch.device("cpu"),
    )  # fmt: skip


@pytest.mark.parametrize(("attention", "ffn", "switches"), KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_rank_holds_what_its_modules_do(
    attention: str, ffn: str, switches: dict[str, Any], layout: tuple[int, int, int], tied: bool
) -> None:
    tp, cp, ep = layout
    ep = ep if ffn in ("moe", "grove") else 1
    run = wide_run(attention, ffn, tied, switches, {"tp": tp, "cp": cp, "ep": ep})
    model = build_model(run.model, fake_groups(tp, cp, ep))
    dense = sum(p.numel() for p in model.parameters() if not is_expert(p))
    routed = sum(p.numel() for p in model.parameters() if is_expert(p))
    assert held_parameters(run.model, tp, ep) == (dense, routed)
    rows = dict(memory_estimate(run, 8, "fp32"))
    assert rows["parameters"] == 4 * (dense + routed)
    assert rows["optimizer states"] == 12 * dense // (8 // tp) + 12 * routed // (8 // ep)


def wide_run(
    attention: str,
    ffn: str,
    tied: bool = True,
    switches: dict[str, Any] | None = None,
    parallel: dict[str, Any] | None = None,
) -> Run:
    """Sizes that every layout of `LAYOUTS` divides."""
    model = make_run().model.model_dump() | {"d_model": 16, "layers": 2, "tie_embeddings": tied}
    model["attention"]["pattern"], model["ffn"]["pattern"] = [attention], [ffn]
    model["attention"]["ada"] |= {"heads": 4, **(switches or {})}
    model["attention"]["softmax"] |= {"heads": 4, "kv_heads": 4}
    model["attention"]["mla"] |= {"heads": 4, "q_rank": 6}
    model["ffn"]["kan"]["rank"] = model["ffn"]["grove"]["kan"]["rank"] = 4
    model["ffn"]["moe"] |= {"experts": 4, "shared_hidden": 4}
    model["ffn"]["grove"]["groves"] = 4
    sections = {"data": {"seq_len": 64}, "batch": {"tokens": 512}, "zero": {"stage": 1}}
    return make_run(model=model, parallel=parallel or {}, **sections)


@pytest.mark.parametrize("attention", ["ada", "softmax", "mla"])
@pytest.mark.parametrize("ffn", ["dense", "moe", "kan", "grove"])
def test_activations_shrink_with_every_dimension(attention: str, ffn: str) -> None:
    def activations(**parallel: Any) -> int:
        rows = memory_estimate(wide_run(attention, ffn, parallel=parallel), 8, "bf16")
        return dict(rows)["activations"]

    whole = activations()
    assert whole / 4 < activations(tp=4) < whole, "norms and residuals stay whole"
    assert whole / 4 <= activations(tp=4, sequence=True) < activations(tp=4)
    assert activations(cp=4) < whole / 2
