"""What remains of a run: `summary.json`, and the table that sets its loss beside n-gram baselines.

Written by `Meters.stop` out of the ledger; read by people, scripts and comparisons between runs.
"""

import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import kalmagrove
from kalmagrove.config import KalmaGroveError
from kalmagrove.config.files import read_json, replace_text
from kalmagrove.track.ledger import History, Line


@dataclass(frozen=True)
class Facts:
    """What the summary needs beside the ledger."""

    run: str
    params_total: int
    params_active: int
    flops_per_token: float
    world_size: int
    devices: int
    unit: str
    price: str
    usd_per_device_hour: float | None
    device: torch.device
    baselines: Mapping[str, float | None] = field(default_factory=dict)
    val_bytes_per_token: float | None = None
    val_split_tokens: int | None = None  # predicted tokens of the held-out split
    forward_flops_per_token: float | None = None
    hardware_flops_per_token: float | None = None
    peak_tflops: float | None = None  # of one device; None: unknown

    def utilisation(self, flops_per_token: float | None, tokens_per_s: float) -> float | None:
        """The share of the devices' peak that these FLOPs are; None if one of both is unknown."""
        if flops_per_token is None or self.peak_tflops is None:
            return None
        return round(tokens_per_s * flops_per_token / (self.peak_tflops * 1e12 * self.devices), 4)


def summarize(history: History, facts: Facts, *, status: str, **more: Any) -> dict[str, Any]:
    """The run in one flat dictionary. Unknown figures are None.

    val_loss_nats is the last evaluation's, in nats per token; val_bits_per_byte the same per byte
    of held-out text, comparable between tokenizers. tokens_per_s counts training alone, without
    evaluations and checkpoints; device_seconds and usd count everything, lost work too; goodput is
    the part of device_seconds, without what is inherited from another ledger, in which training
    steps were done that lasted. joules are those of `track.energy`, to the last line. val_tokens
    were evaluated, of the val_split_tokens that the baselines are for.
    """
    return {
        **more,
        "status": status,
        "run": facts.run,
        **_figures(history),
        "val_bytes_per_token": facts.val_bytes_per_token,
        "val_split_tokens": facts.val_split_tokens,
        "unigram_nats": facts.baselines.get("unigram_nats"),
        "bigram_nats": facts.baselines.get("bigram_nats"),
        "peak_tflops": facts.peak_tflops,
        "params_total": facts.params_total,
        "params_active": facts.params_active,
        "flops_per_token": facts.flops_per_token,
        "hardware_flops_per_token": facts.hardware_flops_per_token,
        "world_size": facts.world_size,
        "devices": facts.devices,
        "device_unit": facts.unit,
        "price": facts.price,
        "usd_per_device_hour": facts.usd_per_device_hour,
        "commit": code_version(),
        "versions": versions(),
        "machine": machine(facts.device),
    }


def _figures(history: History) -> dict[str, Any]:
    """What the ledger alone tells."""
    evals, trained = history.series("eval"), history.series("step")
    best = min((line["val_loss"] for line in evals if line["val_loss"] is not None), default=None)
    steps, tokens = history.reached
    spent, lost = history.spent, history.lost
    return {
        "steps": steps,
        "tokens": tokens,
        "train_loss_nats": _last(trained, "loss"),
        "val_loss_nats": _last(evals, "val_loss"),
        "best_val_loss_nats": best,
        "val_bits_per_byte": _last(evals, "val_bits_per_byte"),
        "val_tokens": _last(evals, "val_tokens"),
        "tokens_per_s": throughput(trained),
        "tokens_per_s_device": _last(trained, "tokens_per_s_device"),
        "mfu": _last(trained, "mfu"),
        "hfu": _last(trained, "hfu"),
        "peak_memory": max(
            (line["peak_memory"] for line in trained if line.get("peak_memory")), default=None
        ),
        "device_seconds": spent.device_seconds,
        "usd": None if spent.usd is None else float(spent.usd),
        "joules": history.joules,
        "wall_seconds": spent.wall_seconds,
        "goodput": history.goodput,
        "lost_steps": lost.steps,
        "lost_device_seconds": lost.device_seconds,
        "sessions": history.sessions,
    }


def summary_of(run_dir: Path, history: History) -> dict[str, Any]:
    """`summary.json`, if it is of the ledger's end; else what the ledger alone tells.

    Its status is then that of the ledger's last line, or `open`: the run goes on, or was killed.
    """
    last = history.lines[-1]
    if last["event"] == "stop":
        written = read_json(run_dir / "summary.json") or {}  # a kill may have come before it
        if written.get("device_seconds") == last["device_seconds"]:
            return written
    status = last["status"] if last["event"] == "stop" else "open"
    run = next((line["run"] for line in reversed(history.lines) if "run" in line), run_dir.name)
    return {"status": status, "run": run, **_figures(history)}


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> Path:
    """Write `summary.json` whole or not at all; returns its path.

    Raises:
        KalmaGroveError: if the file cannot be written (a full disk).
    """
    path = run_dir / "summary.json"
    try:
        replace_text(path, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise KalmaGroveError(
            f"{path} cannot be written ({error.strerror}); the ledger beside it is whole"
        ) from error
    return path


def results_table(summary: Mapping[str, Any]) -> Table:
    """Held-out loss of the model beside the n-gram baselines of the same split.

    With `eval.max_tokens` the model's is of a part of the split, which the title says.
    """
    title, part, whole = "Held-out loss", summary.get("val_tokens"), summary.get("val_split_tokens")
    if part and whole and part < whole:
        title += f" (the model: first {part:,} of {whole:,} tokens; the baselines: all)"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("nats/token", justify="right")
    table.add_column("bits/byte", justify="right")
    for name, key in (
        (summary["run"], "val_loss_nats"),
        ("bigram", "bigram_nats"),
        ("unigram", "unigram_nats"),
    ):
        nats = summary[key]
        bits = bits_per_byte(nats, summary["val_bytes_per_token"])
        table.add_row(name, *("-" if x is None else f"{x:.4f}" for x in (nats, bits)))
    return table


def bits_per_byte(nats: float | None, bytes_per_token: float | None) -> float | None:
    """Nats per token as bits per byte of text; None if either is unknown."""
    if nats is None or not bytes_per_token:
        return None
    return nats / math.log(2) / bytes_per_token


def throughput(steps: list[Line]) -> float | None:
    """Tokens a second of training, over the given step lines weighted by their length."""
    seconds = sum(line["train_seconds"] for line in steps)
    tokens = sum(line["tokens_per_s"] * line["train_seconds"] for line in steps)
    return tokens / seconds if seconds else None


def code_version() -> str:
    """The commit of the running code, `-dirty` if changed; outside git the package version."""
    package = Path(kalmagrove.__file__).parent
    frozen = package.parent / "COMMIT"  # of a copy made for a job
    if frozen.is_file():
        return frozen.read_text().strip()

    def git(*command: str) -> str:
        result = subprocess.run(
            ["git", "-C", str(package), *command],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return result.stdout.strip()

    try:
        # A package installed below somebody's repository is not part of it.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    except (OSError, subprocess.SubprocessError):
        return kalmagrove.__version__


def versions() -> dict[str, str]:
    """Of the packages that decide a result."""
    found = {"python": platform.python_version(), "kalmagrove": kalmagrove.__version__}
    for name in ("torch", "deepspeed", "megatron-core", "transformers", "tokenizers", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """The first rank's machine."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"host": platform.node(), "cpu": _cpu_name(), "cores": os.cpu_count(), "gpu": gpu}


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _last(lines: list[Line], key: str) -> Any:
    return lines[-1].get(key) if lines else None
