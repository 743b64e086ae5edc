"""What ledger and budget cost a step: `python -m tests.meters_overhead [TURNS] [key=value ...]`.

A small model takes twenty steps with meters, then twenty without, in turns, in one process and
through the loop's own `_step`. Prints the medians of both, and what was measured inside the meters'
calls, which is less noisy than the difference. Not a test: other programs disturb it.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kalmagrove.bench.environment import environment
from kalmagrove.bench.layouts import random_batches
from kalmagrove.cli.compose import compose_tree
from kalmagrove.config import load
from kalmagrove.engine import build_engine, connect, disconnect
from kalmagrove.engine.checkpoint import State
from kalmagrove.engine.loop import _step
from kalmagrove.engine.timer import Timer
from kalmagrove.nn import build_model
from kalmagrove.parallel import Groups
from kalmagrove.track import build_meters

STEPS = 20  # of a turn: those of one ledger line
SETTINGS = [
    "model=kan_nano", "model.vocab_size=2048", "data.seq_len=256", "batch.tokens=1024",
    "steps=1000000", "track.console=off", "track.wandb=disabled", "price=cpu", "budget.usd=1000",
    "engine.refit_every=null", "engine.threads=1",
]  # fmt: skip


class Silent(Timer):
    def begin(self) -> None:
        """No clock is read."""

    def lap(self, phase: str, exchanging: Callable[[], float] | None = None) -> None:
        """No clock is read."""


class Without:
    def step(self, record: Any) -> None:
        """Nothing is counted."""

    def over_budget(self) -> None:
        """Nothing is asked."""


class Timed:
    """Meters, and the seconds inside them."""

    def __init__(self, meters: Any) -> None:
        self.meters, self.seconds = meters, 0.0

    def step(self, record: Any) -> None:
        # On the CPU the step is over. A timer's laps are inside the step: see the difference.
        begun = time.perf_counter()
        self.meters.step(record)
        self.seconds += time.perf_counter() - begun

    def over_budget(self) -> None:
        begun = time.perf_counter()
        self.meters.over_budget()
        self.seconds += time.perf_counter() - begun


def main(words: list[str]) -> None:
    turns = int(words.pop(0)) if words and words[0].isdigit() else 40
    run = load(compose_tree("train", [*SETTINGS, *words]))
    device = connect(run)
    groups = Groups.init(run.parallel, device)
    torch.manual_seed(0)
    engine = build_engine(build_model(run.model, groups), run, groups)
    batches: Any = iter(random_batches(run, groups))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        facts = {"params_total": 1, "params_active": 1, "flops_per_token": 1e9}
        meters = build_meters(run, folder, groups, **facts)  # type: ignore[arg-type]
        meters.start(0, 0)
        state, timed = State(folder), Timed(meters)
        kinds: dict[str, tuple[Any, Timer]] = {
            "without": (Without(), Silent(device)),
            "with": (timed, Timer(device)),
        }
        wall: dict[str, list[float]] = {name: [] for name in kinds}
        cpu: dict[str, list[float]] = {name: [] for name in kinds}
        for turn in range(turns + 1):  # the first warms up
            for name, (observer, timer) in sorted(kinds.items(), reverse=bool(turn % 2)):
                engine.timer, state.step = timer, turn * STEPS
                begun, used = time.perf_counter(), time.process_time()
                for _ in range(STEPS):
                    _step(engine, batches, observer, state, run)
                    observer.over_budget()
                if turn:
                    wall[name].append((time.perf_counter() - begun) / STEPS)
                    cpu[name].append((time.process_time() - used) / STEPS)
            if not turn:
                timed.seconds = 0.0
        meters.stop("stopped")
    disconnect()
    own = timed.seconds / turns / STEPS
    made = environment()
    print(f"{made['commit']}, {made['machine']}, {device}, torch {made['versions']['torch']}")
    print(f"{turns} turns of {STEPS} steps of {run.batch.tokens} tokens, a line a turn")
    for what, found in (("wall clock", wall), ("CPU time", cpu)):
        without, with_meters = (statistics.median(found[name]) for name in ("without", "with"))
        print(
            f"{what} a step: {without * 1e3:.2f} ms without meters, {with_meters * 1e3:.2f} with "
            f"({with_meters / without - 1:+.2%})"
        )
    part = own / statistics.median(wall["without"])
    print(f"inside the meters: {own * 1e3:.3f} ms a step ({part:.2%})")


if __name__ == "__main__":
    main(sys.argv[1:])
