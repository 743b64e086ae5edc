"""What `kalmagrove plan` prints: layouts, the first of them in parts, models side by side."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kalmagrove.config import Plan
from kalmagrove.config.counts import parameter_count

if TYPE_CHECKING:
    from kalmagrove.cli.plan import Planned
    from kalmagrove.plan import Prediction

SOURCE = (("kan_340b", 230e3), ("moe_340b", 2.1e6))  # its table 1, for KAN-340B and DeepSeek-R1
TOKENS_PER_PARAMETER = (
    20  # about what Hoffmann et al. (arXiv:2203.15556) find best for dense models
)


def show_layouts(console: Console, one: "Planned") -> None:
    """Those that fit, and the nearest of the refused."""
    plan, result = one.plan, one.result
    assert plan is not None
    count, cluster = parameter_count(plan.model), plan.cluster
    title = f"{one.name}: {_parameters(count.total)} parameters, {_parameters(count.active)} active"
    table = _table(f"{title}, on {cluster.gpus} x {cluster.gpu}")
    shown = result.found[: plan.show]
    cp = any(found.run.parallel.cp > 1 for found in shown)
    names = ("ep", "ZeRO", "micro", "again", "GB", "s/step", "tokens/s", "MFU", "days", "dollars")
    for name in ("tp", *["cp"] * cp, *names):
        table.add_column(name, justify="right")
    for found in shown:
        run = found.run
        table.add_row(
            f"{run.parallel.tp}",
            *[f"{run.parallel.cp}"] * cp,
            f"{run.parallel.ep}",
            f"{run.zero.stage}",
            f"{run.batch.micro}",
            "yes" if run.engine.activation_checkpointing else "no",
            f"{found.peak_bytes / 1e9:,.1f}",
            f"{found.step_seconds:,.3g}",
            _short(found.tokens_per_s),
            f"{found.mfu:.1%}",
            f"{found.hours / 24:,.3g}",
            _usd(found.usd),
        )
    console.print(table)
    left = len(result.found) - plan.show
    said = [f"{left} more layouts fit"] if left > 0 else []
    if result.refused:
        nearest = result.refused[0]
        said.append(
            f"{len(result.refused)} are refused, the nearest: {nearest.layout} {nearest.reason}"
        )
    if said:
        console.print("; ".join(said), highlight=False)


def show_refused(console: Console, one: "Planned") -> None:
    """The layouts nearest to fitting, then the rules that others break."""
    assert one.plan is not None
    refused, cluster = one.result.refused, one.plan.cluster
    large = [f"{refusal.layout} {refusal.reason}" for refusal in refused if not refusal.error]
    rules = [refusal.reason for refusal in refused if refusal.error]
    lines = large + [f"{rules.count(rule)} layouts: {rule}" for rule in dict.fromkeys(rules)]
    text = f"{one.name} on {cluster.gpus} x {cluster.gpu}: none of {len(refused)} layouts can be"
    console.print(text, highlight=False)
    for line in lines[: one.plan.show]:
        console.print(f"  {line}", highlight=False)
    if len(lines) > one.plan.show:
        console.print(f"  show={len(lines)} lists {len(lines) - one.plan.show} more")


def show_parts(console: Console, best: "Prediction") -> None:
    """Memory and time of a layout, part by part."""
    from kalmagrove.plan import describe

    table = Table(
        title=f"{best.run.model.name}, the first: {describe(best.run)}", title_justify="left"
    )
    for name in ("memory of a GPU", "GB", "a step", "s", "share"):
        table.add_column(name, justify="right" if name in ("GB", "s", "share") else "left")
    memory = [(name, f"{size / 1e9:,.2f}") for name, size in best.memory.items()]
    parts = sorted(best.parts, key=lambda part: -part.seconds)
    times = [
        (part.name, f"{part.seconds:,.4g}", f"{part.seconds / best.step_seconds:.0%}")
        for part in parts
    ]
    rows = max(len(memory), len(times))
    memory += [("", "")] * (rows - len(memory))
    times += [("", "", "")] * (rows - len(times))
    for left, right in zip(memory, times, strict=True):
        table.add_row(*left, *right)
    console.print(table)
    console.print(
        f"energy at most {best.joules / 3.6e9:,.3g} MWh ({best.joules:.3g} J: GPUs at full load)",
        highlight=False,
    )


def show_side_by_side(console: Console, planned: Sequence["Planned"], tokens: int) -> None:
    """A row for each model; of one that no layout fits the reason below."""
    table = _table(f"Side by side, {_short(tokens)} tokens each")
    for name in ("", "total", "active", "FLOPs/token", "MFU", "days", "dollars", "the source"):
        table.add_column(name, justify="right" if name else "left")
    claims = dict(SOURCE)
    for one in planned:
        sizes, found = ["-"] * 2, ["-"] * 3 + ["refused"]
        if one.plan is not None:
            count = parameter_count(one.plan.model)
            sizes = [_parameters(count.total), _parameters(count.active)]
        if one.best is not None:
            best = one.best
            found = [_short(best.flops), f"{best.mfu:.1%}", f"{best.hours / 24:,.3g}"]
            found.append(_usd(best.usd))
        table.add_row(one.name, *sizes, *found, _usd(claims.get(one.name)))
    console.print(table)
    for one in planned:
        claim = claims.get(one.name)
        if one.error is not None:
            console.print(f"{one.name} is refused: {one.error}", highlight=False, soft_wrap=True)
        elif claim is not None and one.best is not None and one.best.usd:
            console.print(
                f"{one.name}: the source's {_usd(claim)} would pay for "
                f"{_short(tokens * claim / one.best.usd)} tokens here; it does not say how many it "
                "trained",
                highlight=False,
            )


def show_limits(console: Console, plan: Plan, best: Sequence["Prediction"], tokens: int) -> None:
    """What the figures are, in the plan's own output."""
    counted = "as asked" if plan.tokens else f"{TOKENS_PER_PARAMETER} a parameter"
    console.print(
        f"Predicted for {_short(tokens)} tokens ({counted}), GPUs busy all the time: no failures, "
        "evaluations or checkpoints. The loss is not predicted: equal tokens are not equal "
        "quality.",
        highlight=False,
    )
    for text in dict.fromkeys(text for one in best for text in one.extrapolated):
        console.print(f"extrapolated: {text}", highlight=False)
    console.print(f"{plan.cluster.name}: {plan.cluster.basis}", highlight=False)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _usd(amount: float | None) -> str:
    return "-" if amount is None else f"${_short(amount)}"


def _parameters(number: int) -> str:
    return f"{number / 1e9:,.2f}B" if number >= 1e9 else _short(number)


def _short(number: float) -> str:
    """Three digits: 1,656,000 is 1.66M."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"
