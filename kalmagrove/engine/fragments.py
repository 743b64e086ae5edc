"""What this rank holds of every parameter's fp32 weight and optimizer state, at any ZeRO stage.

Used by `checkpoint`: `collect` names it for saving, `restore` fills it from the parts of any other
layout. Besides `compat` the only place that knows how DeepSpeed lays tensors out.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kalmagrove.engine.engine import Engine
from kalmagrove.engine.tensor_files import Stored, TensorReader
from kalmagrove.engine.tensor_index import (
    BUFFER,
    WEIGHT,
    Entry,
    Index,
    Part,
    Piece,
    assemble,
    key_of,
)
from kalmagrove.parallel import Groups, Shard, module_shards, shard_of

# Buffers in which each rank counts by itself until they are summed over the world (`balance`).
COUNTERS = ("load",)


@dataclass(frozen=True, eq=False)
class Held:
    """The elements of one parameter that this rank's optimizer updates; possibly none.

    flat: what the optimizer updates (fp32), and finds states by. start: of the elements in `flat`;
    first: in this rank's flattened (piece of the) parameter. group: the optimizer's.
    """

    name: str
    parameter: nn.Parameter
    flat: Tensor
    start: int
    first: int
    numel: int
    group: dict[str, Any]

    def cut(self, tensor: Tensor) -> Tensor:
        """The view of these elements in a tensor that is laid out as `flat`."""
        return tensor.detach().view(-1)[self.start : self.start + self.numel]


def held(engine: Engine) -> list[Held]:
    """Of every parameter that trains, what this rank holds, in the optimizer's order.

    Frozen ones are those that the model was built with: checkpoints hold them as weights alone.
    """
    zero, names = engine.deepspeed.optimizer, {}
    for name, parameter in engine.module.named_parameters():
        names[parameter] = name
    if hasattr(zero, "fp16_partitioned_groups_flat"):
        found = list(_held_stage_3(zero, names))
    elif hasattr(zero, "update_lp_params"):
        found = list(_held_stage_1_2(zero, names))
    else:
        found = [
            Held(names[p], p, p, 0, 0, p.numel(), group)
            for group in zero.param_groups
            for p in group["params"]
        ]
    trained = {name for parameter, name in names.items() if parameter.requires_grad}
    left = trained - {part.name for part in found}
    assert not left, f"parameters without optimizer are not saved: {sorted(left)[:3]}"
    return found


def _held_stage_1_2(zero: Any, names: Mapping[nn.Parameter, str]) -> Iterator[Held]:
    """Each group is one flat tensor, divided evenly over its ranks, whatever the borders cut."""
    layout = zero.bf16_groups if hasattr(zero, "bf16_groups") else zero.bit16_groups
    for group, parameters in zip(zero.optimizer.param_groups, layout, strict=True):
        [flat] = group["params"]
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is None:  # all of it is in other ranks' partitions
                yield Held(names[parameter], parameter, flat, 0, 0, 0, group)
                continue
            here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
            name = names[parameter]
            yield Held(name, parameter, flat, here.start, there.start, here.numel, group)


def _held_stage_3(zero: Any, names: Mapping[nn.Parameter, str]) -> Iterator[Held]:
    """Each parameter is divided evenly over its ranks, and a group's partitions lie end to end."""
    for number, (flat, parameters) in enumerate(
        zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
    ):
        group, start = zero.optimizer.param_groups[zero.sub_group_to_group_id[number]], 0
        for parameter in parameters:
            size = parameter.partition_numel()
            first = min(size * zero._get_param_partition_rank(parameter), parameter.ds_numel)
            numel = min(size, parameter.ds_numel - first)
            yield Held(names[parameter], parameter, flat, start, first, numel, group)
            start += size


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter over all ranks."""
    local = tuple(getattr(parameter, "ds_shape", parameter.shape))
    shard = shard_of(parameter)
    return local if shard is None else shard.whole_shape(local)


def parameter_digest(model: nn.Module) -> str:
    """A hash over the names and whole shapes of all parameters."""
    lines = [f"{name} {whole_shape(p)}" for name, p in model.named_parameters()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def collect(engine: Engine, file: str) -> tuple[dict[str, Stored], Index]:
    """What this rank saves, to be written to `file`, and its contribution to the index.

    Of what several ranks hold, one saves it; all describe it.
    """
    tensors: dict[str, Stored] = {}
    index: Index = {}
    optimizer, divided = _inner(engine), engine.run.zero.stage > 0
    scalars: dict[int, dict[str, float]] = {}
    for part in held(engine):
        state = optimizer.state.get(part.flat, {})
        kinds, numbers = state_kinds(optimizer, part.group)
        assert set(state) <= {*kinds, *numbers}, f"unknown optimizer states in {sorted(state)}"
        if id(part.flat) not in scalars:
            scalars[id(part.flat)] = {k: float(state[k]) for k in numbers if k in state}
        kept = {WEIGHT: part.flat, **{k: state[k] for k in kinds if k in state}}
        shard = shard_of(part.parameter)
        places: tuple[Part, ...] = ()
        if part.numel and _saves(shard, engine.groups, divided):
            places = (Part(file, _piece(shard), part.first, part.numel),)
            for kind, tensor in kept.items():
                tensors[key_of(part.name, kind)] = Stored.of(part.cut(tensor))
        shape = whole_shape(part.parameter)
        index[part.name] = Entry(shape, tuple(kept), scalars[id(part.flat)], places)
    for name, (buffer, shard) in _buffers(engine.module).items():
        places, local = (), tuple(buffer.shape)
        if buffer.numel() and _saves_buffer(shard, engine.groups):
            places = (Part(file, _piece(shard), 0, buffer.numel()),)
            tensors[key_of(name, BUFFER)] = Stored.of(buffer.detach().reshape(-1))
        shape = local if shard is None else shard.whole_shape(local)
        index[name] = Entry(shape, (BUFFER,), {}, places)
    return tensors, index


def bytes_to_save(engine: Engine) -> int:
    """Of the tensors that this rank saves, counting optimizer states that the first step makes."""
    tensors, _ = collect(engine, "")
    total, optimizer = sum(stored.size for stored in tensors.values()), _inner(engine)
    for part in held(engine):
        if key_of(part.name, WEIGHT) in tensors:
            kinds, _ = state_kinds(optimizer, part.group)
            missing = set(kinds) - set(optimizer.state.get(part.flat, {}))
            total += len(missing) * part.numel * part.flat.element_size()
    return total


def misfits(engine: Engine, index: Index) -> list[str]:
    """Why an index (that is covered) cannot be loaded by this rank, one line each."""
    parts, buffers = held(engine), _buffers(engine.module)
    own = {part.name: whole_shape(part.parameter) for part in parts}
    for name, (buffer, shard) in buffers.items():
        local = tuple(buffer.shape)
        own[name] = local if shard is None else shard.whole_shape(local)
    other = {name: entry.shape for name, entry in index.items()}
    found = [
        f"{name}: checkpoint {other.get(name)}, model {own.get(name)}"
        for name in sorted(own.keys() | other.keys())
        if own.get(name) != other.get(name)
    ]
    if found:
        return found
    found = [
        f"{name} is no {kind} in the checkpoint"
        for name in own
        for kind in [BUFFER if name in buffers else WEIGHT]
        if kind not in index[name].kinds
    ]
    optimizer = _inner(engine)
    for together in _by_flat(parts):
        kinds, numbers = state_kinds(optimizer, together[0].group)
        steps: dict[tuple[float, ...], str] = {}
        for part in together:
            entry = index[part.name]
            missing = {*kinds, *numbers} - {*entry.kinds, *entry.scalars}
            if missing and len(missing) < len(kinds) + len(numbers):
                found.append(f"{part.name} has no {', '.join(sorted(missing))}")
            steps.setdefault(tuple(entry.scalars.get(k, 0.0) for k in numbers), part.name)
        if len(steps) > 1:
            listed = ", ".join(f"{list(step)} ({name})" for step, name in steps.items())
            found.append(f"{', '.join(numbers)} of tensors that ZeRO updates as one: {listed}")
    return found


@torch.no_grad()
def restore(engine: Engine, index: Index, reader: TensorReader) -> list[str]:
    """Fill weights, states and buffers of this rank; `refresh` makes the model use them.

    Only for an index that has neither `coverage_faults` nor `misfits`.

    Returns:
        The parameters whose optimizer state is not in the checkpoint and begins anew.
    """
    zero, optimizer, anew = engine.deepspeed.optimizer, _inner(engine), []
    if engine.run.zero.stage == 3:
        zero.checkpoint_event_prologue()  # also persistent parameters are partitioned
    for parts in _by_flat(held(engine)):
        flat, group = parts[0].flat, parts[0].group
        kinds, numbers = state_kinds(optimizer, group)
        kept = [part for part in parts if {*kinds, *numbers} & set(index[part.name].kinds)]
        anew += [part.name for part in parts if kinds and part not in kept]
        flat.detach().zero_()  # ZeRO's padding
        tensors = {WEIGHT: flat}
        optimizer.state.pop(flat, None)
        if kept:
            state = {kind: torch.zeros_like(flat, requires_grad=False) for kind in kinds}
            tensors |= state
            values = {k: index[kept[0].name].scalars[k] for k in numbers}
            optimizer.state[flat] = {**_scalars(values, flat, group), **state}
        for part in parts:
            entry, piece = index[part.name], _piece(shard_of(part.parameter))
            for kind in [kind for kind in tensors if kind in entry.kinds]:
                value = assemble(part.name, kind, entry, piece, part.first, part.numel, reader.read)
                part.cut(tensors[kind]).copy_(value)
    for name, (buffer, shard) in _buffers(engine.module).items():
        size = buffer.numel()
        value = assemble(name, BUFFER, index[name], _piece(shard), 0, size, reader.read)
        buffer.copy_(value.view(buffer.shape))
    return anew


def refresh(engine: Engine) -> None:
    """The model's parameters from the fp32 weights, as at the end of DeepSpeed's own step.

    Collective under ZeRO.
    """
    zero = engine.deepspeed.optimizer
    if hasattr(zero, "fp16_partitioned_groups_flat"):
        for low, flat in zip(
            zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True
        ):
            low.data.copy_(flat.data)
        zero.checkpoint_event_epilogue()
    elif hasattr(zero, "update_lp_params"):
        zero.update_lp_params()
        zero._hp_optimizer_states_linked = False  # of the states that were there before


def state_kinds(
    optimizer: torch.optim.Optimizer, group: dict[str, Any]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The states an optimizer keeps a parameter: tensors of its size, and single numbers."""
    if isinstance(optimizer, torch.optim.SGD):
        return (("momentum_buffer",) if group["momentum"] else ()), ()
    if group["muon"]:
        return ("momentum_buffer",), ()
    return ("exp_avg", "exp_avg_sq"), ("step",)


def _scalars(values: dict[str, float], flat: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """Numbers as torch's AdamW and our Muon keep them; none is shared between tensors."""
    device = flat.device if group.get("fused") else torch.device("cpu")
    return {k: torch.tensor(v, dtype=torch.float32, device=device) for k, v in values.items()}


def _inner(engine: Engine) -> torch.optim.Optimizer:
    """The torch optimizer inside ZeRO's."""
    outer = engine.deepspeed.optimizer
    inner: torch.optim.Optimizer = getattr(outer, "optimizer", outer)
    return inner


def _by_flat(parts: list[Held]) -> list[list[Held]]:
    """Together what one tensor of the optimizer holds."""
    found: dict[int, list[Held]] = {}
    for part in parts:
        found.setdefault(id(part.flat), []).append(part)
    return list(found.values())


def _piece(shard: Shard | None) -> Piece:
    return None if shard is None else (shard.dim, shard.start, shard.length)


def _saves(shard: Shard | None, groups: Groups, divided: bool) -> bool:
    """Whether this rank saves its part of a parameter.

    Args:
        divided: by ZeRO, over the ranks that would otherwise all hold the same.
    """
    if shard is not None and shard.over == "ep":
        return divided or groups.expert_dp.rank == 0
    return (divided or groups.dp_cp.rank == 0) and (shard is not None or groups.tp.rank == 0)


def _saves_buffer(shard: Shard | None, groups: Groups) -> bool:
    return _saves(shard, groups, False) if shard is not None else groups.world.rank == 0


def _buffers(module: nn.Module) -> dict[str, tuple[Tensor, Shard | None]]:
    """The buffers that are the same on all ranks, or pieces of the same."""
    shards = module_shards(module)
    return {
        name: (buffer, shards.get(name))
        for name, buffer in persistent_buffers(module)
        if name.rpartition(".")[2] not in COUNTERS
    }


def counters(module: nn.Module) -> dict[str, Tensor]:
    """The buffers in which each rank counts by itself; see `COUNTERS`."""
    return {
        name: buffer
        for name, buffer in persistent_buffers(module)
        if name.rpartition(".")[2] in COUNTERS
    }


def persistent_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    kept = set(module.state_dict(keep_vars=True))
    return [(name, buffer) for name, buffer in module.named_buffers() if name in kept]
