"""From a composed configuration to a validated `Run`: the only way to get one."""

import difflib
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from kalmagrove.config.base import Section
from kalmagrove.config.errors import ConfigError
from kalmagrove.config.run import Run
from kalmagrove.config.secrets import refuse_secrets

S = TypeVar("S", bound=Section)


def load(tree: dict[str, Any]) -> Run:
    """Validate a plain dictionary (`OmegaConf.to_container(cfg, resolve=True)`).

    Raises:
        ConfigError: naming the first key that is unknown, of the wrong type or in conflict.
    """
    return validate(Run, tree)


def validate(schema: type[S], tree: dict[str, Any]) -> S:
    """Validate `tree` against `schema`, with one-line errors."""
    refuse_secrets(tree)
    try:
        return schema.model_validate(_tuples(tree))
    except ValidationError as error:
        raise _explain(error, schema) from None


def _tuples(node: Any) -> Any:
    """Lists become tuples, all the way down: a frozen run holds no list."""
    if isinstance(node, dict):
        return {key: _tuples(value) for key, value in node.items()}
    return tuple(_tuples(item) for item in node) if isinstance(node, list) else node


def _explain(error: ValidationError, schema: type[BaseModel]) -> ConfigError:
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    value = first.get("input")
    if first["type"] == "extra_forbidden":
        path = [str(part) for part in first["loc"]]
        key = ".".join(path)
        known = _fields_at(schema, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(sorted(known))}"
        return ConfigError(key, _short(value), "is not a known key", remedy)
    key = _key(schema, first["loc"])
    if first["type"] == "missing":
        return ConfigError(key, None, "is required", f"set {key}=VALUE")
    same = [e for e in error.errors() if _key(schema, e["loc"]) == key]  # each branch of a union
    value = min(same, key=lambda e: len(e["loc"])).get("input")
    said = dict.fromkeys(e["msg"].split(" ", 1)[1].removeprefix("should ") for e in same)
    rule = "should " + " or ".join(said)
    return ConfigError(key, _short(value), rule, "see the comments in conf/ for its meaning")


def _key(schema: type[BaseModel], loc: tuple[str | int, ...]) -> str:
    """The field at `loc`, without what pydantic adds: places in a tuple, branches of a union."""
    names = [str(part) for part in loc]
    depth = next(
        (i for i in range(len(names)) if names[i] not in _fields_at(schema, names[:i])), None
    )
    return ".".join(names[:depth])


def _fields_at(schema: type[BaseModel], path: list[str]) -> list[str]:
    here: Any = schema
    for part in path:
        field = here.model_fields.get(part)
        here = field.annotation if field else None
        here = next((part for part in get_args(here) if part is not type(None)), here)  # X | None
        if not (isinstance(here, type) and issubclass(here, BaseModel)):
            return []
    return list(here.model_fields)


def _short(value: object) -> object:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
