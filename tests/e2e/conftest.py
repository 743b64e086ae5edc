"""Whole commands, as a user runs them, on a small corpus of real source text."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = [
    "model=kan_tiny",
    "ffn=kan",
    "data=text",
    "data.seq_len=32",
    "data.val_fraction=0.2",
    "data.tokenizer.vocab_size=512",
    "batch={tokens: 512, micro: 4}",
    "eval={every: 1000, micro: 4, max_tokens: 2048}",
    "track.every=1",
    "track.wandb=disabled",
    "price=cpu",
    "sample.max_new_tokens=10",
    "optim.lr=3e-3",
]


@pytest.fixture(scope="session")
def corpus() -> str:
    """Some modules of the standard library, as an override of `data.source.paths`."""
    folder = Path(os.__file__).parent
    return f"data.source.paths=[{folder}/json/*.py,{folder}/email/*.py,{folder}/logging/*.py]"


@pytest.fixture(scope="session")
def settings(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a tiny run; the token cache is shared by all tests."""
    return [*SMALL, corpus, f"data.cache={tmp_path_factory.mktemp('cache')}"]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "kalmagrove", *words]


def run(
    *words: str, cwd: Path, timeout: float = 240, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run `kalmagrove WORDS`; the output is kept."""
    return subprocess.run(
        command(*words),
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
