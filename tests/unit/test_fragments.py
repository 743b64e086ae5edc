"""Weights, optimizer states and buffers saved by one layout are loaded by another; no processes.

Ranks of tensor and expert parallelism are models that hold pieces; ZeRO itself needs processes and
is tested with them.
"""

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kalmagrove.engine.fragments import collect, misfits, parameter_digest, restore
from kalmagrove.engine.muon import Muon
from kalmagrove.engine.rank_state import load_rank_state, rank_state
from kalmagrove.engine.tensor_files import TensorReader, write_tensors
from kalmagrove.engine.tensor_index import Index, coverage_faults, merge
from kalmagrove.parallel import Group, Groups, Shard

pytestmark = pytest.mark.unit
EXPERTS, HIDDEN, WIDTH = 4, 6, 3


class Model(nn.Module):
    """A whole weight, two cut by tp along both dimensions, experts, and buffers of all kinds."""

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(WIDTH))
        columns = Shard.of("tp", groups.tp, HIDDEN)
        rows = Shard.of("tp", groups.tp, HIDDEN, 1)
        experts = Shard.of("ep", groups.ep, EXPERTS)
        self.up = nn.Parameter(torch.zeros(columns.length, WIDTH))
        self.down = nn.Parameter(torch.zeros(WIDTH, rows.length))
        if groups.tp.size > 1:
            self.up.shard, self.down.shard = columns, rows
        self.experts = nn.Parameter(torch.zeros(experts.length, WIDTH, 2))
        self.experts.shard = experts
        self.register_buffer("bias", torch.zeros(EXPERTS))
        self.register_buffer("range", torch.zeros(experts.length, 2))
        self.register_buffer("load", torch.zeros(EXPERTS))
        self.register_buffer("table", torch.zeros(2), persistent=False)
        self.buffer_shards = {"range": experts}


def groups_of(rank: int, world: int, tp: int, ep: int) -> Groups:
    """The layout of megatron-core: tp fastest; ep over all ranks."""

    def group(size: int, stride: int) -> Group:
        place = rank // stride % size
        first = rank - place * stride
        return Group(None, place, size, tuple(first + i * stride for i in range(size)))

    dp = group(world // tp, tp)
    return Groups(
        world=group(world, 1),
        tp=group(tp, 1),
        cp=Group.alone(),
        dp=dp,
        dp_cp=dp,
        ep=group(ep, 1),
        expert_dp=group(world // ep, ep),
        device=torch.device("cpu"),
    )


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW([{"params": params, "muon": False}], lr=0.1),
    "sgd": lambda params: torch.optim.SGD(
        [{"params": params, "muon": False}], lr=0.1, momentum=0.9
    ),
    "plain": lambda params: torch.optim.SGD([{"params": params, "muon": False}], lr=0.1),
    "muon": lambda params: Muon(
        [
            {"params": [p for p in params if p.ndim > 1], "muon": True, "label": "muon"},
            {"params": [p for p in params if p.ndim == 1], "muon": False, "label": "rest"},
        ],
        lr=0.1,
        momentum=0.9,
        betas=(0.9, 0.99),
        eps=1e-8,
    ),
}


def engine_of(groups: Groups, optimizer: str = "adamw") -> Any:
    model = Model(groups)
    return SimpleNamespace(
        module=model,
        groups=groups,
        deepspeed=SimpleNamespace(optimizer=OPTIMIZERS[optimizer](list(model.parameters()))),
        run=SimpleNamespace(zero=SimpleNamespace(stage=0)),
    )


def trained(optimizer: str, steps: int = 2) -> Any:
    """One process that has made some steps."""
    engine = engine_of(Groups.single(), optimizer)
    torch.manual_seed(0)
    for tensor in (*engine.module.parameters(), *engine.module.buffers()):
        tensor.data.normal_()
    for _ in range(steps):
        for parameter in engine.module.parameters():
            parameter.grad = torch.randn_like(parameter)
        engine.deepspeed.optimizer.step()
    return engine


def saved(folder: Path, engines: list[Any]) -> tuple[Index, TensorReader]:
    folder.mkdir()
    indices = []
    for rank, engine in enumerate(engines):
        tensors, index = collect(engine, f"{rank}.safetensors")
        write_tensors(folder / f"{rank}.safetensors", tensors)
        indices.append(index)
    return merge(indices), TensorReader(folder)


def loaded(index: Index, reader: TensorReader, engines: list[Any]) -> list[Any]:
    assert coverage_faults(index) == []
    for engine in engines:
        assert misfits(engine, index) == []
        assert restore(engine, index, reader) == []
    return engines


def same(left: Any, right: Any) -> None:
    """Of two engines of one layout: everything but what is not to be saved."""
    for (name, a), b in zip(
        left.module.state_dict().items(), right.module.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b) or name == "load", name
    states = left.deepspeed.optimizer.state, right.deepspeed.optimizer.state
    for a, b in zip(left.module.parameters(), right.module.parameters(), strict=True):
        assert states[0][a].keys() == states[1][b].keys()
        for key, value in states[0][a].items():
            assert torch.equal(value, states[1][b][key]), key
            assert value.dtype == states[1][b][key].dtype


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("world", "tp", "ep"), [(1, 1, 1), (2, 2, 1), (2, 1, 2), (4, 2, 4), (6, 3, 2)]
)
def test_pieces_come_from_the_whole_and_go_back(
    tmp_path: Path, optimizer: str, world: int, tp: int, ep: int
) -> None:
    source = trained(optimizer)
    ranks = [engine_of(groups_of(rank, world, tp, ep), optimizer) for rank in range(world)]
    loaded(*saved(tmp_path / "whole", [source]), ranks)
    for engine in ranks:
        shard = engine.module.experts.shard
        assert torch.equal(engine.module.experts, shard.cut(source.module.experts))
        assert torch.equal(engine.module.range, shard.cut(source.module.range))
        assert parameter_digest(engine.module) == parameter_digest(source.module)
    index, reader = saved(tmp_path / "pieces", ranks)
    written = sum(part.numel for part in index["norm"].parts)
    assert written == WIDTH, "replicas are written once"
    [back] = loaded(index, reader, [engine_of(Groups.single(), optimizer)])
    same(source, back)
    other = [engine_of(groups_of(rank, 4, 1, 4), optimizer) for rank in range(4)]
    loaded(index, reader, other)
    [back] = loaded(*saved(tmp_path / "other", other), [engine_of(Groups.single(), optimizer)])
    same(source, back)


def test_steps_are_not_shared(tmp_path: Path) -> None:
    [engine] = loaded(
        *saved(tmp_path / "a", [trained("adamw")]), [engine_of(Groups.single(), "adamw")]
    )
    steps = [state["step"] for state in engine.deepspeed.optimizer.state.values()]
    assert [float(step) for step in steps] == [2.0] * 4
    assert len({step.data_ptr() for step in steps}) == 4


def test_a_parameter_without_state_begins_anew(tmp_path: Path) -> None:
    index, reader = saved(tmp_path / "a", [trained("adamw", steps=0)])
    engine = trained("adamw")
    assert misfits(engine, index) == []
    assert restore(engine, index, reader) == ["norm", "up", "down", "experts"]
    assert not engine.deepspeed.optimizer.state


def without(index: Index, name: str, **changes: Any) -> Index:
    return {**index, name: replace(index[name], **changes)}


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    index, _ = saved(tmp_path / "a", [trained("adamw")])
    engine = engine_of(Groups.single())
    cases = [
        (without(index, "up", shape=(6, 4)), "up: checkpoint (6, 4), model (6, 3)"),
        ({k: v for k, v in index.items() if k != "norm"}, "norm: checkpoint None, model (3,)"),
        ({**index, "more": index["norm"]}, "more: checkpoint (3,), model None"),
        (without(index, "range", kinds=("weight",)), "range is no buffer in the checkpoint"),
        (without(index, "up", kinds=("weight", "exp_avg")), "up has no exp_avg_sq"),
        (without(index, "up", scalars={}), "up has no step"),
    ]
    for changed, fault in cases:
        assert misfits(engine, changed) == [fault]
    sgd, _ = saved(tmp_path / "b", [trained("sgd")])
    assert misfits(engine, sgd) == [], "states of no use here are left alone"


def test_tensors_that_zero_updates_as_one_need_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, _ = saved(tmp_path / "a", [trained("adamw")])
    engine = engine_of(Groups.single())
    monkeypatch.setattr("kalmagrove.engine.fragments._by_flat", lambda parts: [parts])
    assert misfits(engine, index) == []
    [fault] = misfits(engine, without(index, "up", scalars={"step": 3.0}))
    assert fault == "step of tensors that ZeRO updates as one: [2.0] (norm), [3.0] (up)"


def test_random_states_and_counts_of_ranks(tmp_path: Path) -> None:
    numbers, files = [], []
    for rank in range(3):
        engine = engine_of(groups_of(rank, 3, 1, 1))
        engine.module.load.fill_(rank + 1)
        torch.manual_seed(rank), random.seed(rank), np.random.seed(rank)
        random.gauss()
        tensors, metadata = rank_state(engine)
        files.append(f"{rank}.safetensors")
        write_tensors(tmp_path / files[-1], tensors, metadata)
        numbers.append((torch.rand(2).tolist(), random.gauss(), np.random.rand()))
    reader = TensorReader(tmp_path)
    for world, rank, source, count in ((3, 1, 1, 2), (5, 0, 0, 6), (5, 4, 2, 0), (2, 1, 1, 0)):
        engine = engine_of(groups_of(rank, world, 1, 1))
        engine.module.load.fill_(77)
        load_rank_state(engine, reader, files, same=world == 3)
        found = (torch.rand(2).tolist(), random.gauss(), np.random.rand())
        assert found == numbers[source]
        assert torch.equal(engine.module.load, torch.full((EXPERTS,), float(count)))


def test_other_buffers_stay_as_they_are(tmp_path: Path) -> None:
    source, engine = trained("adamw"), engine_of(Groups.single())
    before = copy.deepcopy(engine.module.table)
    loaded(*saved(tmp_path / "a", [source]), [engine])
    assert torch.equal(engine.module.table, before)
