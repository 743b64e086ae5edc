"""argparse for the tools: verbs without a configuration of Hydra's."""

import argparse
from typing import NoReturn

from kalmagrove.config import ConfigError


class Parser(argparse.ArgumentParser):
    """Reports a mistake as every verb does: one line, exit code 2.

    usage: the whole help. remedy: None: to see that of the tool by its whole name.
    """

    def __init__(self, tool: str, usage: str, remedy: str | None = None) -> None:
        super().__init__(prog=f"kalmagrove {tool}", usage=usage, add_help=False)
        self._tool, self._remedy = tool, remedy or f"see kalmagrove {tool} --help"

    def error(self, message: str) -> NoReturn:
        raise ConfigError(self._tool, message, "is not understood", self._remedy)
