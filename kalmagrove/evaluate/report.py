"""What an evaluation leaves: results.json, items/TASK.jsonl, and a table for people."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from kalmagrove.config import KalmaGroveError, Price
from kalmagrove.config.files import replace_text
from kalmagrove.engine.connect import usable_cores
from kalmagrove.track import Cost
from kalmagrove.track.summary import code_version, machine, versions

FEW = 30  # tasks of a group that the table lists one by one


def facts_of(
    device: torch.device, ranks: int, price: Price | None, seconds: float
) -> dict[str, Any]:
    """What the evaluation took, and what it was made with; unknown dollars are None."""
    cores = usable_cores()
    cost = Cost.of(price, device.type, ranks, cores) if price is not None else None
    dollars = None if cost is None else cost.usd(cost.device_seconds(seconds))
    return {
        "seconds": round(seconds, 3),
        "dollars": None if dollars is None else float(round(dollars, 6)),
        "price": None if price is None else price.name,
        "device": {"type": device.type, "ranks": ranks} | machine(device),
        "versions": versions() | {"lm-eval": version("lm_eval")},
        "commit": code_version(),
    }


def write_results(
    folder: Path, results: Mapping[str, Any], items: Mapping[str, list[dict[str, Any]]]
) -> None:
    """Write the files whole or not at all, the results last.

    Raises:
        KalmaGroveError: if they cannot be written (a full disk).
    """
    try:
        (folder / "items").mkdir(parents=True, exist_ok=True)
        for task, found in items.items():
            lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in found]
            replace_text(folder / "items" / f"{task}.jsonl", "".join(lines))
        text = json.dumps(results, indent=2, allow_nan=False, ensure_ascii=False)
        replace_text(folder / "results.json", text + "\n")
    except OSError as error:
        raise KalmaGroveError(
            f"{folder} cannot hold the results ({error.strerror or error}); free space or give "
            "another out"
        ) from error


def results_table(results: Mapping[str, Any]) -> Table:
    """Scores beside random guessing and the most frequent answer; in percent."""
    table = Table(title=f"{results['model']} on {results['suite']}", title_justify="left")
    table.add_column("task", overflow="fold")
    for column in ("items", "score", "+-", "random", "majority", "no answer"):
        table.add_column(column, justify="right")
    grouped = {name for group in results["groups"].values() for name in group["tasks"]}
    for name, task in results["tasks"].items():
        if name not in grouped:
            _add(table, name, task)
    for entry, group in results["groups"].items():
        if len(group["tasks"]) <= FEW:
            for name in group["tasks"]:
                _add(table, name.removeprefix(f"{entry}_"), results["tasks"][name])
        _add(table, f"{entry}, mean of {len(group['tasks'])}", group, end=True)
    if len(results["groups"]) + len(results["tasks"]) - len(grouped) > 1:
        table.add_row("average", "", _percent(results["average"]), "", "", "", "")
    return table


def _add(table: Table, name: str, row: Mapping[str, Any], end: bool = False) -> None:
    score = row["metrics"][row["primary"]]
    table.add_row(
        name,
        f"{row['n']:,}",
        _percent(score["value"]),
        _percent(score.get("stderr")),
        _percent(row["random"]),
        _percent(row["majority"]),
        _percent(row["parse_failures"]),
        style="bold" if end else None,
        end_section=end,
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"
