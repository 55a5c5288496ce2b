"""Where text comes from: files, folders and hub datasets, read row by row, with what cannot be read told apart.

A *source* is one of
- a file .jsonl, .jsonl.zst, .jsonl.gz, .parquet (rows), .txt or .txt.zst (one document),
- a glob of such files, or a folder of them (subfolders included),
- a folder written by `datasets.Dataset.save_to_disk`,
- a hub dataset `hub:OWNER/NAME` (its split train), `hub:OWNER/NAME:SPLIT` or `hub:OWNER/NAME:CONFIG:SPLIT`; a branch,
  tag or commit of it is named by `hub:OWNER/NAME@REVISION`, as in `hub:OWNER/NAME@v2:test`.
"""

import difflib
import glob
import gzip
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import zstandard

from ...teachers.hub import HubError, hub_commit
from ..errors import DistillError
from ..run.files import one_line, read_json, write_json

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet", ".txt", ".txt.zst")
REMEMBERED_FROM = 64 * 2**20  # bytes of a file whose hash is remembered: what takes longer to read than to look up
SAMPLES, SAMPLE = 1024, 2**16  # pieces of a large file, and bytes of each, that may stand for the whole


class DataError(DistillError, ValueError):
    """Text that cannot be used as asked. The message is one line that names the thing and the remedy."""


@dataclass(frozen=True)
class Item:
    """One thing to read. kind: a file's suffix (one of SUFFIXES), "saved" (folder of save_to_disk) or "hub"."""

    kind: str
    source: str  # as the user wrote it
    path: Path = Path()
    hub: tuple[str, str | None, str, str] = ("", None, "", "")  # name, config, split, commit
    shard: int | None = None  # of a hub dataset: one of its files, counted from 0; None: all of them

    def __str__(self) -> str:
        return self.source if self.kind == "hub" else str(self.path)


def resolve(source: str) -> list[Item]:
    """The files, saved folders or hub dataset that `source` stands for, in a fixed order."""
    if source.startswith("hub:"):
        return [_hub_item(source)]
    pattern = Path(source).expanduser()
    paths = [pattern] if pattern.exists() else [Path(p) for p in sorted(glob.glob(str(pattern), recursive=True))]
    items = [item for path in paths if path.exists() for item in _items_at(path, source)]
    if items:
        return items
    if glob.has_magic(source):
        raise DataError(f"no file matches {source}: check the pattern and the folder it starts from")
    near = []
    if pattern.parent.is_dir():
        near = difflib.get_close_matches(pattern.name, os.listdir(pattern.parent), n=1)
    hint = f"did you mean {pattern.parent / near[0]}?" if near else "a hub dataset is written hub:OWNER/NAME"
    raise DataError(f"no such file or folder: {source}; {hint}")


def _items_at(path: Path, source: str) -> list[Item]:
    if path.is_file():
        kind = _suffix(path)
        if kind is None:
            raise DataError(f"{path} is of an unsupported kind; supported are {', '.join(SUFFIXES)}")
        return [Item(kind, source, path)]
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir()))
        raise DataError(f"{path} is a saved dataset with the splits {splits}: name one of them, as {path / 'SPLIT'}")
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return [Item("saved", source, path)]
    files = sorted(p for p in path.rglob("*") if p.is_file() and _suffix(p) and not p.name.startswith("."))
    if not files:
        raise DataError(f"folder {path} holds no file of a supported kind ({', '.join(SUFFIXES)})")
    return [Item(cast(str, _suffix(p)), source, p) for p in files]


def _suffix(path: Path) -> str | None:
    return next((s for s in SUFFIXES if path.name.lower().endswith(s)), None)


def _hub_item(source: str) -> Item:
    named, *rest = source.removeprefix("hub:").split(":")
    name, at, revision = named.partition("@")
    if len(rest) > 2 or not all([name, *rest]) or (at and not revision):
        raise DataError(
            f"{source} is not hub:OWNER/NAME, hub:OWNER/NAME:SPLIT or hub:OWNER/NAME:CONFIG:SPLIT, where NAME may be "
            "NAME@REVISION"
        )
    config = rest[0] if len(rest) == 2 else None
    split = rest[-1] if rest else "train"
    try:
        return Item("hub", source, hub=(name, config, split, hub_commit(name, revision or None, "dataset")))
    except HubError as error:
        raise DataError(f"dataset '{name}' {error}") from error


# Things to read -> rows


class Skip(Exception):
    """A row that cannot be used: why (a few fixed words, they are counted) and, if known, the cause."""

    def __init__(self, reason: str, cause: Exception | None = None):
        self.reason = reason
        self.cause = f": {one_line(cause)}" if cause else ""


def read(
    item: Item,
    fields: tuple[str, ...],
    first: int = 0,
    wanted: Callable[[int], bool] = lambda number: True,
    hub: "HubDatasets | None" = None,
) -> Iterator[tuple[int, dict | Skip]]:
    """(number, row) for the rows of `item`, counted from 0, from number `first` on, where `wanted(number)`.

    Rows that are not asked for are passed over as quickly as the format lets: neither parsed nor, in a .parquet file or
    a saved folder, read. `fields`: those wanted of a row, that of its text first; others may be missing. `hub`:
    datasets opened before.

    Raises DataError if reading fails.
    """
    rows = 0
    try:
        for number, row in _rows(item, fields, first, wanted, hub or HubDatasets()):
            yield number, row
            rows += 1
    except Exception as error:  # the readers raise anything; what they raise is about this item
        raise _reading_error(item, rows, error) from error


def place(item: Item, number: int) -> str:
    """Where row `number` is, for people."""
    if item.kind.startswith(".txt"):
        return item.path.name
    if item.kind.startswith(".jsonl"):
        return f"{item.path.name} line {number + 1}"
    return f"{item.source if item.kind == 'hub' else item.path.name} row {number + 1}"


def size(item: Item) -> int:
    """Bytes of text in a local file or saved folder, roughly (compressed ones hold three times what they take); not 0.

    Raises DataError if it cannot be read.
    """
    paths = item.path.glob("*.arrow") if item.kind == "saved" else [item.path]
    try:
        on_disk = sum(path.stat().st_size for path in paths)
    except OSError as error:
        raise DataError(f"{item.path} cannot be read ({error.strerror}): check its permissions") from error
    return max(on_disk, 1) * (3 if item.kind == ".parquet" or item.kind.endswith((".zst", ".gz")) else 1)


def shards(item: Item, hub: "HubDatasets") -> tuple[list[Item], int | None]:
    """The files of a hub dataset, each an item of its own, and the bytes of all where the dataset says.

    Raises DataError if it cannot be reached.
    """
    try:
        rows = hub[item.hub]
        split = (rows.info.splits or {}).get(item.hub[2])
        return [replace(item, shard=shard) for shard in range(rows.num_shards)], split.num_bytes if split else None
    except Exception as error:  # datasets raises anything
        raise _reading_error(item, 0, error) from error


class HubDatasets:
    """Hub datasets, each opened once: opening asks the hub which files there are."""

    def __init__(self):
        self._opened: dict[tuple, Any] = {}

    def __getitem__(self, hub: tuple[str, str | None, str, str]):
        """The `datasets.IterableDataset` of an item's `hub`. Raises what `datasets.load_dataset` raises."""
        import datasets

        if hub not in self._opened:
            name, config, split, commit = hub
            self._opened[hub] = datasets.load_dataset(name, config, split=split, revision=commit, streaming=True)
        return self._opened[hub]


def _rows(
    item: Item, fields: tuple[str, ...], first: int, wanted: Callable[[int], bool], hub: HubDatasets
) -> Iterator[tuple[int, dict | Skip]]:
    if item.kind.startswith(".jsonl"):
        for number, line in enumerate(_lines(_decompressed(item.path))):
            if number >= first and wanted(number) and line.strip():
                yield number, _parse(line)
    elif item.kind.startswith(".txt"):
        if first == 0 and wanted(0):
            try:
                yield 0, {fields[0]: b"".join(_decompressed(item.path)).decode("utf-8-sig")}
            except UnicodeDecodeError as error:
                yield 0, Skip("not valid UTF-8", error)
    elif item.kind == ".parquet":
        yield from _parquet_rows(item.path, fields, first, wanted)
    elif item.kind == "saved":
        yield from _saved_rows(item.path, fields, first, wanted)
    else:
        yield from _hub_rows(hub[item.hub], item.shard, fields, first, wanted)


def _decompressed(path: Path) -> Iterator[bytes]:
    """The contents of a plain, .gz or .zst file in pieces. A file that ends too early raises EOFError."""
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rb") as file:
        pieces = iter(lambda: file.read1(1 << 18), b"")  # read1 gives what there is before it finds damage
        yield from _unzstd(pieces) if path.name.lower().endswith(".zst") else pieces


def _unzstd(pieces: Iterator[bytes]) -> Iterator[bytes]:
    # zstandard's stream_reader takes a truncated frame for a complete one; decompressobj tells.
    frame = None
    for piece in pieces:
        while piece:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()  # as --long=31 wants it
            yield frame.decompress(piece)
            piece = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("compressed data ends before its end marker")


def _lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Lines, split on \\n only: texts hold other line separators such as U+2028."""
    rest = []  # a line can span many pieces: join once
    for piece in pieces:
        head, *lines = piece.split(b"\n")
        rest.append(head)
        for line in lines:
            yield b"".join(rest)
            rest = [line]
    yield b"".join(rest)


def _parse(line: bytes) -> dict | Skip:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Skip("not valid UTF-8", error)
    except (ValueError, RecursionError) as error:
        return Skip("not valid JSON", error)
    return row if isinstance(row, dict) else Skip("not a JSON object")


def _parquet_rows(
    path: Path, fields: tuple[str, ...], first: int, wanted: Callable[[int], bool]
) -> Iterator[tuple[int, dict | Skip]]:
    import pyarrow.parquet  # here and below: slow to import, and most recipes need neither

    with pyarrow.parquet.ParquetFile(path) as file:
        present = [name for name in file.schema_arrow.names if name in fields]
        number = 0
        for group in range(file.num_row_groups):
            if (end := number + file.metadata.row_group(group).num_rows) <= first:
                number = end
                continue
            for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=present or None):
                for i in range(batch.num_rows):
                    if number >= first and wanted(number):
                        try:
                            yield number, {name: batch.column(name)[i].as_py() for name in batch.schema.names}
                        except UnicodeDecodeError as error:
                            yield number, Skip("not valid UTF-8", error)
                    number += 1


def _saved_rows(
    path: Path, fields: tuple[str, ...], first: int, wanted: Callable[[int], bool]
) -> Iterator[tuple[int, dict]]:
    import datasets

    rows = _only(datasets.load_from_disk(str(path)), fields)
    for begin in range(first, len(rows), 1024):
        numbers = [number for number in range(begin, min(begin + 1024, len(rows))) if wanted(number)]
        columns = rows[numbers] if numbers else {}
        for i, number in enumerate(numbers):
            yield number, {name: values[i] for name, values in columns.items()}


def _hub_rows(
    rows, shard: int | None, fields: tuple[str, ...], first: int, wanted: Callable[[int], bool]
) -> Iterator[tuple[int, dict]]:
    rows = _only(rows if shard is None else rows.shard(rows.num_shards, shard), fields)
    for number, row in enumerate(rows.skip(first) if first else rows, first):
        if wanted(number):
            yield number, row


def _only(rows, fields: tuple[str, ...]):
    """A dataset without other columns than `fields`: no decoding of images and the like."""
    present = [column for column in rows.column_names or [] if column in fields]
    return rows.select_columns(present) if present else rows


def _reading_error(item: Item, rows: int, error: Exception) -> DataError:
    remedy = (
        "check the name and the network (a private dataset needs HF_TOKEN), or give a local file"
        if item.kind == "hub"
        else "it may be truncated or damaged; fetch or write it again"
    )
    return DataError(f"{item}: reading failed after {rows:,} rows ({one_line(error)}): {remedy}")


def source_identity(source: str, sampled: bool = False) -> list:
    """Stands for a source in what a stage depends on: hashes of its files, or of a hub dataset name, config, split and
    commit.

    `sampled`: of files too large to be read before training, size and some pieces stand for the whole.
    """
    return [content_hash(item, sampled) for item in resolve(source)]


def content_hash(item: Item, sampled: bool = False) -> list:
    """Hashes of an item's files. Raises DataError if one cannot be read."""
    if item.kind == "hub":
        return list(item.hub)
    digest = _sampled_hash if sampled else file_hash
    if item.kind == "saved":
        return [[p.name, digest(p)] for p in sorted(item.path.iterdir()) if p.is_file()]
    return [digest(item.path)]


def _sampled_hash(path: Path) -> str:
    """`file_hash` of a small file; of one that is larger than its samples, SHA-256 of its size and these."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > SAMPLES * SAMPLE:
                digest = hashlib.sha256(f"{size} bytes".encode())
                for i in range(SAMPLES):
                    file.seek(i * (size - SAMPLE) // (SAMPLES - 1))  # the first and the last piece are among them
                    digest.update(file.read(SAMPLE))
                return digest.hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    return file_hash(path)


def file_hash(path: Path) -> str:
    """SHA-256 of a file. That of a large one is remembered, and read again only when the file was written since.

    Raises DataError if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            facts = os.fstat(file.fileno())
            if facts.st_size < REMEMBERED_FROM:
                return hashlib.file_digest(file, "sha256").hexdigest()
            # Writing changes ctime, even where mtime is set back. One of just now may not change with the next write.
            state = [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]
            settled = time.time_ns() - facts.st_ctime_ns > 2 * 10**9
            known = _remembered().get(str(path.resolve()))
            if known is not None and known[1:] == state:
                return known[0]
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    if settled:
        there = {name: entry for name, entry in _remembered().items() if os.path.exists(name)}
        _remember({**there, str(path.resolve()): [digest, *state]})
    return digest


def _hashes_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "transpoint", "hashes.json")


def _remembered() -> dict[str, list]:
    """Path -> [SHA-256, size, mtime, ctime, inode]."""
    known = read_json(_hashes_file())
    return known if isinstance(known, dict) and all(isinstance(v, list) for v in known.values()) else {}


def _remember(known: dict[str, list]) -> None:
    try:
        _hashes_file().parent.mkdir(parents=True, exist_ok=True)
        write_json(_hashes_file(), known)
    except OSError as error:  # a home that cannot be written: the next run reads the file again
        logger.debug("hashes are not remembered: %s", error)
