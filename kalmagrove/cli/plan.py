"""`kalmagrove plan`: layouts of a run on a cluster, ranked; and models side by side."""

import json
import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kalmagrove.cli.compose import compose_tree, hydra_app, sweep_points
from kalmagrove.config import ConfigError, Plan, Run, validate
from kalmagrove.config.counts import parameter_count
from kalmagrove.config.errors import writing

if TYPE_CHECKING:
    from kalmagrove.plan import Prediction, Search

PLANS_OWN = {"cluster", "tokens", "search", "compare", "host", "show", "out", "price"}
# What `command` says itself: keys, and sections that it says wholly.
SAID = {"model", "zero", "zero.stage", "data.seq_len", "launch.nproc"}
SAID |= {"engine.precision", "engine.activation_checkpointing"}
SECTIONS = {"parallel", "batch", *PLANS_OWN}
SHARED = {"model", "data", "zero", "optim", "engine", "hydra"}  # both have them: `+` stays


class Planned(NamedTuple):
    """A model on the cluster: layouts that fit, or why there is none."""

    name: str
    words: Sequence[str]  # that ask for it
    result: "Search"
    plan: Plan | None = None  # as it was asked for, its vocabulary known; None: it cannot be loaded
    trained_vocabulary: bool = False  # which a tokenizer will decide that is trained on the corpus
    error: ConfigError | None = None

    @property
    def best(self) -> "Prediction | None":
        return self.result.found[0] if self.result.found else None


def main(argv: Sequence[str]) -> int:
    """Plan as `argv` says (Hydra overrides); returns the exit code."""
    words = [word for word in argv if not word.startswith("-") and "=" in word]
    if {"-m", "--multirun"} & set(argv):
        points = sweep_points("plan", words)
        plans = [validate(Plan, compose_tree("plan", point)) for point in points]
        return max(_plan(plan, point) for plan, point in zip(plans, points, strict=True))
    return hydra_app(
        "plan", argv, lambda tree: validate(Plan, tree), lambda plan, _: _plan(plan, words)
    )


def _plan(wanted: Plan, words: Sequence[str]) -> int:
    from rich.console import Console

    from kalmagrove.cli import plan_table
    from kalmagrove.cli.dry_run import with_vocabulary

    if wanted.engine.precision == "fp32":
        rule = "is not planned for: what is measured is bf16"
        raise ConfigError("engine.precision", "fp32", rule, "use engine.precision=bf16")
    if wanted.out is not None:
        _check_out(Path(wanted.out))
    others = [_other(name, words) for name in wanted.compare]
    size = parameter_count(with_vocabulary(wanted)[0].model).total
    tokens = wanted.tokens or plan_table.TOKENS_PER_PARAMETER * size
    planned = [planned_of(wanted, words, tokens)]
    planned += [_compared(name, told, tree, tokens) for name, told, tree in others]
    console = Console()
    for one in planned:
        if one.best is not None:
            plan_table.show_layouts(console, one)
            _show_command(one)
        elif one.result.refused:
            plan_table.show_refused(console, one)
    fitting = [one.best for one in planned if one.best is not None]
    if planned[0].best is not None:
        plan_table.show_parts(console, planned[0].best)
    if len(planned) > 1:
        plan_table.show_side_by_side(console, planned, tokens)
    if fitting:
        plan_table.show_limits(console, wanted, fitting, tokens)
    if wanted.out is not None:
        _write(Path(wanted.out), planned)
        print(wanted.out)
    if not fitting and planned[0].error is not None:
        raise planned[0].error
    return 0


def _check_out(out: Path) -> None:
    """Raises ConfigError if a file of that name cannot be written, before anything is planned."""
    if out.is_dir():
        raise ConfigError("out", out, "is a folder", f"try out={out / 'plan.json'}")
    if not out.parent.is_dir():
        raise ConfigError("out", out, f"is in no folder: there is no {out.parent}", "make it first")
    if not os.access(out if out.exists() else out.parent, os.W_OK):
        raise ConfigError("out", out, "cannot be written", "name a file in a folder of yours")


def _other(name: str, words: Sequence[str]) -> tuple[str, list[str], dict[str, Any]]:
    """A model to compare with, the words for the same plan of it, and what they compose.

    Raises:
        ConfigError: there is no such model.
    """
    told = [word for word in words if not word.startswith(("model=", "compare="))]
    told.append(f"model={name}")
    return name, told, compose_tree("plan", told)


def _compared(name: str, words: list[str], tree: dict[str, Any], tokens: int) -> Planned:
    """As `planned_of`; what is wrong with this model does not end the plan of others."""
    from kalmagrove.plan import Search

    try:
        return planned_of(validate(Plan, tree), words, tokens)
    except ConfigError as error:
        return Planned(name, words, Search([], []), error=error)


def planned_of(wanted: Plan, words: Sequence[str], tokens: int) -> Planned:
    """One model's layouts. What cannot be is told by `error`.

    Raises:
        ConfigError: the vocabulary or the host's file cannot be read.
    """
    from kalmagrove.cli.dry_run import with_vocabulary
    from kalmagrove.plan import HostTimes, Search, given, search

    host = HostTimes() if wanted.host is None else HostTimes.read(wanted.host)
    plan, error = with_vocabulary(wanted)[0], None
    try:
        result = (search if plan.search else given)(plan, plan.cluster, tokens, host)
        error = None if result.found else _why(plan, result)
    except ConfigError as caught:  # the given layout does not go over the GPUs
        result, error = Search([], []), caught
    trained = wanted.model.vocab_size is None and wanted.data.tokenizer.kind == "bpe"
    return Planned(plan.model.name, words, result, plan, trained, error)


def _why(plan: Plan, result: "Search") -> ConfigError:
    """What to say where nothing fits: the layout that comes nearest, or the rule that all break."""
    from kalmagrove.plan import search

    nearest = result.refused[0]
    if nearest.error is not None:
        return nearest.error
    rule = f"cannot hold {plan.model.name}; the nearest layout, {nearest.layout} {nearest.reason}"
    remedy = "use more GPUs, a smaller model, or a smaller data.seq_len"
    if not plan.search:
        rule = f"cannot hold {plan.model.name} as given: {nearest.layout} {nearest.reason}"
        if others := search(plan, plan.cluster, 1).found:
            given, best = layout_words(plan), layout_words(others[0].run)
            changes = [new for old, new in zip(given, best, strict=True) if old != new]
            remedy = f"try {' '.join(changes)}, or search=true"
    return ConfigError("cluster.gpus", plan.cluster.gpus, rule, remedy)


def layout_words(run: Run) -> list[str]:
    """The overrides that ask for the layout of `run`."""
    layout = run.parallel
    return [
        f"parallel.tp={layout.tp}",
        f"parallel.cp={layout.cp}",
        f"parallel.ep={layout.ep}",
        f"parallel.sequence={str(layout.sequence).lower()}",
        f"zero=stage{run.zero.stage}",
        f"batch.micro={run.batch.micro}",
        f"engine.activation_checkpointing={str(run.engine.activation_checkpointing).lower()}",
    ]


def command(one: Planned) -> str:
    """The words that train the first of its layouts, as it was planned."""
    assert one.best is not None
    run = one.best.run
    option = [word for word in one.words if word.startswith("model=")]
    kept = _kept(one.words)
    words = [
        *(option[-1:] or [f"model={run.model.name}"]),
        *kept,
        *layout_words(run),
        f"batch.tokens={run.batch.tokens}",
        f"data.seq_len={run.data.seq_len}",
    ]
    size = f"data.tokenizer.vocab_size={run.data.tokenizer.vocab_size}"
    if one.trained_vocabulary and size not in kept:
        words.append(size)
    words += [f"engine.precision={run.engine.precision}", f"launch.nproc={one.best.cluster.gpus}"]
    if not any(word.startswith("steps=") for word in kept):
        words.append(f"steps={math.ceil(one.best.tokens / run.batch.tokens)}")
    return shlex.join(["kalmagrove", "train", *words])


def _kept(words: Sequence[str]) -> list[str]:
    """Those that `kalmagrove train` needs too, and `command` does not say."""
    kept = []
    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        section = key.partition(".")[0]
        if key not in SAID and section not in SECTIONS:
            kept.append(word if section in SHARED else word.lstrip("+"))
    return kept


def _show_command(one: Planned) -> None:
    assert one.best is not None
    cluster = one.best.cluster
    print(command(one))
    if one.trained_vocabulary:
        size = one.best.run.model.vocab_size
        print(f"with a vocabulary of {size:,}: a tokenizer trained on a small corpus may have less")
    if cluster.gpus > cluster.gpus_per_node:
        machines = cluster.gpus // cluster.gpus_per_node
        print(f"on {machines} machines: docs/clusters.md says how processes start there")
    print()


def _write(out: Path, planned: Sequence[Planned]) -> None:
    from kalmagrove.plan.efficiency import TABLE

    measured = {name: row._asdict() for name, row in TABLE.items()}
    whole = {"models": [_tree(one) for one in planned], "measured": measured}
    with writing("out", out):
        out.write_text(json.dumps(whole, indent=1) + "\n")


def _tree(one: Planned) -> dict[str, Any]:
    """As JSON values."""
    count = None if one.plan is None else parameter_count(one.plan.model)
    return {
        "model": one.name,
        "parameters": count and count.total,
        "active_parameters": count and count.active,
        "command": None if one.best is None else command(one),
        "layouts": [layout.tree() for layout in one.result.found],
        "refused": [{"layout": no.layout, "reason": no.reason} for no in one.result.refused],
        "error": None if one.error is None else str(one.error),
    }
