"""Text in, packed token sequences out.

`tokenize_corpus` reads the sources of a recipe, tokenises them once and keeps the result in a cache; `PackedDataset`
cuts the tokens into sequences of equal length; `batch_indices` says which sequences make up step k, so that resuming
needs no state. Rows that cannot be used are skipped, counted by reason and reported. What a person has to mend is a
`DataError`.

What a *source* may be, `sources.py` says. Rows hold a text (string) or messages (a chat: a list of {role, content});
a row with both is read as text.
"""

import hashlib
import io
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .files import one_line
from .sources import DataError, Item, Skip, content_hash, file_hash, place, read, resolve

logger = logging.getLogger(__name__)

FORMAT = 1  # of the cache; raise it when the same input would give other tokens
FIELD_PATIENCE = 10_000  # rows without the wanted fields before a long source is given up


@dataclass
class Corpus:
    """Tokenised documents, one after another.

    tokens: (T,) uint16 where the vocabulary fits, else int32. starts: (documents,) int64, offset of each document.
    begin: the tokens that a text begins with. skipped: reason -> rows. examples_of_skipped: reason -> the first place.
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

    @property
    def documents(self) -> int:
        return len(self.starts)

    def summary(self) -> str:
        """One line for people."""
        line = f"{self.documents:,} documents, {len(self.tokens):,} tokens"
        if self.skipped:
            line += f"; {_skips_in_words(self.skipped, self.examples_of_skipped)}"
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
    max_tokens: int | None = None,
    cache: str | os.PathLike | None = None,
) -> Corpus:
    """Tokenise `sources` with a transformers tokenizer, or load the result of an earlier call from folder `cache`.

    With `bos` texts begin as the tokenizer begins one, chats as the chat template writes them; each document ends with
    the tokenizer's eos if it has one. Reading stops at `max_tokens`, cutting the last document. The cache key covers
    the contents of the sources, so a changed file is tokenised again and a moved one is not. Safe to call from several
    processes at once, but each of them does the work: let one go first.

    Raises DataError for sources that are missing, unreadable or without a usable document.
    """
    if not sources:
        raise DataError("no sources of text: list files, folders or hub:OWNER/NAME under data.train and data.heldout")
    if max_tokens is not None and max_tokens < 1:
        raise DataError(f"the token limit is {max_tokens}: give a positive number, or null to read everything")
    items = [item for source in sources for item in resolve(source)]
    documents = Documents(tokenizer, text_field, messages_field, bos)
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


class PackedDataset(torch.utils.data.Dataset):
    """A corpus cut into consecutive windows of `length` tokens that do not overlap; the last partial one is dropped.

    Item i is {"input_ids": (length,) int64, "position_ids": (length,) int64}. Positions restart at 0 with each document
    and each window: that is how models and mixers know the documents in a window apart. A window that begins inside of
    a document begins as a document does, and leaves out as many tokens at its end: models that were trained with a
    beginning token lean on it, wherever a text is cut.
    """

    def __init__(self, corpus: Corpus, length: int):
        if length < 1:
            raise DataError(f"data.length is {length}: give a positive number of tokens")
        if len(corpus.tokens) < length:
            raise DataError(
                f"the text has {len(corpus.tokens):,} tokens, less than one sequence of {length:,}: "
                "set a shorter data.length or give more text"
            )
        self.corpus = corpus
        self.tokens_per_item = length

    def __len__(self) -> int:
        return len(self.corpus.tokens) // self.tokens_per_item

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        first = index * self.tokens_per_item
        tokens = self.corpus.tokens[first : first + self.tokens_per_item]
        # In NumPy: torch's searchsorted starts threads, which takes 100 times as long on a busy CPU.
        starts = self.corpus.starts.numpy()
        offsets = np.arange(first, first + self.tokens_per_item)
        document = np.searchsorted(starts, offsets, side="right") - 1
        positions = offsets - np.maximum(starts[document], first)
        begin, tokens = self.corpus.begin, tokens.long()
        if begin and first != starts[document[0]] and len(begin) < self.tokens_per_item:
            tokens = torch.cat((torch.tensor(begin), tokens[: -len(begin)]))
            same = document == document[0]
            kept = positions[: -len(begin)] + len(begin) * same[: -len(begin)]
            positions = np.concatenate((np.arange(len(begin)), kept))
        return {"input_ids": tokens, "position_ids": torch.from_numpy(positions)}

    def batch(self, step: int, batch_size: int, seed: int, slots: range) -> list[dict[str, torch.Tensor]]:
        """The items of batch `step` (from 0) at some of its `batch_size` places: those of one process, say."""
        indices = batch_indices(len(self), batch_size, seed, step)
        return [self[indices[slot]] for slot in slots]

    def spread(self, count: int) -> list[dict[str, torch.Tensor]]:
        """`count` items evenly over the whole, or all if there are fewer."""
        count = min(count, len(self))
        return [self[i * len(self) // count] for i in range(count)]


def batch_indices(n_items: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The items of batch `step` (from 0, counted through all epochs).

    Batches are cut from one endless stream: a seeded permutation of all items for each epoch, end to end. So every item
    comes once per epoch, nothing is dropped, a batch may span epochs, and the answer depends on the arguments alone.
    """
    if n_items < 1 or batch_size < 1 or step < 0:
        raise ValueError(f"n_items={n_items} and batch_size={batch_size} must be positive, step={step} at least 0")
    stream = range(step * batch_size, (step + 1) * batch_size)
    return [int(_permutation(n_items, seed, i // n_items)[i % n_items]) for i in stream]


def collate(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack the tensors of items: (length,) each -> (B, length)."""
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


@lru_cache(maxsize=4)
def _permutation(n_items: int, seed: int, epoch: int) -> np.ndarray:
    mixed = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(mixed[:7], "little"))
    return torch.randperm(n_items, generator=generator).numpy()


# Rows -> documents -> tokens


class Chat(str):
    """A document that a chat template has written, its beginning too."""


class Documents:
    """Turns rows into texts and these into tokens, and counts the rows it cannot use.

    begin: the tokens that a text begins with. skipped: reason -> rows. examples_of_skipped: reason -> the first place.
    """

    def __init__(self, tokenizer, text_field: str, messages_field: str, bos: bool = True):
        self.tokenizer = tokenizer
        self.text_field = text_field
        self.messages_field = messages_field
        self.begin = beginning(tokenizer) if bos else []
        self.skipped: dict[str, int] = {}
        self.examples_of_skipped: dict[str, str] = {}

    def text(self, row: dict | Skip, where: str) -> str | None:
        """The document in `row`, or None for a row that cannot be used."""
        try:
            return self._text(row)
        except Skip as skip:
            self.skip(where, skip)
            return None

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each document, the tokenizer's eos at its end if it has one; none for a text without tokens."""
        tokenizer, begin, eos = self.tokenizer, self.begin, self.tokenizer.eos_token_id
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        found = []
        for text, ids in zip(texts, encoded, strict=True):
            if ids and not isinstance(text, Chat) and ids[: len(begin)] != begin:
                ids = begin + ids
            found.append([*ids, eos] if ids and eos is not None and ids[-1] != eos else ids)
        return found

    def skip(self, where: str, skip: Skip) -> None:
        self.skipped[skip.reason] = self.skipped.get(skip.reason, 0) + 1
        self.examples_of_skipped.setdefault(skip.reason, where + skip.cause)

    def uncounted(self) -> "Documents":
        """One that does the same, and counts for itself."""
        other = copy(self)
        other.skipped, other.examples_of_skipped = {}, {}
        return other

    def skips_in_words(self) -> str:
        return _skips_in_words(self.skipped, self.examples_of_skipped)

    @property
    def fields(self) -> list:
        """What of it the tokens depend on, besides the tokenizer: as earlier versions had it where nothing begins."""
        return [self.text_field, self.messages_field, *([self.begin] if self.begin else [])]

    @property
    def no_field(self) -> str:
        return f"no {self.text_field} or {self.messages_field} field"

    def _text(self, row: dict | Skip) -> str:
        """The document in `row`; raises Skip."""
        if isinstance(row, Skip):
            raise row
        if self.text_field not in row and self.messages_field not in row:
            raise Skip(self.no_field)
        text, messages = row.get(self.text_field), row.get(self.messages_field)
        if not text and messages:
            text = self._chat(messages)
        if not text:
            raise Skip("empty text")
        try:
            text = text.decode() if isinstance(text, bytes) else text
            if not isinstance(text, str):
                raise Skip("text is not a string")
            text.encode()  # JSON can hold half a surrogate pair, which no tokenizer takes
        except UnicodeError as error:
            raise Skip("not valid UTF-8", error) from error
        if not text.strip():
            raise Skip("empty text")
        return text

    def _chat(self, messages) -> Chat:
        if not self.tokenizer.chat_template:
            raise DataError(
                f"rows hold chats ({self.messages_field}) but the tokenizer has no chat template: "
                "use an instruction-tuned teacher's tokenizer, set its chat_template, or give rows with plain text"
            )
        if not isinstance(messages, list):
            raise Skip("messages is not a list")
        try:
            return Chat(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # a template is code of its own
            raise Skip("chat template failed", error) from error


class FieldCheck:
    """Notices a source of which no row has the wanted fields."""

    def __init__(self, source: str, documents: Documents):
        self.source, self.documents = source, documents
        self.rows, self.without = 0, 0
        self.first: dict | None = None

    def see(self, row: dict | Skip) -> None:
        """Raises DataError when the first FIELD_PATIENCE rows are all without the fields."""
        if isinstance(row, dict):
            self.rows += 1
            self.without += self.documents.text_field not in row and self.documents.messages_field not in row
            self.first = self.first or row
            if self.rows == FIELD_PATIENCE:
                self.end()

    def end(self) -> None:
        """Raises DataError if all rows so far were without the fields."""
        if self.rows and self.without == self.rows:
            found = ", ".join(self.first or {}) or "no field at all"
            raise DataError(
                f"{self.source}: {self.documents.no_field} in any of the {self.rows:,} rows read; the first row has "
                f"{found}: set data.text_field or data.messages_field"
            )


def beginning(tokenizer) -> list[int]:
    """The tokens that a tokenizer puts before every text, as `generate` has it: its beginning token, or none."""
    plain, whole = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    places = range(len(whole) - len(plain) + 1)
    return whole[: next((place for place in places if whole[place : place + len(plain)] == plain), 0)]


def check_tokens(ids: list[int] | torch.Tensor, rows: int, tokenizer, where: str) -> None:
    """Raises DataError if the tokens of the text at `where` hold one that a model of `rows` embeddings has none for.

    Such are special tokens that a tokenizer was given and its model was not, for padding say.
    """
    last = int(np.asarray(ids).max(initial=0))
    if last >= rows:
        raise DataError(
            f"{where}: the text holds the token {tokenizer.convert_ids_to_tokens(last)!r} of number {last:,}, the "
            f"model's embeddings {rows:,} rows: take it out of the text, or of the chat template that puts it there, "
            "or resize the model's embeddings"
        )


def _texts(items: list[Item], documents: Documents) -> Iterator[tuple[str, str, str]]:
    """(source, place, text) of each document; DataError for a source of which no row has the wanted fields."""
    for source, of_source in groupby(items, key=lambda item: item.source):
        check = FieldCheck(source, documents)
        for item in of_source:
            for number, row in read(item, documents.text_field, documents.messages_field):
                check.see(row)
                where = place(item, number)
                if (text := documents.text(row, where)) is not None:
                    yield source, where, text
        check.end()


def _tokenize(
    items: list[Item], documents: Documents, max_tokens: int | None, fingerprint: str, aside: Path | None
) -> Corpus:
    """`aside`: a file that the tokens are written to as they come, and mapped from; None keeps them in memory."""
    tokenizer = documents.tokenizer
    dtype = np.uint16 if max(tokenizer.get_vocab().values()) < 65536 else np.int32
    sources = list(dict.fromkeys(item.source for item in items))
    starts, total, unread = [], 0, []
    with _progress(max_tokens) as show, aside.open("w+b") if aside else nullcontext(io.BytesIO()) as file:
        for batch in _batches(_texts(items, documents), max_tokens):
            encoded = documents.encode([text for _, _, text in batch])
            for (source, where, _), ids in zip(batch, encoded, strict=True):
                if not ids:
                    documents.skip(where, Skip("no tokens"))
                    continue
                if max_tokens is not None:
                    ids = ids[: max_tokens - total]
                file.write(np.array(ids, dtype).tobytes())
                starts.append(total)
                total += len(ids)
                if total == max_tokens:
                    unread = sources[sources.index(source) + 1 :]
                    break
            show(len(starts), total)
            if total == max_tokens:
                break
        if not starts:
            skips = documents.skips_in_words() or "there are no rows"
            raise DataError(f"no usable document in {', '.join(sources)}: {skips}")
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


def _skips_in_words(skipped: dict[str, int], examples: dict[str, str]) -> str:
    reasons = [f"{count:,} {reason} (first: {examples[reason]})" for reason, count in skipped.items()]
    return f"skipped {sum(skipped.values()):,}: {', '.join(reasons)}" if reasons else ""


# Cache: KEY.safetensors (tokens, starts) and KEY.json (everything else and the first file's checksum)


def _fingerprint(items: list[Item], documents: Documents, max_tokens: int | None) -> str:
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
        safetensors.torch.save_file({"tokens": corpus.tokens, "starts": corpus.starts}, new_tensors)
    except safetensors.SafetensorError as error:  # a full disk, say
        raise OSError(one_line(error)) from error
    facts["sha256"] = file_hash(new_tensors)
    new_facts.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", "utf-8")
    os.replace(new_tensors, tensors_file)
    os.replace(new_facts, facts_file)  # last: without it the cache does not count
