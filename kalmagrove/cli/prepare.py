"""`kalmagrove prepare`: build the token cache that `train` would build, and say what is in it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kalmagrove.cli.compose import hydra_app
from kalmagrove.config import Prepare, validate

if TYPE_CHECKING:
    from kalmagrove.data import Prepared


def main(argv: Sequence[str]) -> int:
    """Prepare as `argv` says (Hydra overrides); returns the exit code."""
    return hydra_app(
        "prepare", argv, lambda tree: validate(Prepare, tree), lambda wanted, _: _prepare(wanted)
    )


def _prepare(wanted: Prepare) -> int:
    from kalmagrove.data import prepare

    print(_describe(prepare(wanted.data, verify=wanted.verify)))
    if wanted.verify:
        print("verified   every file has the size and checksum that the manifest says")
    return 0


def _describe(prepared: "Prepared") -> str:
    manifest = prepared.manifest
    tokenizer = f"tokenizer  {manifest.tokenizer.kind}, {prepared.vocab_size:,} tokens"
    lines = [str(prepared.path), tokenizer]
    for name, split in (("train", manifest.train), ("held out", manifest.val)):
        lines.append(
            f"{name:10} {split.documents:,} documents, {split.tokens:,} tokens, "
            f"{split.targets:,} with a loss, {split.text_bytes:,} bytes"
        )
    bad = sum(manifest.rows.bad.values())
    reasons = "".join(f"; {reason}: {count:,}" for reason, count in manifest.rows.bad.items())
    lines.append(f"rows       {manifest.rows.read:,} read, {bad:,} bad{reasons}")
    lines.append(
        f"baselines  unigram {prepared.unigram_nats:.4f}, bigram {prepared.bigram_nats:.4f} "
        "nats a held-out token"
    )
    return "\n".join(lines)
