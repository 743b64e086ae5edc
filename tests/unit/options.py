"""The options under conf/, and of which verb each is."""

from pathlib import Path

from kalmagrove.cli.compose import conf_dir

OPTIONS = sorted(p.relative_to(conf_dir()) for p in conf_dir().glob("*/*.yaml"))
OWN = {
    "arm": "retrofit",
    "scratch": "retrofit",
    "experiment/kallm": "retrofit",
    "suite": "evaluate",
    "cluster": "plan",
}


def verb_of(option: Path) -> str:
    """The verb that the option is of; `train` for those that several have."""
    name = str(option.with_suffix(""))
    return OWN.get(name, OWN.get(option.parent.name, "train"))
