"""What a source yields: documents, and a tally of the rows that are none.

`sources` and `hub` make documents through `parse`; `prepare` reads them and reports the tally.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from kalmagrove.config import DataError

Message = dict[str, str]
Format = Literal["text", "messages"]

ROLES = ("system", "user", "assistant")
EARLY_CHECK = 1000  # rows after which the share of bad ones is trusted before the end
EXAMPLES = 5  # places remembered of each kind of bad row


class Where(NamedTuple):
    """The place of a row: line (jsonl) or row number, from 1."""

    file: str
    row: int


@dataclass(frozen=True)
class Document:
    """`content` is a text or a conversation; `raw` the UTF-8 bytes that identify it."""

    content: str | list[Message]
    raw: bytes
    where: Where


class BadRowError(Exception):
    """A row that is no document. Its message is the reason it is counted under."""


@dataclass
class Tally:
    """Rows read, and the bad ones by reason.

    Empty texts are left out and counted, but not bad: corpora of lines are full of them.
    """

    limit: float  # share of bad rows above which reading stops
    rows: int = 0
    empty: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[Where]] = field(default_factory=dict)
    bytes_read: int = 0  # of the input files, as they lie on disk

    def reject(self, reason: str, where: Where) -> None:
        """Count a bad row.

        Raises:
            DataError: if there are so many already that reading on is pointless.
        """
        self.bad[reason] += 1
        places = self.places.setdefault(reason, [])
        if len(places) < EXAMPLES:
            places.append(where)
        if self.rows >= EARLY_CHECK:
            self.check()

    def check(self) -> None:
        """Raises DataError, naming files and lines, if too many rows are bad."""
        bad = sum(self.bad.values())
        if bad > self.limit * self.rows:
            raise DataError(
                f"{bad} of {self.rows} rows read are bad, more than "
                f"data.source.max_bad_fraction={self.limit:g} allows: {self.describe()}; "
                "mend the data, correct data.source.key or raise the limit"
            )

    def describe(self) -> str:
        """`12 not JSON (a.jsonl rows 3, 7), 1 missing text (b.jsonl row 9)`."""
        return ", ".join(
            f"{count} {reason} ({self._locate(reason)})" for reason, count in self.bad.most_common()
        )

    def _locate(self, reason: str) -> str:
        by_file: dict[str, list[str]] = {}
        for where in self.places[reason]:
            by_file.setdefault(where.file, []).append(str(where.row))
        return "; ".join(
            f"{file} row{'s' * (len(rows) > 1)} {', '.join(rows)}" for file, rows in by_file.items()
        )


def parse(value: Any, where: Where, key: str, form: Format, tally: Tally) -> Iterable[Document]:
    """The document of a row's field `value` (or none, counted in `tally`)."""
    tally.rows += 1
    try:
        document = _messages(value, where, key) if form == "messages" else _text(value, where, key)
    except BadRowError as bad:
        tally.reject(str(bad), where)
        return ()
    if document is None:
        tally.empty += 1
        return ()
    return (document,)


def _text(value: Any, where: Where, key: str) -> Document | None:
    if value is None:
        raise BadRowError(f"without {key}")
    if not isinstance(value, str):
        raise BadRowError(f"with {key} of type {type(value).__name__}, not text,")
    raw = _utf8(value)
    return Document(value, raw, where) if value.strip() else None


def _messages(value: Any, where: Where, key: str) -> Document | None:
    if value is None:
        raise BadRowError(f"without {key}")
    if not isinstance(value, list):
        raise BadRowError(f"with {key} of type {type(value).__name__}, not a list,")
    messages = [_message(item) for item in value]
    if not messages:
        return None
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRowError("without an assistant turn")
    return Document(messages, _utf8(json.dumps(messages, ensure_ascii=False)), where)


def _message(item: Any) -> Message:
    if not isinstance(item, dict) or not isinstance(item.get("content"), str):
        raise BadRowError("with a message without role and content")
    if item.get("role") not in ROLES:
        raise BadRowError(f"with a role other than {', '.join(ROLES)}")
    return {"role": item["role"], "content": item["content"]}


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:  # lone surrogates, which JSON can spell
        raise BadRowError("not UTF-8") from None
