"""Dashboards of W&B as code: four workspaces over the charts that sinks log.

`PAGES` is data, so that a test can hold every name against `charts.NAMES`. Needs wandb-workspaces,
of the extra `dash`; only `push` needs a network.
"""

import json
from importlib.util import find_spec
from typing import Any, NamedTuple

from kalmagrove.config import KalmaGroveError
from kalmagrove.track.phases import STAGES, TRAINING
from kalmagrove.track.wandb_sink import refusal


class Chart(NamedTuple):
    """Lines over `over`: metrics by name; or, with `layers`, those of every layer."""

    title: str
    names: tuple[str, ...]
    over: str = "tokens"
    layers: bool = False

    @property
    def regex(self) -> str | None:
        """Of the metrics of single layers: `groves/3.load_cv`."""
        if not self.layers:
            return None
        (name,) = self.names
        group, _, last = name.partition("/")
        return rf"^{group}/\d+\.{last}$"


PAGES: dict[str, dict[str, list[Chart]]] = {
    "learning": {
        "Loss": [
            Chart("held-out loss over tokens, nats", ("eval/loss",)),
            Chart("held-out loss over dollars, nats", ("by_usd/eval_loss",), "usd"),
            Chart("held-out bits per byte", ("eval/bits_per_byte",)),
            Chart("training loss over tokens, nats", ("loss/train",)),
            Chart("training loss over hours, nats", ("loss/train",), "hours"),
            Chart("auxiliary loss", ("loss/aux_loss",)),
        ],
        "Optimizer": [
            Chart("learning rate", ("optim/lr",)),
            Chart("gradient norm, before clipping", ("optim/grad_norm",)),
            Chart("skipped steps", ("optim/skipped",)),
        ],
    },
    "cost": {
        "Dollars": [
            Chart("spent and projected, $", ("cost/usd", "cost/usd_projected")),
            Chart("spent over hours, $", ("cost/usd",), "hours"),
            Chart("$ per million tokens so far", ("cost/usd_per_million_tokens",)),
            Chart("training loss over dollars, nats", ("by_usd/train_loss",), "usd"),
        ],
        "Devices and energy": [
            Chart("device seconds", ("cost/device_seconds",)),
            Chart("joules", ("cost/joules",)),
            Chart("joules per token so far", ("cost/joules_per_token",)),
            Chart(
                "joules of the session, by what they went to",
                tuple(f"energy/{stage}" for stage in STAGES),
            ),
            Chart("seconds left", ("cost/seconds_left",), "hours"),
        ],
    },
    "throughput": {
        "Speed": [
            Chart("tokens a second", ("throughput/tokens_per_s",)),
            Chart("tokens a second of one device", ("throughput/tokens_per_s_device",)),
            Chart("model and hardware FLOPs, of the peak", ("throughput/mfu", "throughput/hfu")),
            Chart("seconds a step", ("throughput/step_seconds",)),
        ],
        "Where the time goes": [
            Chart(
                "seconds between two lines, by phase",
                tuple(f"phases/{phase}" for phase in TRAINING),
            ),
            Chart("all-to-all, seconds a step, mean of ranks", ("comm/alltoall_seconds",)),
            Chart("all-to-all, bytes a step", ("comm/alltoall_bytes",)),
            Chart("peak memory of a device, bytes", ("memory/peak", "memory/reserved")),
        ],
        "Ranks": [
            Chart(
                "own seconds a step: least, mean, most",
                ("ranks/seconds_min", "ranks/seconds_mean", "ranks/seconds_max"),
            ),
            Chart("the slowest rank", ("ranks/slowest",)),
        ],
    },
    "groves": {
        "Groves": [
            Chart("variation of load", ("groves/load_cv",)),
            Chart("variation of load, by layer", ("groves/load_cv",), layers=True),
            Chart("largest load over mean", ("groves/load_max",)),
            Chart("gates: mean and deviation", ("groves/gate_mean", "groves/gate_std")),
        ],
        "Edges": [
            Chart("share of inputs out of the grid", ("edges/out_of_range",)),
            Chart("out of the grid, by layer", ("edges/out_of_range",), layers=True),
            Chart("energy of the kept edges", ("edges/kept_share",)),
            Chart("edges that no token kept", ("edges/dead_edges",)),
        ],
        "Attention": [
            Chart(
                "time constants of ADA's heads, tokens",
                ("attention/time_constant_mean", "attention/time_constant_max"),
            ),
        ],
    },
}


def charts() -> list[Chart]:
    """Of all pages."""
    return [chart for sections in PAGES.values() for page in sections.values() for chart in page]


def build(project: str, entity: str) -> list[Any]:
    """The pages as `wandb_workspaces` objects, which check themselves; needs no network.

    Raises:
        KalmaGroveError: if the package is missing.
    """
    if find_spec("wandb_workspaces") is None:
        raise KalmaGroveError(
            'dashboards need wandb-workspaces, which is missing; pip install "kalmagrove[dash]"'
        )
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    def plot(chart: Chart) -> Any:
        if chart.regex:
            return wr.LinePlot(title=chart.title, x=chart.over, metric_regex=chart.regex)
        return wr.LinePlot(title=chart.title, x=chart.over, y=list(chart.names))

    return [
        ws.Workspace(
            entity=entity,
            project=project,
            name=f"kalmagrove {page}",
            auto_generate_panels=False,
            sections=[
                ws.Section(name=name, panels=[plot(chart) for chart in inside], is_open=True)
                for name, inside in sections.items()
            ],
        )
        for page, sections in PAGES.items()
    ]


def as_json(workspaces: list[Any]) -> str:
    """What W&B's server would be sent, as an indented list: names, and the `spec` of each page.

    It is sent as a string, and with a `name` that is drawn anew each time, which is left out.
    """
    return json.dumps([_sent(page._to_model()) for page in workspaces], indent=1)


def _sent(view: Any) -> dict[str, Any]:
    return {
        "entityName": view.entity,
        "projectName": view.project,
        "displayName": view.display_name,
        "type": "project-view",
        "spec": json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True)),
    }


def push(workspaces: list[Any]) -> list[str]:
    """Save them on the server; returns their addresses.

    Raises:
        KalmaGroveError: naming what W&B answered, or that nothing answered.
    """
    try:
        for page in workspaces:
            page.save()
        return [str(page.url) for page in workspaces]
    except Exception as error:  # wandb's and its client's, of many kinds
        remedy = "give the --entity and --project of yours, and a key with `wandb login`"
        raise KalmaGroveError(f"dashboards: {refusal(error, remedy)}") from None
