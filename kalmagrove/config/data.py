"""What the model reads: a source of documents, a tokenizer, and how tokens are packed."""

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from kalmagrove.config.base import Section
from kalmagrove.config.errors import ConfigError


class Source(Section):
    """Where documents come from.

    stdlib: the .py files of the installed Python's standard library. text: each file is a document.
    jsonl, parquet: each row is a document. hf: a Hugging Face dataset by name.
    """

    kind: Literal["stdlib", "text", "jsonl", "parquet", "hf"]
    paths: tuple[str, ...] = ()  # files or globs (text, jsonl, parquet)
    val_paths: tuple[str, ...] = ()  # a held-out split of its own
    dataset: str | None = None  # hf: name on the hub, or a local folder
    subset: str | None = None  # hf: configuration name
    split: str = "train"  # hf
    val_split: str | None = None  # hf: a held-out split of its own
    streaming: bool = True  # hf
    key: str = "text"  # field of a row that holds the text, or the messages
    max_documents: PositiveInt | None = None
    max_bad_fraction: float = Field(0.01, ge=0, le=1)  # of rows; above it preparation stops


class Tokenizer(Section):
    """bpe: a byte-level BPE trained on the corpus. auto: any `AutoTokenizer` name or folder."""

    kind: Literal["bpe", "auto"] = "bpe"
    vocab_size: PositiveInt = 4096  # bpe
    name: str | None = None  # auto
    train_bytes: PositiveInt = 32_000_000  # bpe: text read to train it


class Data(Section):
    """A corpus, tokenized and packed to rows of `seq_len` tokens."""

    name: str
    source: Source
    format: Literal["text", "messages"] = "text"  # messages: loss on assistant turns only
    tokenizer: Tokenizer = Tokenizer()
    seq_len: PositiveInt = 512
    document_aware: bool = False  # attention does not cross document borders
    val_fraction: float = Field(0.01, gt=0, lt=1)  # of documents, where the source has no split
    seed: int = 0  # of the held-out choice
    cache: str = "~/.cache/kalmagrove/data"
    workers: PositiveInt | None = None  # tokenizing threads; null: all cores

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        source = self.source
        if source.kind in ("text", "jsonl", "parquet") and not source.paths:
            raise ConfigError(
                "data.source.paths",
                "[]",
                f"must name files or globs for kind={source.kind}",
                "try data.source.paths=[my/*.jsonl]",
            )
        if source.kind == "hf" and not source.dataset:
            raise ConfigError(
                "data.source.dataset",
                None,
                "must name a dataset for kind=hf",
                "try data.source.dataset=roneneldan/TinyStories",
            )
        if self.tokenizer.kind == "auto" and not self.tokenizer.name:
            raise ConfigError(
                "data.tokenizer.name",
                None,
                "must name a tokenizer for kind=auto",
                "try HuggingFaceTB/SmolLM2-135M",
            )
        if self.tokenizer.kind == "bpe" and self.tokenizer.vocab_size < 261:
            raise ConfigError(
                "data.tokenizer.vocab_size",
                self.tokenizer.vocab_size,
                "must hold the 256 bytes and 5 special tokens",
                "try 4096",
            )
        if self.format == "messages" and source.kind in ("stdlib", "text"):
            raise ConfigError(
                "data.format",
                "messages",
                f"needs rows with messages, which source.kind={source.kind} has not",
                "use data.source.kind=jsonl",
            )
        return self
