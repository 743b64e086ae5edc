"""`kalmagrove compare FOLDER`: the arms of a study of retrofits, side by side, with a verdict."""

from collections.abc import Sequence
from pathlib import Path

from kalmagrove.cli.arguments import Parser
from kalmagrove.config import ConfigError, DataError
from kalmagrove.config.files import replace_text

USAGE = """kalmagrove compare: the arms of a study side by side, with a plain verdict

usage: kalmagrove compare FOLDER [--suite NAME] [--reference ARM] [--pair ARM:ARM ...]
                          [--resamples N] [--seed N]

  FOLDER           of a study (runs/kallm): one folder a run in it
  --suite NAME     the tasks of one suite alone; the files are then comparison-NAME.*
  --reference ARM  that all others are compared with (restart if it is there, else the first)
  --pair ARM:ARM   two more to compare; may be given several times
  --resamples N    of the bootstrap (10000)
  --seed N         of the bootstrap (0)

Prints the table, and writes comparison.md and comparison.json into FOLDER. Unfinished runs are left
out and named; all arms need the same seeds.
"""


def main(argv: Sequence[str]) -> int:
    """Do what `argv` says; returns the exit code."""
    if not argv or {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0 if argv else 2
    parser = Parser("compare", USAGE)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--suite")
    parser.add_argument("--reference")
    parser.add_argument("--pair", action="append", default=[])
    parser.add_argument("--resamples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(argv)
    pairs = []
    for pair in chosen.pair:
        one, colon, other = pair.partition(":")
        if not (one and colon and other):
            raise ConfigError("--pair", pair, "must be two arms, ARM:ARM")
        pairs.append((one, other))
    show(chosen.folder, chosen.suite, chosen.reference, pairs, chosen.resamples, chosen.seed)
    return 0


def show(
    study: Path,
    suite: str | None = None,
    reference: str | None = None,
    pairs: Sequence[tuple[str, str]] = (),
    resamples: int = 10_000,
    seed: int = 0,
) -> None:
    """Compare the finished runs in `study`; print, and write.

    Raises:
        DataError: there are none, or they cannot be compared.
    """
    from kalmagrove.retrofit import results, statistics, table

    if not study.is_dir():
        raise DataError(f"{study} is no folder; name the one that holds a study's runs")
    runs = sorted(p.parent for p in study.glob("*/retrofit.json") if not p.parent.is_symlink())
    finished = [folder for folder in runs if (folder / "arm.json").is_file()]
    for folder in runs:
        if folder not in finished:
            print(f"{folder.name} is not finished and left out")
    if not finished:
        raise DataError(f"{study} holds no finished run (a folder with arm.json)")
    read = results.read_results(finished, suite)
    names = [arm.name for arm in read.arms]
    if reference is None:
        reference = "restart" if "restart" in names else names[0]
    if len(names) < 2:
        print(f"{study} holds the arm {names[0]} alone: there is nothing to compare")
        return
    summary = statistics.compare(read, reference, list(pairs), resamples, seed)
    table.to_console(summary)
    name = f"comparison-{suite}" if suite else "comparison"
    for ending, text in (("md", table.to_markdown(summary)), ("json", table.to_json(summary))):
        replace_text(study / f"{name}.{ending}", text.rstrip("\n") + "\n")
    print(f"written to {study / name}.md and .json")
