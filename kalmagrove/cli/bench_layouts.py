"""`kalmagrove bench layouts`: train one model in every layout for a few steps, and compare; and
`kalmagrove bench host`: what each layer costs the host there.

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

LAYOUTS_USAGE = """kalmagrove bench layouts: speed, memory and communication of layouts, compared

usage: kalmagrove bench layouts [--steps N] [--only TEXT[;TEXT...]] [--out FILE] [key=value ...]

  --steps N    timed steps of each layout (5), after two that are not timed
  --only TEXT  layouts whose names begin so, of those for the number of processes
  --out FILE   the measurements, as JSON

The overrides are those of `kalmagrove train`; without model.vocab_size it is 32,768, and the tokens
are random. Layouts that do not fit the model are listed with the reason.

example: kalmagrove bench layouts model=kan_1b batch.tokens=65536 data.seq_len=2048 launch.nproc=2
"""


HOST_USAGE = """kalmagrove bench host: what a step costs the host, by kind of layer and layout

usage: kalmagrove bench host [--steps N] [--only TEXT[;TEXT...]] [--out FILE] [key=value ...]

  --steps N    timed steps of each model (10), after three that are not timed
  --only TEXT  layouts whose names begin so, of those for the number of processes
  --out FILE   the measurements, as JSON, for kalmagrove plan host=FILE

Models of two and eight layers of each kind in the model take steps of so few tokens that the GPU
waits for the host. It differs between machines by more than a third, and small models wait for it
all the time: measure it where you train. The overrides are those of `kalmagrove train`; batch and
data.seq_len are not used.

example: kalmagrove bench host model=kan_135m engine.precision=bf16 launch.nproc=1 --out host.json
"""


def layouts(argv: Sequence[str]) -> int:
    """`kalmagrove bench layouts`; returns the exit code."""
    return _suite("layouts", LAYOUTS_USAGE, 5, argv)


def host(argv: Sequence[str]) -> int:
    """`kalmagrove bench host`; returns the exit code."""
    return _suite("host", HOST_USAGE, 10, argv)


def _suite(name: str, usage: str, steps: int, argv: Sequence[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(usage)
        return 0
    parser = Parser(f"bench {name}", usage)
    parser.add_argument("--steps", type=int, default=steps)
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
        command = [*launch.command(run, processes), "kalmagrove", "bench", name, *argv]
        return launch.exit_code(subprocess.run(command, env=launch.environment()).returncode)
    _measure(name, words, processes, chosen.steps, chosen.only, chosen.out)
    return 0


def _measure(
    name: str, words: list[str], processes: int, steps: int, only: str, out: Path | None
) -> None:
    import torch

    from kalmagrove.bench import host, layouts
    from kalmagrove.bench.environment import environment

    def run_of(layout: layouts.Layout) -> Run | str:
        try:
            run = load(compose_tree("train", [*words, *layout.overrides]))
            return run.check_world(processes)
        except ConfigError as error:
            return str(error)

    wanted = [
        layout
        for layout in layouts.candidates(processes)
        if layout.name.startswith(tuple(only.split(";"))) and (layout.aside or name == "layouts")
    ]
    runs = [(layout, run_of(layout)) for layout in wanted]
    if not any(isinstance(run, Run) for _, run in runs):
        reasons = "; ".join(f"{layout.name}: {reason}" for layout, reason in runs)
        raise KalmaGroveError(f"no layout can be measured: {reasons or f'none is named {only}'}")
    # DeepSpeed calls collectives under names that torch 2.13 renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if launch.launched_rank() == 0 and not torch.cuda.is_available():
        print("kalmagrove: no GPU here; times on a CPU say little", file=sys.stderr)
    command = " ".join([f"kalmagrove bench {name}", f"--steps {steps}", *words])
    header = {"command": command, **environment()}

    def keep(result: dict[str, object]) -> None:
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(header | result, indent=1) + "\n")

    (host if name == "host" else layouts).run_all(runs, steps, keep)
