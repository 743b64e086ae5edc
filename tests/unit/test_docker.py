"""The files of docker/, read: both images are made by the same steps, of the same files."""

import fnmatch
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.unit
ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
STEPS = ["system", "packages", "project", "kernels"]
# Of the Compose specification (github.com/compose-spec/compose-spec), those in use.
SERVICE_KEYS = {
    *("image", "build", "command", "environment", "networks", "volumes", "depends_on", "init"),
    "stop_grace_period",
}


@pytest.fixture
def dockerfile() -> list[tuple[str, str]]:
    """(instruction, the rest), continued lines joined."""
    text = (DOCKER / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]


@pytest.fixture
def recipe() -> dict[str, str]:
    """Sections of the Apptainer recipe, the header under ''."""
    parts = re.split(r"^%(\w+)\n", (DOCKER / "kalmagrove.def").read_text(), flags=re.M)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def copied(dockerfile: list[tuple[str, str]]) -> set[str]:
    return {name for word, rest in dockerfile if word == "COPY" for name in rest.split()[:-1]}


def steps(text: str) -> list[str]:
    return re.findall(r"docker/install\.sh (\w+)", text)


def test_both_images_take_the_same_steps(
    dockerfile: list[tuple[str, str]], recipe: dict[str, str]
) -> None:
    assert steps("\n".join(rest for word, rest in dockerfile if word == "RUN")) == STEPS
    assert steps(recipe["post"]) == STEPS
    for step in STEPS:
        assert f"\n{step}() {{\n" in (DOCKER / "install.sh").read_text()


def test_both_images_have_the_same_base_and_files(
    dockerfile: list[tuple[str, str]], recipe: dict[str, str]
) -> None:
    arguments = dict(rest.split("=") for word, rest in dockerfile if word == "ARG")
    (base,) = [rest for word, rest in dockerfile if word == "FROM"]
    assert f"From: {base.replace('${CUDA}', arguments['CUDA'])}" in recipe[""].splitlines()
    assert "Bootstrap: docker" in recipe[""].splitlines()
    pairs = [line.split() for line in recipe["files"].strip().splitlines()]
    assert {source for source, _ in pairs} == copied(dockerfile)
    for source, target in pairs:
        assert target == f"/opt/kalmagrove/source/{source}"
        assert (ROOT / source).exists()


def test_the_recipe_has_its_sections(recipe: dict[str, str]) -> None:
    wanted = {"", "files", "post", "environment", "runscript", "test", "labels", "help"}
    assert set(recipe) == wanted
    assert all(text.strip() for text in recipe.values())


def test_the_context_holds_what_is_copied(dockerfile: list[tuple[str, str]]) -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line]
    rules = [line for line in lines if not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule.removeprefix("!") for rule in rules if rule[0] == "!"} == copied(dockerfile)
    for secret in (".git", ".venv", "runs", "wandb", ".env"):
        assert not any(fnmatch.fnmatch(secret, rule[1:]) for rule in rules if rule[0] == "!")


def test_the_image_is_not_run_by_root_and_tells_its_health(
    dockerfile: list[tuple[str, str]],
) -> None:
    users = [rest for word, rest in dockerfile if word == "USER"]
    assert users == ["10001:10001"]
    words = [word for word, _ in dockerfile]
    assert "RUN" not in words[words.index("USER") :]
    (health,) = [rest for word, rest in dockerfile if word == "HEALTHCHECK"]
    assert health.endswith('CMD ["kalmagrove", "--version"]')
    (volumes,) = [rest for word, rest in dockerfile if word == "VOLUME"]
    assert "/home/grove/.cache" in volumes
    assert "/home/grove/runs" in volumes


def test_the_two_services_are_one_run() -> None:
    tree: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    assert {key for key in tree if not key.startswith("x-")} == {"services", "networks", "volumes"}
    nodes = tree["services"]
    assert list(nodes) == ["node0", "node1"]
    for rank, service in enumerate(nodes.values()):
        assert set(service) <= SERVICE_KEYS
        assert (DOCKER / service["build"]["context"]).resolve() == ROOT
        assert (ROOT / service["build"]["dockerfile"]).is_file()
        assert set(service["networks"]) <= set(tree["networks"])
        assert {volume.split(":")[0] for volume in service["volumes"]} == set(tree["volumes"])
        assert set(service.get("depends_on", [])) <= set(nodes)
        words = shlex.split(service["command"])
        given = dict(zip(words[1::2], words[2::2], strict=False))
        assert given["--nnodes"] == "2"
        assert given["--node_rank"] == str(rank)
        assert given["--master_addr"] == "node0"
    first, second = (shlex.split(service["command"]) for service in nodes.values())
    assert [pair for pair in zip(first, second, strict=True) if len(set(pair)) > 1] == [("0", "1")]
