"""Suites of tasks: from names to lm-eval's task objects with their questions read.

`harness` builds them once and asks every model the same. Task files are in
`kalmagrove/evaluate/tasks`, suites in `conf/suite`.
"""

import io
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kalmagrove.config import ConfigError, Suite, validate
from kalmagrove.config.place import conf_dir

TASKS = Path(__file__).parent / "tasks"
SEED = 1234  # of the examples' choice, as in lm-eval


@dataclass(eq=False)
class Prepared:
    """A suite ready to ask.

    tasks: by name. members: the tasks of each entry of the suite. tokens: of the texts that were
    asked, by tokenizer, for the next model.
    """

    name: str
    tasks: dict[str, Any]
    members: dict[str, tuple[str, ...]]
    tokens: dict[Any, Any] = field(default_factory=dict, repr=False)


def load_suite(name: str) -> Suite:
    """A suite of `conf/suite`.

    Raises:
        ConfigError: if there is none of this name.
    """
    folder = conf_dir() / "suite"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ConfigError("suite", name, "is not an option", f"try {', '.join(known)}")
    return validate(Suite, yaml.safe_load((folder / f"{name}.yaml").read_text()))


def prepare(
    suite: Suite | str, files: str | Path | None = None, shots: int | None = None
) -> Prepared:
    """Read the questions of a suite, from `files` or the hub.

    Raises:
        ConfigError: for a task that does not exist, or more shots than it has examples.
        DataError: for a missing or damaged file, or a dataset that cannot be fetched.
    """
    suite = load_suite(suite) if isinstance(suite, str) else suite
    shots = suite.shots if shots is None else shots
    place = None if files is None else str(files)
    tasks: dict[str, Any] = {}
    members: dict[str, tuple[str, ...]] = {}
    with quiet(), offline(place is not None):
        for entry in suite.tasks:
            loaded = _load(entry, place)
            tasks |= loaded
            label = Path(entry).stem if entry.endswith(".yaml") else entry
            members[label] = tuple(loaded)
    for name, task in tasks.items():
        _set_shots(name, task, shots)
    return Prepared(suite.name, tasks, members)


def _load(entry: str, files: str | None) -> dict[str, Any]:
    """lm-eval's task objects of an entry: ours (also GROUP/TASK), a task file's, or its own."""
    from lm_eval.tasks import TaskManager

    name, _, only = entry.partition("/")
    metadata = {} if files is None else {"files": files}
    if (TASKS / f"{name}.yaml").is_file():
        return _build(TASKS / f"{name}.yaml", only, metadata)
    path = Path(entry).expanduser()
    if path.suffix == ".yaml" and path.is_file():
        folder = str(path.resolve().parent)
        manager = TaskManager(include_path=folder, include_defaults=False, metadata=metadata)
        index = manager.task_index.items()
        inside = [key for key, found in index if found.yaml_path == path.resolve()]
        if not inside:
            raise ConfigError("suite.tasks", entry, "is not a task file that lm-eval can read")
        return _named(manager.load(inside)["tasks"])
    known = f"try {', '.join(sorted(p.stem for p in TASKS.glob('*.yaml')))}"
    if files is not None:
        rule = "has no local files; lm-eval's own tasks come from the hub"
        raise ConfigError("suite.tasks", entry, rule, f"leave out files, or {known}")
    manager = TaskManager(metadata=metadata)
    if entry not in manager.all_tasks:
        rule = "is neither a task of KalmaGrove or lm-eval nor a task file"
        raise ConfigError("suite.tasks", entry, rule, known)
    return _named(manager.load([entry])["tasks"])


def _build(path: Path, only: str, metadata: dict[str, str]) -> dict[str, Any]:
    """The task of one of our files, or the tasks of its group; `only` one of them if it is named.

    Read here and not through lm-eval's TaskManager, which builds whole groups only.
    """
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    shared = load_yaml(path) | {"metadata": metadata}
    group = shared.pop("group", None)
    if group is None:
        return {shared["task"]: ConfigurableTask(config=shared)}
    listed = {item["task"]: item for item in shared.pop("task")}
    if only and only not in listed:
        rule = f"is no task of {group}"
        raise ConfigError("suite.tasks", f"{group}/{only}", rule, f"try {', '.join(listed)}")
    named = {f"{group}_{name}": item for name, item in listed.items() if only in ("", name)}
    return {
        name: ConfigurableTask(config={**shared, **item, "task": name})
        for name, item in named.items()
    }


def _named(tasks: dict[str, Any]) -> dict[str, Any]:
    """By names that can be a file's."""
    return {re.sub(r"[^\w.-]+", "_", name): task for name, task in tasks.items()}


def _set_shots(name: str, task: Any, shots: int | None) -> None:
    if shots is not None:
        task.set_config(key="num_fewshot", value=shots)
    wanted = task.config.num_fewshot or 0
    task.set_config(key="num_fewshot", value=wanted)
    if wanted == 0:
        return
    pool = len(list(task.fewshot_docs() or []))
    own = task.fewshot_cfg.split == task.config.test_split  # never the question itself
    if wanted > pool - own:
        remedy = f"try {pool - own}" if pool > own else "a file of examples is missing"
        rule = f"is more than the examples of {name}: {max(0, pool - own)}"
        raise ConfigError("shots", wanted, rule, remedy)


@contextmanager
def quiet() -> Iterator[None]:
    """lm-eval's log and progress bars held back: what matters is said here."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def offline(wanted: bool) -> Iterator[None]:
    """No request leaves this machine through `datasets` while open."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
