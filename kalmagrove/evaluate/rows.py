"""Requests as rows of tokens for a model, with the places where their logits are read.

`plan` makes rows that compute what requests share once; `batches` fills forward passes by a budget
of tokens. Used by `scorer`; shapes: B rows, T tokens.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

LONGEST_SHARED = 4096  # tokens of a row whose mask is written out

Pair = tuple[list[int], list[int]]  # a context and its continuation


@dataclass(eq=False)
class Row:
    """One row of a batch.

    places, targets, requests: where a logit is read, for which token, and for whom. branches:
    empty, or the length of the shared context and of each alternative after it; alternatives do not
    see one another.
    """

    tokens: list[int]
    places: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)
    branches: tuple[int, ...] = ()

    def read(self, place: int, target: int, request: int) -> None:
        self.places.append(place)
        self.targets.append(target)
        self.requests.append(request)


def plan(
    pairs: Sequence[Pair], max_length: int, longest_shared: int = 0, merge: bool = True
) -> list[Row]:
    """Rows that give the log-likelihood of every continuation, the longest row first.

    Too long a pair loses its first tokens. Requests with the same input share a row, as do those
    whose input begins another one, unless `merge` is false: then every request has its own row.

    Args:
        longest_shared: tokens a row with alternatives after a shared context may have; 0: none.
    """
    if not merge:
        alone: list[Row] = []
        for number, pair in enumerate(pairs):
            made: dict[tuple[int, ...], Row] = {}
            _add(made, pair, number, max_length)
            alone += made.values()
        return sorted(alone, key=lambda row: len(row.tokens), reverse=True)
    single: dict[tuple[int, ...], Row] = {}
    shared: list[Row] = []
    by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, pair in enumerate(pairs):
        by_context[tuple(pair[0])].append(number)
    for context, numbers in by_context.items():
        row = _fork(context, pairs, numbers) if longest_shared and len(numbers) > 1 else None
        fits = all(len(context) + len(pairs[n][1]) - 1 <= max_length for n in numbers)
        if row is not None and len(row.tokens) <= longest_shared and fits:
            shared.append(row)
            continue
        for number in numbers:
            _add(single, pairs[number], number, max_length)
    rows = _absorb(single) + shared
    return sorted(rows, key=lambda row: len(row.tokens), reverse=True)


def _add(rows: dict[tuple[int, ...], Row], pair: Pair, request: int, max_length: int) -> None:
    context, continuation = pair
    tokens = (context + continuation)[-(max_length + 1) :][:-1]
    row = rows.setdefault(tuple(tokens), Row(tokens))
    count = min(len(continuation), len(tokens))
    for i, target in enumerate(continuation[len(continuation) - count :]):
        row.read(len(tokens) - count + i, target, request)


def _absorb(rows: dict[tuple[int, ...], Row]) -> list[Row]:
    """Rows that begin another one are read there. In order, a row stands just before its like."""
    kept: list[Row] = []
    for key in sorted(rows, reverse=True):
        row = rows[key]
        longer = kept[-1] if kept else None
        if longer is not None and longer.tokens[: len(row.tokens)] == row.tokens:
            longer.places += row.places
            longer.targets += row.targets
            longer.requests += row.requests
        else:
            kept.append(row)
    return kept


def _fork(context: tuple[int, ...], pairs: Sequence[Pair], numbers: list[int]) -> Row | None:
    """The context once and every alternative after it; None if a plain row does as well."""
    starts: dict[tuple[int, ...], int] = {}
    row = Row(list(context))
    lengths = [len(context)]
    for number in numbers:
        continuation = pairs[number][1]
        inputs = tuple(continuation[:-1])
        if inputs and inputs not in starts:
            starts[inputs] = len(row.tokens)
            row.tokens += inputs
            lengths.append(len(inputs))
        row.read(len(context) - 1, continuation[0], number)
        for i, target in enumerate(continuation[1:]):
            row.read(starts[inputs] + i, target, number)
    if len(lengths) <= 2:
        return row  # one way on: a plain row
    row.branches = tuple(lengths)
    return row


def batches(rows: Sequence[Row], tokens: int, reads: int) -> Iterator[list[Row]]:
    """Runs of rows of at most `tokens` B x T and `reads` logits, a row at least.

    `rows` begin with the longest.
    """
    batch: list[Row] = []
    count = 0
    for row in rows:
        width = len(batch[0].tokens) if batch else 0
        full = (len(batch) + 1) * width > tokens or count + len(row.places) > reads
        if batch and full:
            yield batch
            batch, count = [], 0
        batch.append(row)
        count += len(row.places)
    if batch:
        yield batch
