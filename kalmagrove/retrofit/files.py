"""Saves and loads retrofitted models in the format of transformers.

Importing this registers the model type, after which AutoConfig and AutoModelForCausalLM read such
folders too. What they give is the base model's own class, with its feed-forwards swapped.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kalmagrove.config.errors import CheckpointError, ConfigError
from kalmagrove.config.names import is_file_name
from kalmagrove.retrofit.structure import RECORD, find
from kalmagrove.retrofit.swap import (
    ARCHITECTURE,
    MODEL_TYPE,
    check_record,
    rebuild,
    retrofit_class,
)
from kalmagrove_kernels.polynomial import BACKENDS

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


class RetrofitConfig(PreTrainedConfig):
    """What config.json of a retrofitted model holds: the base model's config and the record."""

    model_type = MODEL_TYPE
    base: dict[str, Any] | None = None
    kalmagrove: dict[str, Any] | None = None

    def unwrap(self) -> PreTrainedConfig:
        """The base model's config with the record in it."""
        check_record(self.kalmagrove)
        kind = (self.base or {}).get("model_type")
        if kind not in CONFIG_MAPPING:
            raise CheckpointError(f"base.model_type={kind} is not known to transformers")
        config = CONFIG_MAPPING[kind].from_dict(dict(self.base or {}))
        setattr(config, RECORD, self.kalmagrove)
        if self._attn_implementation is not None:
            config._attn_implementation = self._attn_implementation
        if self.dtype is not None:
            config.dtype = self.dtype
        return config


class RetrofitForCausalLM:
    """What AutoModelForCausalLM asks; it makes models of the base's class, never of this one."""

    config_class = RetrofitConfig

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *args: Any, config: RetrofitConfig | None = None, **kwargs: Any
    ) -> Any:
        base = (config or RetrofitConfig.from_pretrained(name)).unwrap()
        with_info = kwargs.pop("output_loading_info", False)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # named below
        model, info = model_class(base).from_pretrained(name, *args, config=base, **kwargs)
        wrong = {
            "missing_keys": sorted(info["missing_keys"]),
            "mismatched_keys": sorted(key for key, *_ in info["mismatched_keys"]),
        }
        if any(wrong.values()):
            found = "; ".join(f"{key}: {', '.join(names)}" for key, names in wrong.items() if names)
            raise CheckpointError(f"the weights of {name} do not fit its config.json: {found}")
        complete(model)
        return (model, info) if with_info else model

    @classmethod
    def _from_config(cls, config: RetrofitConfig, **kwargs: Any) -> Any:
        base = config.unwrap()
        return model_class(base)._from_config(base, **kwargs)


def model_class(config: PreTrainedConfig) -> Any:
    try:
        return retrofit_class(AutoModelForCausalLM._model_mapping[type(config)])
    except KeyError as error:
        rule = "is no causal language model"
        raise CheckpointError(f"base.model_type={config.model_type} {rule}") from error


@torch.no_grad()
def complete(model: Any) -> None:
    """Gives the swapped modules what no file holds: buffers not saved, attributes of parameters.

    transformers builds without memory and leaves both empty.
    """
    record = getattr(model.config, RECORD)
    structure = find(model)
    for number in record["blocks"]:
        module = structure.feed_forwards()[number]
        fresh = rebuild(record["description"], structure.width)
        saved = module.state_dict()
        for name, buffer in fresh.named_buffers():
            if name not in saved:
                module.get_buffer(name).copy_(buffer)
        for name, parameter in fresh.named_parameters():
            vars(module.get_parameter(name)).update(vars(parameter))


def save(model: Any, folder: str | Path, tokenizer: Any = None) -> Path:
    """Writes `model`, swapped or not, as safetensors and config.json.

    tokenizer: one of transformers, or a folder whose tokenizer files are copied.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ConfigError("folder", folder, "must not be a file")
    base = type(model)
    record = getattr(model.config, RECORD, None)
    if record is not None:
        check_record(record)
        base = base.__mro__[2]  # Retrofit<base>, Retrofitted, base
    if AutoModelForCausalLM._model_mapping.get(type(model.config), None) is not base:
        rule = "must be the class that AutoModelForCausalLM makes of its config"
        raise ConfigError("model", base.__name__, rule)
    sources = tokenizer_files(tokenizer) if isinstance(tokenizer, str | Path) else []
    model.save_pretrained(folder)
    for path in sources:
        shutil.copyfile(path, folder / path.name)
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    return folder


def tokenizer_files(folder: str | Path) -> list[Path]:
    paths = [Path(folder) / name for name in TOKENIZER_FILES]
    found = [path for path in paths if path.is_file()]
    if not found:
        rule = f"must be a folder with one of {', '.join(TOKENIZER_FILES)}"
        raise ConfigError("tokenizer", folder, rule)
    return found


def load(
    name: str | Path, dtype: torch.dtype | None = None, backend: str | None = None, **kwargs: Any
) -> nn.Module:
    """The model in a folder or repository, swapped or not, in evaluation mode.

    dtype: that of its weights; None keeps the one they were saved in. backend: of
    `kalmagrove_kernels.polynomial`, a matter of the machine and so not saved. `kwargs` go to
    `from_pretrained`.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_folder(folder)
        name = folder
    elif local_looking(str(name)):
        raise CheckpointError(f"{name} is not a folder")
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        str(name),
        dtype=dtype or "auto",
        use_safetensors=True,
        trust_remote_code=False,  # without it a yes to a question runs code found there
        **kwargs,
    )
    if backend is not None:
        set_backend(model, backend)
    return model


def local_looking(name: str) -> bool:
    """Whether a name is a path of this machine, there or not, rather than one of the hub."""
    folder = Path(name).expanduser()
    return name.startswith(("/", ".", "~")) or ("/" in name and folder.parent.is_dir())


def set_backend(model: nn.Module, backend: str) -> None:
    """Has the swapped feed-forwards computed by `backend`."""
    if backend not in BACKENDS:
        raise ConfigError("backend", backend, f"must be one of {', '.join(BACKENDS)}")
    record: Any = getattr(model.config, RECORD, None)
    modules = find(model).feed_forwards() if record else []
    parts = [
        part for number in (record or {}).get("blocks", ()) for part in modules[number].modules()
    ]
    parts = [part for part in parts if hasattr(part, "backend")]
    if not parts:
        raise ConfigError("backend", backend, "needs a model with KAN feed-forwards")
    for part in parts:
        part.backend = backend


def check_folder(folder: Path) -> None:
    """CheckpointError unless config.json and all the weights are there."""
    config = folder / "config.json"
    if not config.is_file():
        raise CheckpointError(f"{folder} has no config.json")
    try:
        held = json.loads(config.read_text())
    except ValueError as error:
        raise CheckpointError(f"{config} is not JSON: {error}") from error
    if held.get("model_type") == MODEL_TYPE:
        check_record(held.get(RECORD))
    index = folder / "model.safetensors.index.json"
    wanted = {"model.safetensors"}
    if index.is_file():
        wanted = set(json.loads(index.read_text())["weight_map"].values())
        if outside := [file for file in wanted if not is_file_name(file)]:
            raise CheckpointError(f"{index} names {outside[0]!r}, which is no file of its folder")
    if missing := sorted(file for file in wanted if not (folder / file).is_file()):
        raise CheckpointError(f"{folder} has no {', '.join(missing)}")


AutoConfig.register(MODEL_TYPE, RetrofitConfig, exist_ok=True)
AutoModelForCausalLM.register(RetrofitConfig, RetrofitForCausalLM, exist_ok=True)
assert RetrofitForCausalLM.__name__ == ARCHITECTURE
