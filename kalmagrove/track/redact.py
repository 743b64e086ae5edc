"""Secrets stay on this machine: what is left out of everything that is recorded or sent.

`Ledger` passes every line through here, and so the console, W&B and the summary, which are fed
from it; sinks pass the run's configuration.
"""

from collections.abc import Mapping
from typing import Any

from kalmagrove.config.secrets import HIDDEN, is_secret, scrub

__all__ = ["HIDDEN", "is_secret", "scrub", "without_secrets"]


def without_secrets(tree: Any) -> Any:
    """Plain data with every text under such a name hidden; numbers stay (`eos_token_id`)."""
    if isinstance(tree, Mapping):
        return {
            key: HIDDEN
            if isinstance(value, str) and is_secret(str(key))
            else without_secrets(value)
            for key, value in tree.items()
        }
    return [without_secrets(item) for item in tree] if isinstance(tree, list | tuple) else tree
