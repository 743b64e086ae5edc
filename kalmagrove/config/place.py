"""Where the YAML files of the configuration are."""

from pathlib import Path


def conf_dir() -> Path:
    """The configuration folder: inside the installed package, or beside it in the repository."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"
