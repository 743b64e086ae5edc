"""From a run's settings to the model that trains: open, replace feed-forwards, freeze the rest."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kalmagrove.config.errors import CheckpointError, ConfigError
from kalmagrove.config.retrofit_run import Retrofit
from kalmagrove.nn.backends import resolve_polynomial
from kalmagrove.retrofit.feedforward import FeedForward, build_feedforward
from kalmagrove.retrofit.files import load, set_backend
from kalmagrove.retrofit.fit import FitReport, RowBatches, calibrate, fit
from kalmagrove.retrofit.freeze import Trainable, freeze
from kalmagrove.retrofit.mlp import INIT_STD, SwiGLU, matching_hidden
from kalmagrove.retrofit.model import LanguageModel
from kalmagrove.retrofit.structure import RECORD, Structure, find
from kalmagrove.retrofit.swap import swap

log = logging.getLogger(__name__)
ROUND = 64  # a vocabulary that grows or is new is padded to a multiple of it


@dataclass
class Built:
    """model: as it trains. inner: the one of transformers in it, as it is saved. fits: of a warm
    start, by block.
    """

    model: LanguageModel
    inner: Any
    structure: Structure
    blocks: tuple[int, ...]
    trainable: Trainable
    fits: dict[int, FitReport] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def build(
    run: Retrofit,
    vocabulary: int,
    sample: Iterable[Tensor] = (),
    device: torch.device | None = None,
) -> Built:
    """The model of `run`, fp32 on the CPU; the same on every rank, as the seed says.

    Args:
        vocabulary: ids of the tokenizer.
        sample: tokens [B, T] that a warm start looks at.
        device: that trains, and on which a warm start computes; None: the CPU.
    Raises:
        ConfigError: the model has no feed-forwards to replace, or settings do not fit it.
        CheckpointError: the base cannot be read.
    """
    inner, notes = open_base(run, vocabulary)
    if run.replace != "none" and getattr(inner.config, RECORD, None) is not None:
        rule, remedy = "is retrofitted already", "use replace=none to train it on, or its own base"
        raise ConfigError("base", run.base, rule, remedy)
    structure = find(inner)
    chosen: tuple[int, ...] = ()
    if run.replace != "none" or run.train == "blocks":
        chosen = structure.select(run.blocks, run.last)
    torch.manual_seed(run.seed)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    if run.warm_start.tokens:
        seen = watch(inner, structure, chosen, sample, device or torch.device("cpu"))
    replace(run, inner, structure, chosen)
    if run.replace == "kan":
        set_backend(inner, resolve_polynomial(run.backend, device or torch.device("cpu")))
    fits = imitate(structure, run.warm_start.ridge, seen) if seen else {}
    trainable = choose_trainable(run, inner, structure, chosen)
    return Built(
        LanguageModel(inner, structure),
        inner,
        structure,
        chosen,
        trainable,
        fits,
        (*notes, *trainable.notes),
    )


def open_base(run: Retrofit, vocabulary: int) -> tuple[Any, list[str]]:
    """The base model, with room for all ids of the tokenizer, and what was done to it."""
    if run.scratch is not None:
        return fresh(run.scratch, vocabulary, run.seed), []
    assert run.base is not None
    inner: Any = load_base(run.base)
    size = inner.get_input_embeddings().weight.shape[0]
    if vocabulary <= size:
        return inner, []
    torch.manual_seed(run.seed)
    inner.resize_token_embeddings(vocabulary, pad_to_multiple_of=ROUND, mean_resizing=False)
    note = f"the vocabulary grew from {size} to {inner.get_input_embeddings().weight.shape[0]} ids"
    if run.embeddings != "tied" and run.train == "blocks":
        note += f"; with embeddings={run.embeddings} the new ones keep random embeddings"
    return inner, [note]


def load_base(name: str) -> Any:
    """A model of the hub or a folder, fp32."""
    try:
        return load(name, torch.float32)
    except (OSError, ValueError, CheckpointError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"base={name} cannot be loaded: {reason[0][:200]}; give a folder with config.json and "
            "model.safetensors, or a name of the hub while there is a network"
        ) from None


def fresh(scratch: dict[str, Any], vocabulary: int, seed: int) -> Any:
    """A model with random weights, from the configuration of a type known to transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tree = dict(scratch)
    kind = tree.pop("model_type")
    tree.setdefault("vocab_size", -(-vocabulary // ROUND) * ROUND)
    if tree["vocab_size"] < vocabulary:
        rule = f"must hold the tokenizer's {vocabulary} ids"
        raise ConfigError("scratch.vocab_size", tree["vocab_size"], rule, "leave it out")
    tree = {key: list(value) if isinstance(value, tuple) else value for key, value in tree.items()}
    try:
        config = AutoConfig.for_model(kind, **tree)
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "scratch", kind, f"is not understood by transformers: {str(error).splitlines()[0]}"
        ) from None


def replace(run: Retrofit, inner: Any, structure: Structure, chosen: tuple[int, ...]) -> None:
    """Put in what `run.replace` says."""
    if run.replace == "none":
        return
    std = float(getattr(inner.config.get_text_config(), "initializer_range", INIT_STD))
    if run.replace == "restart":
        for number in chosen:
            restart(structure.feed_forwards()[number], std)
        return
    tree = None if run.ffn is None else run.ffn.model_dump(mode="json")
    if run.replace == "kan":
        assert run.ffn is not None
        config = run.ffn

        def build_kan(width: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
            return build_feedforward(config, width).to(device=device, dtype=dtype)

        swap(inner, chosen, build_kan, {"kind": "kan", "config": tree})
        return
    hidden = run.hidden
    if hidden == "match":
        assert run.ffn is not None
        hidden = matching_hidden(structure.width, run.ffn.parameters(structure.width))
    inner_width: int = hidden

    def build_mlp(width: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
        module = SwiGLU(width, inner_width)
        module.init_weights(std)
        return module.to(device=device, dtype=dtype)

    swap(inner, chosen, build_mlp, {"kind": "swiglu", "hidden": inner_width})


@torch.no_grad()
def restart(feed_forward: nn.Module, std: float) -> None:
    """Fresh weights: normal ones in linear maps, zero biases."""
    for part in feed_forward.modules():
        if isinstance(part, nn.Linear | Conv1D):
            part.weight.normal_(0, std)
            if part.bias is not None:
                part.bias.zero_()


def choose_trainable(
    run: Retrofit, inner: Any, structure: Structure, chosen: tuple[int, ...]
) -> Trainable:
    if run.train == "blocks":
        structure = find(inner)  # with the new feed-forwards
        return freeze(inner, structure, chosen, embeddings=run.embeddings, norms=run.norms)
    parameters = list(inner.parameters())
    for parameter in parameters:
        parameter.requires_grad_(run.train == "all")
    total = sum(p.numel() for p in parameters)
    trains = total if run.train == "all" else 0
    everything = tuple(range(len(structure.blocks))) if trains else ()
    return Trainable(trains, total, everything, {"all": trains}, cut=False)


@torch.no_grad()
def watch(
    inner: Any,
    structure: Structure,
    chosen: tuple[int, ...],
    sample: Iterable[Tensor],
    device: torch.device,
) -> dict[int, tuple[Tensor, Tensor]]:
    """What the feed-forwards of `chosen` are given and give: rows x [N, D] and y [N, D], on CPU."""
    seen: dict[int, tuple[list[Tensor], list[Tensor]]] = {number: ([], []) for number in chosen}
    hooks = []
    for number in chosen:

        def keep(module: nn.Module, args: Any, out: Tensor, number: int = number) -> None:
            seen[number][0].append(args[0].flatten(0, -2).cpu())
            seen[number][1].append(out.flatten(0, -2).cpu())

        hooks.append(structure.feed_forwards()[number].register_forward_hook(keep))
    inner.to(device).eval()
    try:
        for tokens_BT in sample:
            inner.base_model(tokens_BT.to(device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        inner.to("cpu")
    return {number: (torch.cat(x), torch.cat(y)) for number, (x, y) in seen.items()}


def imitate(
    structure: Structure, ridge: float, seen: dict[int, tuple[Tensor, Tensor]]
) -> dict[int, FitReport]:
    """Fit the new feed-forwards to what the old ones did."""
    reports = {}
    for number, (x_ND, y_ND) in seen.items():
        module: FeedForward = structure.feed_forwards()[number]  # type: ignore[assignment]
        calibrate(module, x_ND)
        reports[number] = fit(module, RowBatches(x_ND, y_ND, 1024), ridge=ridge)
    return reports


@torch.no_grad()
def adopt(inner: Any, weights: dict[str, Tensor]) -> None:
    """Give `inner` the whole weights of the `LanguageModel` that it was trained in, on the CPU.

    Whatever sharded them; it is only saved after that.
    """
    for name, parameter in inner.named_parameters():
        parameter.data = weights[f"inner.{name}"]


def model_folder(run_dir: Path) -> Path:
    """Where a run keeps the trained model, in the format of Hugging Face."""
    return run_dir / "model"
