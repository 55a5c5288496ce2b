"""From rows to documents, and from these to tokens.

Rows hold a text (string) or messages (a chat: a list of {role, content}); a row with both is read as text. Those that
cannot be used are skipped, counted by reason and reported; what a person has to mend is a `DataError`.
"""

from copy import copy

import numpy as np
import torch

from ..tokenizers import beginning
from .sources import DataError, Skip

FIELD_PATIENCE = 10_000  # rows without the wanted fields before a long source is given up


class Chat(str):
    """A document that a chat template has written, its beginning too."""


class RowEncoder:
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

    def uncounted(self) -> "RowEncoder":
        """One that does the same, and counts for itself."""
        other = copy(self)
        other.skipped, other.examples_of_skipped = {}, {}
        return other

    def skips_in_words(self) -> str:
        return skips_in_words(self.skipped, self.examples_of_skipped)

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

    def __init__(self, source: str, documents: RowEncoder):
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


def skips_in_words(skipped: dict[str, int], examples: dict[str, str]) -> str:
    reasons = [f"{count:,} {reason} (first: {examples[reason]})" for reason, count in skipped.items()]
    return f"skipped {sum(skipped.values()):,}: {', '.join(reasons)}" if reasons else ""
