"""What a model answers."""

from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.rows import check_tokens
from ..models import embedding_rows, generated, generating
from ..tokenizers import decoded


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> dict[str, Tensor]:
    """The inputs of a model that is to answer: a chat question where the tokenizer has a template, else a text."""
    if not tokenizer.chat_template:
        return cast("dict[str, Tensor]", tokenizer(prompt, return_tensors="pt"))
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return cast("dict[str, Tensor]", inputs)


@torch.no_grad()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int = 64) -> str:
    """The model's greedy answer: to a chat question where the tokenizer has a template, else a continuation.

    Raises DataError for a prompt with a token that the model has no embedding for.
    """
    inputs = prompt_tokens(tokenizer, prompt)
    check_tokens(inputs["input_ids"], embedding_rows(model), tokenizer, f"prompt {prompt!r}")
    inputs = {key: inputs[key].to(model.device) for key in ("input_ids", "attention_mask")}
    with generating(model, max_new_tokens=max_new_tokens, do_sample=False):
        output = generated(model, **inputs)
    return decoded(tokenizer, output[0, inputs["input_ids"].shape[1] :]).strip()
