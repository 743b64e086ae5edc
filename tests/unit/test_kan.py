"""The KAN layer against a plain double loop, in every precision and under checkpointing."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kalmagrove.config import KAN, Edge
from kalmagrove.nn.baselines import DenseFFN
from kalmagrove.nn.kan import KANLayer
from kalmagrove.parallel import Groups
from kalmagrove_kernels.edge import bspline_bases

pytestmark = pytest.mark.unit


def layer(width: int = 12, **changes: object) -> KANLayer:
    torch.manual_seed(0)
    config = KAN(**{"edges": 9, "top_k": 3, "rank": 4, "edge": Edge(init_scale=0.5), **changes})
    module = KANLayer(width, config, Groups.single())
    module.init_weights(0.5, 0.5)
    return module


def by_hand(module: KANLayer, x_ND: Tensor) -> Tensor:
    """The formula of the paper, one token and one edge at a time."""
    config, rows = module.config, []
    for x_D in x_ND:
        h_M = module.edges @ x_D
        basis_MP = bspline_bases(h_M, module.edge.range, degree=3, grid=config.edge.grid)
        e_M = module.edge.scale * F.silu(h_M) + (module.edge.coef * basis_MP).sum(-1)
        y_D = torch.zeros_like(x_D)
        for i in e_M.abs().argsort(descending=True)[: config.top_k]:
            z_R = module.v[i] @ x_D
            z_R = F.silu(z_R) if config.inner_silu else z_R
            y_D = y_D + module.u[i].T @ (e_M[i] * z_R)
        rows.append(y_D)
    return torch.stack(rows)


@pytest.mark.parametrize("tokens", [17, 200])  # below and above the switch to the sorted form
@pytest.mark.parametrize("inner_silu", [True, False])
def test_layer_is_the_double_loop_with_every_gradient(inner_silu: bool, tokens: int) -> None:
    module = layer(inner_silu=inner_silu).double()
    x = torch.randn(1, tokens, 12, dtype=torch.float64, requires_grad=True)
    leaves = [x, *module.parameters()]
    weight = torch.randn(tokens, 12, dtype=torch.float64)
    ours, expected = module(x).y_BTD[0], by_hand(module, x[0])
    torch.testing.assert_close(ours, expected)
    grads = torch.autograd.grad((ours * weight).sum(), leaves)
    expected_grads = torch.autograd.grad((expected * weight).sum(), leaves)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


def test_straight_through_is_hard_forward_and_moves_edges_that_were_not_kept() -> None:
    hard, soft = layer(), layer(routing="straight_through")
    x = torch.randn(2, 3, 12)
    torch.testing.assert_close(soft(x).y_BTD, hard(x).y_BTD)
    for module in (hard, soft):
        module(x[:1, :1]).y_BTD.sum().backward()
    assert (hard.edges.grad.abs().sum(1) > 0).sum() == 3
    assert (soft.edges.grad.abs().sum(1) > 0).sum() == 9


def test_bf16_is_close_to_fp32_and_one_token_works() -> None:
    module = layer(width=64, edges=16, top_k=16, rank=8)  # all kept: no choice to flip
    x = torch.randn(1, 1, 64)
    expected = module(x).y_BTD
    ours = module.bfloat16()(x.bfloat16()).y_BTD
    assert ours.dtype == torch.bfloat16
    assert float((ours.float() - expected).norm() / expected.norm()) < 0.02
    assert module.edge.range.dtype == torch.float32


def test_checkpointing_gives_the_same_gradients() -> None:
    module = layer()
    x = torch.randn(2, 50, 12, requires_grad=True)
    leaves = [x, *module.parameters()]
    plain = torch.autograd.grad(module(x).y_BTD.square().sum(), leaves)
    again = checkpoint(module, x, use_reentrant=False).y_BTD
    recomputed = torch.autograd.grad(again.square().sum(), leaves)
    for ours, expected in zip(recomputed, plain, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("inner_silu", [True, False])
@pytest.mark.parametrize("routing", ["hard", "straight_through"])
def test_output_varies_as_that_of_a_dense_layer_of_equal_active_size(
    inner_silu: bool, routing: str
) -> None:
    torch.manual_seed(0)
    width, edges, k, rank, std, out_std = 128, 52, 8, 16, 0.05, 0.01
    kan = KANLayer(
        width,
        KAN(edges=edges, top_k=k, rank=rank, inner_silu=inner_silu, routing=routing),
        Groups.single(),
    )
    dense = DenseFFN(width, (edges + 2 * k * rank) // 3, Groups.single())
    x = torch.randn(1, 512, width)
    spread = []
    for module in (kan, dense):
        module.init_weights(std, out_std)
        spread.append(float(module(x).y_BTD.detach().std()))
    assert 0.8 < spread[0] / spread[1] < 1.25
    h = F.linear(x, kan.edges.detach())
    assert float(h.std()) == pytest.approx(1.0, rel=0.05)


def test_metrics_say_what_the_edges_did() -> None:
    module = layer()
    x = torch.randn(1, 40, 12)
    with torch.no_grad():
        module.edges[5:] = 0.0  # phi(0) is almost 0: four edges that nobody keeps
        module.edge.coef.zero_()
    module(x)
    h = F.linear(x[0], module.edges.detach())
    e = F.silu(h)
    kept = e.abs().sort(dim=1, descending=True).values[:, :3].square().sum()
    metrics = module.metrics
    assert set(metrics) == {"out_of_range", "kept_share", "dead_edges"}
    assert all(not m.requires_grad for m in metrics.values())
    assert float(metrics["dead_edges"]) == pytest.approx(4 / 9)
    assert float(metrics["kept_share"]) == pytest.approx(float(kept / e.square().sum()))
    assert float(metrics["out_of_range"]) == pytest.approx(float((h.abs() > 3).float().mean()))


def test_a_forward_of_not_a_number_does_not_crash() -> None:
    module = layer()
    x = torch.full((1, 300, 12), float("nan"))
    assert module(x).y_BTD.isnan().all()


def test_parameters_carry_their_kinds() -> None:
    kinds = {name: p.kind for name, p in layer().named_parameters()}
    assert kinds == {
        "edges": "matrix",
        "v": "matrix",
        "u": "matrix",
        "edge.coef": "spline",
        "edge.scale": "spline",
    }
