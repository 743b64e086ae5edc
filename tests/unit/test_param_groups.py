"""What is decayed, what Muon moves, and that every parameter is in exactly one group."""

import pytest
import torch
from torch import nn

from kalmagrove.config import ConfigError, Optim
from kalmagrove.engine.compat import tag_parallel
from kalmagrove.engine.optim import build_optimizer
from kalmagrove.engine.param_groups import parameter_groups, parameter_kind
from kalmagrove.nn.grove import GroveLayer
from kalmagrove.parallel import Group, Groups
from tests.unit.tiny_run import make_run

pytestmark = pytest.mark.unit
TAGS = {"norm": (4,), "spline": (3, 4), "kernel": (2, 2), "embedding": (6, 4), "decay": (2, 3)}


class Tagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for kind, shape in TAGS.items():
            parameter = nn.Parameter(torch.zeros(shape))
            parameter.kind = kind
            self.register_parameter(kind, parameter)
        self.linear = nn.Linear(4, 4)
        self.batch_of_matrices = nn.Parameter(torch.zeros(2, 3, 4))
        self.frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)


def names(optim: Optim) -> dict[str, tuple[float, float, set[str]]]:
    model = Tagged()
    of = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, tuple[float, float, set[str]]] = {}
    for g in parameter_groups(model, optim):
        members = {of[id(p)] for p in g["params"]}
        kind = g["label"].split(".")[0]  # decay, decay.0, ...: see the test of alignment
        found[kind] = (g["lr"], g["weight_decay"], found.get(kind, (0, 0, set()))[2] | members)
    return found


def test_parameters_laid_end_to_end_stay_aligned() -> None:
    groups = parameter_groups(Tagged(), Optim())
    assert len({g["label"] for g in groups}) == len(groups)
    for group in groups:
        sizes = [p.numel() for p in group["params"]]
        assert len(sizes) == 1 or all(size % 8 == 0 for size in sizes), group["label"]


def test_untagged_parameters_go_by_their_dimensions() -> None:
    model = Tagged()
    assert parameter_kind(model.linear.weight) == "matrix"
    assert parameter_kind(model.linear.bias) == "bias"
    assert parameter_kind(model.spline) == "spline"


def test_only_matrices_and_embeddings_decay() -> None:
    assert names(Optim(lr=0.5, weight_decay=0.2)) == {
        "decay": (0.5, 0.2, {"embedding", "linear.weight", "batch_of_matrices"}),
        "no_decay": (0.5, 0.0, {"norm", "spline", "kernel", "decay", "linear.bias"}),
    }


def test_splines_decay_if_asked() -> None:
    assert "spline" in names(Optim(decay_splines=True))["decay"][2]


def test_muon_takes_the_matrices_with_its_own_rate() -> None:
    found = names(Optim(kind="muon", lr=0.5, muon_lr=0.25, weight_decay=0.2))
    assert found["muon"] == (0.25, 0.2, {"linear.weight", "batch_of_matrices"})
    assert found["decay"] == (0.5, 0.2, {"embedding"})
    assert found["no_decay"][2] == {"norm", "spline", "kernel", "decay", "linear.bias"}


def test_unknown_kinds_and_empty_models_are_refused() -> None:
    model = Tagged()
    model.norm.kind = "nrom"
    with pytest.raises(AssertionError, match="nrom"):
        parameter_groups(model, Optim())
    with pytest.raises(ConfigError, match="no trainable parameter"):
        parameter_groups(nn.Identity(), Optim())


@pytest.mark.parametrize("kind", ["adamw", "muon", "sgd"])
def test_every_optimizer_moves_every_trainable_parameter(kind: str) -> None:
    torch.manual_seed(0)
    model = Tagged()
    optimizer = build_optimizer(model, Optim(kind=kind), torch.device("cpu"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert still == {"frozen"}


def test_groves_on_other_ranks_form_groups_of_their_own() -> None:
    """Under the names DeepSpeed reads; the router, which all ranks hold, stays with the others."""
    one = Group.alone()
    two = Group(None, 0, 2, (0, 1))
    groups = Groups(two, one, one, two, two, two, one, torch.device("cpu"))
    run = make_run()
    layer = GroveLayer(8, run.model.ffn.grove, groups)
    names = {id(p): name for name, p in layer.named_parameters()}
    tag_parallel(layer, groups)
    found = parameter_groups(layer, Optim())
    moe = {names[id(p)] for g in found if g.get("moe") for p in g["params"]}
    assert moe == {"edges", "v", "u", "edge.coef", "edge.scale"}
    assert all(g["name"] == "ep_size_2" for g in found if g.get("moe"))
    assert len({g["label"] for g in found}) == len(found)
    everything = [names[id(p)] for g in found for p in g["params"]]
    assert sorted(everything) == sorted(names.values())
    tag_parallel(alone := GroveLayer(8, run.model.ffn.grove, Groups.single()), Groups.single())
    assert not any(g.get("moe") for g in parameter_groups(alone, Optim()))
