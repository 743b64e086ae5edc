"""What a training step reports, with plain torch in DeepSpeed's place."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_run import make_run
from torch import Tensor

from kalmagrove.config import Run
from kalmagrove.engine.compat import (
    _add_gradients,
    _gradients_at_once,
    _norm_at_once,
    _not_finite,
)
from kalmagrove.engine.engine import Engine
from kalmagrove.nn import build_model
from kalmagrove.parallel import Groups

pytestmark = pytest.mark.unit


class Plain:
    """DeepSpeed's interface without its work: the weights stay."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.optimizer = module, SimpleNamespace(param_groups=[])

    def __call__(self, **batch: Any) -> Any:
        return self.module(**batch)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def is_gradient_accumulation_boundary(self) -> bool:
        return True

    def step(self) -> None:
        """Nothing is updated."""

    def get_global_grad_norm(self) -> float:
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))


def make_engine(**model: Any) -> Engine:
    base = make_run().model.model_dump(mode="json")
    base["ffn"]["pattern"] = ["grove"]
    base["ffn"]["grove"]["z_loss"] = model.pop("router_z_loss")
    run: Run = make_run(model={**base, **model})
    groups = Groups.single()
    torch.manual_seed(0)
    module = build_model(run.model, groups)
    return Engine(module, Plain(module), groups, run, torch.float32)


def batches(engine: Engine, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 32, (engine.accumulation, 2, 1, 8), generator=generator)
    return [{"tokens": t[0], "targets": t[1], "normalizer": 8.0} for t in tokens]


@pytest.mark.parametrize(("router", "logit"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5)])
def test_the_loss_reported_is_the_cross_entropy_alone(router: float, logit: float) -> None:
    engine = make_engine(router_z_loss=router, logit_z_loss=logit)
    steps = batches(engine)
    whole = sum(float(engine.module(**b).loss.detach()) for b in steps) / len(steps)
    alone = sum(float(engine.eval_loss(b)[0]) / 8 for b in steps) / len(steps)
    loss, norm = engine.train_step(steps, 0)
    assert float(loss) == pytest.approx(alone, rel=1e-6)
    assert math.isfinite(norm)
    aux_loss = float(engine.metrics()["aux_loss"])
    if router or logit:
        assert aux_loss == pytest.approx(whole - alone, rel=1e-3)
        assert aux_loss > 1e-4  # far above rounding
    else:
        assert aux_loss == 0


def test_the_gradient_is_that_of_the_whole_loss() -> None:
    engine = make_engine(router_z_loss=0.5, logit_z_loss=0.5)
    steps = batches(engine)
    engine.train_step(steps, 0)
    found = {name: p.grad.clone() for name, p in engine.module.named_parameters()}
    engine.module.zero_grad()
    for batch in steps:
        engine.module(**batch).loss.backward()
    for name, parameter in engine.module.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)


def test_an_evaluation_leaves_the_metrics_of_training() -> None:
    engine = make_engine(router_z_loss=0.5)
    engine.train_step(batches(engine), 0)
    first = engine.module.metrics()
    taken = {name: value.clone() for name, value in first.items()}
    engine.eval_loss(batches(engine, seed=1)[0])  # before anybody asked for the metrics
    found = engine.metrics()
    assert found.keys() == taken.keys() | {"aux_loss"}
    assert all(torch.equal(taken[name], found[name]) for name in taken)
    other = engine.module.metrics()
    assert any(not torch.equal(taken[name], other[name]) for name in other)


def test_a_loss_that_is_not_finite_is_reported_even_if_the_cross_entropy_is() -> None:
    engine = make_engine(router_z_loss=0.5)
    engine.module.blocks[0].ffn.gate_bias.data.fill_(1e20)  # its square is infinite
    steps = batches(engine)
    assert all(math.isfinite(engine.module(**batch).nll) for batch in steps)
    loss, _ = engine.train_step(steps, 0)
    assert math.isnan(loss)
    assert engine.skipped


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_found_in_any_group(bad: float) -> None:
    def zero(*values: float) -> Any:
        groups = {i: [torch.ones(2, 3), torch.tensor([1.0, v]), None] for i, v in enumerate(values)}
        empty = {len(values): [torch.empty(0)]}
        return SimpleNamespace(
            averaged_gradients=groups | empty,
            bit16_groups=[None] * (len(values) + 1),
            device=torch.device("cpu"),
        )

    assert not _not_finite(zero(1.0, -3e38)).item()
    assert _not_finite(zero(1.0, bad)).item()
    assert _not_finite(zero(bad, 1.0)).item()
    assert not _not_finite(zero()).item()


def test_bf16_gradients_add_up_in_fp32_where_there_are_any() -> None:
    torch.manual_seed(0)
    shapes = [[(3, 5), (), (4,)], [(2, 2, 2)], [(6,)]]
    groups = [[torch.nn.Parameter(torch.zeros(s).bfloat16()) for s in group] for group in shapes]
    sums = [[torch.zeros(p.numel()) for p in group] for group in groups]
    zero = SimpleNamespace(
        bf16_groups=groups,
        fp32_groups_gradients=sums,
        fp32_groups_has_gradients=[[False] * len(group) for group in groups],
    )
    expected = [[s.clone() for s in group] for group in sums]
    for _ in range(3):
        for i, j in ((0, 0), (0, 1), (2, 0)):  # not (0, 2), nor any of group 1
            grad = torch.randn(groups[i][j].shape).bfloat16() * 10
            groups[i][j].grad = grad
            expected[i][j] += grad.float().flatten()
        _add_gradients(zero)
        assert all(p.grad is None for group in groups for p in group)
    assert all(
        map(torch.equal, sums[0] + sums[1] + sums[2], expected[0] + expected[1] + expected[2])
    )
    assert zero.fp32_groups_has_gradients == [[True, True, False], [False], [True]]
    assert groups[0][1]._hp_grad is sums[0][1]
    assert not hasattr(groups[1][0], "_hp_grad")


def test_the_norm_of_norms_is_given_to_deepspeed_where_a_rank_counts_any() -> None:
    torch.manual_seed(0)
    padding = torch.zeros(3)
    padding._zero_padding = True  # type: ignore[attr-defined]
    whole, piece, empty = torch.randn(3, 4), torch.randn(5), torch.empty(0)
    params = [torch.zeros(()) for _ in range(3)]
    params[1].tensor_model_parallel = True  # type: ignore[attr-defined]

    def given(rank: int) -> Any:
        zero = SimpleNamespace(model_parallel_rank=rank, get_grad_norm_direct=lambda *asked: asked)
        return _norm_at_once(zero)([whole, piece, empty, padding], params, 2)

    (norms,), (first,), kind = given(0)
    expected = torch.cat([whole.flatten(), piece]).norm()
    torch.testing.assert_close(norms.norm().float(), expected)
    assert first is params[0]
    assert kind == 2
    (norms,), (first,), _ = given(1)  # what is whole is counted by the first tp rank
    torch.testing.assert_close(norms.norm().float(), piece.norm())
    assert first is params[1]
    zero = SimpleNamespace(model_parallel_rank=1, get_grad_norm_direct=lambda *asked: asked)
    assert _norm_at_once(zero)([whole], params, 2) == ([], [], 2)


def test_experts_keep_a_norm_of_their_own_and_buffers_are_scaled_whole() -> None:
    torch.manual_seed(0)
    dense, experts = [torch.randn(2, 3), torch.randn(4)], {"ep_size_2": [torch.randn(6)]}
    buffers = [torch.ones(10), torch.ones(6)]
    zero = SimpleNamespace(
        fp32_groups_gradients_flat=buffers, get_grads_for_norm=lambda: (dense, experts)
    )
    gradients = _gradients_at_once(zero)
    (norms,), by_group = gradients()
    torch.testing.assert_close(norms.norm().float(), torch.cat([d.flatten() for d in dense]).norm())
    torch.testing.assert_close(
        by_group["ep_size_2"][0].norm().float(), experts["ep_size_2"][0].norm()
    )
    assert all(map(torch.is_tensor, gradients(for_clipping=True)))
    assert [g.data_ptr() for g in gradients(for_clipping=True)] == [b.data_ptr() for b in buffers]
