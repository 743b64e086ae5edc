"""`kalmagrove plan`: layouts of a run on a cluster, ranked; and models side by side."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalmagrove.cli.compose import compose_tree, hydra_app
from kalmagrove.config import ConfigError, Plan, validate
from kalmagrove.config.counts import parameter_count

if TYPE_CHECKING:
    from rich.console import Console

    from kalmagrove.plan import Prediction, Search

TOKENS_PER_PARAMETER = (
    20  # about what Hoffmann et al. (arXiv:2203.15556) find best for dense models
)
SOURCE = (("kan_340b", 230e3), ("moe_340b", 2.1e6))  # its table 1, for KAN-340B and DeepSeek-R1


def main(argv: Sequence[str]) -> int:
    """Plan as `argv` says (Hydra overrides); returns the exit code."""

    def task(wanted: Plan, in_sweep: bool) -> int:
        return _plan(wanted, argv)

    return hydra_app("plan", argv, lambda tree: validate(Plan, tree), task)


def _plan(wanted: Plan, argv: Sequence[str]) -> int:
    from rich.console import Console

    from kalmagrove.cli.dry_run import with_vocabulary

    if wanted.engine.precision == "fp32":
        rule = "is not planned for: what is measured is bf16"
        raise ConfigError("engine.precision", "fp32", rule, "use engine.precision=bf16")
    first = with_vocabulary(wanted)[0]
    plans = [first, *(with_vocabulary(_other(name, argv))[0] for name in wanted.compare)]
    tokens = wanted.tokens or TOKENS_PER_PARAMETER * parameter_count(first.model).total
    console = Console()
    results = [(plan, _search(plan, tokens)) for plan in plans]
    for plan, result in results:
        _show_layouts(console, plan, result)
    _show_best(console, results[0][1].found[0])
    if len(results) > 1:
        _show_side_by_side(console, [result.found[0] for _, result in results], tokens)
    _show_limits(console, wanted, [result.found[0] for _, result in results], tokens)
    if wanted.out is not None:
        _write(Path(wanted.out), results)
        print(wanted.out)
    return 0


def _other(name: str, argv: Sequence[str]) -> Plan:
    """The same plan of another model."""
    words = [word for word in argv if not word.startswith(("-", "model=", "compare="))]
    return validate(Plan, compose_tree("plan", [*words, f"model={name}"]))


def _search(plan: Plan, tokens: int) -> "Search":
    """Raises ConfigError if nothing fits, with the layout that comes nearest."""
    from kalmagrove.plan import HostTimes, Search, predicted, search

    cluster = plan.cluster
    host = HostTimes() if plan.host is None else HostTimes.read(plan.host)
    if plan.search:
        result = search(plan, cluster, tokens, host)
    else:
        result = Search([predicted(plan, cluster, tokens, host)], [])
    if not result.found or not result.found[0].fits:
        nearest = result.refused[0] if result.refused else None
        reason = f"{nearest.layout} {nearest.reason}" if nearest else _memory_line(result.found[0])
        raise ConfigError(
            "cluster.gpus",
            cluster.gpus,
            f"cannot hold {plan.model.name}; the nearest layout, {reason}",
            "use more GPUs, a smaller model, or a smaller data.seq_len",
        )
    return result


def _memory_line(prediction: "Prediction") -> str:
    return f"as given, needs {prediction.peak_bytes / 1e9:,.0f} GB of a GPU"


def _show_layouts(console: "Console", plan: Plan, result: "Search") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    count, cluster = parameter_count(plan.model), plan.cluster
    title = f"{plan.model.name}: {count.total / 1e9:,.2f}B parameters, {count.active / 1e9:,.2f}B"
    title += f" active, on {cluster.gpus} x {cluster.gpu}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("tp", "ep", "ZeRO", "micro", "again", "GB", "s/step", "tokens/s", "MFU", "days"):
        table.add_column(name, justify="right")
    table.add_column("dollars", justify="right")
    for one in result.found[: plan.show]:
        run = one.run
        table.add_row(
            f"{run.parallel.tp}",
            f"{run.parallel.ep}",
            f"{run.zero.stage}",
            f"{run.batch.micro}",
            "yes" if run.engine.activation_checkpointing else "no",
            f"{one.peak_bytes / 1e9:,.1f}",
            f"{one.step_seconds:,.3g}",
            _short(one.tokens_per_s),
            f"{one.mfu:.1%}",
            f"{one.hours / 24:,.3g}",
            _usd(one.usd),
        )
    console.print(table)
    left = len(result.found) - plan.show
    said = f"{left} more layouts fit" if left > 0 else ""
    if result.refused:
        nearest = result.refused[0]
        said += f"{'; ' if said else ''}{len(result.refused)} are refused, the nearest: "
        said += f"{nearest.layout} {nearest.reason}"
    if said:
        console.print(said, highlight=False)


def _show_best(console: "Console", best: "Prediction") -> None:
    """Memory and time of the layout that is recommended, and the overrides that ask for it."""
    from rich.table import Table

    from kalmagrove.plan.search import describe

    table = Table(title=f"The first: {describe(best.run)}", title_justify="left")
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
    run, layout = best.run, best.run.parallel
    console.print(
        f"kalmagrove train model={run.model.name} parallel.tp={layout.tp} parallel.cp={layout.cp} "
        f"parallel.ep={layout.ep} parallel.sequence={str(layout.sequence).lower()} "
        f"zero=stage{run.zero.stage} batch.micro={run.batch.micro} "
        "engine.activation_checkpointing="
        f"{str(run.engine.activation_checkpointing).lower()}\n"
        f"energy at most {best.joules / 3.6e9:,.3g} MWh ({best.joules:.3g} J: GPUs at full load)",
        highlight=False,
    )


def _show_side_by_side(console: "Console", best: list["Prediction"], tokens: int) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=f"Side by side, {_short(tokens)} tokens each",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in ("", "total", "active", "FLOPs/token", "MFU", "days", "dollars", "the source"):
        table.add_column(name, justify="right" if name else "left")
    claims = dict(SOURCE)
    for one in best:
        count = parameter_count(one.run.model)
        table.add_row(
            one.run.model.name,
            f"{count.total / 1e9:,.1f}B",
            f"{count.active / 1e9:,.1f}B",
            _short(one.flops),
            f"{one.mfu:.1%}",
            f"{one.hours / 24:,.3g}",
            _usd(one.usd),
            _usd(claims.get(one.run.model.name)),
        )
    console.print(table)
    for one in best:
        claim, usd = claims.get(one.run.model.name), one.usd
        if claim is not None and usd:
            console.print(
                f"{one.run.model.name}: the source's {_usd(claim)} would pay for "
                f"{_short(tokens * claim / usd)} tokens here; it does not say how many it trained",
                highlight=False,
            )


def _show_limits(console: "Console", plan: Plan, best: list["Prediction"], tokens: int) -> None:
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


def _usd(amount: float | None) -> str:
    return "-" if amount is None else f"${_short(amount)}"


def _short(number: float) -> str:
    """Three digits: 1,656,000 is 1.66M."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"


def _write(path: Path, results: list[tuple[Plan, "Search"]]) -> None:
    from kalmagrove.plan.efficiency import TABLE

    models: list[dict[str, Any]] = [
        {
            "model": plan.model.name,
            "parameters": parameter_count(plan.model).total,
            "active_parameters": parameter_count(plan.model).active,
            "layouts": [one.tree() for one in result.found],
            "refused": [refusal._asdict() for refusal in result.refused],
        }
        for plan, result in results
    ]
    measured = {name: row._asdict() for name, row in TABLE.items()}
    path.write_text(json.dumps({"models": models, "measured": measured}, indent=1) + "\n")
