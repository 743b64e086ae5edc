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
        loss = model(**next(rows)).loss
        optimizer.zero_grad()
        loss.backward()
        clip = run.optim.clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor(step, run.steps, run.schedule)
        optimizer.step()
        model.balance(groups)
        found.append((loss.item(), norm.item()))
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


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_losses_and_norms_are_those_of_plain_torch(ranks: int) -> None:
    """Also with accumulation and activation checkpointing, without clipping, with Muon, in bf16."""
    variants: dict[str, tuple[str, float, dict[str, Any]]] = {}
    for stage in (0, 1, 2, 3):
        zero: dict[str, Any] = {"zero": {"stage": stage}, "batch": {"micro": ROWS // ranks}}
        accumulated = {
            "zero": {"stage": stage},
            "batch": {"micro": ROWS // ranks // 2},
            "engine": {"activation_checkpointing": True},
        }
        variants[f"z{stage}"] = ("sgd", 1e-5, zero)
        variants[f"z{stage} accumulated"] = ("sgd", 1e-5, accumulated)
        variants[f"z{stage} unclipped"] = ("unclipped", 1e-5, {**zero, **UNCLIPPED})
        if stage < 3:
            variants[f"z{stage} muon"] = ("muon", 1e-5, {**zero, **MUON})
        if stage > 0:
            variants[f"z{stage} bf16"] = ("sgd", 2e-2, {**zero, **BF16})
    sections = {name: sections for name, (_, _, sections) in variants.items()}
    result = run_ranks("equality", ranks, variants=sections, timeout=300)
    for name, (expected, tolerance, _) in variants.items():
        try:
            close(result["losses"][name], reference(expected), tolerance)
        except AssertionError as error:
            raise AssertionError(f"{name} on {ranks} ranks: {error}") from None


def test_the_real_model_too() -> None:
    overrides = ["ffn=grove", "attention=hybrid", "model.layers=4"]
    run = real_run(overrides)
    torch.manual_seed(0)
    expected = plain_torch(run, build_model(run.model, Groups.single()), 4)
    result = run_ranks(
        "real_model", 2, overrides=[*overrides, "batch.micro=2"], stages=[0, 1, 2, 3]
    )
    for stage, found in result.items():
        try:
            close(found, expected, 2e-5)
        except AssertionError as error:
            raise AssertionError(f"ZeRO {stage}: {error}") from None
