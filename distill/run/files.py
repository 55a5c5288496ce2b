"""Text and JSON written whole or not at all, hashes, and what an error says in one line."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO
from uuid import uuid4


def one_line(error: BaseException) -> str:
    """The first of what an error says, up to 200 characters, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def read_json(path: Path) -> Any:
    """What a JSON file holds; None if it is not there or damaged (records are written whole, so damage is foreign)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


@contextmanager
def written_whole(path: Path, errors: str = "strict") -> Iterator[TextIO]:
    """A text file to write, which is at `path` once it is whole and on the disk. errors: of encoding, as in `open`."""
    aside = path.with_name(f".{path.name}.{uuid4().hex}")  # not by tempfile, whose files others may not read
    try:
        with aside.open("x", encoding="utf-8", errors=errors) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all; dataclasses, wherever they are in it, as objects."""
    with written_whole(path) as file:
        json.dump(value, file, indent=1, ensure_ascii=False, default=dataclasses.asdict)


def sha256(path: Path) -> str:
    """Of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
