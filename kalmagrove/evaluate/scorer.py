"""Log-likelihoods of rows: one forward pass a batch, logits only where they are read.

The hidden states are picked before the model's head sees them, so that [B, T, V] never exists;
soft caps and scales that a model applies after its head stay in force. Called by the lm-eval
adapter and by `bits`. Letters: B rows, T tokens, N logits read, V vocabulary, D model width.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kalmagrove.evaluate.generate import evaluating
from kalmagrove.evaluate.rows import LONGEST_SHARED, Row, batches, plan
from kalmagrove.nn import Transformer

SLICE = 1 << 26  # logits that are normalised in fp32 at once
LOGITS = 1 << 29  # logits of a batch
TOKENS = {"cuda": 65536, "cpu": 16384}  # of a batch, where nothing is said
AGREE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of two ways to compute; other types: 0.1


class Scorer:
    """Computes with a model that stays where it is.

    Attributes:
        longest_shared: tokens of a row with alternatives after a shared context; 0 where a trial
            with the model showed that it does not compute such rows.
        passes, tokens: forward passes and tokens (with padding) so far.
    """

    def __init__(
        self, model: nn.Module, batch_tokens: int | None = None, autocast: bool = False
    ) -> None:
        self._model = model
        self.device = next(model.parameters()).device
        self._autocast = autocast
        self.batch_tokens = batch_tokens or TOKENS.get(self.device.type, TOKENS["cpu"])
        self._vocab = 0
        self.passes = self.tokens = 0
        self.longest_shared = self._trial() if _takes_masks(model) else 0

    def score(self, rows: Sequence[Row]) -> Iterator[dict[int, tuple[float, bool]]]:
        """Batch by batch: the sum of each request's log-probabilities, and whether all of its
        tokens are the likeliest. `rows` begin with the longest.
        """
        if not self._vocab:
            self._vocab = self._width()
        long = [row for row in rows if len(row.tokens) > self.longest_shared]
        for some in (long, rows[len(long) :]):  # alternatives' masks are for short rows alone
            for batch in batches(some, self.batch_tokens, max(1, LOGITS // self._vocab)):
                yield self._score(batch)

    def _score(self, batch: list[Row]) -> dict[int, tuple[float, bool]]:
        try:
            values, greedy = self._read(batch)
        except torch.cuda.OutOfMemoryError:
            if len(batch) == 1:
                raise
            torch.cuda.empty_cache()
            half = len(batch) // 2
            self.batch_tokens = max(1, half * len(batch[0].tokens))  # of the batches to come
            return self._score(batch[:half]) | self._score(batch[half:])
        requests = np.array([number for row in batch for number in row.requests])
        numbers, place = np.unique(requests, return_inverse=True)
        sums = np.bincount(place, weights=values)
        misses = np.bincount(place, weights=~greedy)
        return {
            int(number): (float(total), miss == 0)
            for number, total, miss in zip(numbers, sums.tolist(), misses.tolist(), strict=True)
        }

    @torch.no_grad()
    def _read(self, batch: list[Row]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Log-probability of every read token, and whether it is the likeliest: [N] each."""
        width = max(len(row.tokens) for row in batch)
        if self.device.type == "cuda":
            width = -(-width // 8) * 8  # as its kernels like it
        tokens_BT = np.zeros((len(batch), width), np.int64)
        for b, row in enumerate(batch):
            tokens_BT[b, : len(row.tokens)] = row.tokens
        places = [b * width + place for b, row in enumerate(batch) for place in row.places]
        targets = [target for row in batch for target in row.targets]
        place_N, target_N = (torch.tensor(x, device=self.device) for x in (places, targets))
        extra = self._forked(batch, width) if any(row.branches for row in batch) else {}
        logits_NV = self.logits(torch.from_numpy(tokens_BT).to(self.device), place_N, **extra)
        values, greedy = [], []
        step = max(1, SLICE // logits_NV.shape[-1])
        for start in range(0, len(targets), step):
            part_NV = logits_NV[start : start + step].float()
            token_N1 = target_N[start : start + step, None]
            values.append(part_NV.gather(1, token_N1)[:, 0] - part_NV.logsumexp(-1))
            greedy.append(part_NV.argmax(-1) == token_N1[:, 0])
        self.passes += 1
        self.tokens += tokens_BT.size
        return torch.cat(values).double().cpu().numpy(), torch.cat(greedy).cpu().numpy()

    def logits(self, tokens_BT: Tensor, place_N: Tensor, **extra: Any) -> Tensor:
        """Logits [N, V] at places b T + t of a forward pass."""
        with evaluating(self._model), self._precision(), _picked(self._model, place_N) as picked:
            found = logits_of(self._model, tokens_BT, **extra).flatten(0, -2)
        return found if picked[0] else found[place_N]

    def continue_(self, tokens_BT: Tensor, **inputs: Any) -> tuple[Tensor, Any]:
        """Logits [B, V] after the last token of every row, and the cache that continues it."""
        rows, width = tokens_BT.shape
        last_B = torch.arange(rows, device=self.device) * width + width - 1
        with evaluating(self._model), self._precision(), _picked(self._model, last_B) as picked:
            out = self._model(input_ids=tokens_BT, use_cache=True, **inputs)
        self.passes += 1
        self.tokens += tokens_BT.numel()
        logits = out.logits.flatten(0, -2)
        return (logits if picked[0] else logits[last_B]).float(), out.past_key_values

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast)

    def _forked(self, batch: list[Row], width: int) -> dict[str, Tensor]:
        """Mask and positions of rows with alternatives: each sees the context and itself."""
        branch_BT = np.zeros((len(batch), width), np.int64)
        position_BT = np.tile(np.arange(width), (len(batch), 1))
        for b, row in enumerate(batch):
            end = sum(row.branches[:1])
            for number, length in enumerate(row.branches[1:], start=1):
                branch_BT[b, end : end + length] = number
                first = row.branches[0]
                position_BT[b, end : end + length] = np.arange(first, first + length)
                end += length
        branch = torch.from_numpy(branch_BT).to(self.device)
        earlier_TT = torch.ones(width, width, dtype=torch.bool, device=self.device).tril()
        same_BTT = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
        seen_BTT = same_BTT & earlier_TT
        dtype = torch.bfloat16 if self._autocast else next(self._model.parameters()).dtype
        mask = torch.zeros(seen_BTT.shape, dtype=dtype, device=self.device)
        mask.masked_fill_(~seen_BTT, torch.finfo(dtype).min)
        positions = torch.from_numpy(position_BT).to(self.device)
        return {"attention_mask": mask[:, None], "position_ids": positions}

    def _trial(self) -> int:
        """Whether this model computes rows with alternatives as it computes plain ones."""
        numbers = np.random.default_rng(0).integers(1, max(2, min(self._width(), 32000)), 60)
        t = numbers.tolist()
        pairs = [(t[:9], t[20:23]), (t[:9], t[30:34]), (t[:9], t[40:41]), (t[9:18], t[50:53])]
        pairs.append((t[9:18], t[53:56]))
        rows = [plan(pairs, 64, longest) for longest in (0, LONGEST_SHARED)]
        try:
            plain, shared = (self._score(some) for some in rows)
        except Exception:  # whatever a model raises at a mask that it does not know
            return 0
        finally:
            self.passes = self.tokens = 0
        limit = AGREE.get(torch.bfloat16 if self._autocast else self._dtype, 0.1)
        if any(abs(plain[n][0] - shared[n][0]) > limit for n in plain):
            return 0
        config: Any = getattr(self._model, "config", None)
        windows = [getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size")]
        return min([LONGEST_SHARED, *(window for window in windows if window)])

    @property
    def _dtype(self) -> torch.dtype:
        return next(self._model.parameters()).dtype

    @torch.no_grad()
    def _width(self) -> int:
        one = torch.zeros((1, 1), dtype=torch.int64, device=self.device)
        return self.logits(one, one[0]).shape[-1]


def logits_of(model: nn.Module, tokens_BT: Tensor, **extra: Any) -> Tensor:
    """The logits of a forward pass."""
    if hasattr(model, "get_output_embeddings"):
        out = model(input_ids=tokens_BT, **({"use_cache": False} | extra))
    else:
        out = model(tokens_BT, **extra)
    logits = getattr(out, "logits", out)
    assert isinstance(logits, Tensor)
    return logits


@contextmanager
def _picked(model: nn.Module, place_N: Tensor) -> Iterator[list[bool]]:
    """While open, the model's head sees the hidden states at these places alone, as [1, N, D].

    The list says whether it did: a model whose head is not found gives all logits.
    """
    done = [False]

    def pick(hidden_BTD: Tensor) -> Tensor:
        done[0] = True
        return hidden_BTD.flatten(0, -2)[place_N][None]

    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    if isinstance(model, Transformer):  # its head may be the embedding's weight
        handle = model.norm.register_forward_hook(lambda module, args, out: pick(out))
    elif isinstance(head, nn.Module):
        handle = head.register_forward_pre_hook(lambda module, args: (pick(args[0]), *args[1:]))
    else:
        yield done
        return
    try:
        yield done
    finally:
        handle.remove()


def _takes_masks(model: nn.Module) -> bool:
    known = set(inspect.signature(model.forward).parameters)
    return hasattr(model, "get_output_embeddings") and {"attention_mask", "position_ids"} <= known
