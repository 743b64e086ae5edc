"""Bits per byte of held-out text: how well a model predicts it, whatever its tokenizer.

Called by `harness`; each document is predicted alone, in windows of the model's length.
"""

import math
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance

from kalmagrove import config
from kalmagrove.config import ConfigError
from kalmagrove.data import prepare, sources
from kalmagrove.data.rows import Tally
from kalmagrove.evaluate.lm import SubjectLM
from kalmagrove.evaluate.subject import Subject

HELD_OUT = "val"


def bits_per_byte(lm: SubjectLM, corpus: str, documents: int | None = None) -> dict[str, Any]:
    """How the corpus is predicted.

    Args:
        corpus: a text file (one document), JSON lines with the key `text`, both also compressed; or
            `val`, the held-out split of the subject's run.
        documents: only the first ones.

    Raises:
        ConfigError: for `val` of a model that has no run of its own.
        DataError: for a file that cannot be read.
    """
    texts = _held_out(lm.subject) if corpus == HELD_OUT else _read(corpus)
    texts = [text for text in texts if text][:documents]
    requests = [
        Instance("loglikelihood_rolling", {}, (text,), 0, ("corpus", number, 1))
        for number, text in enumerate(texts)
    ]
    nats = -sum(lm.loglikelihood_rolling(requests))
    size = sum(len(text.encode()) for text in texts)
    tokens = sum(len(row) for row in lm.codec.encode_bare(texts))
    return {
        "corpus": corpus,
        "documents": len(texts),
        "bytes": size,
        "tokens": tokens,
        "bits_per_byte": nats / math.log(2) / size if size else None,
        "nats_per_token": nats / tokens if tokens else None,
    }


def _read(corpus: str) -> list[str]:
    bare = Path(corpus)
    if bare.suffix in (".zst", ".gz"):
        bare = bare.with_suffix("")
    kind = "jsonl" if bare.suffix == ".jsonl" else "text"
    source = config.Source(kind=kind, paths=(corpus,))  # type: ignore[arg-type]
    tally = Tally(source.max_bad_fraction)
    listing = sources.locate(source)
    found = [d.content for d in sources.read(source, "text", listing, "train", tally)]
    tally.check()
    return [text for text in found if isinstance(text, str)]


def _held_out(subject: Subject) -> list[str]:
    if subject.run is None or subject.run.data.format != "text":
        raise ConfigError(
            "corpus",
            HELD_OUT,
            "needs a run of KalmaGrove that was trained on texts",
            "name a file of text or JSON lines",
        )
    prepared = prepare(subject.run.data, progress=False)
    split = prepared.val
    return [
        prepared.tokenizer.decode(split.document(i)[1:].tolist()) for i in range(split.documents)
    ]
