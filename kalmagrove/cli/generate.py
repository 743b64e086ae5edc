"""`kalmagrove generate`: text from a checkpoint, decoded with constant-size ADA states."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kalmagrove.cli.compose import hydra_app
from kalmagrove.config import Generate, validate


def main(argv: Sequence[str]) -> int:
    """Generate as `argv` says (overrides, and `prompt=` words verbatim); returns the exit code."""
    prompts = tuple(word[len("prompt=") :] for word in argv if word.startswith("prompt="))
    rest = [word for word in argv if not word.startswith("prompt=")]

    def parse(tree: dict[str, Any]) -> Generate:
        return validate(Generate, tree | ({"prompts": prompts} if prompts else {}))

    return hydra_app("generate", rest, parse, lambda wanted, _: _generate(wanted))


def _generate(wanted: Generate) -> int:
    from kalmagrove.evaluate.generate import write
    from kalmagrove.evaluate.load import load_trained

    model, tokenizer = load_trained(Path(wanted.run), wanted.device)
    settings = wanted.model_dump(include={"max_new_tokens", "temperature", "top_p", "seed"})
    print(write(model, tokenizer, wanted.prompts, **settings))
    return 0
