"""What a measurement was made with: hardware, versions, commit. In every benchmark's file."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "deepspeed", "megatron-core", "fla-core", "kalmagrove")


def environment() -> dict[str, Any]:
    """JSON values: `gpu` (None without one), `versions`, `commit` (with "+" if files differ)."""
    cuda = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))}
        | {"cuda": torch.version.cuda},
        "commit": commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Of the repository that this file lies in, "+" with local changes; KALMAGROVE_COMMIT (for
    images and copies without one) goes first; else None.
    """
    if named := os.environ.get("KALMAGROVE_COMMIT"):
        return named

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        head = git("rev-parse", "--short=7", "HEAD")
        return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
