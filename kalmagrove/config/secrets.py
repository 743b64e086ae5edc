"""Secrets have no place in a configuration, which is written down with every run.

Libraries find theirs in the environment; `scrub` hides those in texts. What else is hidden:
`kalmagrove.track.redact`.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from kalmagrove.config.errors import ConfigError

WORDS = frozenset({"key", "apikey", "token", "secret", "password", "passwd", "credential"})
SHORTEST = 16  # characters of a variable's value that is looked for in configurations
SCRUBBED = 8  # in messages, where one hidden too much does no harm
HIDDEN = "(hidden)"
# Hugging Face, W&B, GitHub, OpenAI and the like, AWS, private keys; passwords in addresses.
SHAPES = re.compile(
    r"\b(hf_\w{20,}|wandb_v\d_\w{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|sk-[\w-]{20,}|AKIA\w{16})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY|://[^/\s:@]+:[^/\s@]+@"
)


def is_secret(name: str) -> bool:
    """Whether a setting or variable of this name may hold a secret.

    >>> [is_secret(name) for name in ("WANDB_API_KEY", "hubToken", "max_tokens", "tokenizer")]
    [True, True, False, False]
    """
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    return any(word.lower() in WORDS for word in words)


def refuse_secrets(tree: Any, environment: Mapping[str, str] = os.environ) -> None:
    """Look through a configuration, plain data, before it is used or written.

    Raises:
        ConfigError: a text has the form of a secret, holds the value of a variable named like one
            (WANDB_API_KEY), or is to be the value of one (`cluster.slurm.env`); the error does not
            repeat it.
    """
    known = [
        value
        for name, value in environment.items()
        if len(value) >= SHORTEST and is_secret(name) and not value.startswith("/")  # a path
    ]
    for key, text in _texts(tree):
        variable = key.rpartition(".")[2]
        named = bool(text) and variable.isupper() and is_secret(variable)
        if named or SHAPES.search(text) or any(value in text for value in known):
            raise ConfigError(
                key,
                HIDDEN,
                "looks like a secret, and configurations are written down with every run",
                "set it in the environment (HF_TOKEN, WANDB_API_KEY) and leave it out here",
            )


def scrub(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The text without the values of such variables, which messages of libraries may quote."""
    for name, value in environment.items():
        if len(value) >= SCRUBBED and is_secret(name):
            text = text.replace(value, HIDDEN)
    return text


def _texts(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _texts(value, key)
    elif isinstance(node, str):
        yield key, node
