"""Training text that is read, tokenised and packed while training runs.

Slot b of every batch is fed by *lane* b alone. A lane is a fixed share of the documents, whatever the number of
processes, and a process reads the lanes of its own slots: when the number of processes changes, lanes move, and no
document is lost or seen twice. A lane goes through its share again and again; in each epoch the files come in another
order, sources side by side in proportion to their size, and documents are shuffled in blocks. Lanes of one process that
share a file read it together.

The order is a function of seed, lane, epoch and text alone. So a position is small (where the block at hand began, how
many of its documents are used up, and how many tokens of the next one), and going on from it gives the same batches.
"""

import hashlib
import json
import logging
import random
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from weakref import WeakValueDictionary

import numpy as np
import torch

from .rows import FieldCheck, RowEncoder, check_tokens
from .sources import DataError, HubDatasets, Item, Skip, place, read, resolve, shards, size

logger = logging.getLogger(__name__)

AHEAD = 4  # windows of text tokenised at once for a lane that has run out: tokenizers are quicker on many documents
CHARACTERS = 4  # of a token, roughly
PATIENCE = 4  # blocks of documents that are kept for a lane that is behind the others in a file


class StreamedDataset:
    """Endless packed sequences from `sources`, for the trainer: `batch` is a function of its arguments.

    An item is {"input_ids": (length,) int64, "position_ids": (length,) int64}, consecutive `length` tokens of a lane;
    positions restart at 0 with each document and each window. Documents and the rows they come from are as in
    `data.tokenize_corpus`. `shuffle_buffer`: documents of a lane that are held and shuffled together. `rows`: of the
    model's embeddings, beyond which there may be no token.

    Batches are quick to get one after another, and from a position that `load_state_dict` was given; for any other the
    text is read from its beginning.

    Raises DataError (`batch` and `spread` too) for sources that are missing or unreadable, for too few documents, and
    for a token beyond `rows`.
    """

    def __init__(
        self,
        sources: list[str],
        tokenizer,
        length: int,
        *,
        text_field: str = "text",
        messages_field: str = "messages",
        bos: bool = True,
        shuffle_buffer: int = 1000,
        rows: int | None = None,
    ):
        if not sources:
            raise DataError("no sources of text: list files, folders or hub:OWNER/NAME under data.train")
        if length < 1 or shuffle_buffer < 1:
            raise DataError(f"data.length is {length}, data.shuffle_buffer {shuffle_buffer}: give positive numbers")
        self.tokens_per_item = length
        self.shuffle_buffer = shuffle_buffer
        self.rows = rows
        self.documents = RowEncoder(tokenizer, text_field, messages_field, bos)
        self._hub = HubDatasets()
        self._items = [resolve(source) for source in sources]
        self._open()  # better an error now than after the teacher's first forward pass
        self._lanes: dict[int, _Lane] = {}
        self._scans: WeakValueDictionary[tuple, _Scan] = WeakValueDictionary()  # each lives while a lane reads it
        self._saved: dict[int, dict] = {}
        self._made_for: tuple[int, int] | None = None  # batch size and seed

    def batch(self, step: int, batch_size: int, seed: int, slots: range) -> list[dict[str, torch.Tensor]]:
        """The items of batch `step` (from 0) at some of its `batch_size` slots: those of one process, say."""
        if self._made_for != (batch_size, seed):
            self._lanes, self._saved, self._made_for = {}, {}, (batch_size, seed)
            self._scans.clear()
        for slot in slots:
            if slot not in self._lanes or self._lanes[slot].windows > step:
                if slot in self._lanes:
                    self._scans.clear()  # it begins anew, and they are further
                saved = self._saved.get(slot)
                usable = saved is not None and saved["windows"] <= step
                self._lanes[slot] = self._lane(slot, batch_size, seed, saved if usable else None)
        lanes = [self._lanes[slot] for slot in slots]
        if any(lane.windows < step for lane in lanes):
            logger.warning("no position in the text was saved for step %d: reading up to it", step)
        while behind := [lane for lane in lanes if lane.windows < step]:
            self._take(behind)
        return self._take(lanes)

    def spread(self, count: int) -> list[dict[str, torch.Tensor]]:
        """`count` items of one shuffled block (fewer if all the text has less), whatever `batch` does."""
        lane = self._lane(0, 1, 0, None, alone=True)
        items = self._take([lane])
        while len(items) < count:
            items += self._take([lane])
            if lane.at.epoch > 0:
                return items[:-1]
        return items

    def state_dict(self, slots: range) -> dict:
        """Where the lanes of `slots` are after the latest batch: whole numbers and text for JSON, no tokens.

        The keys are the slots, as text, and words for what is the same in all processes: their states, put together by
        `dict.update`, are one state.
        """
        lanes = {str(slot): self._lanes[slot].state() for slot in slots if slot in self._lanes}
        return lanes | {
            "made_for": list(self._made_for or ()),
            "text": self._identity,
            "commits": {items[0].source: items[0].hub[3] for items in self._items if items[0].kind == "hub"},
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on from a state: of all lanes, or at least of those that `batch` will be asked for.

        Hub datasets are read at the commit that they had when the state was made.

        Raises DataError if it is a position in other text.
        """
        commits = state["commits"]
        for items in self._items:
            if items[0].kind == "hub":
                name, config, split, commit = items[0].hub
                items[0] = replace(items[0], hub=(name, config, split, commits.get(items[0].source, commit)))
        self._open()
        if state["text"] != self._identity:
            raise DataError(
                "the saved position is in other text than data.train holds now: restore the files, or run the stage "
                "anew with --from"
            )
        self._made_for = tuple(state["made_for"]) or None
        self._scans.clear()
        self._lanes, self._saved = {}, {int(slot): lane for slot, lane in state.items() if slot.isdigit()}

    def summary(self) -> str:
        """One line for people: the sources, and what was skipped by this process so far."""
        files = sum(len(source.items) for source in self._sources)
        line = f"streamed from {files:,} file{'s' if files != 1 else ''}"
        skips = self.documents.skips_in_words()
        return f"{line}; {skips}" if skips else line

    def _take(self, lanes: list["_Lane"]) -> list[dict[str, torch.Tensor]]:
        """The next window of each lane. What they lack is tokenised in one call: a tokenizer uses all cores on it."""
        length, names = self.tokens_per_item, ", ".join(source.name for source in self._sources)
        while short := [lane for lane in lanes if lane.ready < length]:
            drawn = [(lane, *entry) for lane in short for entry in lane.draw(AHEAD * CHARACTERS * length)]
            encoded = self.documents.encode([text for *_, text in drawn])
            for (lane, at, _), (ids, _) in zip(drawn, encoded, strict=True):
                if self.rows is not None:
                    check_tokens(ids, self.rows, self.documents.tokenizer, names)
                lane.put(at, ids)
        return [lane.take(length) for lane in lanes]

    def _lane(self, slot: int, batch_size: int, seed: int, state: dict | None, alone: bool = False) -> "_Lane":
        """`alone`: it shares no reading with the lanes of the batch, and its skips are not counted."""
        documents = self.documents
        if alone:
            documents = documents.uncounted()
        shares = [source.share(slot, batch_size) for source in self._sources]
        rows = self._read if alone else partial(self._read_together, slot)
        return _Lane(f"{slot} of {batch_size}", seed, shares, documents, self.shuffle_buffer, rows, state)

    def _read(self, source: int, piece: "_Piece", epoch: int, first: int) -> Iterator[tuple[int, dict | Skip]]:
        return read(piece.item, self.documents.columns, first, piece.holds, self._hub)

    def _read_together(
        self, slot: int, source: int, piece: "_Piece", epoch: int, first: int
    ) -> Iterator[tuple[int, dict | Skip]]:
        """As `_read`, by a scan that other lanes in the same file and epoch take part in, if it has not begun later."""
        key = source, piece.item, epoch
        alone = partial(self._read, source, piece, epoch)
        scan = self._scans.get(key)
        if scan is None:
            found = {other: lane.piece(source, piece.item) for other, lane in self._lanes.items()}
            pieces = {other: own for other, own in found.items() if own is not None}
            # After going on from a position, lanes are at different rows: it begins at the first that is wanted.
            begin = min(first, *(self._lanes[other].row(source, piece.item, epoch, first) for other in pieces))
            whole = _Piece(piece.item, min(p.low for p in pieces.values()), max(p.high for p in pieces.values()))
            rows = self._read(source, whole, epoch, begin)
            self._scans[key] = scan = _Scan(rows, begin, pieces, PATIENCE * self.shuffle_buffer)
        return scan.rows(slot, first, alone) if scan.has(slot, first) else alone(first)

    def _open(self) -> None:
        """Finds out what the sources hold, hub datasets at their commits."""
        sources = []
        for items in self._items:
            name = items[0].source
            if items[0].kind == "hub":
                items, weight = shards(items[0], self._hub)
                sizes = [1] * len(items)  # of a hub dataset's files, which are made alike
            else:
                sizes = [size(item) for item in items]
                weight = sum(sizes)
            sources.append(_Source(name, items, sizes, weight))
        known = [source.weight for source in sources if source.weight]
        for source in sources:  # a hub dataset that does not say its size comes as often as the others on average
            source.weight = source.weight or (sum(known) / len(known) if known else 1)
        text = [[[item.kind, item.hub] for item in source.items] + [source.sizes] for source in sources]
        parts = [text, self.documents.fields, self.tokens_per_item, self.shuffle_buffer]
        self._sources, self._identity = sources, hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


# Which rows are a lane's

_SPAN = 2**32
_GOLDEN = 2654435769  # _SPAN over the golden ratio: its multiples modulo _SPAN lie evenly, however many are taken


@dataclass
class _Piece:
    """Rows of one file: those with low <= number * _GOLDEN % _SPAN < high."""

    item: Item
    low: int
    high: int

    def holds(self, number: int) -> bool:
        return self.low <= number * _GOLDEN % _SPAN < self.high


@dataclass
class _Source:
    """What one entry of data.train stands for. sizes: of the items, in any unit. weight: bytes of text, roughly."""

    name: str
    items: list[Item]
    sizes: list[int]
    weight: float | None

    def share(self, lane: int, lanes: int) -> tuple["_Source", list[_Piece]]:
        """The lane's pieces. Laid end to end, the files are cut into `lanes` parts of equal size.

        So a lane opens few of many files; rows of a file that lies in several parts are dealt out among them.
        """
        total, before, pieces = sum(self.sizes), 0, []
        for item, of_item in zip(self.items, self.sizes, strict=True):
            # Rounded up in whole numbers: where one lane ends, the next one begins.
            low, high = (
                min(max(-((before * lanes - edge * total) * _SPAN // (of_item * lanes)), 0), _SPAN)
                for edge in (lane, lane + 1)
            )
            if low < high:
                pieces.append(_Piece(item, low, high))
            before += of_item
        return self, pieces


class _Scan:
    """Rows of one file, read once for several lanes: what is another lane's is kept for it, up to `limit` rows.

    A lane that falls further behind is left to read the file alone.
    """

    def __init__(self, rows: Iterator[tuple[int, dict | Skip]], first: int, pieces: dict[int, _Piece], limit: int):
        self._rows, self._limit = rows, limit
        self._pieces = sorted(pieces.items(), key=lambda entry: entry[1].low)
        self._highs = [piece.high for _, piece in self._pieces]
        self._kept: dict[int, deque | None] = {slot: deque() for slot in pieces}
        self._next = dict.fromkeys(pieces, first)  # the number from which on each lane's rows are still to be had

    def has(self, slot: int, first: int) -> bool:
        """Whether a lane's rows from number `first` on can be had."""
        return self._kept.get(slot) is not None and self._next[slot] <= first

    def rows(
        self, slot: int, first: int, alone: Callable[[int], Iterator[tuple[int, dict | Skip]]]
    ) -> Iterator[tuple[int, dict | Skip]]:
        """The rows of one lane from number `first` on; `alone(first)` reads them without the others."""
        while (kept := self._kept[slot]) is not None:
            if not kept and not self._advance(slot):
                return
            number, row = kept.popleft()
            self._next[slot] = number + 1
            if number >= first:
                first = number + 1
                yield number, row
        yield from alone(first)

    def _advance(self, slot: int) -> bool:
        """Reads until there is a row for a lane; False at the end of the file."""
        for number, row in self._rows:
            at = number * _GOLDEN % _SPAN
            owner, piece = self._pieces[bisect_right(self._highs, at)]
            kept = self._kept[owner]
            if kept is not None and piece.low <= at:
                kept.append((number, row))
                if owner == slot:
                    return True
                if len(kept) > self._limit:
                    self._kept[owner] = None
        return False


# A lane


@dataclass(frozen=True)
class _Position:
    """Of a document in a lane: `index` in the block that began where the sources were at `cursors`.

    A cursor: file (in the order of the epoch), row, characters read of this source in this epoch.
    """

    epoch: int
    cursors: tuple[tuple[int, int, int], ...]
    index: int


class _Lane:
    """The documents of one slot of the batch, as one endless row of tokens cut into windows."""

    def __init__(
        self,
        name: str,
        seed: int,
        shares: list[tuple[_Source, list[_Piece]]],
        documents: RowEncoder,
        shuffle_buffer: int,
        read: Callable[[int, _Piece, int, int], Iterator[tuple[int, dict | Skip]]],
        state: dict | None,
    ):
        """`read(source, piece, epoch, first)`: rows of a piece of a source from number `first` on."""
        self.name, self.seed, self.shares = name, seed, shares
        self.documents, self.shuffle_buffer, self._read = documents, shuffle_buffer, read
        self.begin = ((0, 0, 0),) * len(shares)
        self.windows = 0  # taken so far
        self.at = _Position(0, self.begin, 0)  # of the next token's document
        self.offset = 0  # of the next token in it
        if state is not None:
            self.windows, self.offset = state["windows"], state["offset"]
            self.at = _Position(state["epoch"], tuple(map(tuple, state["cursors"])), state["index"])
        self.queue: deque[tuple[_Position, np.ndarray]] = deque()  # tokenised, not yet used up
        self.ready = -self.offset  # tokens in it
        self.drawn = self.with_tokens = self.at.epoch  # latest epochs of which a document was drawn, and had tokens
        self._texts = self._all_texts(self.at)

    def state(self) -> dict:
        at = self.at
        return {
            "windows": self.windows,
            "epoch": at.epoch,
            "cursors": [list(cursor) for cursor in at.cursors],
            "index": at.index,
            "offset": self.offset,
        }

    def piece(self, source: int, item: Item) -> _Piece | None:
        """The lane's piece of a file, if it has any."""
        return next((piece for piece in self.shares[source][1] if piece.item == item), None)

    def row(self, source: int, item: Item, epoch: int, default: int) -> int:
        """Where the block at hand began in a file, if it began there; else `default`."""
        file, row, _ = self.at.cursors[source]
        order = self._shuffled(self.shares[source][1], epoch, source)
        return row if self.at.epoch == epoch and file < len(order) and order[file].item == item else default

    def draw(self, characters: int) -> Iterator[tuple[_Position, str]]:
        """The next documents, of at least so many characters together."""
        if self.drawn > self.with_tokens + 1:  # a whole epoch gave none
            raise self._no_document()
        while characters > 0:
            at, text = next(self._texts)
            characters -= len(text)
            self.drawn = at.epoch
            yield at, text

    def put(self, at: _Position, ids: list[int]) -> None:
        """Takes the tokens of a document that was drawn."""
        if ids:
            self.queue.append((at, np.array(ids, np.int64)))
            self.ready += len(ids)
            self.with_tokens = at.epoch
        else:
            self.documents.skip(f"sequence {self.name} in a batch", Skip("no tokens"))

    def take(self, length: int) -> dict[str, torch.Tensor]:
        """The next window; `ready` must be at least `length`. The rest of a document begins as a document does."""
        again = self.documents.begin if self.offset and length > len(self.documents.begin) else []
        pieces: list[np.ndarray] = []
        missing = length - len(again)
        self.ready -= missing
        while missing:
            at, ids = self.queue[0]
            piece = ids[self.offset : self.offset + missing]
            pieces.append(piece if pieces else np.array([*again, *piece], np.int64))
            missing -= len(piece)
            self.at, self.offset = at, self.offset + len(piece)
            if self.offset == len(ids):
                self.queue.popleft()
                self.at, self.offset = replace(at, index=at.index + 1), 0
        self.windows += 1
        positions = np.concatenate([np.arange(len(piece)) for piece in pieces])
        return {"input_ids": torch.from_numpy(np.concatenate(pieces)), "position_ids": torch.from_numpy(positions)}

    def _all_texts(self, at: _Position) -> Iterator[tuple[_Position, str]]:
        """Documents from a position on, epoch after epoch."""
        epoch, cursors, index = at.epoch, at.cursors, at.index
        found = at != _Position(0, self.begin, 0)
        while True:
            readers: list[Iterator | None] = [
                self._rows(source, epoch, cursor) for source, cursor in enumerate(cursors)
            ]
            while True:
                texts, after = self._block(readers, epoch, cursors)
                if not texts:
                    break
                found = True
                for i in range(index, len(texts)):
                    yield _Position(epoch, cursors, i), texts[i]
                cursors, index = after, 0
            if not found:
                raise self._no_document()
            epoch, cursors, index, found = epoch + 1, self.begin, 0, False

    def _block(
        self, readers: list[Iterator | None], epoch: int, cursors: tuple
    ) -> tuple[list[str], tuple[tuple[int, int, int], ...]]:
        """The next documents, shuffled, and where the sources are after them; none at the end of the epoch."""
        texts: list[str] = []
        after = list(cursors)
        while len(texts) < self.shuffle_buffer and any(readers):
            # The source that is furthest behind its share: so all of them last through the epoch.
            left = {source: reader for source, reader in enumerate(readers) if reader}
            source = min(left, key=lambda source: after[source][2] / self.shares[source][0].weight)
            row = next(left[source], None)
            if row is None:
                readers[source] = None
                after[source] = (len(self.shares[source][1]), 0, after[source][2])
                continue
            file, number, text = row
            after[source] = (file, number + 1, after[source][2] + len(text or ""))
            if text is not None:
                texts.append(text)
        return self._shuffled(texts, epoch, cursors), tuple(after)

    def _rows(self, source: int, epoch: int, cursor: tuple[int, int, int]) -> Iterator[tuple[int, int, str | None]]:
        """(file, row, text) of the lane's share of a source; the text is None for a row that cannot be used."""
        of_source, pieces = self.shares[source]
        pieces = self._shuffled(pieces, epoch, source)
        first_file, first_row, _ = cursor
        check = FieldCheck(of_source.name, self.documents) if epoch == 0 and cursor == (0, 0, 0) else None
        for file, piece in enumerate(pieces[first_file:], first_file):
            first = first_row if file == first_file else 0
            for number, row in self._read(source, piece, epoch, first):
                if check:
                    check.see(row)
                yield file, number, self.documents.text(row, place(piece.item, number))

    def _shuffled(self, values: list, epoch: int, what: object) -> list:
        draw = random.Random(f"{self.seed} {self.name} {epoch} {what}").random
        return sorted(values, key=lambda _: draw())

    def _no_document(self) -> DataError:
        skips = self.documents.skips_in_words()
        return DataError(
            f"no document for sequence {self.name} in a batch: {', '.join(source.name for source, _ in self.shares)} "
            f"hold{'s' if len(self.shares) == 1 else ''} too few{f' ({skips})' if skips else ''}; "
            "give more text, or set a smaller batch_size or data.streaming=false"
        )
