"""`kalmagrove train --dry-run`: what would be trained, and what it would need. Builds nothing."""

from typing import TypeVar

from rich.console import Console
from rich.table import Table

from kalmagrove.cli.compose import to_yaml
from kalmagrove.cli.session import path_here
from kalmagrove.config import Model, Run
from kalmagrove.config.counts import parameter_count, parameter_table

R = TypeVar("R", bound=Run)


def describe(run: Run, world_size: int) -> None:
    """Print the resolved run, its layout, and what it takes: memory, communication, FLOPs."""
    from kalmagrove.cli.launch import visible_gpus
    from kalmagrove.track import communication_estimate, flops_per_token, memory_estimate

    run, vocabulary = with_vocabulary(run)
    precision, gpu = run.engine.precision, bool(visible_gpus())
    if precision == "auto":
        precision = "bf16" if gpu else "fp32"
    path = path_here(run.model.backend, gpu)
    dp = run.data_parallel(world_size)
    print(to_yaml(run.model_dump(mode="json")))
    console = Console()
    console.print(_parameters(run))
    memory = [
        (row.component, row.bytes) for row in memory_estimate(run, world_size, precision, path)
    ]
    console.print(_bytes(f"Memory of a rank, {precision}", memory, "memory, all"))
    if world_size > 1:
        rows = communication_estimate(run, world_size, precision)
        sent = [(row.kind, row.bytes) for row in rows]
        console.print(_bytes(f"Sent by a rank in a step, {precision}", sent, "sent, all"))
    flops = flops_per_token(run.model, run.data.seq_len, path)
    repeated = run.engine.activation_checkpointing
    tokens = run.steps * run.batch.tokens
    console.print(
        f"layout         {_layout(run, world_size)}\n"
        f"tokens         {tokens:,} ({run.steps:,} steps of {run.batch.tokens:,}: "
        f"{dp} data-parallel ranks x {run.accumulation(dp)} micro-batches x "
        f"{run.batch.micro} rows of {run.data.seq_len})\n"
        f"model FLOPs    {flops.training:,.0f} a token in training (forward "
        f"{flops.forward:,.0f}), {flops.training * tokens:.3g} in all; {_beside_twin(run)}\n"
        f"hardware FLOPs {flops.hardware(repeated):,.0f} a token ({path}"
        f"{', blocks computed twice' if repeated else ''})\n"
        f"vocabulary     {run.model.vocab_size:,} ({vocabulary})\n"
        f"run folder     {run.dir}/{run.run_name}",
        highlight=False,
    )


def _layout(run: Run, world_size: int) -> str:
    parallel = run.parallel
    dense = f"tp {parallel.tp} x cp {parallel.cp} x dp {run.data_parallel(world_size)}"
    routed = f"ep {parallel.ep} x expert_dp {world_size // parallel.ep}"
    sequence = "; sequence" if parallel.sequence else ""
    return f"{world_size} ranks: {dense}; {routed}{sequence}; ZeRO {run.zero.stage}"


def _bytes(title: str, rows: list[tuple[str, int]], total: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("GB", justify="right")
    for name, size in rows:
        table.add_row(name, f"{size / 1e9:.3f}")
    table.add_row(total, f"{sum(size for _, size in rows) / 1e9:.3f}")
    return table


def _beside_twin(run: Run) -> str:
    """FLOPs per parameter, the model's and those of a dense one of as many parameters."""
    from kalmagrove.track import dense_twin, flops_per_token

    def share(model: Model) -> float:
        return flops_per_token(model, run.data.seq_len).training / parameter_count(model).total

    own, twin = share(run.model), share(dense_twin(run.model))
    return (
        f"{own:.2f} a parameter, a dense model of the same size {twin:.2f} ({own / twin - 1:+.0%})"
    )


def with_vocabulary(run: R) -> tuple[R, str]:
    """This run with the vocabulary of its tokenizer, and where that is from."""
    tokenizer = run.data.tokenizer
    if run.model.vocab_size is not None:
        return run, "as configured"
    if tokenizer.kind == "bpe":
        return run.with_vocab(tokenizer.vocab_size), "BPE, at most; a small corpus may give fewer"
    from kalmagrove.data.tokenizer import Auto

    assert tokenizer.name is not None
    return run.with_vocab(Auto.fetch(tokenizer.name, False).size), tokenizer.name


def _parameters(run: Run) -> Table:
    table = Table(title="Parameters", title_justify="left")
    for column in ("", "total", "active for a token"):
        table.add_column(column, justify="right" if column else "left")
    rows = parameter_table(run.model)
    for row in rows:
        table.add_row(row.component, f"{row.total:,}", f"{row.active:,}")
    total, active = sum(r.total for r in rows), sum(r.active for r in rows)
    table.add_row("all", f"{total:,}", f"{active:,}", style="bold")
    return table
