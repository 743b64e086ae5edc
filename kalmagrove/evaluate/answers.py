"""What a model has answered already, on disk: a stopped evaluation continues from here.

One folder holds a file a model and process, named after the model's fingerprint, of JSON lines that
are only appended. Used by the lm-eval adapter.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Self

from kalmagrove.config import KalmaGroveError


def key_of(kind: str, arguments: Iterable[Any]) -> str:
    """The name of a request: its kind and what is asked."""
    asked = json.dumps([kind, *arguments], sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(asked.encode(), digest_size=12).hexdigest()


class Answers:
    """The answers of one model, and where this process adds to them."""

    def __init__(self, folder: Path, fingerprint: str, rank: int = 0) -> None:
        """Read what all processes have written for `fingerprint`; lines cut short are left out.

        Raises:
            KalmaGroveError: if the folder cannot be written.
        """
        self.known: dict[str, Any] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob(f"{fingerprint[:16]}.*.jsonl")):
                for line in path.read_bytes().splitlines():
                    try:
                        key, answer = json.loads(line)
                    except ValueError:  # torn by a kill
                        continue
                    self.known[key] = answer
            self._file: BinaryIO = (folder / f"{fingerprint[:16]}.{rank}.jsonl").open("ab")
            if self._file.tell():
                self._file.write(b"\n")  # ends a torn line; an empty one is no answer
        except OSError as error:
            raise _unwritable(folder, error) from error
        self._folder = folder

    def add(self, answers: dict[str, Any]) -> None:
        """Append, through to the system; a kill loses the line it is in at most."""
        self.known.update(answers)
        lines = [json.dumps(pair) + "\n" for pair in answers.items()]
        try:
            self._file.write("".join(lines).encode())
            self._file.flush()
        except OSError as error:
            raise _unwritable(self._folder, error) from error

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _unwritable(folder: Path, error: OSError) -> KalmaGroveError:
    return KalmaGroveError(
        f"{folder} cannot hold the answers ({error.strerror or error}); free space or give another "
        "out"
    )
