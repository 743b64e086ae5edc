"""`kalmagrove bench layouts`: train one model in every layout for a few steps, and compare.

The words are those of `kalmagrove train`; without a launcher this starts the processes itself.
"""

import json
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from kalmagrove.cli import launch
from kalmagrove.cli.arguments import Parser
from kalmagrove.cli.compose import compose_tree
from kalmagrove.config import ConfigError, KalmaGroveError, Run, load

USAGE = """kalmagrove bench layouts: throughput, memory and communication of layouts, side by side

usage: kalmagrove bench layouts [--steps N] [--only TEXT[;TEXT...]] [--out FILE] [key=value ...]

  --steps N    timed steps of each layout (5), after two that are not timed
  --only TEXT  layouts whose names begin so, of those for the number of processes
  --out FILE   the measurements, as JSON

The overrides are those of `kalmagrove train`; without model.vocab_size it is 32,768, and the tokens
are random. Layouts that do not fit the model are listed with the reason.

example: kalmagrove bench layouts model=kan_1b batch.tokens=65536 data.seq_len=2048 launch.nproc=2
"""


def main(argv: Sequence[str]) -> int:
    """Do what `argv` says; returns the exit code."""
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0
    parser = Parser("bench layouts", USAGE, "see --help")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    chosen, words = parser.parse_known_args(argv)
    if chosen.steps < 1:
        raise ConfigError("--steps", chosen.steps, "must be at least 1")
    if not any(word.partition("=")[0].endswith("model.vocab_size") for word in words):
        words.append("model.vocab_size=32768")
    run = load(compose_tree("train", words))
    processes = launch.world_size(run)
    if processes > 1 and launch.launched_world_size() is None:
        command = [*launch.command(run, processes), "kalmagrove", "bench", "layouts", *argv]
        return launch.exit_code(subprocess.run(command, env=launch.environment()).returncode)
    _measure(words, processes, chosen.steps, chosen.only, chosen.out)
    return 0


def _measure(words: list[str], processes: int, steps: int, only: str, out: Path | None) -> None:
    import torch

    from kalmagrove.bench.environment import environment
    from kalmagrove.bench.layouts import Layout, candidates, run_all

    def run_of(layout: Layout) -> Run | str:
        try:
            run = load(compose_tree("train", [*words, *layout.overrides]))
            return run.check_world(processes)
        except ConfigError as error:
            return str(error)

    layouts = [
        layout for layout in candidates(processes) if layout.name.startswith(tuple(only.split(";")))
    ]
    runs = [(layout, run_of(layout)) for layout in layouts]
    if not any(isinstance(run, Run) for _, run in runs):
        reasons = "; ".join(f"{layout.name}: {reason}" for layout, reason in runs)
        raise KalmaGroveError(f"no layout can be measured: {reasons or f'none is named {only}'}")
    # DeepSpeed calls collectives under names that torch 2.13 renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if launch.launched_rank() == 0 and not torch.cuda.is_available():
        print("kalmagrove: no GPU here; times on a CPU say little", file=sys.stderr)
    command = " ".join(["kalmagrove bench layouts", f"--steps {steps}", *words])
    header = {"command": command, **environment()}

    def keep(result: dict[str, object]) -> None:
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(header | result, indent=1) + "\n")

    run_all(runs, steps, keep)
