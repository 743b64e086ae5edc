"""Groves: the sum they compute, their dispatch, their gates and their balance."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kalmagrove.config import KAN, Edge, Grove
from kalmagrove.nn.grove import GroveLayer
from kalmagrove.nn.kan import KANLayer
from kalmagrove.nn.tally import metrics_of
from kalmagrove.parallel import Groups

pytestmark = pytest.mark.unit

WIDTH = 10


def layer(width: int = WIDTH, **changes: object) -> GroveLayer:
    torch.manual_seed(0)
    body = KAN(edges=6, top_k=2, rank=3, edge=Edge(init_scale=0.5))
    config = Grove(**{"groves": 4, "top_g": 2, "edge_manifold": 5, "kan": body, **changes})
    module = GroveLayer(width, config, Groups.single())
    module.init_weights(0.5, 0.5)
    with torch.no_grad():
        module.gate_bias.normal_()
    return module


def single(module: GroveLayer, grove: int) -> KANLayer:
    """One grove as a layer of its own."""
    width, dtype = module.edges.shape[-1], module.edges.dtype
    kan = KANLayer(width, module.config.kan, Groups.single()).to(dtype)
    with torch.no_grad():
        kan.edges.copy_(module.edges[grove])
        kan.v.copy_(module.v[grove])
        kan.u.copy_(module.u[grove])
        kan.edge.coef.copy_(module.edge.coef[grove])
        kan.edge.scale.copy_(module.edge.scale[grove])
        kan.edge.range.copy_(module.edge.range[grove])
    return kan


def scores_and_gates(module: GroveLayer, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's formula, without the choice."""
    score = torch.stack([(x_ND @ e.T).square().sum(-1).sqrt() for e in module.manifold], dim=-1)
    return score, torch.sigmoid(x_ND @ module.gate.T + module.gate_bias) * score


def test_all_groves_chosen_is_the_dense_gated_sum() -> None:
    module = layer(top_g=4).double()
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    _, gate = scores_and_gates(module, x.flatten(0, 1))
    expected = module.shared(x).y_BTD
    for g in range(4):
        expected = expected + gate[:, g].view(2, 9, 1) * single(module, g)(x).y_BTD
    torch.testing.assert_close(module(x).y_BTD, expected)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tokens", [1, 23])
def test_chosen_groves_are_the_largest_of_score_plus_bias(tokens: int, shared: bool) -> None:
    module = layer(shared=shared).double()
    module.bias.copy_(torch.tensor([0.0, 3.0, -2.0, 0.5]))
    x = torch.randn(1, tokens, WIDTH, dtype=torch.float64)
    score, gate = scores_and_gates(module, x[0])
    outputs = [single(module, g)(x).y_BTD[0] for g in range(4)]
    expected = module.shared(x).y_BTD[0] if shared else torch.zeros_like(x[0])
    for t in range(tokens):
        for g in (score[t] + module.bias).argsort(descending=True)[:2]:
            expected[t] = expected[t] + gate[t, g] * outputs[g][t]  # the bias is not in the gate
    torch.testing.assert_close(module(x).y_BTD[0], expected)


def test_an_empty_grove_has_zero_gradients_and_the_others_do_not() -> None:
    module = layer()
    module.bias.copy_(torch.tensor([-100.0, 50.0, 50.0, -100.0]))
    out = module(torch.randn(1, 7, WIDTH))
    (out.y_BTD.sum() + out.aux_loss).backward()
    assert module.metrics["load"].tolist() == [0.0, 0.5, 0.5, 0.0]
    for name, p in module.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
    for p in (module.edges, module.v, module.u, module.edge.coef, module.edge.scale):
        assert not p.grad[0].any()
        assert p.grad[1].any()


def test_gradients_are_those_of_finite_differences() -> None:
    small = KAN(edges=3, top_k=2, rank=1, edge=Edge(grid=2, degree=2))
    module = layer(width=4, groves=3, edge_manifold=2, shared=False, kan=small).double()
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *_: Tensor) -> Tensor:
        return module(x).y_BTD  # not the z-loss: fp32, too coarse for a finite difference

    assert torch.autograd.gradcheck(run, (x, *module.parameters()))


def test_balance_moves_biases_by_the_sign_rule_and_resets() -> None:
    module = layer(bias_rate=0.25)
    module.load.copy_(torch.tensor([8.0, 4.0, 4.0, 0.0]))
    module.balance(Groups.single())
    assert module.bias.tolist() == [-0.25, 0.0, 0.0, 0.25]
    assert not module.load.any()


def test_balancing_pushes_the_loads_together() -> None:
    module = layer(bias_rate=0.05)
    with torch.no_grad():
        module.manifold[0] *= 3  # a grove that would win every token
    x = torch.randn(1, 400, WIDTH)
    module(x)
    first = 4 * float(module.metrics["load"].max())
    for _ in range(150):
        module.route(x[0])
        module.balance(Groups.single())
    module(x)
    assert first > 1.9
    assert 4 * float(module.metrics["load"].max()) < 1.2


def test_load_is_counted_in_training_only() -> None:
    module = layer()
    module.eval()(torch.randn(1, 6, WIDTH))
    assert not module.load.any()
    module.train()(torch.randn(1, 6, WIDTH))
    assert float(module.load.sum()) == 12


def test_bias_and_load_stay_fp32_and_bf16_is_close() -> None:
    module = layer(width=64, top_g=4, kan=KAN(edges=8, top_k=8, rank=4))
    module.bias.fill_(1 / 3)
    x = torch.randn(1, 20, 64)
    expected = module(x).y_BTD.detach()
    ours = module.bfloat16()(x.bfloat16()).y_BTD.detach()
    assert torch.equal(module.bias, torch.full((4,), 1 / 3))
    assert module.load.dtype == module.edge.range.dtype == torch.float32
    assert float((ours.float() - expected).norm() / expected.norm()) < 0.02


def test_checkpointing_gives_the_same_gradients() -> None:
    module = layer()
    x = torch.randn(2, 15, WIDTH, requires_grad=True)
    leaves = [x, *module.parameters()]

    def loss(recompute: bool) -> Tensor:
        y, aux = checkpoint(module, x, use_reentrant=False) if recompute else module(x)
        return y.square().sum() + aux

    plain = torch.autograd.grad(loss(False), leaves)
    for ours, expected in zip(torch.autograd.grad(loss(True), leaves), plain, strict=True):
        assert torch.equal(ours, expected)


def test_z_loss_is_the_mean_square_of_the_logits() -> None:
    module = layer(z_loss=0.5)
    x = torch.randn(1, 8, WIDTH)
    logits = x[0] @ module.gate.T + module.gate_bias
    torch.testing.assert_close(module(x).aux_loss, 0.5 * logits.square().mean())
    assert float(layer(z_loss=0.0)(x).aux_loss) == 0.0


def test_gates_start_near_one_and_the_sum_varies_as_one_layer() -> None:
    torch.manual_seed(0)
    body = KAN(edges=32, top_k=8, rank=16)
    grove = GroveLayer(64, Grove(groves=4, top_g=2, kan=body), Groups.single())
    kan = KANLayer(64, body, Groups.single())
    x = torch.randn(1, 512, 64)
    spread = []
    for module in (grove, kan):
        module.init_weights(0.05, 0.01)
        spread.append(float(module(x).y_BTD.detach().std()))
    assert 0.8 < float(grove.metrics["gate_mean"]) < 1.4
    assert 0.7 < spread[0] / spread[1] < 1.4


def test_tokens_reach_their_groves_without_a_look_at_any_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = layer()
    monkeypatch.setattr(module, "run_groves", lambda rows, plan: (rows.x_SD, []))
    y_BTD, aux_loss = module.to("meta")(torch.randn(2, 9, WIDTH, device="meta"))
    (y_BTD.sum() + aux_loss).backward()
    assert y_BTD.shape == (2, 9, WIDTH)


def test_metrics_are_of_the_last_forward_pass_whatever_became_of_the_weights() -> None:
    module = layer(capacity=1.0)
    module(torch.randn(1, 12, WIDTH))
    before = {name: value.clone() for name, value in module.metrics.items()}
    assert before.keys() > {"load", "dropped", "gate_mean", "gate_std"}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert module.metrics.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in module.metrics.items())


def test_metrics_of_many_layers_are_those_of_each() -> None:
    layers = [layer(), layer(capacity=1.0), layer(), layer(shared=False)]
    for module in layers:
        module(torch.randn(1, 12, WIDTH))
    idle = layer()
    for module, found in zip([*layers, idle], metrics_of([*layers, idle]), strict=True):
        assert found.keys() == module.metrics.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, module.metrics[name], msg=name)
