"""Hydra, and nothing else: from command-line words to a plain dictionary.

The only home of hydra and omegaconf. `--help`, `--cfg`, `--info` and sweeps (`-m`) are Hydra's own;
everything is composed once beforehand, all points of a sweep too, so that a mistake is one line and
exit code 2.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeVar

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Override,
    RangeSweep,
    Sweep,
)
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kalmagrove.config import BudgetReached, ConfigError, KalmaGroveError
from kalmagrove.config.place import conf_dir

HYDRA_VERSION_BASE = "1.3"
STOPPED = (75, 130)  # exit codes of a run that was asked to stop
S = TypeVar("S")


def compose_tree(config_name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Compose `conf/<config_name>.yaml` with Hydra overrides.

    Raises:
        ConfigError: for an unknown key or option, or a word that is not an override.
    """
    with _hydra(config_name, overrides):
        return to_tree(compose(config_name, list(overrides)))


@dataclass(frozen=True)
class Axis:
    """A key of a sweep, and what it may be.

    words: overrides, one for each of its values; none: it is any number from `low` to `high`.
    step: of a range, which has these numbers too.
    """

    key: str
    words: tuple[str, ...] = ()
    low: float | int = 0
    high: float | int = 0
    step: float | int | None = None
    log: bool = False

    def word(self, value: object) -> str:
        """The override that chooses `value`."""
        return f"{self.key}={value}"


def sweep_axes(config_name: str, overrides: Sequence[str]) -> list[Axis]:
    """Every word of a sweep in order, those that its experiment sweeps first.

    Raises:
        ConfigError: for a word that is not an override, or numbers that leave no choice.
    """
    with _hydra(config_name, overrides):
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        given = parser.parse_overrides(list(overrides))
        plain = [w for w, o in zip(overrides, given, strict=True) if not o.is_sweep_override()]
        whole = compose(config_name, plain, return_hydra_config=True)
        swept = OmegaConf.select(whole, "hydra.sweeper.params") or {}
        keys = {override.get_key_element() for override in given}
        words = [f"{key}={value}" for key, value in swept.items() if key not in keys]
        words += overrides
        return [
            _axis(word, override)
            for word, override in zip(words, parser.parse_overrides(words), strict=True)
        ]


def sweep_points(config_name: str, overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every run of a sweep, in Hydra's order; those of its experiment first.

    Raises:
        ConfigError: for a word that is not an override, or a sweep that is not a list of values.
    """
    axes = sweep_axes(config_name, overrides)
    for axis in axes:
        if not axis.words:
            rule = "is no list of values, as a sweep with -m needs"
            remedy = f"{axis.key}=1,2 or {axis.key}=range(1,3); kalmagrove sweep searches intervals"
            raise ConfigError(axis.key, f"interval({axis.low},{axis.high})", rule, remedy)
    return [list(point) for point in itertools.product(*(axis.words for axis in axes))]


def _axis(word: str, override: Override) -> Axis:
    """What Hydra's grammar says of one word."""
    key, said = override.get_key_element(), word.partition("=")[2]
    if not override.is_sweep_override():
        return Axis(key, (word,))
    sweep, log = override.value(), False
    if isinstance(sweep, Sweep):
        log = sweep.tags == {"log"}
        if sweep.tags and not (log and override.is_interval_sweep()):
            rule = "has a tag that is not understood"
            raise ConfigError(key, said, rule, "use tag(log, interval(1e-4, 1e-2))")
    if isinstance(sweep, ChoiceSweep | RangeSweep):
        sweep.shuffle = False  # it would be another order each time
    if isinstance(sweep, RangeSweep) and not sweep.step:
        raise ConfigError(key, said, "has a step of 0", "try range(1, 9) or range(1, 9, 2)")
    if isinstance(sweep, IntervalSweep):
        low, high = sweep.start, sweep.end
        if not (low < high and math.isfinite(high - low) and (low > 0 or not log)):
            rule = "must go from a number to a higher one" + (", above 0 for log" if log else "")
            raise ConfigError(key, said, rule, "try interval(1e-4, 1e-2)")
        return Axis(key, low=low, high=high, log=log)
    words = tuple(f"{key}={value}" for value in override.sweep_string_iterator())
    if not words:
        raise ConfigError(key, said, "has no value", "the end of a range is not among them")
    if not isinstance(sweep, RangeSweep):
        return Axis(key, tuple(dict.fromkeys(words)))
    low, step = min(sweep.range()), abs(sweep.step)
    high = type(low)(Decimal(str(low)) + (len(words) - 1) * Decimal(str(step)))
    return Axis(key, words, low, high, step)


@contextmanager
def _hydra(config_name: str, overrides: Sequence[str]) -> Iterator[None]:
    """Hydra's composer over `conf/`; its errors become one line."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), version_base=HYDRA_VERSION_BASE):
            yield
    except (HydraException, OmegaConfBaseException) as error:
        raise _one_line(error, config_name, overrides) from None
    except ValueError as error:  # of a group that is given null or a number
        if not str(error).startswith("Config group override"):
            raise
        raise _no_option(error, overrides) from None


def to_tree(cfg: DictConfig) -> dict[str, Any]:
    """A composed configuration as a plain dictionary, interpolations resolved."""
    tree = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items() if key != "experiment"}


def read_yaml(path: str) -> dict[str, Any]:
    """A saved `config.yaml` as a plain dictionary.

    Raises:
        ConfigError: if the file is missing or is not YAML.
    """
    try:
        return to_tree(OmegaConf.load(path))  # type: ignore[arg-type]
    except (OSError, AssertionError) as error:
        raise ConfigError("--config", path, f"cannot be read ({error})") from None
    except Exception as error:  # yaml's own errors, which OmegaConf passes through
        raise ConfigError("--config", path, f"is not YAML ({error})".replace("\n", " ")) from None


def to_yaml(tree: dict[str, Any]) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(tree))


def hydra_app(
    config_name: str,
    argv: Sequence[str],
    parse: Callable[[dict[str, Any]], S],
    task: Callable[[S, bool], int],
) -> int:
    """Run `task(parse(tree), in_sweep)` as a Hydra application; returns its exit code.

    A sweep begins when all its points can be parsed, and ends with a run that is stopped or fails.
    A run that reaches its own budget ends only itself: the exit code tells of it in the end.
    """
    flags = [word for word in argv if word.startswith("-")]
    if not flags:
        return task(parse(compose_tree(config_name, argv)), False)
    if {"-m", "--multirun"} & set(flags):
        for point in sweep_points(config_name, _overrides(argv)):
            parse(compose_tree(config_name, point))
    else:
        compose_tree(config_name, _overrides(argv))
    code = 0
    failure: KalmaGroveError | None = None

    @hydra.main(str(conf_dir()), config_name, version_base=HYDRA_VERSION_BASE)
    def app(cfg: DictConfig) -> None:
        nonlocal code, failure
        in_sweep = HydraConfig.get().mode.name == "MULTIRUN"
        try:
            last = task(parse(to_tree(cfg)), in_sweep)
        except KalmaGroveError as error:
            if not (in_sweep and isinstance(error, BudgetReached)):
                failure = error
                raise SystemExit(error.exit_code) from None
            print(f"kalmagrove: {error}", file=sys.stderr)
            last = error.exit_code
        code = max(code, last, key=lambda found: (found not in (0, BudgetReached.exit_code), found))
        if last in STOPPED:
            raise SystemExit(last)

    program, sys.argv = sys.argv, [f"kalmagrove {config_name}", *argv]
    try:
        app()
    except SystemExit as end:  # Hydra's way to leave after --help and after its own errors
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = program
    if failure is not None:
        raise failure
    return code


def _overrides(argv: Sequence[str]) -> list[str]:
    """The words that are overrides: not flags, and not the value of `--cfg` and the like."""
    takes_value = {"--cfg", "-c", "--package", "-p", "--config-name", "-cn", "--config-dir", "-cd"}
    pairs = zip(["", *argv], argv, strict=False)
    return [word for last, word in pairs if not word.startswith("-") and last not in takes_value]


def _no_option(error: ValueError, overrides: Sequence[str]) -> ConfigError:
    for word in overrides:
        group, _, value = word.lstrip("+~").partition("=")
        options = sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
        if options and value not in options:
            remedy = f"try {', '.join(options)}, or leave it out"
            return ConfigError(group, value, "is not an option", remedy)
    return ConfigError("overrides", " ".join(overrides), f"cannot be composed: {error}")


def _one_line(error: Exception, config_name: str, overrides: Sequence[str]) -> ConfigError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = lines[0] if lines else type(error).__name__
    if "Could not find" in message and "Available options" in str(error):
        start = next(i for i, line in enumerate(lines) if line.startswith("Available options"))
        end = next(
            (i for i, line in enumerate(lines) if line.startswith("Config search path")), len(lines)
        )
        group = message.split("'")[-2].rpartition("/")
        return ConfigError(
            group[0], group[2], "is not an option", f"try {', '.join(lines[start + 1 : end])}"
        )
    for word in overrides:
        if "=" not in word:
            return ConfigError("argument", repr(word), "is not of the form key=value")
        if message == f"Error parsing override '{word}'":
            key, _, value = word.partition("=")
            return ConfigError(key, value, "cannot be read by Hydra's grammar", lines[1])
    for word in overrides:
        key, _, value = word.lstrip("+~").partition("=")
        if key and key in message:
            remedy = f"`kalmagrove {config_name} --cfg job` lists all ({message})"
            return ConfigError(key, value, "is not a known key", remedy)
    return ConfigError("overrides", " ".join(overrides), f"cannot be composed: {message}")
