"""Text to tokens and back: a byte-level BPE trained on the corpus, or any `AutoTokenizer`.

`prepare` makes one and saves it inside the token cache; everybody else loads it from there.
"""

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from kalmagrove import config
from kalmagrove.config import ConfigError, DataError
from kalmagrove.data.rows import Message

EOT, END = "<|endoftext|>", "<|end|>"
MARKERS = {role: f"<|{role}|>" for role in ("system", "user", "assistant")}
SPECIALS = (EOT, *MARKERS.values(), END)
TEMPLATE = (
    "{{ eos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PIECE = 1_000_000  # characters encoded at once: tokenizers needs over 100 bytes of memory for each


class Tokenizer(ABC):
    """What the rest of the project knows of a tokenizer.

    Attributes:
        size: number of ids; every id is below it.
        eot: the end-of-text id, which also begins every document.
        markers: ids that open a turn of each role, and `end`, which closes one; None where the
            tokenizer has a chat template of its own.
        fingerprint: equal exactly for tokenizers that encode alike.
    """

    size: int
    eot: int
    markers: dict[str, int] | None
    fingerprint: str

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], specials: bool = False) -> list[list[int]]:
        """Token ids of each text, nothing added.

        specials: whether the names of special tokens in the text become these tokens; else they are
        text like any other.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens appear by name."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write files that `load` and `AutoTokenizer.from_pretrained` read."""

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]


@contextmanager
def _os_errors() -> Iterator[None]:
    """What the system refuses as an OSError: the library, in Rust, raises a plain Exception."""
    try:
        yield
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


class BPE(Tokenizer):
    """A byte-level BPE (arXiv:1508.07909; bytes and word split as in GPT-2): lossless."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend, self._with_specials = _two_modes(backend)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        ids = {name: vocabulary[name] for name in SPECIALS}
        self.size = backend.get_vocab_size()
        self.eot = ids[EOT]
        self.markers = {role: ids[name] for role, name in MARKERS.items()} | {"end": ids[END]}
        self.fingerprint = _digest(backend.to_str())

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPE":
        """Train on `texts`; the same texts give the same tokenizer."""
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIALS),
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    def encode_batch(self, texts: Sequence[str], specials: bool = False) -> list[list[int]]:
        return _encode_fast(self._with_specials if specials else self._backend, texts)

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with _os_errors():
            self._backend.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": EOT,
            "eos_token": EOT,
            "clean_up_tokenization_spaces": False,
            "chat_template": TEMPLATE,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


class Auto(Tokenizer):
    """A tokenizer of transformers. One without a chat template gets the turn markers of `BPE`."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        backend: Any = getattr(inner, "backend_tokenizer", None)
        fast = isinstance(backend, tokenizers.Tokenizer)
        self._modes = _two_modes(backend) if fast else None
        vocabulary: dict[str, int] = inner.get_vocab()
        self.size = max(vocabulary.values()) + 1
        eot = inner.eos_token_id if inner.eos_token_id is not None else inner.bos_token_id
        if eot is None:
            raise ConfigError(
                "data.tokenizer.name",
                inner.name_or_path,
                "must have an end-of-text (eos) token",
                "use another tokenizer or data.tokenizer.kind=bpe",
            )
        self.eot = eot
        self.markers = None
        if not inner.chat_template and all(name in vocabulary for name in SPECIALS[1:]):
            self.markers = {role: vocabulary[name] for role, name in MARKERS.items()}
            self.markers["end"] = vocabulary[END]
        added = inner.added_tokens_decoder
        self._special_ids = {id_ for id_, token in added.items() if token.special}
        names = sorted(token.content for token in added.values() if token.special)
        self._special_names = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        core = backend.to_str() if fast else json.dumps(sorted(vocabulary.items()))
        self.fingerprint = _digest(core, str(self.eot), str(inner.chat_template))

    @classmethod
    def fetch(cls, name: str, chat: bool) -> "Auto":
        """By name from the hub or its cache, or from a folder.

        Raises:
            DataError: if there is no such tokenizer, or no network to get it from.
        """
        inner = _from_pretrained(name)
        if chat and not inner.chat_template:
            new = [tokenizers.AddedToken(name, special=True) for name in SPECIALS[1:]]
            inner.add_tokens(new, special_tokens=True)
        return cls(inner)

    def encode_batch(self, texts: Sequence[str], specials: bool = False) -> list[list[int]]:
        if self._modes:
            return _encode_fast(self._modes[specials], texts)
        return [
            self._inner(text, add_special_tokens=False, split_special_tokens=not specials)[
                "input_ids"
            ]
            for text in texts
        ]

    def decode(self, ids: Sequence[int]) -> str:
        text = self._inner.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def save(self, folder: Path) -> None:
        with _os_errors():
            self._inner.save_pretrained(folder)

    def render(self, messages: list[Message], prompt: bool) -> str:
        """The chat template's text of a conversation; `prompt` opens an assistant turn after it."""
        text = self._inner.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt
        )
        assert isinstance(text, str)
        return text

    def contains_special(self, text: str) -> bool:
        """Whether the name of a special token stands in `text`."""
        return self._special_names.search(text) is not None

    def is_special(self, token: int) -> bool:
        """Whether a token marks structure rather than text."""
        return token in self._special_ids


def load(kind: str, folder: Path) -> Tokenizer:
    """The tokenizer that `save` wrote."""
    if kind == "auto":
        return Auto(_from_pretrained(str(folder)))
    return BPE(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")))


def identity(section: config.Tokenizer) -> tuple[Any, ...]:
    """What determines the tokenizer, besides the corpus it is trained on."""
    if section.kind == "bpe":
        return ("bpe", section.vocab_size, section.train_bytes)
    assert section.name is not None
    folder = Path(section.name).expanduser()
    if not folder.is_dir():
        return ("auto", section.name)
    files = sorted(p for p in folder.iterdir() if "token" in p.name or p.suffix == ".jinja")
    marks = [(p.name, hashlib.sha256(p.read_bytes()).hexdigest()) for p in files if p.is_file()]
    return ("auto", *marks)


def _from_pretrained(name: str) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(Path(name).expanduser()), trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"data.tokenizer.name={name} cannot be loaded: {reason[0][:200]}; it needs a network, "
            "the Hugging Face cache or a folder with a tokenizer; without one use "
            "data.tokenizer.kind=bpe"
        ) from error


def _two_modes(
    backend: tokenizers.Tokenizer,
) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
    """Copies of `backend`: names of special tokens in a text are (0) text, (1) these tokens."""
    plain, special = (tokenizers.Tokenizer.from_str(backend.to_str()) for _ in range(2))
    plain.encode_special_tokens = True
    for copy in (plain, special):
        copy.no_truncation()
        copy.no_padding()
    return plain, special


def _encode_fast(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    pieces = [_cut(text) for text in texts]
    flat = [piece for parts in pieces for piece in parts]
    encoded = iter(backend.encode_batch_fast(flat, add_special_tokens=False))
    return [[id_ for _ in parts for id_ in next(encoded).ids] for parts in pieces]


def _cut(text: str) -> list[str]:
    """Cut a very long text where a line begins with a letter or sign.

    The word split of byte-level tokenizers cuts there anyway, so their tokens stay the same.
    """
    pieces, start = [], 0
    border = re.compile(r"\n(?=\S)")
    while len(text) - start > PIECE:
        match = border.search(text, start + PIECE)
        if match is None:
            break
        pieces.append(text[start : match.end()])
        start = match.end()
    pieces.append(text[start:])
    return pieces


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
