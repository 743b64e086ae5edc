"""Text to tokens as a model was trained to see it, for both kinds of tokenizers.

`codec_of` wraps a tokenizer of transformers (encoding as lm-eval's own `hf` model does) or of
`kalmagrove.data` (documents begin with the end-of-text token). Used by the lm-eval adapter.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from kalmagrove.config import ConfigError
from kalmagrove.data.tokenizer import END, MARKERS, Auto, Tokenizer

Turns = list[dict[str, str]]


class Codec(ABC):
    """What the adapter asks of a tokenizer.

    Attributes:
        prefix: the token that stands before a text without context.
        eos: tokens that end a generated text.
        has_template: whether conversations can be rendered.
        fingerprint: equal for tokenizers that encode and render alike.
    """

    prefix: int
    eos: tuple[int, ...]
    has_template: bool
    fingerprint: str

    @abstractmethod
    def encode(self, texts: Sequence[str], rendered: bool = False) -> list[list[int]]:
        """Token ids of texts that begin a document; `rendered`: by `render`."""

    @abstractmethod
    def encode_bare(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids and nothing added."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text of generated tokens, without special ones."""

    @abstractmethod
    def render(self, turns: Turns, prompt: bool) -> str:
        """A conversation as text; `prompt` opens the assistant's turn."""


class HuggingFace(Codec):
    """A tokenizer of transformers, with the settings of lm-eval's `hf` model."""

    def __init__(self, tokenizer: Any) -> None:
        self._inner = tokenizer
        first = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        known = [token for token in first if token is not None]
        if not known:
            raise ConfigError(
                "run", tokenizer.name_or_path, "must have a tokenizer with a bos or eos token"
            )
        self.prefix = known[0]
        self.eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.has_template = bool(tokenizer.chat_template)
        self._begin = tokenizer.decode([self.prefix])
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        core = backend.to_str() if hasattr(backend, "to_str") else sorted(tokenizer.get_vocab())
        self.fingerprint = digest(type(tokenizer).__name__, core, tokenizer.chat_template, known)

    def encode(self, texts: Sequence[str], rendered: bool = False) -> list[list[int]]:
        begun = [text.startswith(self._begin) for text in texts]
        found: list[list[int]] = [[]] * len(texts)
        for special in (True, False):
            places = [i for i, has in enumerate(begun) if has != special]
            ids = self._ids([texts[i] for i in places], special)
            for i, row in zip(places, ids, strict=True):
                found[i] = row
        return found

    def encode_bare(self, texts: Sequence[str]) -> list[list[int]]:
        return self._ids(texts, False)

    def _ids(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        found: list[list[int]] = self._inner(
            list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False
        )["input_ids"]
        return found

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._inner.decode(list(tokens), skip_special_tokens=True))

    def render(self, turns: Turns, prompt: bool) -> str:
        return str(
            self._inner.apply_chat_template(
                turns,
                tokenize=False,
                add_generation_prompt=prompt,
                continue_final_message=not prompt,
            )
        )


class Own(Codec):
    """A tokenizer of `kalmagrove.data`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._inner = tokenizer
        self.prefix = tokenizer.eot
        end = tokenizer.markers["end"] if tokenizer.markers else None
        self.eos = tuple(token for token in (tokenizer.eot, end) if token is not None)
        self.has_template = tokenizer.markers is not None or isinstance(tokenizer, Auto)
        self.fingerprint = tokenizer.fingerprint

    def encode(self, texts: Sequence[str], rendered: bool = False) -> list[list[int]]:
        ids = self._inner.encode_batch(texts, specials=rendered)
        return [row if row[:1] == [self.prefix] else [self.prefix, *row] for row in ids]

    def encode_bare(self, texts: Sequence[str]) -> list[list[int]]:
        return self._inner.encode_batch(texts)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._inner.decode([token for token in tokens if token not in self.eos])

    def render(self, turns: Turns, prompt: bool) -> str:
        if self._inner.markers is None:
            assert isinstance(self._inner, Auto)
            return self._inner.render(turns, prompt)
        text = "".join(f"{MARKERS[turn['role']]}{turn['content']}{END}" for turn in turns)
        return text + MARKERS["assistant"] if prompt else text.removesuffix(END)


def codec_of(tokenizer: Any) -> Codec:
    return Own(tokenizer) if isinstance(tokenizer, Tokenizer) else HuggingFace(tokenizer)


def digest(*parts: Any) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
