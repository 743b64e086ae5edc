"""Imports point one way, and every large dependency has one home."""

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit
ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {
    "config": set(),
    "kernels": set(),
    "data": {"config"},
    "parallel": {"config"},
    "track": {"config", "parallel"},
    "nn": {"config", "parallel", "kernels"},
    "plan": {"config", "track"},
    "retrofit": {"config", "data", "parallel", "nn", "kernels"},
    "engine": {"config", "parallel", "nn", "track"},
    "evaluate": {
        *("config", "data", "parallel", "nn", "engine", "track"),
        *("retrofit", "kernels"),
    },
    "bench": {"config", "parallel", "nn", "engine", "track", "kernels"},
    "cli": {
        *("config", "data", "parallel", "nn", "engine", "track"),
        *("evaluate", "retrofit", "bench", "plan", "kernels"),
    },
}
HOMES = {
    "deepspeed": "engine",
    "megatron": "parallel",
    "wandb": "track",
    "wandb_workspaces": "track",
    "tensorboard": "track",
    "trackio": "track",
    "lm_eval": "evaluate",
    "hydra": "cli",
    "omegaconf": "cli",
    "optuna": "cli",
    "triton": "kernels",
}


def imports() -> list[tuple[str, str, str]]:
    """(part of the project, file, imported module) for every import statement."""
    found = []
    for base in (ROOT / "kalmagrove", ROOT / "kernels" / "kalmagrove_kernels"):
        for path in base.rglob("*.py"):
            parts = path.relative_to(base).parts
            part = "kernels" if base.name == "kalmagrove_kernels" else parts[0]
            for node in ast.walk(ast.parse(path.read_text())):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    assert node.level == 0, f"{path}: relative import"
                    names = [node.module or ""]
                found += [(part, str(path.relative_to(ROOT)), name) for name in names]
    return found


def test_imports_follow_the_layers() -> None:
    wrong = []
    for part, path, name in imports():
        if part not in ALLOWED:
            continue
        target = None
        if name.startswith("kalmagrove_kernels"):
            target = "kernels"
        elif name.startswith("kalmagrove."):
            target = name.split(".")[1]
        if target in ALLOWED and target != part and target not in ALLOWED[part]:
            wrong.append(f"{path} imports {name}")
    assert wrong == []


def test_every_dependency_has_one_home() -> None:
    wrong = [
        f"{path} imports {name}"
        for part, path, name in imports()
        if name.split(".")[0] in HOMES and HOMES[name.split(".")[0]] != part
    ]
    assert wrong == []


def test_every_package_is_in_the_wheel() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    found = {"kalmagrove.conf", "kalmagrove_kernels.csrc"}
    found |= {"kalmagrove.templates", "hydra_plugins", "hydra_plugins.kalmagrove_launchers"}
    for base in (ROOT / "kalmagrove", ROOT / "kernels" / "kalmagrove_kernels"):
        for init in base.rglob("__init__.py"):
            found.add(".".join(init.parent.relative_to(base.parent).parts))
    assert listed == found
