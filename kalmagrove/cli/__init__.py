"""The command line: `kalmagrove VERB [key=value ...]`, one small module a verb.

A verb composes its configuration with Hydra, validates it, and only then imports torch. Known
failures are one line on stderr and an exit code: 2 configuration, 3 numbers not finite, 75 stopped
and resumable, 76 at a cap of `budget`, 77 hung, 1 anything else.
"""

import errno
import importlib
import sys
from collections.abc import Sequence

from kalmagrove import __version__
from kalmagrove.config import KalmaGroveError
from kalmagrove.config.secrets import scrub

VERBS = {
    "train": "train a model, from scratch or from where it stopped",
    "sweep": "search settings of runs; a table and a plot of many runs",
    "retrofit": "put KAN feed-forwards into a pretrained model, train, evaluate",
    "plan": "what a run would take on GPUs not rented yet, by layout",
    "prepare": "turn text into tokens on disk",
    "generate": "write text with a trained model",
    "evaluate": "score a model on benchmarks",
    "inspect": "plot and judge a model's learned edge functions",
}

TOOLS = {  # verbs without a configuration
    "checkpoint": "inspect, verify or convert a checkpoint",
    "report": "one HTML page about a run, or about several side by side",
    "ledger": "show, verify or export what a run did and cost",
    "track": "send runs to W&B, make its dashboards",
    "jobs": "list, follow or cancel runs that were given to Slurm",
    "doctor": "look for what may go wrong on this machine",
    "compare": "compare the arms of a study of retrofits",
    "bench": "measure kernels against their peers, or layouts against one another",
}

USAGE = """kalmagrove: train language models made of Kolmogorov-Arnold blocks

usage: kalmagrove VERB [key=value ...] [--help]

{verbs}

example: kalmagrove train model=kan_nano data=stdlib steps=300 launch.nproc=2
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        listed = "\n".join(f"  {v:12}{text}" for v, text in (VERBS | TOOLS).items())
        print(USAGE.format(verbs=listed))
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        print(f"kalmagrove {__version__}")
        return 0
    verb, rest = args[0], args[1:]
    if verb not in VERBS | TOOLS:
        names = ", ".join(VERBS | TOOLS)
        print(f"kalmagrove: {verb} is not a verb; use {names}", file=sys.stderr)
        return 2
    try:
        return int(importlib.import_module(f"kalmagrove.cli.{verb}").main(rest) or 0)
    except KalmaGroveError as error:
        _report(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("kalmagrove: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except OSError as error:  # what no verb has put into better words
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        place = error.filename or "a file"
        print(f"kalmagrove: {place} cannot be written ({error.strerror})", file=sys.stderr)
        return 1


def _report(error: KalmaGroveError) -> None:
    """One line, without secrets; of what connected ranks raise together, one line in all."""
    from kalmagrove.cli.launch import launched_rank

    rank = launched_rank()
    of_rank = f"rank {rank}: " if rank else ""

    def say() -> None:
        print(f"kalmagrove: {of_rank}{scrub(str(error))}", file=sys.stderr, flush=True)

    dist = sys.modules.get("torch.distributed")
    if error.collective and dist is not None and dist.is_initialized():
        from kalmagrove.parallel import last_word

        last_word(say)
    else:
        say()
