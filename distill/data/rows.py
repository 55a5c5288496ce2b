"""From rows to documents, and from these to tokens.

Rows hold a text (string) or messages (a chat: a list of {role, content}); a row with both is read as text. Where
answers are asked for, they hold messages, or a prompt and a completion (two texts, or two lists of messages). Those
that cannot be used are skipped, counted by reason and reported; what a person has to mend is a `DataError`.
"""

import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from copy import copy
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch

from ..tokenizers import beginning
from .sources import DataError, Skip

FIELD_PATIENCE = 10_000  # rows without the wanted fields before a long source is given up


PROMPT, COMPLETION = "prompt", "completion"  # fields that rows of answers may have in place of messages
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # what a chat template marks answers with, where it does
_Spans = list[tuple[int, int]]  # the first and one past the last, of characters or tokens


class Text(str):
    """A document. answers: the characters of each answer in it, where they were asked for."""

    answers: _Spans

    def __new__(cls, text: str, answers: _Spans):
        made = super().__new__(cls, text)
        made.answers = answers
        return made


class Chat(Text):
    """A document that a chat template has written, its beginning too."""


class Tokens(NamedTuple):
    """Of a document. answers: the places in `ids` of each answer, where they were asked for."""

    ids: list[int]
    answers: _Spans


class RowEncoder:
    """Turns rows into texts and these into tokens, and counts the rows it cannot use.

    With `answers` it finds the assistant's turns in chats, and takes no row without one.

    begin: the tokens that a text begins with. skipped: reason -> rows. examples_of_skipped: reason -> the first place.

    Raises DataError if the tokenizer cannot say where in a text a token stands, and answers are asked for.
    """

    def __init__(self, tokenizer, text_field: str, messages_field: str, bos: bool = True, answers: bool = False):
        if answers and not tokenizer.is_fast:
            raise DataError(
                f"answers cannot be told apart with a {type(tokenizer).__name__}, which does not say where its tokens "
                "stand in a text: use a fast tokenizer (tokenizer.json)"
            )
        self.tokenizer = tokenizer
        self.text_field = text_field
        self.messages_field = messages_field
        self.answers = answers
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

    def encode(self, texts: list[str]) -> list[Tokens]:
        """The tokens of each document, the tokenizer's eos at its end if it has one; none for a text without tokens.

        To an answer belong the tokens that hold any of its characters, and the eos at the end if none is among them.
        """
        tokenizer, begin, eos = self.tokenizer, self.begin, self.tokenizer.eos_token_id
        encoded = tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=self.answers,
            verbose=False,
        )
        found = []
        for number, (text, ids) in enumerate(zip(texts, encoded["input_ids"], strict=True)):
            answers = []
            if self.answers and isinstance(text, Text):
                answers = _tokens_of(text.answers, encoded["offset_mapping"][number])
            if ids and not isinstance(text, Chat) and ids[: len(begin)] != begin:
                ids = begin + ids
                answers = [(first + len(begin), end + len(begin)) for first, end in answers]
            if ids and eos is not None and ids[-1] != eos:
                ids = [*ids, eos]
                first, end = answers[-1] if answers else (0, 0)
                if end == len(ids) - 1 and eos not in ids[first:end]:
                    answers[-1] = (first, end + 1)
            found.append(Tokens(ids, answers))
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
        more = [*([self.begin] if self.begin else []), *(["answers"] if self.answers else [])]
        return [self.text_field, self.messages_field, *more]

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields of a row that are read."""
        return (self.text_field, self.messages_field, *((PROMPT, COMPLETION) if self.answers else ()))

    @property
    def no_field(self) -> str:
        *others, last = self.columns
        return f"no {', '.join(others)} or {last} field"

    def _text(self, row: dict | Skip) -> str:
        """The document in `row`; raises Skip."""
        if isinstance(row, Skip):
            raise row
        if not any(name in row for name in self.columns):
            raise Skip(self.no_field)
        text, messages = row.get(self.text_field), row.get(self.messages_field)
        if self.answers:
            text = self._answered(messages, row.get(PROMPT), row.get(COMPLETION))
        elif not text and messages:
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

    def _answered(self, messages, prompt, completion) -> Text:
        """The document in a row of which answers are asked for; raises Skip."""
        if messages:
            text: Text = self._chat(messages, 0)
        elif isinstance(prompt, str) and isinstance(completion, str):
            whole = len(prompt), len(prompt + completion)
            text = Text(prompt + completion, [whole])
        elif isinstance(prompt, list) and isinstance(completion, list):
            text = self._chat([*prompt, *completion], len(prompt))
        else:
            raise Skip("no answer")
        if not any(first < end for first, end in text.answers):
            raise Skip("no answer")
        return text

    def _chat(self, messages, answers_from: int | None = None) -> Chat:
        """`answers_from`: the message from which on the assistant's turns are answers; None: none are looked for."""
        if not self.tokenizer.chat_template:
            raise DataError(
                f"rows hold chats ({self.messages_field}) but the tokenizer has no chat template: "
                "use an instruction-tuned teacher's tokenizer, set its chat_template, or give rows with plain text"
            )
        if not isinstance(messages, list):
            raise Skip("messages is not a list")
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
            return Chat(text, [] if answers_from is None else list(self._answers(messages, answers_from, text)))
        except Skip:
            raise
        except Exception as error:  # a template is code of its own
            raise Skip("chat template failed", error) from error

    def _answers(self, messages: list[dict], first: int, text: str) -> Iterator[tuple[int, int]]:
        """Where the assistant's turns, from message `first` on, stand in a chat.

        As the template marks them, if it does. Else one stands between what the template writes of the messages before
        with the prompt for an answer, and what it writes of them with the answer.
        """
        write = self.tokenizer.apply_chat_template
        if _GENERATION.search(self.tokenizer.get_chat_template()):
            options = {"tokenizer_kwargs": {"return_offsets_mapping": True}, "return_assistant_tokens_mask": True}
            marked = write(messages, tokenize=True, return_dict=True, **options)
            begin = len(write(messages[:first], tokenize=False)) if first else 0
            tokens = zip(marked["assistant_masks"], marked["offset_mapping"], strict=True)
            for answer, run in groupby(tokens, key=lambda token: token[0]):
                places = [place for _, place in run]
                if answer and places[0][0] >= begin:
                    yield places[0][0], places[-1][1]
            return
        for number, message in enumerate(messages):
            if number < max(first, 1) or message["role"] != "assistant":  # nobody asked for a greeting
                continue
            before = write(messages[:number], tokenize=False, add_generation_prompt=True)
            through = write(messages[: number + 1], tokenize=False)
            if not text.startswith(through):  # some templates end a chat with the eos
                through = through.removesuffix(self.tokenizer.eos_token or "")
            if not through.startswith(before):  # the prompt begins what is not kept of an answer: a thought, say
                shared = os.path.commonprefix([before, through])
                before = shared if len(shared) >= len(write(messages[:number], tokenize=False)) else before
            if not (text.startswith(through) and through.startswith(before)):
                raise Skip("the chat template rewrites earlier turns, and marks no answers by {% generation %}")
            yield len(before), len(through)


def _tokens_of(answers: _Spans, places: _Spans) -> _Spans:
    """The tokens, of which these are the places in a text, that hold any character of each answer."""
    found = []
    for first, end in answers:
        tokens = bisect_right(places, first, key=lambda place: place[1]), bisect_left(places, end, key=lambda p: p[0])
        if first < end and tokens[0] < tokens[1]:
            found.append(tokens)
    return found


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
            self.without += not any(name in row for name in self.documents.columns)
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
