"""From a source of documents to micro-batches of tokens: sources, tokenizer, cache, loader."""

from kalmagrove.data.loader import Batches, ValBatches, build_batches, check_seq_len, val_batches
from kalmagrove.data.prepare import prepare
from kalmagrove.data.store import Manifest, Prepared, TokenStore, open_prepared
from kalmagrove.data.tokenizer import Tokenizer

__all__ = [
    "Batches",
    "Manifest",
    "Prepared",
    "TokenStore",
    "Tokenizer",
    "ValBatches",
    "build_batches",
    "check_seq_len",
    "open_prepared",
    "prepare",
    "val_batches",
]
