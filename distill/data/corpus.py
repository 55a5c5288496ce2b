"""Text in, tokens out: the sources of a recipe are read and tokenised once, and the result is kept in a cache."""

import hashlib
import io
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..run.files import one_line
from .rows import FieldCheck, RowEncoder, skips_in_words
from .sources import DataError, Item, Skip, content_hash, file_hash, place, read, resolve

logger = logging.getLogger(__name__)

FORMAT = 1  # of the cache; raise it when the same input would give other tokens


@dataclass
class Corpus:
    """Tokenised documents, one after another.

    tokens: (T,) uint16 where the vocabulary fits, else int32. starts: (documents,) int64, offset of each document.
    begin: the tokens that a text begins with. answers: (answers, 2) int64, the first and one past the last token of
    each; None where they were not asked for. skipped: reason -> rows. examples_of_skipped: reason -> the first place.
    unread: sources not reached because `max_tokens` was. fingerprint: SHA-256 of everything the tokens depend on.
    """

    tokens: torch.Tensor
    starts: torch.Tensor
    fingerprint: str
    sources: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    examples_of_skipped: dict[str, str] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    begin: list[int] = field(default_factory=list)
    answers: torch.Tensor | None = None

    @property
    def documents(self) -> int:
        return len(self.starts)

    @property
    def answered(self) -> float:
        """The fraction of the tokens that are an answer's, where answers were asked for."""
        return int(cast(torch.Tensor, self.answers).diff().sum()) / len(self.tokens)

    def summary(self) -> str:
        """One line for people."""
        line = f"{self.documents:,} documents, {len(self.tokens):,} tokens"
        if self.answers is not None:
            line += f", {self.answered:.0%} of them in {len(self.answers):,} answers"
        if self.skipped:
            line += f"; {skips_in_words(self.skipped, self.examples_of_skipped)}"
        if self.unread:
            line += f"; token limit reached before {', '.join(self.unread)}"
        return line


def tokenize_corpus(
    sources: list[str],
    tokenizer,
    *,
    text_field: str = "text",
    messages_field: str = "messages",
    bos: bool = True,
    answers: bool = False,
    max_tokens: int | None = None,
    cache: str | os.PathLike | None = None,
) -> Corpus:
    """Tokenise `sources` with a transformers tokenizer, or load the result of an earlier call from folder `cache`.

    With `bos` texts begin as the tokenizer begins one, chats as the chat template writes them; each document ends with
    the tokenizer's eos if it has one. With `answers` rows are chats, or prompts with completions, and their answers are
    marked. Reading stops at `max_tokens`, cutting the last document. The cache key covers the contents of the sources,
    so a changed file is tokenised again and a moved one is not. Safe to call from several processes at once, but each
    of them does the work: let one go first.

    Raises DataError for sources that are missing, unreadable or without a usable document.
    """
    if not sources:
        raise DataError("no sources of text: list files, folders or hub:OWNER/NAME under data.train and data.heldout")
    if max_tokens is not None and max_tokens < 1:
        raise DataError(f"the token limit is {max_tokens}: give a positive number, or null to read everything")
    items = [item for source in sources for item in resolve(source)]
    documents = RowEncoder(tokenizer, text_field, messages_field, bos, answers)
    fingerprint = _fingerprint(items, documents, max_tokens)
    if cache is None:
        return _tokenize(items, documents, max_tokens, fingerprint, None)
    corpus = _load(Path(cache), fingerprint)
    if corpus is None:
        with _aside(Path(cache)) as aside:
            corpus = _tokenize(items, documents, max_tokens, fingerprint, aside / "tokens.raw")
            _save(corpus, Path(cache), aside)
        corpus = _load(Path(cache), fingerprint) or corpus
    return corpus


def _texts(items: list[Item], documents: RowEncoder) -> Iterator[tuple[str, str, str]]:
    """(source, place, text) of each document; DataError for a source of which no row has the wanted fields."""
    for source, of_source in groupby(items, key=lambda item: item.source):
        check = FieldCheck(source, documents)
        for item in of_source:
            for number, row in read(item, documents.columns):
                check.see(row)
                where = place(item, number)
                if (text := documents.text(row, where)) is not None:
                    yield source, where, text
        check.end()


def _tokenize(
    items: list[Item], documents: RowEncoder, max_tokens: int | None, fingerprint: str, aside: Path | None
) -> Corpus:
    """`aside`: a file that the tokens are written to as they come, and mapped from; None keeps them in memory."""
    tokenizer = documents.tokenizer
    dtype = np.uint16 if max(tokenizer.get_vocab().values()) < 65536 else np.int32
    sources = list(dict.fromkeys(item.source for item in items))
    starts, total, unread = [], 0, []
    answers: list[tuple[int, int]] = []
    with _progress(max_tokens) as show, aside.open("w+b") if aside else nullcontext(io.BytesIO()) as file:
        for batch in _batches(_texts(items, documents), max_tokens):
            encoded = documents.encode([text for _, _, text in batch])
            for (source, where, _), (ids, answered) in zip(batch, encoded, strict=True):
                if not ids:
                    documents.skip(where, Skip("no tokens"))
                    continue
                if max_tokens is not None:
                    ids = ids[: max_tokens - total]
                file.write(np.array(ids, dtype).tobytes())
                starts.append(total)
                ends = ((total + first, total + min(end, len(ids))) for first, end in answered)
                answers += [(first, end) for first, end in ends if first < end]
                total += len(ids)
                if total == max_tokens:
                    unread = sources[sources.index(source) + 1 :]
                    break
            show(len(starts), total)
            if total == max_tokens:
                break
        if not starts:
            skips = documents.skips_in_words() or "there are no rows"
            remedy = "; give rows of messages, or of prompt and completion, in tune.train" if documents.answers else ""
            raise DataError(f"no usable document in {', '.join(sources)}: {skips}{remedy}")
        file.flush()
        # Mapped copy-on-write, as torch has no tensor that cannot be written.
        tokens = np.memmap(aside, dtype, "c") if aside else np.frombuffer(cast(io.BytesIO, file).getbuffer(), dtype)
    return Corpus(
        torch.from_numpy(tokens),
        torch.tensor(starts),
        fingerprint,
        sources,
        documents.skipped,
        documents.examples_of_skipped,
        unread,
        documents.begin,
        torch.tensor(answers, dtype=torch.int64).view(-1, 2) if documents.answers else None,
    )


def _batches(texts: Iterator[tuple[str, str, str]], max_tokens: int | None) -> Iterator[list[tuple[str, str, str]]]:
    """Lists of documents large enough to keep all cores busy, small enough for memory and for the tokens wanted."""
    batch, characters = [], 0
    most = 2_000_000 if max_tokens is None else min(2_000_000, 8 * max_tokens)  # few tokens are longer
    for document in texts:
        batch.append(document)
        characters += len(document[2])
        if len(batch) >= 1024 or characters >= most:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@contextmanager
def _progress(max_tokens: int | None) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal (nothing elsewhere); gives a function to call with documents and tokens so far."""
    counts = TextColumn("{task.fields[documents]:,} documents, {task.completed:,.0f} tokens")
    columns = (TextColumn("tokenising"), BarColumn(), counts, TimeElapsedColumn())
    hidden = not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as progress:
        task = progress.add_task("", total=max_tokens, documents=0)
        yield lambda documents, tokens: progress.update(task, documents=documents, completed=tokens)


# Cache: KEY.safetensors (tokens, starts, answers) and KEY.json (everything else and the first file's checksum)


def _fingerprint(items: list[Item], documents: RowEncoder, max_tokens: int | None) -> str:
    contents, fields = [[item.kind, content_hash(item)] for item in items], documents.fields
    parts = [FORMAT, contents, _tokenizer_identity(documents.tokenizer), *fields[:2], max_tokens, *fields[2:]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _tokenizer_identity(tokenizer) -> list:
    """What a tokenizer's output depends on. Padding and truncation are left out: calls change them, we use neither."""
    if tokenizer.is_fast:
        model = json.loads(tokenizer.backend_tokenizer.to_str())
        model = {key: value for key, value in model.items() if key not in ("padding", "truncation")}
    else:
        model = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    digest = hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()
    return [digest, tokenizer.chat_template, sorted((k, str(v)) for k, v in tokenizer.special_tokens_map.items())]


def _cache_files(folder: Path, fingerprint: str) -> tuple[Path, Path]:
    return folder / f"{fingerprint[:16]}.safetensors", folder / f"{fingerprint[:16]}.json"


def _load(folder: Path, fingerprint: str) -> Corpus | None:
    """The cached corpus, or None if there is none or it is damaged (logged)."""
    tensors_file, facts_file = _cache_files(folder, fingerprint)
    if not facts_file.exists():
        return None
    try:
        facts = json.loads(facts_file.read_text("utf-8"))
        if file_hash(tensors_file) != facts.pop("sha256"):
            raise ValueError("its checksum differs")
        del facts["documents"], facts["tokens"]  # for people
        tensors: dict[str, Any] = safetensors.torch.load_file(tensors_file)
        return Corpus(**tensors, **facts)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        logger.warning("tokenised text in %s is damaged (%s): tokenising again", tensors_file, one_line(error))
        return None


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A folder to write in before moving what is whole into `folder`; DataError if that cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as aside:
            yield Path(aside)
    except OSError as error:
        raise DataError(f"cannot write tokenised text to {folder} ({one_line(error)}): set data.cache") from error


def _save(corpus: Corpus, folder: Path, aside: Path) -> None:
    """Write both files aside and move them into place, so that a reader sees all or nothing."""
    tensors_file, facts_file = _cache_files(folder, corpus.fingerprint)
    facts = {key: value for key, value in vars(corpus).items() if not isinstance(value, torch.Tensor)}
    facts |= {"documents": corpus.documents, "tokens": len(corpus.tokens)}
    new_tensors, new_facts = aside / "tensors", aside / "facts"
    try:
        tensors = {key: value for key, value in vars(corpus).items() if isinstance(value, torch.Tensor)}
        safetensors.torch.save_file(tensors, new_tensors)
    except safetensors.SafetensorError as error:  # a full disk, say
        raise OSError(one_line(error)) from error
    facts["sha256"] = file_hash(new_tensors)
    new_facts.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", "utf-8")
    os.replace(new_tensors, tensors_file)
    os.replace(new_facts, facts_file)  # last: without it the cache does not count
