"""`kalmagrove bench lengths`: compose the runs of every attention and length, and measure them.

The words are those of `kalmagrove train`; everything happens in this process.
"""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kalmagrove.cli import launch
from kalmagrove.cli.arguments import Parser
from kalmagrove.cli.compose import compose_tree
from kalmagrove.config import ConfigError, KalmaGroveError, Run, load

if TYPE_CHECKING:
    from kalmagrove.bench.lengths import Contender

DEFAULTS = [
    "model=kan_135m",
    "ffn=dense",
    "model.name=lengths",
    "model.d_model=1024",
    "model.layers=12",
    "model.attention.ada.heads=8",
    "model.attention.softmax.heads=8",
    "model.attention.softmax.kv_heads=8",
    "model.ffn.dense.hidden=2816",
    "model.vocab_size=8192",
    "optim=adamw",
    "engine.activation_checkpointing=true",
    "engine.refit_every=null",
]
LENGTHS = tuple(1024 * 2**i for i in range(8))

USAGE = """kalmagrove bench lengths: training throughput of attentions by the length of the rows

usage: kalmagrove bench lengths [options] [key=value ...]

  --attentions NAME[,NAME]   of conf/attention (ada,hybrid,softmax)
  --lengths N[,N]            tokens a row (1024,2048,...,131072)
  --tokens N                 of a step, all of which are in memory at once (131072)
  --steps N                  timed at each length (3), after one that is not timed
  --seconds S                begin no length after that
  --out FILE                 the measurements, as JSON
  --plots FOLDER             the figure, PNG and SVG; needs matplotlib

A step is forward, backward and update by the engine of `kalmagrove train` (DeepSpeed, AdamW), in
one process. The model has 12 layers, 1024 wide, 8 heads of 128, SwiGLU feed-forwards and 8,192
words, 175M parameters; the feed-forwards of the second attention and the following are widened or
narrowed to as many parameters as the first has. Blocks are computed again in the backward pass
(engine.activation_checkpointing). The overrides are those of `kalmagrove train`, model.backend for
the kernels among them; with model=NAME that model's own sizes are taken. What runs out of memory
is listed as failed.

example: kalmagrove bench lengths --lengths 2048,16384 --attentions ada,softmax model=kan_1b
"""


def main(argv: Sequence[str]) -> int:
    """Do what `argv` says; returns the exit code: 1 if nothing could be measured."""
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0
    parser = Parser("bench lengths", USAGE)
    parser.add_argument("--attentions", default="ada,hybrid,softmax")
    parser.add_argument("--lengths", type=_numbers, default=LENGTHS)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plots", type=Path)
    chosen, words = parser.parse_known_args(argv)
    if chosen.steps < 1:
        raise ConfigError("--steps", chosen.steps, "must be at least 1")
    for length in chosen.lengths:
        if length < 1 or chosen.tokens % length:
            rule = f"must divide --tokens={chosen.tokens}"
            raise ConfigError("--lengths", length, rule, "choose powers of two")
    if (launch.launched_world_size() or 1) > 1:
        raise KalmaGroveError("kalmagrove bench lengths is for one process, without a launcher")
    words = [*_defaults(words), *words]
    runs = contenders(chosen.attentions.split(","), chosen.lengths, chosen.tokens, words)
    command = " ".join(["kalmagrove bench lengths", *argv])
    return _measure(runs, chosen.steps, chosen.seconds, command, chosen.out, chosen.plots)


def contenders(
    attentions: Sequence[str], lengths: Sequence[int], tokens: int, words: Sequence[str]
) -> list["Contender"]:
    """Each attention's runs, sized like the first one's.

    words: all overrides but those of attention, row and step.
    """
    from kalmagrove.bench.lengths import Contender, matching_width
    from kalmagrove.config.counts import parameter_count

    found: list[Contender] = []
    for attention in attentions:
        own = [*words, f"attention={attention}"]
        if found:
            parameters = parameter_count(found[0].first.model).total
            model = _run(own, lengths[0], tokens).model
            if (width := matching_width(model, parameters)) is not None:
                own.append(f"model.ffn.dense.hidden={width}")
        found.append(Contender(attention, {n: _run(own, n, tokens) for n in lengths}))
    return found


def _run(words: Sequence[str], length: int, tokens: int) -> Run:
    step = [f"data.seq_len={length}", f"batch.tokens={tokens}", f"batch.micro={tokens // length}"]
    return load(compose_tree("train", [*words, *step])).check_world(1)


def _defaults(words: Sequence[str]) -> list[str]:
    """Those that the words leave; with a model of theirs, its own sizes."""
    given = {word.partition("=")[0].lstrip("+~") for word in words}
    kept = [word for word in DEFAULTS if word.partition("=")[0] not in given]
    if "model" in given:
        kept = [w for w in kept if not w.startswith("model.") or w.startswith("model.vocab_size")]
    return kept


def _measure(
    runs: list["Contender"],
    steps: int,
    seconds: float | None,
    command: str,
    out: Path | None,
    plots: Path | None,
) -> int:
    import torch

    from kalmagrove.bench import lengths, report

    # DeepSpeed calls collectives under names that torch 2.13 renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if not torch.cuda.is_available():
        print("kalmagrove: no GPU here; times on a CPU say little", file=sys.stderr)
    header = lengths.header_of(runs, steps, command)
    for attention, size in header["parameters"].items():
        print(f"{attention:10} {size:12,} parameters")

    def keep(records: list[dict[str, object]]) -> None:
        if out is not None:
            report.write(out, header, [r | report.of_header(header) for r in records])

    records = lengths.run_all(runs, steps, seconds, header, keep)
    keep(records)  # with the header's last word on what was skipped
    report.print_end(header, out)
    if plots is not None:
        lengths.plot(plots, header, records)
    return int(not any(record["check"] == "ok" for record in records))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))
