"""Documents to tokens, with the mask of what is learned: all of a text, the answers of a chat.

`encode` runs in the tokenizing threads of `prepare`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jinja2
import numpy as np
from numpy.typing import NDArray

from kalmagrove.data.rows import BadRowError, Document, Message
from kalmagrove.data.tokenizer import Auto, Tokenizer


@dataclass(frozen=True)
class Encoded:
    """A document of L tokens.

    tokens: [L] int64, beginning with the end-of-text token. learned: [L] uint8, 1 where the token
    is a target of the loss; None: everywhere. text_bytes: UTF-8 bytes of the learned text.
    """

    tokens: NDArray[np.int64]
    learned: NDArray[np.uint8] | None
    text_bytes: int


class Span(NamedTuple):
    """A part of a rendered conversation, inside or outside the loss."""

    text: str
    learned: bool


def encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[Encoded | str]:
    """Tokens of each document, or the reason why it is a bad row."""
    if not documents or isinstance(documents[0].content, str):
        texts = [document.content for document in documents]
        ids = tokenizer.encode_batch([text for text in texts if isinstance(text, str)])
        return [
            Encoded(np.array([tokenizer.eot, *row], np.int64), None, len(document.raw))
            for row, document in zip(ids, documents, strict=True)
        ]
    chats = [document.content for document in documents if not isinstance(document.content, str)]
    if tokenizer.markers is None:
        assert isinstance(tokenizer, Auto)
        return _templated(tokenizer, chats)
    return list(_marked(tokenizer, tokenizer.markers, chats))


def _marked(
    tokenizer: Tokenizer, markers: dict[str, int], chats: list[list[Message]]
) -> list[Encoded]:
    """`<|role|>content<|end|>` for each turn; content and end of the assistant's are learned."""
    contents = [message["content"] for chat in chats for message in chat]
    ids = iter(tokenizer.encode_batch(contents))
    encoded = []
    for chat in chats:
        tokens, learned = [tokenizer.eot], [0]
        for message in chat:
            body = [*next(ids), markers["end"]]
            tokens += [markers[message["role"]], *body]
            learned += [0, *[int(message["role"] == "assistant")] * len(body)]
        encoded.append(_encoded(tokens, learned, chat))
    return encoded


def _templated(tokenizer: Auto, chats: list[list[Message]]) -> list[Encoded | str]:
    """By the tokenizer's own template, each span encoded by itself.

    So the mask is exact, and a prompt is tokenized in training as it will be in use.
    """
    spans: list[list[Span] | str] = []
    for chat in chats:
        try:
            spans.append(_spans(tokenizer, chat))
        except BadRowError as bad:
            spans.append(str(bad))
    good = [row for row in spans if not isinstance(row, str)]
    ids = iter(tokenizer.encode_batch([s.text for row in good for s in row], specials=True))
    encoded: list[Encoded | str] = []
    for chat, row in zip(chats, spans, strict=True):
        if isinstance(row, str):
            encoded.append(row)
            continue
        tokens: list[int] = []
        learned: list[int] = []
        for span in row:
            part = next(ids)
            count = _turn_length(tokenizer, part) if span.learned else 0
            tokens += part
            learned += [1] * count + [0] * (len(part) - count)
        if tokens[0] != tokenizer.eot:
            tokens, learned = [tokenizer.eot, *tokens], [0, *learned]
        encoded.append(_encoded(tokens, learned, chat))
    return encoded


def _spans(tokenizer: Auto, chat: list[Message]) -> list[Span]:
    """Cut the rendered conversation where assistant turns begin and end.

    A turn is what the template adds to the rendering of the turns before it, opened for an answer.
    """
    if any(tokenizer.contains_special(message["content"]) for message in chat):
        raise BadRowError("with a special token's name in the text")
    try:
        whole = tokenizer.render(chat, prompt=False)
        spans, done = [], 0
        for index, message in enumerate(chat):
            if message["role"] != "assistant":
                continue
            before = tokenizer.render(chat[:index], prompt=True)
            after = tokenizer.render(chat[: index + 1], prompt=False)
            if not (after.startswith(before) and whole.startswith(after)):
                raise BadRowError("whose chat template rewrites earlier turns")
            spans += [Span(whole[done : len(before)], False), Span(after[len(before) :], True)]
            done = len(after)
    except jinja2.TemplateError as error:
        raise BadRowError(f"refused by the chat template ({error})") from error
    return [span for span in (*spans, Span(whole[done:], False)) if span.text]


def _turn_length(tokenizer: Auto, turn: list[int]) -> int:
    """Tokens up to the one that ends the turn; templates may add a line break after it."""
    last = max((i for i, token in enumerate(turn) if tokenizer.is_special(token)), default=None)
    return len(turn) if last is None else last + 1


def _encoded(tokens: list[int], learned: list[int], chat: list[Message]) -> Encoded:
    text_bytes = sum(len(m["content"].encode()) for m in chat if m["role"] == "assistant")
    return Encoded(np.array(tokens, np.int64), np.array(learned, np.uint8), text_bytes)
