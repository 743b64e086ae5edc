"""The figures of a ledger line out of all ranks: one transfer from the device, two reductions.

`Meters` asks for them every `track.every` steps. The mean over all ranks is right for any layout: a
rank with a piece of the rows has that piece's share of their loss, ranks with slices of one layer
have the same loss. (Shares of edges are means of the ranks' own shares; with expert parallelism
these are of other groves, however few tokens they have.)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from kalmagrove.track.charts import COMM
from kalmagrove.track.devices import peak_memory, reserved_memory
from kalmagrove.track.model_metrics import grove_shares, pack_metrics, split_metrics, to_scalars
from kalmagrove.track.phases import ALLTOALL, STAGES
from kalmagrove.track.records import StepRecord
from kalmagrove.track.stragglers import Stragglers, rank_figures


class Group(Protocol):
    """What is needed of a `kalmagrove.parallel.Group`."""

    @property
    def handle(self) -> dist.ProcessGroup | None: ...
    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...


class Groups(Protocol):
    """What is needed of `kalmagrove.parallel.Groups`."""

    @property
    def world(self) -> Group: ...
    @property
    def device(self) -> torch.device: ...


@dataclass
class Window:
    """Sums since the last ledger line. `loss` lies on the device."""

    loss: Tensor
    counted: int = 0  # steps in `loss`
    skipped: int = 0
    steps: int = 0
    train_seconds: float = 0.0  # without evaluations and checkpoints

    @classmethod
    def on(cls, device: torch.device) -> "Window":
        return cls(torch.zeros((), dtype=torch.float64, device=device))

    def add(self, record: StepRecord) -> None:
        self.steps += 1
        if record.skipped:
            self.skipped += 1  # its loss is not finite: one such would hide all others
        else:
            self.loss += record.loss.detach()
            self.counted += 1


class Gathered(NamedTuple):
    """figures: of the ledger's line. joules: of all ranks in this session, by stage. shares: of the
    groves.
    """

    figures: dict[str, Any]
    joules: dict[str, float]
    shares: dict[str, list[float]]


class Gather:
    """Of one rank; all ranks make the same calls in the same order."""

    def __init__(self, groups: Groups) -> None:
        self._world, self._device = groups.world, groups.device
        self._stragglers = Stragglers(groups.world.rank, groups.world.size)
        self._alltoall = 0.0  # seconds, at the last line

    def line(
        self,
        record: StepRecord,
        window: Window,
        grad_norm: Tensor | float | None,
        joules: Mapping[str, float],
    ) -> Gathered:
        """Mean loss, gradient norm, metrics, memory, energy.

        Args:
            window: of this rank, since the last call.
            grad_norm: None: there was no finite one yet.
            joules: of this rank in this session, by stage.
        """
        means, largest = split_metrics(record.model_metrics())
        seconds = record.seconds()
        before, self._alltoall = self._alltoall, seconds.get(ALLTOALL, 0.0)
        exchanging = (self._alltoall - before) / window.steps
        layout, packed = pack_metrics(
            {
                "loss": window.loss,
                "counted": torch.tensor(float(window.counted)),
                "grad_norm": torch.as_tensor(float("nan") if grad_norm is None else grad_norm),
                "joules": _as_tensor(joules),
                "rank_seconds": self._stragglers.own(seconds, window.steps),
                "alltoall_seconds": torch.tensor(exchanging, dtype=torch.float64),
                **{f"model/{name}": value for name, value in means.items()},
            },
            self._device,
        )
        top_layout, top = pack_metrics(
            {
                "peak_memory": torch.tensor(peak_memory(self._device)),
                "reserved_memory": torch.tensor(reserved_memory(self._device)),
                **largest,
            },
            self._device,
        )
        self._reduce(packed, dist.ReduceOp.SUM)
        self._reduce(top, dist.ReduceOp.MAX)
        size = self._world.size
        values, tops = layout.unpack((packed / size).cpu()), top_layout.unpack(top.cpu())
        loss, counted = values.pop("loss").item(), values.pop("counted").item()
        figures = {
            "loss": loss / counted if counted else None,
            "grad_norm": values.pop("grad_norm").item(),
            "peak_memory": int(tops.pop("peak_memory").item()),
            "reserved_memory": int(tops.pop("reserved_memory").item()) or None,
            **rank_figures(values.pop("rank_seconds") * size),
        }
        used = _by_stage(values.pop("joules") * size)
        exchanged = values.pop("alltoall_seconds").item()
        values = {name.removeprefix("model/"): value for name, value in values.items()}
        model = to_scalars(values | tops)
        if model.get("aux_loss") == 0:
            del model["aux_loss"]  # the model has none
        comm = {name: model.pop(name) for name in COMM if name in model}
        if comm:
            comm["alltoall_seconds"] = exchanged
        more = {key: model.get(key) for key in ("load_cv", "out_of_range")}
        return Gathered(
            {**figures, **more, "model": model, "comm": comm}, used, grove_shares(values)
        )

    def joules(self, used: Mapping[str, float]) -> dict[str, float]:
        """Those of all ranks, by stage."""
        total = _as_tensor(used).to(self._device)
        self._reduce(total, dist.ReduceOp.SUM)
        return _by_stage(total.cpu())

    def _reduce(self, tensor: Tensor, how: Any) -> None:
        if self._world.size > 1:
            dist.all_reduce(tensor, op=how, group=self._world.handle)


def _as_tensor(joules: Mapping[str, float]) -> Tensor:
    return torch.tensor([joules[stage] for stage in STAGES], dtype=torch.float64)


def _by_stage(joules: Tensor) -> dict[str, float]:
    return dict(zip(STAGES, joules.tolist(), strict=True))
