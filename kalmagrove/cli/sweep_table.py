"""What a sweep has found: a table, `sweep.json`, `sweep.csv` and `sweep.svg`.

For the trials of `kalmagrove sweep`, for the runs of a sweep with `-m`, and for any folder of runs.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalmagrove.cli import study
from kalmagrove.cli.compose import read_yaml
from kalmagrove.cli.multirun import summary_of
from kalmagrove.config import DataError, KalmaGroveError
from kalmagrove.config.files import replace_text

if TYPE_CHECKING:
    from kalmagrove.track.report import Outcome, RunData

COLUMNS = 6  # settings in the console's table; the files have all
NAME = "sweep"  # of the files


@dataclass(frozen=True)
class Row:
    """A run. settings: those that are not the same in all. loss, bits: the last held out."""

    run: str
    settings: Mapping[str, Any]
    params: int | None
    steps: int
    loss: float | None
    bits: float | None
    usd: float | None
    status: str  # done | pruned | failed | stopped | budget | running | not begun
    why: str = ""
    best: bool = False
    pareto: bool = False

    def outcome(self, measure: str) -> "Outcome":
        from kalmagrove.track.report import Outcome

        loss = self.bits if measure == "bits" else self.loss
        return Outcome(self.run, self.usd, loss, self.status == "done")


@dataclass(frozen=True)
class Summary:
    """A sweep. objective: of a study; None: the runs are of no study, the loss is looked at."""

    folder: Path
    objective: str | None
    rows: Sequence[Row]

    @property
    def measure(self) -> str:
        return (self.objective or "loss").partition("_")[0]


def summarize(folder: Path) -> Summary:
    """Read a study, or any folder that holds runs.

    Raises:
        DataError: it holds neither.
    """
    if (folder / study.JOURNAL).is_file():
        facts, trials = study.read(folder)
        rows = [_of_trial(folder, trial) for trial in newest(trials)]
        return _judged(Summary(folder, facts["objective"], rows))
    from kalmagrove.track.report import config_diff, read_run, run_folders

    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; name that of a sweep (runs/STUDY)")
    runs = [read_run(f, config=_config(f)) for f in run_folders([folder])]
    settings: dict[str, dict[str, str]] = {run.name: {} for run in runs}
    for key, *cells in config_diff(runs)[1]:
        for run, cell in zip(runs, cells, strict=True):
            settings[run.name][key] = cell
    rows = [_of_run(run, settings[run.name]) for run in runs]
    return _judged(Summary(folder, None, rows))


def newest(trials: Sequence[study.Trial]) -> list[study.Trial]:
    """Of trials that share a run the last one, in the order of the runs."""
    return list({trial.name: trial for trial in trials}.values())


def show(summary: Summary) -> None:
    """Print the table: the best first, then what is not done."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from kalmagrove.track.report.markup import dollars, number

    keys = telling([row.settings for row in summary.rows])
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("run", no_wrap=True)
    for key in keys[:COLUMNS]:
        table.add_column(key, overflow="fold", min_width=8)
    for column in ("params", "steps", "bits/byte" if summary.measure == "bits" else "loss", "cost"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("status", min_width=6)  # wraps between words
    for row in summary.rows:
        cells = [study.setting_text(row.settings.get(key, "-")) for key in keys[:COLUMNS]]
        loss, usd = row.outcome(summary.measure).loss, dollars(row.usd)
        cells += [number(row.params), f"{row.steps:,}", "-" if loss is None else f"{loss:.4f}"]
        marks = ", best" * row.best + ", Pareto" * row.pareto
        table.add_row(row.run, *cells, usd, row.status + marks)
    Console().print(table)
    for row in summary.rows:
        if row.why:
            print(f"{row.run}: {row.why}")
    if len(keys) > COLUMNS:
        print(f"{len(keys) - COLUMNS} more settings differ: see {NAME}.csv")


def write(summary: Summary) -> None:
    """Write the three files beside the runs; the plot if two runs have loss and dollars.

    Raises:
        KalmaGroveError: they cannot be written.
    """
    from kalmagrove.track.report import as_file, trade

    label = "bits a byte" if summary.measure == "bits" else "loss (nats a token)"
    figure = trade([row.outcome(summary.measure) for row in summary.rows], label)
    known = [row.usd for row in summary.rows if row.usd is not None]
    told = {
        "objective": summary.objective,
        "usd": sum(known) if len(known) == len(summary.rows) else None,
        "best": next((row.run for row in summary.rows if row.best), None),
        "pareto": [row.run for row in summary.rows if row.pareto],
        "runs": [asdict(row) for row in summary.rows],
    }
    files = {"json": json.dumps(told, indent=2) + "\n", "csv": _csv(summary.rows)}
    if not figure.absent:
        files["svg"] = as_file(figure)
    for ending, text in files.items():
        path = summary.folder / f"{NAME}.{ending}"
        try:
            replace_text(path, text)
        except OSError as error:
            raise KalmaGroveError(f"{path} cannot be written ({error.strerror})") from None


def telling(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys that tell the runs apart; of those that always change together the first.

    >>> telling([{"name": "a", "d": 1, "lr": 1}, {"name": "b", "d": 2, "lr": 1}])
    ['name']
    """
    found: dict[tuple[int, ...], str] = {}
    for key in dict.fromkeys(key for each in settings for key in each):
        values = [str(each.get(key)) for each in settings]
        pattern = tuple(values.index(value) for value in values)
        if len(settings) == 1 or any(pattern):
            found.setdefault(pattern, key)
    return list(found.values())


def _judged(summary: Summary) -> Summary:
    """Best and Pareto front marked; sorted by loss, what is not done last."""
    from kalmagrove.track.report import pareto

    outcomes = {row.run: row.outcome(summary.measure) for row in summary.rows}
    front = {one.name for one in pareto(list(outcomes.values()))}

    def place(row: Row) -> tuple[bool, float, str]:
        loss = outcomes[row.run].loss
        return row.status != "done", float("inf") if loss is None else loss, row.run

    rows = sorted(summary.rows, key=place)
    judged = []
    for i, row in enumerate(rows):
        best = i == 0 and row.status == "done" and outcomes[row.run].loss is not None
        judged.append(replace(row, best=best, pareto=row.run in front))
    return Summary(summary.folder, summary.objective, judged)


def _of_trial(folder: Path, trial: study.Trial) -> Row:
    from kalmagrove.track.report import read_run

    try:
        row = _of_run(read_run(folder / trial.name), trial.params)
    except DataError:  # it has no ledger yet, or was removed
        cost = 0.0 if trial.state == "open" else None
        row = Row(trial.name, trial.params, None, 0, None, None, cost, "not begun")
    status = row.status if trial.state == "open" else trial.state
    return replace(row, status=status, why=trial.why)


def _of_run(run: "RunData", settings: Mapping[str, Any]) -> Row:
    usd, last = run.history.spent.usd, run.evals[-1] if run.evals else {}
    return Row(
        run=run.name,
        settings=dict(settings),
        params=summary_of(run.folder).get("params_total"),
        steps=run.history.reached[0],
        loss=last.get("val_loss"),
        bits=last.get("val_bits_per_byte"),
        usd=None if usd is None else float(usd),
        status={"open": "running"}.get(run.status, run.status),
    )


def _config(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.yaml"
    return read_yaml(str(path)) if path.is_file() else None


def _csv(rows: Sequence[Row]) -> str:
    facts = ("params", "steps", "loss", "bits", "usd", "status", "best", "pareto")
    keys = list(dict.fromkeys(key for row in rows for key in row.settings))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", *keys, *facts, "why"])
    for row in rows:
        settings = [row.settings.get(key) for key in keys]
        writer.writerow([row.run, *settings, *(getattr(row, fact) for fact in facts), row.why])
    return text.getvalue()
