"""What a suite of `kalmagrove bench` found, as a table on the console, JSON, and plots."""

import importlib
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from kalmagrove.bench.spec import Case
from kalmagrove.config.files import replace_text

Record = dict[str, Any]
PASSES = ("fwd", "bwd", "fwd+bwd")


def driver() -> str | None:
    """The version of NVIDIA's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.split("\n")[0].strip() or None


def of_header(header: Record) -> Record:
    """What every record repeats, so that records of several files can be laid together."""
    return {name: header[name] for name in ("gpu", "versions", "commit")}


def write(path: Path, header: Record, records: Sequence[Record]) -> None:
    """`{"header": {...}, "records": [...]}`, one line a record; never half a file."""
    lines = ",\n".join(json.dumps(record) for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, f'{{"header": {json.dumps(header)},\n"records": [\n{lines}\n]}}\n')


def print_header(header: Record) -> None:
    top = header["ceilings"]
    print(
        f"{header['gpu'] or header['machine']}, {header['dtype']}: device copy "
        f"{top['bytes_per_s'] / 1e12:.3g} TB/s, matrix product "
        f"{top['flops_per_s'] / 1e12:.3g} TFLOP/s",
        flush=True,
    )
    if launch := header["launch_ms"]:
        print(
            f"an empty kernel in a graph: {1e3 * launch['kernel']:.2f} us, "
            f"a graph of one: {1e3 * launch['graph']:.2f} us",
            flush=True,
        )
    if not header["claims"]:
        print("Times on a CPU are no claims: this only shows that everything works.", flush=True)


def print_case(case: Case, records: Sequence[Record]) -> None:
    """A row an implementation: ms from the host and replayed, how far from the floor, memory.

    of_floor: the whole work's time, replayed if it was, over its floor.
    """
    table = Table("ms", title=str(case), title_justify="left", box=box.SIMPLE)
    for column in (*PASSES, *(f"graph {name}" for name in PASSES), "floor", "of_floor", "MB"):
        table.add_column(column, justify="right")
    by_impl: dict[str, list[Record]] = {}
    for record in records:
        by_impl.setdefault(record["impl"], []).append(record)
    for name, own in by_impl.items():
        if own[0]["check"] == "ok":
            table.add_row(name, *_cells(own))
    console = Console()
    Console(width=max(console.width, 120)).print(table)
    for name, own in by_impl.items():
        if own[0]["check"] != "ok":
            print(f"  {name}: {own[0]['check']}")
    print(flush=True)


def _cells(records: Sequence[Record]) -> list[str]:
    """The columns of one implementation."""
    by_pass = {(record["pass"], record["graph"]): record for record in records}
    times = [
        _ms(by_pass[name, graph]["median_ms"]) if (name, graph) in by_pass else ""
        for graph in (False, True)
        for name in PASSES
    ]
    best = fastest(records)
    assert best is not None
    peak = max(record["peak_extra_bytes"] or 0 for record in records)
    return [*times, _ms(best["floor_ms"]), f"{best['of_floor']:.2f}", f"{peak / 1e6:.0f}"]


def _ms(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}"


def fastest(records: Sequence[Record]) -> Record | None:
    """One implementation's whole work (fwd+bwd, or fwd alone): replayed, else from the host."""
    timed = [record for record in records if record["median_ms"] is not None]
    for name in ("fwd+bwd", "fwd"):
        of_pass = [record for record in timed if record["pass"] == name]
        if of_pass:
            return max(of_pass, key=lambda record: record["graph"])
    return None


def print_end(header: Record, out: Path | None) -> None:
    if header["skipped"]:
        print(f"out of time, not measured: {'; '.join(header['skipped'])}")
    print(f"{header.get('seconds', 0)} s" + (f", written to {out}" if out else ""))


def plot(folder: Path, header: Record, records: Sequence[Record]) -> list[Path]:
    """One figure an op, PNG and SVG: bars of the whole work by implementation, floors as lines."""
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError:
        print("no plots: matplotlib is not installed")
        return []
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for op in dict.fromkeys(record["op"] for record in records):
        suite = header["suite"]
        name = op if op.startswith(suite) else f"{suite}_{op}"
        cases = _by_case([record for record in records if record["op"] == op])
        if not cases:
            continue
        figure = figures.Figure(figsize=(7, 1 + 2.2 * len(cases)), layout="constrained")
        axes = figure.subplots(len(cases), 1, squeeze=False)[:, 0]
        for axis, (title, bars) in zip(axes, cases.items(), strict=True):
            _bars(axis, title, bars)
        figure.suptitle(f"{op}, {header['gpu'] or header['machine']}, {header['dtype']}")
        for ending in ("png", "svg"):
            path = folder / f"{name}.{ending}"
            figure.savefig(path, dpi=150)
            written.append(path)
    print(f"plots: {folder}")
    return written


def _by_case(records: Sequence[Record]) -> dict[str, list[Record]]:
    """By case, each implementation's whole work, slowest first."""
    cases: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        title = str(Case(record["op"], record["shape"]))
        cases.setdefault(title, {}).setdefault(record["impl"], []).append(record)
    found = {
        title: [best for each in by_impl.values() if (best := fastest(each)) is not None]
        for title, by_impl in cases.items()
    }
    return {
        title: sorted(bars, key=lambda r: -r["median_ms"]) for title, bars in found.items() if bars
    }


def _bars(axis: Any, title: str, bars: list[Record]) -> None:
    names = [r["impl"] + ("" if r["graph"] else " (host included)") for r in bars]
    colours = ["tab:green" if r["ours"] else "tab:gray" for r in bars]
    drawn = axis.barh(names, [r["median_ms"] for r in bars], color=colours)
    axis.bar_label(drawn, fmt="%.3g", padding=3)
    axis.vlines(
        [r["floor_ms"] for r in bars],
        [y - 0.4 for y in range(len(bars))],
        [y + 0.4 for y in range(len(bars))],
        colors="black",
        linestyles="dotted",
    )
    axis.set_title(title, fontsize=9, loc="left")
    axis.set_xlabel(f"{bars[0]['pass']}, ms (dotted: floor)", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
