"""Text generation: a batch of prompts, decoded in lock step through the model's cache.

Called by `kalmagrove generate` and at the end of a run; it asks of the model only `init_cache` and
`forward`.

Legend: B batch (one row a prompt), V vocabulary.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kalmagrove.config import ConfigError


class Tokenizer(Protocol):
    """What generation needs of a tokenizer."""

    @property
    def size(self) -> int: ...

    @property
    def eot(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...


def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    stop_at_eot: bool = True,
) -> list[str]:
    """The continuation of every prompt (without the prompt), at most `max_new_tokens` each.

    temperature 0 is greedy; top_p keeps the smallest set of likeliest tokens with at least that
    probability (Holtzman et al., arXiv:1904.09751). Every prompt begins with the end-of-text
    token, as documents do in training. The text of a prompt depends on the seed, not on the other
    prompts of the batch; repeats of one prompt get streams of their own. Padded vocabulary entries
    are never drawn.
    Raises ConfigError for settings out of range.
    """
    _check(max_new_tokens, temperature, top_p)
    rows = [[tokenizer.eot, *tokenizer.encode(prompt)] for prompt in prompts]
    streams = _streams(prompts, seed)

    def choose(logits_BV: Tensor, drawing: list[bool]) -> Tensor:
        return sample(logits_BV, _draw(streams, drawing), temperature, top_p)

    ends = (tokenizer.eot,) if stop_at_eot else ()
    texts = continue_rows(
        model,
        rows,
        max_new_tokens=max_new_tokens,
        eos=ends,
        size=tokenizer.size,
        filler=tokenizer.eot,
        choose=choose,
    )
    return [tokenizer.decode(text) for text in texts]


@torch.no_grad()
def continue_rows(
    model: nn.Module,
    rows: Sequence[list[int]],
    *,
    max_new_tokens: int,
    eos: Sequence[int],
    size: int,
    filler: int,
    choose: Callable[[Tensor, list[bool]], Tensor] = lambda logits_BV, _: logits_BV.argmax(-1),
    stop: Callable[[list[int]], bool] = lambda new: False,
) -> list[list[int]]:
    """The new tokens of every row, until one of `eos` (left out), `stop` or the maximum.

    The shortest row's length is prefilled in one call; then all rows advance token by token, rows
    still inside their prompt taking its tokens.

    Args:
        size: of the vocabulary without padding, which is never chosen.
        filler: a token for rows that have ended.
        choose: the next token of each row, [B], from logits [B, V] and which rows take one.
        stop: whether a row's new tokens are enough.
    """
    if not rows or max_new_tokens == 0:
        return [[] for _ in rows]
    rows = [list(row) for row in rows]
    device = next(model.parameters()).device
    lengths = [len(row) for row in rows]
    finished = [False] * len(rows)
    done = min(lengths)
    with evaluating(model):
        cache: Any = model.init_cache(len(rows), max(lengths) + max_new_tokens)  # type: ignore[operator]
        tokens = torch.tensor([row[:done] for row in rows], device=device)
        while True:
            logits_BV = model(tokens, cache=cache).logits[:, -1, :size].float().cpu()
            drawing = [
                done >= length and not over for length, over in zip(lengths, finished, strict=True)
            ]
            chosen = choose(logits_BV, drawing)
            for i, token in enumerate(chosen.tolist()):
                if drawing[i]:
                    rows[i].append(token)
                    full = len(rows[i]) == lengths[i] + max_new_tokens
                    finished[i] = full or token in eos or stop(rows[i][lengths[i] :])
            if all(finished):
                break
            # A finished row is fed anything: nobody reads it again.
            feed = [row[done] if done < len(row) else filler for row in rows]
            tokens = torch.tensor(feed, device=device)[:, None]
            done += 1
    texts = [row[length:] for row, length in zip(rows, lengths, strict=True)]
    return [text[:-1] if text and text[-1] in eos else text for text in texts]


def write(model: nn.Module, tokenizer: Tokenizer, prompts: Sequence[str], **settings: Any) -> str:
    """Prompts with their continuations, as one text to show; `settings` are `generate`'s."""
    texts = generate(model, tokenizer, prompts, **settings)
    pairs = zip(prompts, texts, strict=True)
    return f"\n{'-' * 40}\n".join(prompt + text for prompt, text in pairs)


def sample(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token per row, int64 [B], from logits and one uniform number in [0, 1) per row.

    The uniform number picks by the inverse of the cumulative distribution, likeliest token first.
    """
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    probabilities = torch.softmax(logits_BV.double() / temperature, dim=-1)
    sorted_BV, order_BV = probabilities.sort(dim=-1, descending=True, stable=True)
    cumulative = sorted_BV.cumsum(dim=-1)
    kept = sorted_BV.masked_fill(cumulative - sorted_BV >= top_p, 0.0).cumsum(dim=-1)
    target = uniform_B[:, None].to(kept.dtype) * kept[:, -1:]
    picks = torch.searchsorted(kept, target, right=True).clamp(max=kept.shape[-1] - 1)
    return order_BV.gather(1, picks).squeeze(1)


def _streams(prompts: Sequence[str], seed: int) -> list[torch.Generator]:
    """One generator per row, seeded by the seed and by how many equal prompts came before it."""
    seen: Counter[str] = Counter()
    streams = []
    for prompt in prompts:
        row_seed = (seed + seen[prompt] * 0x9E3779B97F4A7C15) % 2**63  # golden ratio: far apart
        streams.append(torch.Generator().manual_seed(row_seed))
        seen[prompt] += 1
    return streams


def _draw(streams: list[torch.Generator], drawing: list[bool]) -> Tensor:
    """A number in [0, 1) per row, fp64 [B]; only the streams of rows that draw move on."""
    return torch.stack(
        [
            torch.rand((), generator=stream, dtype=torch.float64)
            if draws
            else torch.zeros((), dtype=torch.float64)
            for stream, draws in zip(streams, drawing, strict=True)
        ]
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, afterwards as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _check(max_new_tokens: int, temperature: float, top_p: float) -> None:
    if max_new_tokens < 0:
        raise ConfigError("max_new_tokens", max_new_tokens, "must not be negative", "try 120")
    if temperature < 0:
        raise ConfigError(
            "temperature", temperature, "must not be negative", "0 is greedy; try 0.8"
        )
    if not 0 < top_p <= 1:
        raise ConfigError("top_p", top_p, "must be in (0, 1]", "try 0.95")
