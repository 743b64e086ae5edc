"""Rows of tokens in a seeded order, the same for every number of ranks; resumable exactly.

The loop iterates over `Batches` and evaluates over `ValBatches`; both read a `TokenStore`.
Shapes: B rows, T tokens a row (`data.seq_len`).
"""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kalmagrove import config
from kalmagrove.config import CheckpointError, ConfigError, DataError
from kalmagrove.data.store import Prepared, TokenStore

IGNORED = -100  # the target of a position without a loss
Batch = dict[str, Any]


class Rows:
    """A split cut into rows: row i reads tokens [iT, iT + T) and predicts [iT + 1, iT + T + 1)."""

    def __init__(
        self, store: TokenStore, seq_len: int, pad: int, aware: bool, vocab: int | None = None
    ) -> None:
        """vocab: tokens are below it; None: not checked."""
        self._store, self._T, self._pad, self._aware = store, seq_len, pad, aware
        self._vocab = vocab
        self.whole = (len(store) - 1) // seq_len  # rows without padding
        self.all = -(-(len(store) - 1) // seq_len)

    def target_counts(self) -> NDArray[np.int64]:
        """Number of targets of every whole row: [whole]."""
        learned = self._store.learned
        if learned is None:
            return np.full(self.whole, self._T, np.int64)
        body = learned[1 : self.whole * self._T + 1].reshape(self.whole, self._T)
        return body.sum(axis=1, dtype=np.int64)

    def read(self, rows: Iterable[int], normalizer: float) -> Batch:
        """The batch of these rows; rows beyond the end have no targets.

        Raises:
            DataError: a token is none of the vocabulary's: the file was damaged after it had been
                verified. (On a GPU the embedding would end the process without a word of why.)
        """
        picked = list(rows)
        tokens_BT = np.full((len(picked), self._T), self._pad, np.int64)
        targets_BT = np.full((len(picked), self._T), IGNORED, np.int64)
        segments_BT = np.zeros((len(picked), self._T), np.int32)
        for b, row in enumerate(picked):
            start = row * self._T
            span = np.asarray(self._store.tokens[start : start + self._T + 1])
            if len(span) < 2:
                continue
            if self._vocab is not None and span.max() >= self._vocab:
                raise self._damaged(row, int(span.max()))
            here = len(span) - 1
            tokens_BT[b, :here] = span[:-1]
            targets_BT[b, :here] = span[1:]
            if self._store.learned is not None:
                learned = self._store.learned[start + 1 : start + 1 + here]
                targets_BT[b, :here][learned == 0] = IGNORED
            if self._aware:
                segments_BT[b] = self._segments(start)
        batch: Batch = {
            "tokens": torch.from_numpy(tokens_BT),
            "targets": torch.from_numpy(targets_BT),
            "normalizer": normalizer,
        }
        if self._aware:
            batch["segments"] = torch.from_numpy(segments_BT)
        return batch

    def _damaged(self, row: int, token: int) -> DataError:
        file = getattr(self._store.tokens, "filename", "the tokens")
        return DataError(
            f"{file}: row {row} holds token {token}, of a vocabulary of {self._vocab}; the file is "
            "damaged: see kalmagrove prepare verify=true, delete its folder, and give the same "
            "command again"
        )

    def _segments(self, start: int) -> NDArray[np.int64]:
        """[T]: how many documents begin after the row's first position, up to each position."""
        offsets = self._store.offsets
        low, high = np.searchsorted(offsets, (start, start + self._T - 1), side="right")
        marks = np.zeros(self._T, np.int64)
        marks[offsets[low:high] - start] = 1
        return np.cumsum(marks)


class Batches:
    """Endless micro-batches of one data-parallel rank.

    With G rows a step, step s takes rows [sG, (s + 1)G) of a global order, a permutation of the
    rows for each epoch drawn from `run.seed`. Micro-batch j of rank r takes `micro` of these from
    (j dp + r) micro on. Nothing depends on what was read before: a position is enough to resume.
    """

    def __init__(
        self, prepared: Prepared, run: config.Training, dp_rank: int, dp_size: int
    ) -> None:
        if run.rows_per_step % (run.batch.micro * dp_size):
            run.check_world(dp_size * run.parallel.tp * run.parallel.cp)
        T = run.data.seq_len
        eot, vocab = prepared.tokenizer.eot, prepared.vocab_size
        self._rows = Rows(prepared.train, T, eot, run.data.document_aware, vocab)
        check_seq_len(prepared, T)
        if self._rows.whole < run.rows_per_step and dp_rank == 0:
            warnings.warn(
                f"batch.tokens={run.batch.tokens} is more than the data: each step reads its "
                f"{self._rows.whole} rows of {T} tokens more than once",
                stacklevel=2,
            )
        self._targets = self._rows.target_counts()
        self._seed, self._micro = run.seed, run.batch.micro
        self._rank, self._dp, self._step_rows = dp_rank, dp_size, run.rows_per_step
        self._identity = {"data": prepared.fingerprint, "seq_len": T, "seed": run.seed}
        self._orders: dict[int, NDArray[np.int64]] = {}
        self._samples = 0  # rows of all ranks before the current step
        self._taken = 0  # rows of all ranks in the current step
        self._step: NDArray[np.int64] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._step is None:
            self._step = self._global_rows(self._samples, self._step_rows)
        here = self._taken + self._rank * self._micro
        batch = self._rows.read(self._step[here : here + self._micro].tolist(), self._normalizer())
        self._taken += self._micro * self._dp
        if self._taken == self._step_rows:
            self._samples, self._taken, self._step = self._samples + self._step_rows, 0, None
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position (rows all ranks have read) and what gives it a meaning.

        Raises:
            CheckpointError: in the middle of a step, where other ranks could not take over.
        """
        if self._taken:
            raise CheckpointError(
                f"the data position was asked for in the middle of a step: {self._taken} of "
                f"{self._step_rows} rows are read; save between steps"
            )
        return {"samples": self._samples, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken, by any number of ranks.

        Raises:
            CheckpointError: if it was taken on other data, row length or seed.
        """
        names = {"data": "data (its tokens)", "seq_len": "data.seq_len", "seed": "seed"}
        wrong = [
            f"{names[key]} was {state.get(key)}, is {value}"
            for key, value in self._identity.items()
            if state.get(key) != value
        ]
        if wrong:
            raise CheckpointError(
                f"the checkpoint's data position has no meaning here: {'; '.join(wrong)}; "
                "restore these settings, or start anew with checkpoint.resume=never"
            )
        self._samples, self._taken, self._step = int(state["samples"]), 0, None

    def _normalizer(self) -> float:
        """Targets of the whole step a micro-batch; at least one, as a step may have none."""
        assert self._step is not None
        micro_batches = self._step_rows // self._micro
        return max(1, int(self._targets[self._step].sum())) / micro_batches

    def _global_rows(self, start: int, count: int) -> NDArray[np.int64]:
        """Rows number [start, start + count) of the endless global order."""
        parts = []
        while count:
            epoch, place = divmod(start, self._rows.whole)
            part = self._order(epoch)[place : place + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            seed = np.random.SeedSequence([self._seed % 2**64, epoch])
            order = np.random.Generator(np.random.PCG64(seed)).permutation(self._rows.whole)
            self._orders = {epoch: order}
        return self._orders[epoch]


class ValBatches:
    """The held-out split in order, again at each iteration; all ranks get as many micro-batches.

    normalizer is 1, so that the model's loss is the sum of nats. All tokens but the first are
    predicted once, those of the baselines in the manifest.
    """

    def __init__(
        self, prepared: Prepared, run: config.Training, dp_rank: int, dp_size: int
    ) -> None:
        T = run.data.seq_len
        eot, vocab = prepared.tokenizer.eot, prepared.vocab_size
        self._rows = Rows(prepared.val, T, eot, run.data.document_aware, vocab)
        count = self._rows.all
        if run.eval.max_tokens is not None:
            count = min(count, max(1, run.eval.max_tokens // T))
        self._count, self._micro = count, run.eval.micro
        self._rank, self._dp = dp_rank, dp_size

    def __len__(self) -> int:
        return -(-self._count // (self._micro * self._dp))

    def __iter__(self) -> Iterator[Batch]:
        for j in range(len(self)):
            first = (j * self._dp + self._rank) * self._micro
            beyond = self._rows.all  # a row without tokens
            rows = [i if i < self._count else beyond for i in range(first, first + self._micro)]
            yield self._rows.read(rows, 1.0)


def check_seq_len(prepared: Prepared, seq_len: int) -> None:
    """Whether the data holds a row at all.

    Raises:
        ConfigError: if it does not.
    """
    tokens = len(prepared.train)
    if tokens - 1 < seq_len:
        raise ConfigError(
            "data.seq_len",
            seq_len,
            f"is longer than the data: {tokens} training tokens",
            f"try {max(1, (tokens - 1) // 8)} or more data",
        )


def build_batches(prepared: Prepared, run: config.Training, dp_rank: int, dp_size: int) -> Batches:
    """The training data of one data-parallel rank.

    Raises:
        ConfigError: if a row is longer than the data, or the step does not split over the ranks.
    """
    return Batches(prepared, run, dp_rank, dp_size)


def val_batches(prepared: Prepared, run: config.Training, dp_rank: int, dp_size: int) -> ValBatches:
    """The held-out data of one data-parallel rank."""
    return ValBatches(prepared, run, dp_rank, dp_size)
