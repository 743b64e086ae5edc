"""Greedy decoding of batches until a stop string, for both kinds of models.

Models of transformers: prompts padded on the left, decoded with their key-value cache. Own models:
through `generate`, in lock step. Others: the whole text again for every token. Letters: B rows, T
tokens.
"""

import inspect
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kalmagrove.evaluate.generate import continue_rows
from kalmagrove.evaluate.scorer import Scorer
from kalmagrove.nn import Transformer

LOOK_EVERY = 4  # steps between looks for stop strings

Stop = Callable[[list[int]], bool]


@torch.no_grad()
def greedy(
    model: nn.Module,
    scorer: Scorer,
    rows: Sequence[list[int]],
    *,
    max_new_tokens: int,
    eos: Sequence[int],
    stop: Stop,
    size: int,
) -> list[list[int]]:
    """The likeliest next tokens of every row, until one of `eos` (left out), `stop` or the maximum.

    Args:
        stop: whether these new tokens hold a stop string; what follows it may be there too.
        size: ids of the tokenizer; padding of an own model's vocabulary is never chosen.
    """
    if isinstance(model, Transformer):
        written = continue_rows(
            model, rows, max_new_tokens=max_new_tokens, eos=eos, size=size, filler=eos[0], stop=stop
        )
        scorer.tokens += sum(map(len, rows)) + sum(map(len, written))
        return written
    known = inspect.signature(model.forward).parameters
    steps = _cached if "past_key_values" in known else _recomputed
    filler = eos[0] if eos else 0
    ends = torch.tensor(list(eos), device=scorer.device, dtype=torch.int64)
    done_B = torch.zeros(len(rows), dtype=torch.bool, device=scorer.device)
    new: list[Tensor] = []
    following = steps(model, scorer, rows, filler)
    logits_BV = next(following)
    while True:
        chosen_B = logits_BV.argmax(-1).masked_fill(done_B, filler)
        new.append(chosen_B)
        done_B |= torch.isin(chosen_B, ends)
        if len(new) % LOOK_EVERY == 0:
            texts = torch.stack(new, 1).tolist()
            over = [gone or stop(text) for gone, text in zip(done_B.tolist(), texts, strict=True)]
            done_B = torch.tensor(over, device=scorer.device)
        if len(new) >= max_new_tokens or bool(done_B.all()):
            break
        logits_BV = following.send(chosen_B)
    return [_until(text, eos) for text in torch.stack(new, 1).tolist()]


Steps = Generator[Tensor, Tensor, None]  # logits [B, V] out, the tokens chosen by them in


def _cached(model: Any, scorer: Scorer, rows: Sequence[list[int]], filler: int) -> Steps:
    """Prompts padded on the left, then one token after the other."""
    width = max(map(len, rows))
    padded = [[filler] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    tokens_BT, mask_BT = (torch.tensor(x, device=scorer.device) for x in (padded, mask))
    position_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    one_B1 = torch.ones_like(mask_BT[:, :1])
    cache = None
    extra = {"position_ids"} & inspect.signature(model.forward).parameters.keys()
    while True:
        places = {"position_ids": position_BT} if extra else {}
        logits_BV, cache = scorer.continue_(
            tokens_BT, attention_mask=mask_BT, past_key_values=cache, **places
        )
        tokens_BT = (yield logits_BV)[:, None]
        mask_BT, position_BT = torch.cat([mask_BT, one_B1], 1), position_BT[:, -1:] + 1


def _recomputed(model: Any, scorer: Scorer, rows: Sequence[list[int]], filler: int) -> Steps:
    """Rows padded on the right, from the beginning for every token."""
    texts = [list(row) for row in rows]
    while True:
        width = max(map(len, texts))
        padded = [text + [filler] * (width - len(text)) for text in texts]
        last = [b * width + len(text) - 1 for b, text in enumerate(texts)]
        tokens_BT, last_B = (torch.tensor(x, device=scorer.device) for x in (padded, last))
        scorer.tokens += tokens_BT.numel()
        chosen_B = yield scorer.logits(tokens_BT, last_B).float()
        for text, token in zip(texts, chosen_B.tolist(), strict=True):
            text.append(token)


def _until(row: list[int], eos: Sequence[int]) -> list[int]:
    end = next((i for i, token in enumerate(row) if token in eos), len(row))
    return row[:end]
