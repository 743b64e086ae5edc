"""Workers that count what the collectives of the real model send, and what meters make of ranks."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from kalmagrove.cli.compose import compose_tree
from kalmagrove.config import Run, load
from kalmagrove.nn import build_model
from kalmagrove.nn.dispatch import Balanced
from kalmagrove.parallel import Groups, differentiable
from kalmagrove.track import Energy, StepRecord, build_meters, communication_estimate, read_history
from tests.dist.serving import serve

MODEL = [
    "model=kan_tiny",
    "model.layers=4",
    "model.vocab_size=64",
    "model.attention.pattern=[ada,softmax,mla,ada]",
    "model.ffn.pattern=[grove,kan,moe,dense]",
    "model.attention.ada.heads=4",
    "model.attention.softmax.heads=4",
    "model.attention.softmax.kv_heads=4",
    "model.attention.mla.heads=4",
    "model.ffn.moe.shared_hidden=16",
    "data.seq_len=64",
    "engine.precision=fp32",
]


class Counter:
    """Bytes that this rank sends in each group, by the cost of ring algorithms."""

    def __init__(self, groups: Groups) -> None:
        self.kinds = {
            "tensor parallel": groups.tp,
            "context parallel": groups.cp,
            "groves and experts": groups.ep,
        }
        self.sent = dict.fromkeys(self.kinds, 0.0)
        self.scattering = False

    def add(self, group: Any, size: float, times: int) -> None:
        """`times` the share of `size` bytes that a rank does not keep, or all of it for times=0."""
        (kind,) = [kind for kind, known in self.kinds.items() if known.handle is group]
        ranks = self.kinds[kind].size
        self.sent[kind] += size * times * (ranks - 1) / ranks if times else size

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count the calls of torch.distributed."""

        def all_reduce(real: Callable, tensor: Tensor, *args: Any, group: Any, **named: Any) -> Any:
            # Without a reduce-scatter, gloo's is an all-reduce of everything.
            self.add(group, tensor.nbytes, 1 if self.scattering else 2)
            return real(tensor, *args, group=group, **named)

        def all_gather(real: Callable, out: Tensor, own: Tensor, group: Any) -> Any:
            self.add(group, out.nbytes, 1)
            return real(out, own, group=group)

        def all_to_all(real: Callable, out: Tensor, x: Tensor, *splits: Any, group: Any) -> Any:
            send, rank = splits[1], dist.get_rank(group)
            self.add(group, x[0].nbytes * (sum(send) - send[rank]) if len(x) else 0, 0)
            return real(out, x, *splits, group=group)

        def neighbours(real: Callable, operations: list[dist.P2POp]) -> Any:
            for operation in operations:
                if operation.op is dist.isend:
                    self.add(operation.group, operation.tensor.nbytes, 0)
            return real(operations)

        def reduce_scatter(real: Callable, *args: Any) -> Any:
            self.scattering = True
            out = real(*args)
            self.scattering = False
            return out

        places: dict[str, tuple[Any, Callable]] = {
            "all_reduce": (dist, all_reduce),
            "all_gather_into_tensor": (dist, all_gather),
            "all_to_all_single": (dist, all_to_all),
            "batch_isend_irecv": (dist, neighbours),
            "reduce_scatter": (differentiable, reduce_scatter),
        }
        with ExitStack() as patched:
            for name, (home, count) in places.items():
                counting = partial(count, getattr(home, name))
                patched.enter_context(mock.patch.object(home, name, counting))
            yield


def even(score_NG: Tensor, chosen: int) -> Tensor:
    """In the place of `Balanced.choose`: all choices are equally likely."""
    return torch.rand_like(score_NG).topk(chosen, 1).indices


def one_batch(run: Run, groups: Groups) -> dict[str, float]:
    """Bytes of a forward and backward pass, mean over ranks."""
    torch.manual_seed(0)
    model = build_model(run.model, groups)
    if run.engine.precision == "bf16":
        model.bfloat16()
    model.activation_checkpointing = run.engine.activation_checkpointing
    for module in model.modules():
        if isinstance(module, Balanced):
            module.choose = even  # type: ignore[method-assign]
    tokens = torch.randint(run.model.vocab_size, (run.batch.micro, run.data.seq_len))
    segments = (torch.arange(run.data.seq_len) // 10).int().expand(len(tokens), -1)
    torch.manual_seed(1 + groups.world.rank)  # routing
    counter = Counter(groups)
    with counter.watching():
        output = model(tokens, tokens, segments if run.data.document_aware else None, 1.0)
        assert output.loss is not None
        output.loss.backward()
    sent: list[Any] = [None] * groups.world.size
    dist.all_gather_object(sent, counter.sent)
    return {kind: sum(rank[kind] for rank in sent) / len(sent) for kind in counter.sent}


def traffic(
    layouts: dict[str, dict[str, Any]], cases: dict[str, list[str]]
) -> list[tuple[str, str, str, float, float]]:
    """(layout, case, kind, counted, predicted) bytes of one micro-batch."""
    rows = []
    for case, words in cases.items():
        tree = compose_tree("train", [*MODEL, *words])
        for layout, sizes in layouts.items():
            split = sizes.get("tp", 1) * sizes.get("cp", 1)
            one_micro_batch = {"tokens": 128 * dist.get_world_size() // split, "micro": 2}
            run = load(tree | {"parallel": sizes, "batch": one_micro_batch})
            groups = Groups.init(run.parallel, torch.device("cpu"))
            counted = one_batch(run, groups)
            estimate = communication_estimate(run, groups.world.size, run.engine.precision)
            predicted = {row.kind: row.bytes for row in estimate}
            rows += [(layout, case, kind, sent, predicted[kind]) for kind, sent in counted.items()]
            Groups.reset()
    return rows


def meters(folder: str) -> dict[str, Any]:
    """The ledger's line of a step in which every rank tells something else."""
    words = ["model=kan_tiny", "track.wandb=disabled", "track.console=off", "track.every=1"]
    run = load(
        compose_tree("train", [*words, "parallel.tp=2", "model.attention.softmax.kv_heads=2"])
    )
    groups = Groups.init(run.parallel, torch.device("cpu"))
    sizes = {"params_total": 1, "params_active": 1, "flops_per_token": 1.0}
    joules = iter(range(100, 200, 2))  # two more at each look, on each rank
    energy = Energy(lambda: float(next(joules)))
    found = build_meters(run, Path(folder), groups, energy=energy, **sizes)
    found.start(0, 0)
    rank = groups.world.rank
    told = {
        "0.time_constant": torch.tensor([4.0, 8.0]) * (1 + rank),  # of other heads on each rank
        "1.load": torch.tensor([1.0, 0.0] if rank == 0 else [0.5, 0.5]),
        "1.load_cv": torch.tensor(1.0 if rank == 0 else 0.0),
        "1.dropped": torch.tensor(0.5 * rank),
        "alltoall_bytes": torch.tensor(100 * rank),
    }
    seconds = {"forward": 1.0, "alltoall": 0.25 + 0.5 * rank}
    loss = torch.tensor(2.0 + 2 * rank)
    found.step(StepRecord(1, 16, loss, 0.5, 1e-3, False, seconds.copy, told.copy))
    dist.barrier()
    (line,) = read_history(Path(folder) / "ledger.jsonl").series("step")
    return line


def both(folder: str, **arguments: Any) -> dict[str, Any]:
    """Starting processes takes longer than either."""
    return {"traffic": traffic(**arguments), "meters": meters(folder)}


WORKERS: dict[str, Any] = {"traffic": traffic, "both": both}

if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    serve(WORKERS)
