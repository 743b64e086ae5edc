"""`kalmagrove bench SUITE`: measure kernels against their peers, or layouts against one another."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from kalmagrove.config import KalmaGroveError

USAGE = """kalmagrove bench: measure this machine

usage: kalmagrove bench kernels [options]
       kalmagrove bench layouts [options] [key=value ...]

  kernels   every kernel against its peers: checked, then time, memory, distance from the floor
  layouts   throughput, memory and communication of layouts, side by side

kalmagrove bench SUITE --help lists the options of a suite.
"""

KERNELS_USAGE = """kalmagrove bench kernels: our kernels and their peers, checked, then timed

usage: kalmagrove bench kernels [options]

  --device cuda|cpu   where (cuda); cpu only with --tiny, and its times are no claims
  --tiny              small shapes: does everything work?
  --ops NAME[,NAME]   of permute, edge_topk, projection, kan_layer, polynomial (all)
  --impl NAME[,NAME]  implementations: ours, ours-cuda, grouped_mm, dense, ... (all)
  --rounds N          samples of each implementation and pass (10)
  --seed N            of the random inputs (0)
  --seconds S         begin no case after that
  --out FILE          the measurements, as JSON
  --plots FOLDER      figures, PNG and SVG; needs matplotlib
  --tune              instead: time the Triton kernels' tile candidates, print the best as JSON

Exit code 1: an implementation of ours failed its check.
"""


class _UsageError(KalmaGroveError):
    exit_code = 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"bench: {message}; see {self.prog} --help")


def main(argv: Sequence[str]) -> int:
    """Run the suite that `argv` names; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    suite, *rest = argv
    if suite not in SUITES:
        raise _UsageError(f"bench: {suite} is not a suite; use {', '.join(SUITES)}")
    return SUITES[suite](rest)


def _kernels(argv: Sequence[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(KERNELS_USAGE)
        return 0
    parser = _Parser(prog="kalmagrove bench kernels", usage=KERNELS_USAGE, add_help=False)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--ops", type=_names, default=())
    parser.add_argument("--impl", type=_names, default=())
    parser.add_argument("--rounds", type=_positive, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plots", type=Path)
    parser.add_argument("--tune", action="store_true")
    chosen = vars(parser.parse_args(argv))
    if chosen.pop("tune"):
        from kalmagrove.bench import tune

        return tune.run(
            **{name: chosen[name] for name in ("device", "tiny", "ops", "rounds", "out")}
        )
    from kalmagrove.bench import kernels

    return kernels.run(implementations=chosen.pop("impl"), **chosen)


def _layouts(argv: Sequence[str]) -> int:
    from kalmagrove.cli import bench_layouts

    return bench_layouts.main(argv)


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


SUITES: dict[str, Callable[[Sequence[str]], int]] = {"kernels": _kernels, "layouts": _layouts}
