"""Newton-Schulz, batches of matrices, the layout of flat partitions, and the AdamW half."""

import math

import pytest
import torch

from kalmagrove.engine.muon import Muon, Shard, muon_update, newton_schulz, sharded_update
from kalmagrove.parallel import Group

pytestmark = pytest.mark.unit
SHAPES = ((4, 6), (3, 5, 4), (7, 2), (2, 2, 3, 4))


def optimizer(group: dict, **fields: object) -> Muon:
    settings = {"lr": 0.1, "momentum": 0.9, "betas": (0.9, 0.95), "eps": 1e-8, **fields}
    return Muon([group], **settings)


@pytest.mark.parametrize("shape", [(8, 8), (4, 16), (16, 4), (3, 5, 9)])
def test_singular_values_come_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(newton_schulz(torch.randn(shape)))
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_direction_is_that_of_the_svd() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 6)
    u, _, v = torch.linalg.svd(x)
    cosine = torch.cosine_similarity(newton_schulz(x).flatten(), (u @ v).flatten(), dim=0)
    assert cosine > 0.97


def test_a_batch_is_its_matrices_one_by_one() -> None:
    torch.manual_seed(0)
    x_BRC = torch.randn(3, 5, 4)
    one_by_one = torch.stack([newton_schulz(x) for x in x_BRC])
    assert torch.allclose(newton_schulz(x_BRC), one_by_one, atol=1e-5)


def test_tall_matrices_are_scaled_up() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 4)
    assert torch.equal(muon_update(x), newton_schulz(x) * math.sqrt(4))
    assert torch.equal(muon_update(x.T), newton_schulz(x.T))


def test_zero_gradient_gives_zero_update() -> None:
    assert not newton_schulz(torch.zeros(4, 4)).any()


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_shards_cover_every_matrix_once(ranks: int) -> None:
    total = sum(math.prod(s) for s in SHAPES)
    size = -(-total // ranks)
    covered = torch.zeros(ranks * size, dtype=torch.int64)
    shards = [Shard(SHAPES, size, Group(None, r, ranks, tuple(range(ranks)))) for r in range(ranks)]
    for shard in shards:
        for first, count, rows, cols in shard.whole():
            covered[shard.start + first : shard.start + first + count * rows * cols] += 1
    splits = [list(shard.split()) for shard in shards]
    assert all(s == splits[0] for s in splits)
    for first, rows, cols in splits[0]:
        covered[first : first + rows * cols] += 1
    assert covered[:total].tolist() == [1] * total
    assert not covered[total:].any()


def test_a_single_partition_equals_whole_parameters_and_leaves_its_padding() -> None:
    torch.manual_seed(0)
    grads = [torch.randn(s) for s in SHAPES]
    flat = torch.cat([*(g.flatten() for g in grads), torch.ones(3)])
    update = sharded_update(flat, Shard(SHAPES, len(flat), Group.alone()))
    expected = torch.cat([*(muon_update(g).flatten() for g in grads), torch.zeros(3)])
    assert torch.allclose(update, expected, atol=1e-5)


def test_nesterov_momentum_and_decoupled_decay() -> None:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(4, 4))
    start = parameter.detach().clone()
    grads = torch.randn(2, 4, 4)
    muon = optimizer({"params": [parameter], "label": "muon", "muon": True, "weight_decay": 0.5})
    expected, momentum = start, torch.zeros(4, 4)
    for grad in grads:
        parameter.grad = grad.clone()
        muon.step()
        momentum = 0.9 * momentum + 0.1 * grad
        update = muon_update(0.1 * grad + 0.9 * momentum)
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * update
    assert torch.allclose(parameter, expected, atol=1e-6)


def test_the_rest_is_adamw() -> None:
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(5))
    theirs = torch.nn.Parameter(ours.detach().clone())
    muon = optimizer({"params": [ours], "name": "decay", "muon": False, "weight_decay": 0.3})
    adamw = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.3)
    for grad in torch.randn(4, 5):
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        muon.step()
        adamw.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_without_gradient_nothing_moves() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    muon = optimizer({"params": [parameter], "label": "muon", "muon": True, "weight_decay": 0.5})
    muon.step()
    assert torch.equal(parameter, torch.ones(2, 2))
    assert not muon.state
