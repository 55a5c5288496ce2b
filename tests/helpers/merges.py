"""A tokenizer that llama.cpp has, too: tiny random teachers' own has no merges."""

import json

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from transpoint.teachers.random import byte_tokenizer

MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2"), ("i", "s"), ("Ġ", "is")]


def tokenizer_with(**changes):
    """A few merges of bytes; changes: of what tokenizer.json has."""
    bytes_alone = byte_tokenizer()
    told = json.loads(bytes_alone.backend_tokenizer.to_str())
    for pair in MERGES:
        told["model"]["vocab"].setdefault("".join(pair), len(told["model"]["vocab"]))
    told["model"]["merges"] = [list(pair) for pair in MERGES]
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(told | changes)), **bytes_alone.special_tokens_map
    )
    made.chat_template = bytes_alone.chat_template
    return made
