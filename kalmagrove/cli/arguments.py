"""argparse for the tools: verbs without a configuration of Hydra's."""

import argparse
from typing import Any, NoReturn

from kalmagrove.config import KalmaGroveError


class UsageError(KalmaGroveError):
    """Words that are no command, in a sentence of argparse's."""

    exit_code = 2


class Parser(argparse.ArgumentParser):
    """Reports a mistake as every verb does: one line, exit code 2.

    usage: the whole help. remedy: None: to see that of the tool by its whole name.
    """

    def __init__(self, tool: str, usage: str, remedy: str | None = None) -> None:
        super().__init__(prog=f"kalmagrove {tool}", usage=usage, add_help=False)
        self._tool, self._usage = tool, usage
        self._remedy = remedy or f"see kalmagrove {tool} --help"

    def add_actions(self, *names: str) -> "list[Parser]":
        """A parser for each of the actions, one of which must be named: `action` of what is parsed.

        They report mistakes as this one does.
        """
        another: Any = lambda **_: Parser(self._tool, self._usage, self._remedy)  # noqa: E731
        actions = self.add_subparsers(dest="action", required=True, parser_class=another)
        return [actions.add_parser(name) for name in names]

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; {self._remedy}")
