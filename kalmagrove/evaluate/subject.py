"""What is evaluated: a model with its tokenizer, in memory or opened from a folder or the hub."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kalmagrove.config import CheckpointError, Run, load
from kalmagrove.engine import find_checkpoints, read_state
from kalmagrove.evaluate.codec import Codec, codec_of, digest
from kalmagrove.evaluate.load import find_device, load_trained

CHUNK = 1 << 24  # elements of a tensor that are summed at once
DEFAULT_LENGTH = 2048  # tokens, where nothing says how many a model was made for


@dataclass(eq=False)
class Subject:
    """A causal language model to evaluate.

    model: gives logits for token ids: of transformers, retrofitted or not, or a `Transformer`.
    tokenizer: of transformers or of `kalmagrove.data`. chat: whether `chat=auto` uses the chat
    template; None: if the tokenizer has one. length: tokens the model was made for; None: as its
    config says.
    """

    model: nn.Module
    tokenizer: Any
    name: str
    chat: bool | None = None
    length: int | None = None
    run: Run | None = field(default=None, repr=False)  # of KalmaGrove's own models

    def __post_init__(self) -> None:
        self.codec: Codec = codec_of(self.tokenizer)
        if self.chat is None:
            self.chat = self.codec.has_template
        if self.length is None:
            self.length = _length(getattr(self.model, "config", None))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end a generated text."""
        said = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        more = said if isinstance(said, list) else [] if said is None else [said]
        return tuple(dict.fromkeys((*self.codec.eos, *more)))

    @property
    def size(self) -> int:
        """Ids of the tokenizer."""
        return int(getattr(self.tokenizer, "size", 0)) or len(self.tokenizer)

    def fingerprint(self) -> str:
        """Equal for models that compute the same: weights, configuration and tokenizer."""
        config: Any = getattr(self.model, "config", None)
        if hasattr(config, "model_dump_json"):
            described = config.model_dump_json()
        elif hasattr(config, "to_dict"):
            left_out = ("_name_or_path", "transformers_version", "architectures", "dtype")
            tree = config.to_dict()
            described = digest({key: tree[key] for key in sorted(tree) if key not in left_out})
        else:
            described = type(self.model).__name__
        weights = [
            (name, str(tensor.dtype), list(tensor.shape), checksum(tensor))
            for name, tensor in sorted(self.model.state_dict().items())
            if isinstance(tensor, Tensor)
        ]
        return digest(described, weights, self.codec.fingerprint)


@torch.no_grad()
def checksum(tensor: Tensor) -> tuple[int, int]:
    """Two sums over the bits of a tensor, the second weighted by place; the same on any device."""
    size = tensor.element_size()
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().contiguous().reshape(-1)
    bits = flat.view(kinds[size]) if size in kinds else flat.view(torch.uint8)
    plain = weighted = 0
    for start in range(0, len(bits), CHUNK):
        part = bits[start : start + CHUNK].to(torch.int64)
        place = torch.arange(start, start + len(part), device=part.device)
        plain += int(part.sum())
        weighted += int((part * (place * 0x9E3779B1 % 0x7FFFFFFF + 1)).sum())
    return plain % 2**64, weighted % 2**64


def open_model(name: str | Path, device: str = "auto", precision: str = "auto") -> Subject:
    """The model of a folder, or of that name on the hub, ready to be evaluated.

    A folder may hold a Hugging Face model (retrofitted or not; also in its subfolder `model`), or
    be that of a run or checkpoint of `kalmagrove train`.

    Args:
        device: a torch device, or auto: cuda if there is one.
        precision: auto (bf16 on GPU, fp32 on CPU), bf16 or fp32.

    Raises:
        CheckpointError: if there is no such model, or a part of it is missing.
        ConfigError: if this machine lacks the device.
    """
    folder = Path(name).expanduser()
    chosen = find_device(device)
    wide = precision == "fp32" or (precision == "auto" and chosen.type == "cpu")
    dtype = torch.float32 if wide else torch.bfloat16
    for place in (folder, folder / "model"):
        if (place / "config.json").is_file():
            return _open_hugging_face(str(place), folder.resolve().name, chosen, dtype)
    if not folder.exists() and _may_be_hub_name(str(name)):
        return _open_hugging_face(str(name), str(name), chosen, dtype)
    if folder.is_dir() and find_checkpoints(folder):
        model, tokenizer = load_trained(folder, device)
        run = load(read_state(find_checkpoints(folder)[0])["run"])
        subject_name = folder.resolve().name
        if subject_name.startswith("step-"):
            subject_name = f"{folder.resolve().parents[1].name}-{subject_name}"
        return Subject(
            model.to(dtype),
            tokenizer,
            subject_name,
            chat=run.data.format == "messages",
            length=run.data.seq_len,
            run=run,
        )
    raise CheckpointError(
        f"run={name} holds no model; name the folder of a run (runs/NAME), of a checkpoint or of a "
        "Hugging Face model (config.json), or a model on the hub (OWNER/NAME)"
    )


def _may_be_hub_name(name: str) -> bool:
    from kalmagrove.retrofit.files import local_looking

    return not local_looking(name) and name.count("/") <= 1 and name != "runs/latest"


def _open_hugging_face(place: str, name: str, device: torch.device, dtype: torch.dtype) -> Subject:
    from transformers import AutoTokenizer

    from kalmagrove.retrofit import load as load_pretrained

    try:
        model = load_pretrained(place, dtype)
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(
            f"run={name} cannot be opened ({reason}); name a local folder, or one of the hub's "
            "models while there is a network"
        ) from None
    return Subject(model.to(device).eval(), tokenizer, name)


def _length(config: Any) -> int:
    """Tokens that a model of transformers was made for."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for key in ("max_position_embeddings", "n_positions", "n_ctx", "seq_length"):
        found = getattr(text, key, None)
        if isinstance(found, int) and 0 < found < 1 << 24:
            return found
    return DEFAULT_LENGTH
