"""`kalmagrove bench SUITE`: measure kernels against peers, or models and layouts side by side."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from kalmagrove.cli.arguments import Parser, UsageError

USAGE = """kalmagrove bench: measure this machine

usage: kalmagrove bench kernels [options]
       kalmagrove bench ada [options]
       kalmagrove bench lengths [options] [key=value ...]
       kalmagrove bench layouts [options] [key=value ...]
       kalmagrove bench host [options] [key=value ...]

  kernels   every KAN kernel against its peers: checked, then time, memory, distance from the floor
  ada       the same for the kernels of Arnold Diffusion Attention
  lengths   training throughput of attentions by the length of the rows
  layouts   throughput, memory and communication of layouts, side by side
  host      what each layer costs the host, for kalmagrove plan host=FILE

kalmagrove bench SUITE --help lists the options of a suite.
"""

OPTIONS = """  --device cuda|cpu   where (cuda); cpu only with --tiny, and its times are no claims
  --tiny              small shapes: does everything work?
  --ops NAME[,NAME]   of {ops} (all)
  --impl NAME[,NAME]  implementations: {implementations}, ... (all)
  --rounds N          samples of each implementation and pass (10)
  --seed N            of the random inputs (0)
  --seconds S         begin no case after that
  --out FILE          the measurements, as JSON
  --plots FOLDER      figures, PNG and SVG; needs matplotlib"""

KERNELS_USAGE = f"""kalmagrove bench kernels: our kernels and their peers, checked, then timed

usage: kalmagrove bench kernels [options]

{
    OPTIONS.format(
        ops="permute, edge_topk, projection, kan_layer, polynomial",
        implementations="ours, ours-cuda, grouped_mm, dense",
    )
}
  --tune              instead: time the Triton kernels' tile candidates, print the best as JSON

Exit code 1: an implementation of ours failed its check.
"""

ADA_USAGE = f"""kalmagrove bench ada: the kernels of ADA and their peers, checked, then timed

usage: kalmagrove bench ada [options]

{
    OPTIONS.format(
        ops="ada_decode, ada_norm_gate, ada_prepare, ada",
        implementations="ours, ours-learned, ours-plain, torch, fla, sdpa",
    )
}

Peers called fla need fla-core 0.6.0 and einops (pip install fla-core==0.6.0 einops).
Exit code 1: an implementation of ours failed its check.
"""


def main(argv: Sequence[str]) -> int:
    """Run the suite that `argv` names; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    suite, *rest = argv
    if suite not in SUITES:
        raise UsageError(f"bench: {suite} is not a suite; use {', '.join(SUITES)}")
    return SUITES[suite](rest)


def _against_peers(suite: str, usage: str, tunable: bool, argv: Sequence[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(usage)
        return 0
    parser = Parser(f"bench {suite}", usage)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--ops", type=_names, default=())
    parser.add_argument("--impl", type=_names, default=())
    parser.add_argument("--rounds", type=_positive, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plots", type=Path)
    if tunable:
        parser.add_argument("--tune", action="store_true")
    chosen = vars(parser.parse_args(argv))
    if chosen.pop("tune", False):
        from kalmagrove.bench import tune

        return tune.run(
            **{name: chosen[name] for name in ("device", "tiny", "ops", "rounds", "out")}
        )
    from kalmagrove.bench import runner, suites

    implementations = chosen.pop("impl")
    return runner.run(suites.SUITES[suite], implementations=implementations, **chosen)


def _layouts(argv: Sequence[str]) -> int:
    from kalmagrove.cli.bench_layouts import layouts

    return layouts(argv)


def _host(argv: Sequence[str]) -> int:
    from kalmagrove.cli.bench_layouts import host

    return host(argv)


def _lengths(argv: Sequence[str]) -> int:
    from kalmagrove.cli.bench_lengths import main

    return main(argv)


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


SUITES: dict[str, Callable[[Sequence[str]], int]] = {
    "kernels": partial(_against_peers, "kernels", KERNELS_USAGE, True),
    "ada": partial(_against_peers, "ada", ADA_USAGE, False),
    "lengths": _lengths,
    "layouts": _layouts,
    "host": _host,
}
