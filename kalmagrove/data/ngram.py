"""What a model must beat: the held-out cross-entropy of unigram and bigram models.

`prepare` computes them once and keeps them in the manifest.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CAP = 50_000_000  # training tokens counted: about 1 GB of memory
Ints = NDArray[np.integer]


@dataclass(frozen=True)
class Baselines:
    """Nats per predicted token of the held-out split.

    train_tokens: how many of the first training tokens were counted.
    """

    unigram_nats: float
    bigram_nats: float
    train_tokens: int


def fit(
    train: Ints,
    val: Ints,
    vocab: int,
    train_learned: Ints | None = None,
    val_learned: Ints | None = None,
    cap: int = CAP,
) -> Baselines:
    """Count `train`, predict `val`: every token but the first, or those marked as learned.

    Unigram: add-one smoothing. Bigram: interpolated Kneser-Ney with one absolute discount
    n1 / (n1 + 2 n2) (Ney, Essen and Kneser 1994; Chen and Goodman 1999, section 2.7); its
    lower order, the continuation counts, has add-one smoothing so that no token is impossible.
    """
    train, train_learned = train[:cap], None if train_learned is None else train_learned[:cap]
    before, after = _pairs(train, train_learned)
    val_before, val_after = _pairs(val, val_learned)

    counts = np.bincount(after, minlength=vocab)
    unigram = (counts + 1) / (counts.sum() + vocab)

    dtype = np.uint32 if vocab * vocab <= 1 << 32 else np.uint64
    pairs, times = np.unique(_key(before, after, vocab, dtype), return_counts=True)
    once, twice = int((times == 1).sum()), int((times == 2).sum())
    discount = once / (once + 2 * twice) if once and twice else 0.5
    context = np.bincount(before, minlength=vocab)
    followers = np.bincount((pairs // vocab).astype(np.int64), minlength=vocab)
    continuations = np.bincount((pairs % vocab).astype(np.int64), minlength=vocab)
    lower = (continuations + 1) / (len(pairs) + vocab)

    key = _key(val_before, val_after, vocab, dtype)
    place = np.minimum(np.searchsorted(pairs, key), len(pairs) - 1)
    seen = np.where(pairs[place] == key, times[place], 0)
    total = context[val_before]
    safe = np.maximum(total, 1)  # a context never seen leaves all to the lower order
    direct = np.maximum(seen - discount, 0) / safe
    left = np.where(total > 0, discount * followers[val_before] / safe, 1.0)
    bigram = direct + left * lower[val_after]

    return Baselines(
        unigram_nats=float(-np.log(unigram[val_after]).mean()),
        bigram_nats=float(-np.log(bigram).mean()),
        train_tokens=len(train),
    )


def _pairs(tokens: Ints, learned: Ints | None) -> tuple[Ints, Ints]:
    """(token, next token) wherever the next one is learned."""
    before, after = np.asarray(tokens[:-1]), np.asarray(tokens[1:])
    if learned is None:
        return before, after
    kept = np.asarray(learned[1:]).astype(bool)
    return before[kept], after[kept]


def _key(before: Ints, after: Ints, vocab: int, dtype: type) -> Ints:
    key: NDArray[Any] = before.astype(dtype)
    key *= dtype(vocab)
    key += after.astype(dtype)
    return key
