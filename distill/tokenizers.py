"""Tokenizers on disk, and whether two of them do the same."""

from pathlib import Path
from typing import cast

from transformers import PreTrainedTokenizerBase

from .run.files import read_json, write_json

# What tokenizers differ in: runs of spaces, line ends, capitals, digits, accents and their decompositions, other
# scripts, characters of several code points, bytes without a meaning, and nothing.
PROBES = (
    "The capital of France is Paris.",
    "  two spaces,\ttabs\n\n and   lines \r\n",
    "12345 3.14 x_1 += [0];  def f(x):\n    return x",
    "na\u00efve nai\u0308ve \u00df \u0130 \ufb01 \u2028 \u00a0",
    "\u65e5\u672c\u8a9e \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0639\u0631\u0628\u064a \u0e44\u0e17\u0e22",
    "\U0001f469\u200d\U0001f52c\U0001f1eb\U0001f1f7 \x07 \ufffd",
    "",
)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Writes a tokenizer, with what transformers would else choose anew by the model's class when it is loaded."""
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    sides = {name: getattr(tokenizer, name) for name in ("padding_side", "truncation_side")}
    write_json(path, read_json(path) | sides)


def tokenizer_facts(tokenizer, probes) -> dict:
    """What a tokenizer makes of texts, by name; as JSON has it."""
    special = tokenizer.special_tokens_map
    probes = [*probes, "a".join(map(str, special.values()))]
    ids = tokenizer(probes)["input_ids"]
    facts = {
        "ids": ids,
        "ids without special tokens": tokenizer(probes, add_special_tokens=False)["input_ids"],
        "text": tokenizer.batch_decode(ids),
        "special tokens": {name: [token, tokenizer.convert_tokens_to_ids(token)] for name, token in special.items()},
        "padding side": tokenizer.padding_side,
        "truncation side": tokenizer.truncation_side,
        "length": tokenizer.model_max_length,
        "chat template": tokenizer.chat_template,
    }
    if tokenizer.pad_token is not None:
        facts["padded ids"] = tokenizer(probes, padding=True)["input_ids"]
    return facts


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a tokenizer puts before every text, as `generate` has it: its beginning token, or none."""
    plain, whole = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    places = range(len(whole) - len(plain) + 1)
    return whole[: next((place for place in places if whole[place : place + len(plain)] == plain), 0)]


def decoded(tokenizer: PreTrainedTokenizerBase, ids, **options) -> str:
    """The text of one row of tokens, without special ones."""
    return cast(str, tokenizer.decode(ids, skip_special_tokens=True, **options))


def first_difference(own: dict, found: dict) -> str | None:
    """The name of the first of `tokenizer_facts` that two tokenizers do not share; None where they do the same."""
    return next((name for name, value in own.items() if found.get(name) != value), None)
