"""What a step costs the host: Python, launches and DeepSpeed's loops over parameters.

A GPU that is faster waits for it, as with small models it does all the time. Seconds are those of
`kalmagrove bench host` on the machine that will train, else those of `efficiency`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from kalmagrove.config import ConfigError, Run
from kalmagrove.config.layout import UsedLayout
from kalmagrove.plan.efficiency import of
from kalmagrove.track import path_of
from kalmagrove.track.communication import routed_parts

# Tensors of a layer's parameters, its norm among them.
PARAMETERS = {"ada": 9, "softmax": 7, "mla": 8, "dense": 4, "kan": 6, "grove": 14, "moe": 8}
COLUMNS = ("layer", "rest", "optimizer_layer", "optimizer_rest")


class Cost(NamedTuple):
    """Seconds. passes: of the forward and backward passes of a micro-batch; optimizer: of the rest
    of a step. notes: what was not measured in this layout. elsewhere: they are of `efficiency`.
    """

    passes: float
    optimizer: float
    notes: tuple[str, ...] = ()
    elsewhere: bool = False

    def times(self, factor: float) -> "Cost":
        """Of a host that takes so many times as long."""
        return self._replace(passes=factor * self.passes, optimizer=factor * self.optimizer)


class Row(NamedTuple):
    """Seconds of a kind of layer in a layout: those of `kalmagrove.bench.host.measure`."""

    attention: str
    ffn: str
    layout: UsedLayout
    layer: float
    rest: float
    optimizer_layer: float
    optimizer_rest: float


class HostTimes:
    """Measured rows; without any, the numbers of `efficiency`."""

    def __init__(self, rows: list[Row] | None = None, source: str = "") -> None:
        self._rows, self._source = rows or [], source

    @classmethod
    def read(cls, path: str) -> "HostTimes":
        """Those that `kalmagrove bench host --out PATH` wrote.

        Raises:
            ConfigError: if it is not such a file.
        """
        try:
            times = cls.of(json.loads(Path(path).read_text()), path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            rule = f"cannot be read as the output of kalmagrove bench host: {error!r}"
            remedy = "write it with kalmagrove bench host ... --out FILE"
            raise ConfigError("host", path, rule, remedy) from None
        if not times._rows:
            raise ConfigError("host", path, "has no measured layout", "see its `failed` entries")
        return times

    @classmethod
    def of(cls, found: dict[str, Any], source: str) -> "HostTimes":
        """The contents of such a file. Raises KeyError or TypeError if it is another."""
        return cls(list(_rows(found)), source)

    def cost(self, run: Run, ranks: int) -> Cost:
        """Of `run` on so many ranks."""
        if not self._rows:
            return _tabled(run)
        layout, pairs = UsedLayout.of(run, ranks), run.model.layer_kinds()
        rows, notes = {}, []
        for pair in dict.fromkeys(pairs):
            alike = [row for row in self._rows if (row.attention, row.ffn) == pair]
            same = [row for row in alike if row.layout.zero == layout.zero]
            if not same:
                text = f"host: {self._source} has no {pair[0]} + {pair[1]} with ZeRO {layout.zero}"
                note = f"{text}: the middle of other machines is taken"
                return _tabled(run)._replace(notes=(note,))
            rows[pair] = max(same, key=lambda row: row.layout.agreeing(layout))
            if rows[pair].layout != layout:
                notes.append(f"host: of {rows[pair].layout} for {layout}")
        layers = [rows[pair] for pair in pairs]
        return Cost(
            again(run) * sum(row.layer for row in layers)
            + fmean(max(0.0, row.rest) for row in rows.values()),
            sum(row.optimizer_layer for row in layers)
            + fmean(max(0.0, row.optimizer_rest) for row in rows.values()),
            tuple(dict.fromkeys(notes)),
        )


def _rows(found: dict[str, Any]) -> Iterator[Row]:
    for record in found["layouts"]:
        for kind in record.get("kinds", []):
            layout = UsedLayout(**record["used"])
            yield Row(kind["attention"], kind["ffn"], layout, *(kind[name] for name in COLUMNS))


def _tabled(run: Run) -> Cost:
    """By `efficiency`: an attention and a feed-forward, and what DeepSpeed does for each of their
    parameters.
    """
    model = run.model
    zero = {2: of("host_zero2"), 3: of("host_zero3")}.get(run.zero.stage, 0.0)
    passes, parameters = 0.0, 0
    for i, (attention, ffn) in enumerate(model.layer_kinds()):
        passes += of(f"host_{attention}") + of(f"host_{ffn}")
        if run.parallel.tp > 1:
            passes += of("host_tp")
        if run.parallel.cp > 1:
            passes += of("host_cp")
        if ffn == "moe":
            parts = routed_parts(model, i)
            assert parts is not None
            passes += of("host_expert") * parts[0] / run.parallel.ep
        elif ffn == "grove" and path_of(model.backend, gpu=True) != "kernels":
            passes += of("host_groves_reference")
        elif ffn == "grove" and run.parallel.ep > 1:
            passes += of("host_ep")
        parameters += PARAMETERS[attention] + PARAMETERS[ffn]
    return Cost(
        again(run) * passes + zero * parameters + of("host_rest"),
        of("host_optimizer") * parameters,
        elsewhere=True,
    )


def again(run: Run) -> float:
    """How often a layer is passed through, forward and backward together being once."""
    return 4 / 3 if run.engine.activation_checkpointing else 1.0
