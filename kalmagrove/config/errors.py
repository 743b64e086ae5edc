"""Errors a user can mend: one line that names the key, the value, the rule and the remedy.

Every other package raises these; `kalmagrove.cli` prints them and exits with their code.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class KalmaGroveError(Exception):
    """A failure with a known cause; printed as one line, without a traceback.

    collective: all ranks of a run raise it together, so that printing it on one is enough.
    """

    exit_code = 1
    collective = False


class ConfigError(KalmaGroveError):
    """A setting that cannot work.

    >>> str(ConfigError("model.ffn.kan.top_k", 200, "must be at most edges=104", "try 8"))
    'model.ffn.kan.top_k=200 must be at most edges=104; try 8'
    """

    exit_code = 2
    collective = True

    def __init__(self, key: str, value: object, rule: str, remedy: str = "") -> None:
        self.key, self.value, self.rule, self.remedy = key, value, rule, remedy
        shown = "null" if value is None else value
        super().__init__(f"{key}={shown} {rule}" + (f"; {remedy}" if remedy else ""))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.key, self.value, self.rule, self.remedy)  # sent between ranks


@contextmanager
def writing(key: str, value: object) -> Iterator[None]:
    """What the system refuses becomes a ConfigError: KEY=VALUE cannot be written, and why."""
    try:
        yield
    except OSError as error:
        raise ConfigError(key, value, f"cannot be written ({error.strerror})") from None


class DataError(KalmaGroveError):
    """Data that cannot be read, or a token cache that is damaged."""


class CheckpointError(KalmaGroveError):
    """A checkpoint that cannot be written, or must not be loaded."""

    collective = True


class NonFiniteError(KalmaGroveError):
    """Too many steps in a row gave a loss or gradient that is not finite."""

    exit_code = 3
    collective = True


class BudgetReached(KalmaGroveError):
    """A cap of `budget` is reached; the run is saved, and a higher cap continues it."""

    exit_code = 76
    collective = True


class Interrupted(KalmaGroveError):
    """The run was asked to stop; its state is saved and the same command continues it.

    75 is EX_TEMPFAIL of sysexits.h: try again.
    """

    exit_code = 75
    collective = True


class Hung(KalmaGroveError):
    """A rank no longer got on. Never raised, as the thread that could is stuck: the watchdog ends
    the process with this code.
    """

    exit_code = 77
    collective = True


class RankLost(KalmaGroveError):
    """Another rank can no longer be reached: it died, or its machine did. It has said why, if it
    could; the checkpoints are as they were.
    """
