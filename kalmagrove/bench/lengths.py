"""Training throughput of attentions by the length of the rows: `kalmagrove bench lengths`.

Models of equal size that differ in their attention take steps of equally many random tokens, in
rows of one length after the other, in one process.
"""

import gc
import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kalmagrove.bench.environment import environment
from kalmagrove.bench.layouts import random_batches
from kalmagrove.config import KalmaGroveError, Model, Run
from kalmagrove.config.counts import parameter_count
from kalmagrove.engine import build_engine, connect, disconnect
from kalmagrove.engine.engine import Engine
from kalmagrove.nn import build_model
from kalmagrove.parallel import Groups
from kalmagrove.track import flops_per_token

Record = dict[str, Any]

WARMUP = 1  # steps at each length, beside one more of a new engine
METHOD = (
    "tokens of a step over the median of its seconds: forward, backward and the optimizer's update "
    "by the engine of `kalmagrove train` (DeepSpeed, one process), waited for; random tokens, no "
    "data loader. Softmax attention is torch's scaled_dot_product_attention, is_causal, by the "
    "kernel that PyTorch chooses."
)


class Contender(NamedTuple):
    """An attention, and its run at every length; the runs differ in nothing else."""

    attention: str
    runs: dict[int, Run]

    @property
    def first(self) -> Run:
        return next(iter(self.runs.values()))


def matching_width(model: Model, parameters: int) -> int | None:
    """The dense hidden width that brings a model next to so many parameters; None if not all of its
    feed-forwards are dense. A multiple of 64, of 8 below 512.
    """
    if {model.ffn_kind(layer) for layer in range(model.layers)} != {"dense"}:
        return None
    hidden = model.ffn.dense.hidden
    missing = parameters - parameter_count(model).total
    wanted = hidden + missing / (3 * model.d_model * model.layers)
    multiple = 64 if wanted >= 512 else 8
    return max(multiple, multiple * round(wanted / multiple))


def header_of(contenders: Sequence[Contender], steps: int, command: str) -> Record:
    run = contenders[0].first
    return environment() | {
        "suite": "lengths",
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "tokens_per_step": run.batch.tokens,
        "steps": steps,
        "backend": run.model.backend,
        "zero_stage": run.zero.stage,
        "optimizer": run.optim.kind,
        "activation_checkpointing": run.engine.activation_checkpointing,
        "parameters": {c.attention: parameter_count(c.first.model).total for c in contenders},
        "method": METHOD,
        "claims": torch.cuda.is_available(),
        "skipped": [],
    }


def run_all(
    contenders: Sequence[Contender],
    steps: int,
    seconds: float | None,
    header: Record,
    keep: Callable[[list[Record]], None],
) -> list[Record]:
    """A record for every attention and length.

    Args:
        steps: timed ones at each length.
        seconds: begin no length after that; those are named in the header.
        keep: given all records so far, after each.
    """
    begun = time.monotonic()
    device = connect(contenders[0].first)
    records: list[Record] = []
    try:
        if torch.distributed.get_world_size() > 1:
            raise KalmaGroveError("kalmagrove bench lengths is for one process")
        first = contenders[0].first
        groups = Groups.init(first.parallel, device, first.launch.timeout)
        for contender in contenders:
            bench = _Bench(contender, groups)
            for length in contender.runs:
                if seconds is not None and time.monotonic() - begun > seconds:
                    header["skipped"].append(f"{contender.attention} {length}")
                    continue
                records.append(bench.record(length, steps))
                print(line(records[-1]), flush=True)
                header["seconds"] = round(time.monotonic() - begun, 1)
                keep(records)
            bench.close()
        Groups.reset()
    finally:
        disconnect()
    return records


class _Bench:
    """One attention's engine, built when first needed and again after a failure."""

    def __init__(self, contender: Contender, groups: Groups) -> None:
        self.contender, self.groups = contender, groups
        self.cuda = groups.device.type == "cuda"
        self.engine: Engine | None = None
        self.held = 0  # bytes before the engine: DeepSpeed keeps some of the last one's
        self.numbers: Iterator[int] = count()

    def record(self, length: int, steps: int) -> Record:
        run = self.contender.runs[length]
        base: Record = {
            "attention": self.contender.attention,
            "length": length,
            "rows": run.batch.tokens // length,
            "tokens_per_second": None,
            "step_seconds": [],
            "loss": None,
            "model_flops_per_second": None,
            "peak_bytes": None,
            "check": "ok",
        }
        try:
            return base | self._measure(run, steps)
        except KalmaGroveError:
            raise
        except torch.OutOfMemoryError:
            failed = "failed: out of memory"
        except Exception as error:  # a kernel may raise anything; the others are still measured
            failed = f"failed: {type(error).__name__}: {error}".splitlines()[0][:200]
        self.close()
        return base | {"check": failed}

    def close(self) -> None:
        self.engine = None
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def _measure(self, run: Run, steps: int) -> Record:
        warmup = WARMUP
        if self.engine is None:
            self.engine, warmup = self._build(), WARMUP + 1
        batches = random_batches(run, self.groups)
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        taken = [self._step(self.engine, batches) for _ in range(warmup + steps)]
        times = [seconds for seconds, _ in taken[warmup:]]
        speed = run.batch.tokens / statistics.median(times)
        needed = flops_per_token(run.model, run.data.seq_len).training
        record: Record = {
            "tokens_per_second": speed,
            "step_seconds": [round(seconds, 5) for seconds in times],
            "loss": taken[-1][1],
            "model_flops_per_second": needed * speed,
        }
        if self.cuda:
            record["peak_bytes"] = torch.cuda.max_memory_allocated() - self.held
        return record

    def _build(self) -> Engine:
        run = self.contender.first
        if self.cuda:
            self.held = torch.cuda.memory_allocated()
        torch.manual_seed(run.seed)
        return build_engine(build_model(run.model, self.groups), run, self.groups)

    def _step(self, engine: Engine, batches: Iterator[Any]) -> tuple[float, float]:
        micro = [next(batches) for _ in range(engine.accumulation)]
        if self.cuda:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        loss, _ = engine.train_step(micro, next(self.numbers))
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begun, float(loss)


def line(record: Record) -> str:
    text = f"{record['attention']:10} {record['length']:>8,} tokens a row"
    if record["check"] != "ok":
        return f"{text}  {record['check']}"
    text += f"  {record['tokens_per_second']:12,.0f} tokens/s"
    text += f"  {record['model_flops_per_second'] / 1e12:6.1f} model TFLOP/s"
    if record["peak_bytes"] is not None:
        text += f"  {record['peak_bytes'] / 1e9:.1f} GB"
    return text


def plot(folder: Path, header: Record, records: Sequence[Record]) -> list[Path]:
    """Tokens a second over the length, a line an attention; crosses where there was no memory."""
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError:
        print("no plots: matplotlib is not installed")
        return []
    figure = figures.Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for i, attention in enumerate(header["parameters"]):
        own = [record for record in records if record["attention"] == attention]
        timed = [record for record in own if record["check"] == "ok"]
        failed = [record for record in own if record["check"] != "ok"]
        size = header["parameters"][attention] / 1e6
        lengths = [record["length"] for record in timed]
        speeds = [record["tokens_per_second"] for record in timed]
        axis.plot(lengths, speeds, "o-", color=f"C{i}", label=f"{attention}, {size:.0f}M")
        axis.plot([r["length"] for r in failed], [0] * len(failed), "x", color=f"C{i}")
    axis.set_xscale("log", base=2)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("tokens a row (crosses: failed)")
    axis.set_ylabel("tokens a second, training")
    axis.set_title(
        f"{header['tokens_per_step']:,} tokens a step, {header['gpu'] or header['machine']}, "
        f"model.backend={header['backend']}",
        fontsize=9,
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend()
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"lengths.{ending}" for ending in ("png", "svg")]
    for path in written:
        figure.savefig(path, dpi=150)
    print(f"plots: {folder}")
    return written
