"""Any number of processes at any ZeRO stage trains like one process of plain torch."""

import functools
from typing import Any

import pytest
import torch

from kalmagrove.engine.optim import build_optimizer
from kalmagrove.engine.schedule import lr_factor
from kalmagrove.nn import build_model
from kalmagrove.parallel import Groups
from tests.dist.harness import run_ranks
from tests.dist.toy import ROWS, Rows, Toy, real_run, toy_run

pytestmark = pytest.mark.dist
MUON = {"optim": {"kind": "muon", "lr": 0.01, "weight_decay": 0.1}}
UNCLIPPED = {"optim": {"clip": 0.0, "lr": 0.02, "weight_decay": 0.1}}
BF16 = {"engine": {"precision": "bf16"}}


def plain_torch(run: Any, model: torch.nn.Module, steps: int) -> list[tuple[float, float]]:
    """Whole steps in one batch, without DeepSpeed."""
    rows, groups = Rows(ROWS, 0, 1), Groups.single()
    optimizer = build_optimizer(model, run.optim, torch.device("cpu"))
    found = []
    for step in range(steps):
        loss, _, nll = model(**next(rows))
        optimizer.zero_grad()
        loss.backward()
        clip = run.optim.clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor(step, run.steps, run.schedule)
        optimizer.step()
        model.balance(groups)
        found.append((nll.item(), norm.item()))
    return found


@functools.cache
def reference(name: str) -> list[tuple[float, float]]:
    torch.manual_seed(0)
    sections = {"sgd": {}, "muon": MUON, "unclipped": UNCLIPPED}[name]
    return plain_torch(toy_run(**sections), Toy(), 6)


def close(found: Any, expected: Any, tolerance: float) -> None:
    torch.testing.assert_close(
        torch.tensor(found), torch.tensor(expected), rtol=tolerance, atol=tolerance
    )


Variants = dict[str, tuple[str, float, dict[str, Any]]]  # reference, tolerance, sections
REAL = ["ffn=grove", "attention=hybrid", "model.layers=4"]


def variants_on(ranks: int) -> Variants:
    """Everything on 2 ranks; on 1 and 4 what depends on their number most."""
    found: Variants = {}
    for stage in (0, 1, 2, 3):
        zero: dict[str, Any] = {"zero": {"stage": stage}, "batch": {"micro": ROWS // ranks}}
        accumulated = {
            "zero": {"stage": stage},
            "batch": {"micro": ROWS // ranks // 2},
            "engine": {"activation_checkpointing": True},
        }
        found[f"z{stage} accumulated"] = ("sgd", 1e-5, accumulated)
        if stage < 3 and (ranks == 2 or stage > 0):
            found[f"z{stage} muon"] = ("muon", 1e-5, {**zero, **MUON})
        if ranks != 2:
            continue
        found[f"z{stage}"] = ("sgd", 1e-5, zero)
        found[f"z{stage} unclipped"] = ("unclipped", 1e-5, {**zero, **UNCLIPPED})
        if stage > 0:
            found[f"z{stage} bf16"] = ("sgd", 2e-2, {**zero, **BF16})
    return found


@functools.cache
def results(ranks: int) -> Any:
    sections = {name: sections for name, (_, _, sections) in variants_on(ranks).items()}
    jobs: dict[str, Any] = {"equality": {"variants": sections}}
    if ranks == 2:
        overrides = [*REAL, "batch.micro=2"]
        jobs["real_model"] = {"overrides": overrides, "stages": [0, 1, 2, 3]}
        layouts = {f"ep {ep}": ["ffn=grove", "batch.micro=2", f"parallel.ep={ep}"] for ep in (1, 2)}
        jobs["bf16_sums"] = {"overrides": layouts}  # last: it makes groups of its own
    return run_ranks("several", ranks, jobs=jobs, timeout=300)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_losses_and_norms_are_those_of_plain_torch(ranks: int) -> None:
    """Also with accumulation and activation checkpointing, without clipping, with Muon, in bf16."""
    for name, (expected, tolerance, _) in variants_on(ranks).items():
        try:
            close(results(ranks)["equality"][name], reference(expected), tolerance)
        except AssertionError as error:
            raise AssertionError(f"{name} on {ranks} ranks: {error}") from None


def test_the_real_model_too() -> None:
    run = real_run(REAL)
    torch.manual_seed(0)
    expected = plain_torch(run, build_model(run.model, Groups.single()), 4)
    for stage, found in results(2)["real_model"].items():
        try:
            close(found, expected, 2e-5)
        except AssertionError as error:
            raise AssertionError(f"ZeRO {stage}: {error}") from None


def test_bf16_gradients_add_up_to_the_last_bit_as_deepspeed_adds_them() -> None:
    """With groves, whole and expert-parallel, and two micro-batches a step."""
    assert results(2)["bf16_sums"] == {f"ep {ep}": [[True] * 3] * 2 for ep in (1, 2)}
