"""What an option's file says arrives in the composed configuration: no other file overwrites it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kalmagrove.cli.compose import compose_tree, conf_dir
from tests.unit.options import OPTIONS, verb_of

pytestmark = pytest.mark.unit


def leaves(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, (*path, key))
    else:
        yield path, node


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_values_arrive(option: Path) -> None:
    group = option.parent.name
    text = (conf_dir() / option).read_text()
    said = yaml.safe_load(text) or {}
    said.pop("defaults", None)
    said.pop("hydra", None)  # how a sweep runs, not what
    package = group
    if text.startswith("# @package "):
        package = text.split("\n", 1)[0].removeprefix("# @package ")
    home = () if package == "_global_" else tuple(package.split("."))
    tree = compose_tree(verb_of(option), [f"{group}={option.stem}"])
    for path, value in leaves(said):
        node: Any = tree
        for part in (*home, *path):
            node = node[part]
        assert node == value, ".".join((*home, *path))


def test_ada_paper_is_the_literal_formula() -> None:
    ada = compose_tree("train", ["attention=ada_paper"])["model"]["attention"]["ada"]
    off = ("rope", "qk_norm", "output_norm", "output_gate")
    assert {key: ada[key] for key in off} == dict.fromkeys(off, False)
    assert ada["decay"] == "none"
