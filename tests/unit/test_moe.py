"""The mixture of experts and the dense SwiGLU against plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kalmagrove.config import MoE
from kalmagrove.nn.baselines import DenseFFN, MoEFFN
from kalmagrove.parallel import Groups
from kalmagrove.parallel.expert import Copies, collect, spread

pytestmark = pytest.mark.unit


def layer(**changes: object) -> MoEFFN:
    torch.manual_seed(0)
    sizes = {"experts": 5, "top_k": 2, "hidden": 6, "shared_hidden": 7, "scale": 1.5}
    module = MoEFFN(8, MoE(**{**sizes, **changes}), Groups.single())
    module.init_weights(0.5, 0.5)
    return module


def by_hand(module: MoEFFN, x_ND: Tensor) -> Tensor:
    rows = []
    for x in x_ND:
        affinity = torch.sigmoid(module.router @ x)
        chosen = (affinity + module.bias).argsort(descending=True)[: module.config.top_k]
        total = affinity[chosen].sum()
        y = module.shared(x).y_BTD if module.shared is not None else torch.zeros_like(x)
        for i in chosen:
            hidden = F.silu(module.gate[i] @ x) * (module.up[i] @ x)
            y = y + module.config.scale * affinity[i] / total * (module.down[i] @ hidden)
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("shared_hidden", [0, 7])
def test_moe_is_the_naive_loop_with_every_gradient(shared_hidden: int) -> None:
    module = layer(shared_hidden=shared_hidden).double()
    module.bias.copy_(torch.tensor([0.3, 0.0, -0.2, 0.1, 0.0]))
    x = torch.randn(1, 13, 8, dtype=torch.float64, requires_grad=True)
    leaves = [x, *module.parameters()]
    ours, expected = module(x).y_BTD[0], by_hand(module, x[0])
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    grads = torch.autograd.grad((ours * weight).sum(), leaves)
    expected_grads = torch.autograd.grad((expected * weight).sum(), leaves)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


def test_empty_experts_have_zero_gradients() -> None:
    module = layer()
    module.bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0, 0.0]))
    module(torch.randn(1, 3, 8)).y_BTD.sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    assert module.up.grad[0].any()
    assert not module.up.grad[2:].any()


@pytest.mark.parametrize("capacity", [0.5, 1.0, 2.0])
def test_a_capacity_keeps_the_largest_gates_of_each_expert(capacity: float) -> None:
    module = layer(capacity=capacity, z_loss=0.1).double()
    module.bias[0] = 9.0  # every token chooses expert 0: 13 choices where 26 / 5 are even
    x = torch.randn(1, 13, 8, dtype=torch.float64, requires_grad=True)
    module.config = module.config.model_copy(update={"capacity": None})
    index, gate, _ = module.route(x[0])
    limit = math.ceil(capacity * 26 / 5)
    kept = torch.zeros_like(gate)
    for expert in range(5):
        tokens, choices = (index == expert).nonzero(as_tuple=True)
        best = gate[tokens, choices].argsort(descending=True)[:limit]
        kept[tokens[best], choices[best]] = 1.0
    expected = module.shared(x[0]).y_BTD
    for n, k in kept.nonzero().tolist():
        i = int(index[n, k])
        hidden = F.silu(module.gate[i] @ x[0, n]) * (module.up[i] @ x[0, n])
        expected[n] = expected[n] + gate[n, k] * (module.down[i] @ hidden)

    module.config = module.config.model_copy(update={"capacity": capacity})
    ours = module(x).y_BTD[0]
    torch.testing.assert_close(ours, expected)
    assert kept.sum() < 26
    torch.testing.assert_close(module.metrics["dropped"], (1 - kept).mean().float())
    leaves = [x, *module.parameters()]
    weight = torch.randn_like(ours)
    grads = torch.autograd.grad((ours * weight).sum(), leaves)
    expected_grads = torch.autograd.grad((expected * weight).sum(), leaves)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


def test_of_equal_gates_beyond_the_capacity_the_earlier_token_stays() -> None:
    module = layer(top_k=1)
    index, gate = torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1)
    assert module.limit(index, gate, 2.0).flatten().tolist() == [0, 0, 5, 5, 5]
    assert float(module.metrics["dropped"]) == pytest.approx(0.6)


def test_without_a_capacity_nothing_is_dropped_or_reported() -> None:
    module = layer()
    module(torch.randn(1, 9, 8))
    assert "dropped" not in module.metrics


def test_copies_are_spread_and_collected_with_exact_gradients() -> None:
    place = torch.tensor([[2, 0], [3, 3], [0, 2], [3, 1], [3, 3]])  # 3: none; a row without copies
    copies = Copies.to(place, 3, 5)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(5, dtype=torch.float64, requires_grad=True)
    assert torch.equal(spread(x, copies), x[[0, 2, 3, 0, 2]])
    y = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    expected = torch.zeros(5, 4, dtype=torch.float64)
    for copy, row in enumerate([0, 2, 3, 0, 2]):
        expected[row] += (weight[copy] * y[copy]).detach()
    torch.testing.assert_close(collect(y, copies, weight), expected)
    assert torch.autograd.gradcheck(lambda x: spread(x, copies), x)
    assert torch.autograd.gradcheck(lambda y, w: collect(y, copies, w), (y, weight))
    assert torch.autograd.gradcheck(lambda y: collect(y, copies), y)


def test_no_copies_at_all_give_zeros_and_a_gradient() -> None:
    copies = Copies.to(torch.full((3, 2), 4), 4, 0)
    x = torch.randn(3, 5, requires_grad=True)
    y = collect(spread(x, copies), copies, torch.ones(0))
    assert torch.equal(y, torch.zeros(3, 5))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros(3, 5))


def test_balance_is_the_sign_rule() -> None:
    module = layer(bias_rate=0.5)
    module(torch.randn(1, 40, 8))
    load = module.load.clone()
    module.balance(Groups.single())
    assert torch.equal(module.bias, 0.5 * torch.sign(load.mean() - load))


def test_metrics_measure_how_even_the_load_is() -> None:
    module = layer()
    module.bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0, 0.0]))
    module(torch.randn(1, 3, 8))
    assert module.metrics["load"].tolist() == [0.5, 0.5, 0.0, 0.0, 0.0]


def test_bf16_is_close_to_fp32() -> None:
    module = layer(top_k=5)
    x = torch.randn(1, 9, 8)
    expected = module(x).y_BTD
    ours = module.bfloat16()(x.bfloat16()).y_BTD
    assert module.bias.dtype == torch.float32
    assert float((ours.float() - expected).norm() / expected.norm()) < 0.02


def test_dense_is_swiglu() -> None:
    torch.manual_seed(0)
    dense = DenseFFN(4, 6, Groups.single())
    dense.init_weights(1.0, 1.0)
    x = torch.randn(1, 3, 4)
    expected = (F.silu(x @ dense.gate.T) * (x @ dense.up.T)) @ dense.down.T
    torch.testing.assert_close(dense(x).y_BTD, expected)
    assert dense(x).aux_loss.dtype == torch.float32
